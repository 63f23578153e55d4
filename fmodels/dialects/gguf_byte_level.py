"""Byte-level BPE of a tokenizer.json for GGUF.

llama.cpp has the pre-tokenizers built in, under names; here they are known by what tokenizer.json says of them, not by what a
text becomes, so that new vocabularies have them, too.

Source: conversion/base.py (`get_vocab_base`) and src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmodels.dialects.gguf_vocabulary import Vocabulary, mapping, merges, numbered, steps, unusual
from fmodels.weights.sentencepiece import Piece
from fmodels.weights.tensors import brief

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


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json turns bytes into characters of its own first."""
    return any(step.get("type") == "ByteLevel" for step in _pre_steps(tokenizer))


def byte_level(tokenizer: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    name, model = pre_tokenizer(tokenizer), mapping(tokenizer.get("model"))
    pieces = {number: Piece(text) for text, number in numbered(model).items()}
    space = chr(256 + ord(" "))  # a space in a part is written as a byte
    joined = [" ".join(part.replace(" ", space) for part in pair) for pair in merges(model)]
    return Vocabulary("gpt2", name, pieces, scored=False, more={"merges": joined})


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """The name that llama.cpp has for the pre-tokenizer of a tokenizer.json.

    Raises:
        ValueError: it has none, or the tokenizer is not byte-level BPE.

    Example:
        >>> byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        >>> pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": byte_level})
        'gpt-2'
    """
    model, parts = mapping(tokenizer.get("model")), _pre_steps(tokenizer)
    pre, last = tokenizer.get("pre_tokenizer"), parts[-1] if parts else {}
    if (
        model.get("type", "BPE") != "BPE"
        or last.get("type") != "ByteLevel"
        or model.get("byte_fallback")
        or unusual(model)
    ):
        raise ValueError(f"it is {brief(model.get('type'))} with the pre-tokenizer {brief(pre)}, not byte-level BPE")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and mapping(normalizer).get("type") != "NFC":  # which llama.cpp leaves out
        raise ValueError(f"its normalizer {brief(normalizer)} is not in llama.cpp")
    split = _split_of(parts[:-1], own=last.get("use_regex", True))
    found = NAMES.get((split or "", bool(model.get("ignore_merges"))))
    if found is None or last.get("add_prefix_space", True):
        how = ", ignore_merges" if model.get("ignore_merges") else ""
        raise ValueError(f"its pre-tokenizer has no known name in llama.cpp: {brief(pre, 300)}{how}")
    return found


def _pre_steps(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return steps(tokenizer.get("pre_tokenizer"), "pretokenizers")


def _split_of(steps: Sequence[Mapping[str, Any]], *, own: bool) -> str | None:
    """The regular expression, or the words for it, of what comes before ByteLevel, which may have one of its `own`."""
    kinds = [step.get("type") for step in steps]
    if not kinds:
        return BYTE_LEVEL if own else None
    if kinds == ["Digits"]:
        return DIGITS if own and steps[0].get("individual_digits") else None
    if kinds != ["Split"] or own or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    return mapping(steps[0].get("pattern")).get("Regex")
