"""The tokenizer of a checkpoint's folder as metadata of a GGUF file: byte-level BPE of a tokenizer.json.

llama.cpp has the pre-tokenizers built in, under names; here they are known by what tokenizer.json says of them, not by what a
text becomes, so that new vocabularies have them, too.

Source: conversion/base.py (`get_vocab_base`) and src/llama-vocab.cpp of llama.cpp, and gguf-py's `SpecialVocab`. Where a
tokenizer adds no start token, `add_bos_token` says so, as llama.cpp adds one in some of these by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmodels.weights.tensors import brief, listing, parse_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens."""

_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}" for a, b in (("*", "+"), ("+", "*"))]
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = "of ByteLevel itself"
DIGITS = "of ByteLevel itself, digits apart"
NAMES: Mapping[tuple[str, bool], str] = {
    (BYTE_LEVEL, False): "gpt-2",
    (DIGITS, False): "starcoder",
    (rf"{_WORDS}|\p{{N}}{{1,3}}{_ENDS}", True): "llama-bpe",
    (rf"{_WORDS}|\p{{N}}{{1,3}}{_ENDS}", False): "dbrx",
    (rf"{_WORDS}|\p{{N}}{_ENDS}", False): "qwen2",
    (rf"{'|'.join(_CASED)}|\p{{N}}{_SLASHES}", True): "tekken",
}
"""The regular expression by which a text is split, and whether a word in the vocabulary is taken without merges -> name."""

IDS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "mask": "mask_token_id",
}  # fmt: skip
"""Token in tokenizer_config.json -> key after `tokenizer.ggml.`, spelled as there."""


def tokenizer_metadata(folder: Path, size: int) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer in a folder.

    Args:
        folder: with a tokenizer.json, and a tokenizer_config.json and chat template if it has them.
        size: rows of the model's embeddings; those without a token get one that is unused.

    Raises:
        ValueError: the tokenizer is of a kind that llama.cpp has not, or that is not written here, or damaged.
    """
    tokenizer = _read(folder / "tokenizer.json")
    options = _read(folder / "tokenizer_config.json")
    model, added = _mapping(tokenizer.get("model")), _mappings(tokenizer.get("added_tokens"))
    name = pre_tokenizer(tokenizer)
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError(f"its vocabulary is {brief(vocabulary)}, not a map from tokens to numbers")
    tokens, types = _tokens(vocabulary, added, size)
    found: dict[str, Any] = {
        "model": "gpt2", "pre": name, "tokens": tokens, "token_type": np.array(types, np.int32),
        "merges": [_merge(pair) for pair in _list(model.get("merges"))],
    }  # fmt: skip
    numbers = {str(token.get("content")): token.get("id") for token in added}
    special = {kind: _content(options.get(f"{kind}_token")) for kind in IDS}
    for kind, key in IDS.items():
        if isinstance(number := numbers.get(special[kind] or ""), int):
            found[key] = np.uint32(number)
    for kind, token in _surroundings(tokenizer).items():
        says, added_is_it = options.get(f"add_{kind}_token"), special[kind] in (None, token)
        found[f"add_{kind}_token"] = np.bool_(says if isinstance(says, bool) else token is not None and added_is_it)
        if added_is_it and f"{kind}_token_id" not in found and isinstance(number := numbers.get(token or ""), int):
            found[f"{kind}_token_id"] = np.uint32(number)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | _templates(folder, options)


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """The name that llama.cpp has for the pre-tokenizer of a tokenizer.json.

    Raises:
        ValueError: it has none, or the tokenizer is not byte-level BPE.

    Example:
        >>> byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        >>> pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": byte_level})
        'gpt-2'
    """
    model, pre = _mapping(tokenizer.get("model")), _mapping(tokenizer.get("pre_tokenizer"))
    steps = _mappings(pre.get("pretokenizers")) if pre.get("type") == "Sequence" else [pre]
    last = steps[-1] if steps else {}
    unusual = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type", "BPE") != "BPE" or last.get("type") != "ByteLevel" or model.get("byte_fallback") or unusual:
        raise ValueError(
            f"it is {brief(model.get('type'))} with the pre-tokenizer {brief(pre)}; only byte-level BPE is written"
        )
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and _mapping(normalizer).get("type") != "NFC":  # which llama.cpp leaves out
        raise ValueError(f"its normalizer {brief(normalizer)} is not in llama.cpp")
    split = _split_of(steps[:-1], own=last.get("use_regex", True))
    found = NAMES.get((split or "", bool(model.get("ignore_merges"))))
    if found is None or last.get("add_prefix_space", True):
        how = ", ignore_merges" if model.get("ignore_merges") else ""
        raise ValueError(f"its pre-tokenizer has no known name in llama.cpp: {brief(pre, 300)}{how}")
    return found


def _split_of(steps: Sequence[Mapping[str, Any]], *, own: bool) -> str | None:
    """The regular expression, or the words for it, of what comes before ByteLevel, which may have one of its `own`."""
    kinds = [step.get("type") for step in steps]
    if not kinds:
        return BYTE_LEVEL if own else None
    if kinds == ["Digits"]:
        return DIGITS if own and steps[0].get("individual_digits") else None
    if kinds != ["Split"] or own or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    return _mapping(steps[0].get("pattern")).get("Regex")


def _tokens(
    vocabulary: Mapping[str, Any], added: Sequence[Mapping[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """The tokens in their order, and their types."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    named = [(text, number, NORMAL) for text, number in vocabulary.items()]
    for token in added:
        text, control = str(token.get("content")), bool(token.get("special"))
        kind = CONTROL if control or _looks_special(text) else USER_DEFINED
        named.append((text if kind == CONTROL else text.replace("\u2581", " "), token.get("id"), kind))
    outside = [f"{text!r} is {brief(number)}" for text, number, _ in named if not _is_in(number, size)]
    if outside:
        raise ValueError(f"the model has {size} tokens, but {listing(outside, 5)}")
    for text, number, kind in named:
        tokens[number], types[number] = text, kind
    return tokens, types


