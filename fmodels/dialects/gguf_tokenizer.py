"""The tokenizer of a checkpoint's folder as metadata of a GGUF file.

The pieces come from a tokenizer.json of byte-level BPE, else from a `tokenizer.model` of SentencePiece, else from a
tokenizer.json that has been made of one; tokens that were added come from tokenizer.json, or from added_tokens.json and
tokenizer_config.json. WordPiece is not written: no family here that llama.cpp has uses it.

Source: conversion/base.py of llama.cpp, and gguf-py's `SpecialVocab`. Whether a tokenizer adds start and end tokens is always
said where it is known, as llama.cpp adds some by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmodels.dialects.gguf_byte_level import byte_level, is_byte_level
from fmodels.dialects.gguf_sentencepiece import SPACE, of_json, of_model
from fmodels.dialects.gguf_vocabulary import Vocabulary, mapping, mappings, steps
from fmodels.weights.sentencepiece import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Piece, read_sentencepiece
from fmodels.weights.tensors import brief, listing, parse_json

MODELS = ("tokenizer.model", "spiece.model")
"""Names of the file of SentencePiece."""

ADDED = -1000.0
"""The score of tokens that were added."""

IDS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "mask": "mask_token_id",
}  # fmt: skip
"""Token in tokenizer_config.json -> key after `tokenizer.ggml.`, spelled as there."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's folder holds a tokenizer of which GGUF may have something."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *MODELS))


def tokenizer_metadata(folder: Path, size: int) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer in a folder.

    Args:
        folder: with a tokenizer.json or tokenizer.model, and a tokenizer_config.json and chat template if it has them.
        size: rows of the model's embeddings; those without a token get one that is unused.

    Raises:
        ValueError: the tokenizer is of a kind that llama.cpp has not, or that is not written here, or damaged.
    """
    tokenizer = _read(folder / "tokenizer.json")
    options = _read(folder / "tokenizer_config.json")
    vocabulary = _vocabulary(folder, tokenizer)
    pieces = _filled(vocabulary, _added(folder, tokenizer, options), size)
    found: dict[str, Any] = {
        "model": vocabulary.model, "pre": vocabulary.pre, "tokens": [piece.text for piece in pieces],
        "token_type": np.array([piece.type for piece in pieces], np.int32),
    }  # fmt: skip
    if vocabulary.scored:
        found["scores"] = np.array([piece.score for piece in pieces], np.float32)
    found |= vocabulary.more
    if vocabulary.scored and isinstance(says := options.get("add_prefix_space"), bool):
        found["add_space_prefix"] = np.bool_(says)
    found |= _special(vocabulary, pieces, tokenizer, options)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | _templates(folder, options)


def _vocabulary(folder: Path, tokenizer: Mapping[str, Any]) -> Vocabulary:
    model = next((folder / name for name in MODELS if (folder / name).is_file()), None)
    if is_byte_level(tokenizer):
        return byte_level(tokenizer)
    return of_json(tokenizer) if model is None else of_model(read_sentencepiece(model))


def _added(folder: Path, tokenizer: Mapping[str, Any], options: Mapping[str, Any]) -> dict[int, Piece]:
    """Number -> token, of those that were added to a vocabulary, or that have another meaning than it says.

    What added_tokens.json alone names is text as it stands, whatever it looks like.
    """
    found: dict[int, Piece] = {}
    if tokenizer:
        entries = [(token.get("id"), token) for token in mappings(tokenizer.get("added_tokens"))]
    else:
        for text, number in _read(folder / "added_tokens.json").items():
            found[_number(number, text)] = Piece(text, USER_DEFINED, ADDED)
        decoder = mapping(options.get("added_tokens_decoder")).items()
        entries = [(int(number) if number.isdecimal() else number, mapping(token)) for number, token in decoder]
    for number, token in entries:
        text = str(token.get("content"))
        control = token.get("special") or _looks_special(text)
        kind = CONTROL if control else USER_DEFINED
        found[_number(number, text)] = Piece(text if control else text.replace(SPACE, " "), kind, ADDED)
    return found


def _number(number: object, text: str) -> int:
    if type(number) is not int:
        raise ValueError(f"its added token {text!r} is {brief(number)}, no number")
    return number


def _filled(vocabulary: Vocabulary, added: Mapping[int, Piece], size: int) -> list[Piece]:
    """The tokens of all rows; the unknown token stays what it is, whatever it was added as."""
    pieces = [Piece(f"[PAD{i}]", UNUSED, 10 * ADDED) for i in range(size)]
    kept = {number for number, piece in vocabulary.pieces.items() if piece.type == UNKNOWN}
    named = {**vocabulary.pieces, **{n: piece for n, piece in added.items() if n not in kept}}
    outside = [f"{piece.text!r} is {number}" for number, piece in named.items() if not 0 <= number < size]
    if outside:
        raise ValueError(f"the model has {size} tokens, but {listing(outside, 5)}")
    for number, piece in named.items():
        pieces[number] = piece
    owner: dict[str, int] = {}
    twice = [f"{p.text!r} is {owner[p.text]} and {n}" for n, p in enumerate(pieces) if owner.setdefault(p.text, n) != n]
    if twice:
        raise ValueError(f"{len(twice)} tokens are there twice, which llama.cpp does not have: {listing(twice, 5)}")
    return pieces


def _special(
    vocabulary: Vocabulary, pieces: Sequence[Piece], tokenizer: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of the tokens with a meaning, and whether they are put around a text."""
    numbers = {piece.text: number for number, piece in enumerate(pieces)}
    special = {kind: _content(options.get(f"{kind}_token")) for kind in IDS}
    found: dict[str, Any] = {}
    for kind, key in IDS.items():
        number = numbers.get(special[kind] or "", vocabulary.special.get(kind))
        if number is not None:
            found[key] = np.uint32(number)
    for kind, token in _surroundings(tokenizer).items():
        says, added_is_it = options.get(f"add_{kind}_token"), special[kind] in (None, token)
        if isinstance(says, bool) or tokenizer:  # else llama.cpp knows what is usual
            known = says if isinstance(says, bool) else token is not None and added_is_it
            found[f"add_{kind}_token"] = np.bool_(known)
        if added_is_it and token in numbers:
            found[f"{kind}_token_id"] = np.uint32(numbers[token])
    return found


def _looks_special(text: str) -> bool:
    """Whether llama.cpp takes an added token for one that controls, though tokenizer.json does not say so."""
    around = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in around
    )


def _surroundings(tokenizer: Mapping[str, Any]) -> dict[str, str | None]:
    """The tokens that are put before and behind a text."""
    inner = steps(tokenizer.get("post_processor"), "processors")
    template = next((one for one in inner if one.get("type") == "TemplateProcessing"), {})
    parts = [mapping(part.get("SpecialToken")).get("id") for part in mappings(template.get("single"))]
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
    named = {str(one.get("name")): str(one.get("template")) for one in mappings(given)}
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