def _is_in(number: Any, size: int) -> bool:
    return type(number) is int and 0 <= number < size


def _looks_special(text: str) -> bool:
    """Whether llama.cpp takes an added token for one that controls, though tokenizer.json does not say so."""
    around = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in around
    )


def _merge(pair: Any) -> str:
    """Two parts with a space between; a space in them is written as a byte."""
    if isinstance(pair, str):
        return pair
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
        raise ValueError(f"its merge {brief(pair)} is no pair of texts")
    return " ".join(part.replace(" ", chr(256 + ord(" "))) for part in pair)


def _surroundings(tokenizer: Mapping[str, Any]) -> dict[str, str | None]:
    """The tokens that are put before and behind a text."""
    processor = _mapping(tokenizer.get("post_processor"))
    inner = _mappings(processor.get("processors")) if processor.get("type") == "Sequence" else [processor]
    template = next((one for one in inner if one.get("type") == "TemplateProcessing"), {})
    parts = [_mapping(part.get("SpecialToken")).get("id") for part in _mappings(template.get("single"))]
    return {"bos": parts[0] if len(parts) > 1 else None, "eos": parts[-1] if len(parts) > 1 else None}


def _templates(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates: one, or several with names."""
    beside = folder / "chat_template.jinja"
    given = options.get("chat_template")
    if given is None and beside.is_file():
        given = beside.read_text(encoding="utf-8")
    if given is None:
        given = _read(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"tokenizer.chat_template": given}
    named = {str(one.get("name")): str(one.get("template")) for one in _mappings(given)}
    default = named.pop("default", None)
    found: dict[str, Any] = {"tokenizer.chat_templates": list(named)} if named else {}
    found |= {f"tokenizer.chat_template.{name}": template for name, template in named.items()}
    return found if default is None else {"tokenizer.chat_template": default, **found}


def _content(token: Any) -> str | None:
    """The text of a token of tokenizer_config.json, which may be a map."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _read(path: Path) -> dict[str, Any]:
    return parse_json(path.read_bytes(), f"{path.name!r}") if path.is_file() else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [_mapping(one) for one in _list(value)]
