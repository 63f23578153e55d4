"""Tokenizers of SentencePiece's kind for GGUF: from `tokenizer.model`, or from what a tokenizer.json has made of one.

llama.cpp has two. `"llama"` joins the two neighbours whose piece has the highest score, the left ones of several, and knows no
merges: the score of a piece is minus the rank of the first merge that makes it. It joins any two that make a piece, where
`tokenizers` wants the pair to be among the merges; those made from a `tokenizer.model` hold all pairs, and `tokenizers` trained
on texts hardly ever meet another one. It replaces no characters. `"t5"` looks for the best sum of scores, as Unigram does,
after it has replaced characters by a table; what the table does not make a space, as a line's end, is none. Both put the space
of a prefix behind special tokens, too, whatever a tokenizer.json says.

Source: conversion/base.py (`_create_vocab_sentencepiece`), conversion/t5.py, conversion/bert.py (`_xlmroberta_set_vocab`) and
src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fmodels.dialects.gguf_vocabulary import Vocabulary, items, mapping, merges, numbered, steps, unusual
from fmodels.weights.sentencepiece import BYTE, NORMAL, UNKNOWN, USER_DEFINED, Piece, SentencePiece
from fmodels.weights.tensors import brief

SPACE = "\u2581"
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class Spaces(NamedTuple):
    """What happens to a text before it is split.

    Attributes:
        prefix: whether a space is put before it.
        merged: whether several spaces become one.
        charsmap: how characters are replaced, as SentencePiece compiles it.
    """

    prefix: bool
    merged: bool
    charsmap: bytes


def of_model(model: SentencePiece) -> Vocabulary:
    """The vocabulary of a `tokenizer.model`.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    if model.algorithm not in ("bpe", "unigram") or model.unusual:
        raise ValueError(f"it is {model.algorithm} {', '.join(model.unusual)}".rstrip() + ", which llama.cpp has not")
    pieces = {
        number: piece._replace(text=piece.text.replace(SPACE, " ")) if piece.type == USER_DEFINED else piece
        for number, piece in enumerate(model.pieces)
    }
    spaces = Spaces(model.prefix, model.merges_spaces, model.charsmap)
    return _vocabulary(pieces, spaces, greedy=model.algorithm == "bpe", special=model.special)


def of_json(tokenizer: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    model = mapping(tokenizer.get("model"))
    kind = model.get("type", "Unigram" if isinstance(model.get("vocab"), list) else "BPE")
    if kind not in ("BPE", "Unigram") or model.get("ignore_merges") or unusual(model):
        raise ValueError(
            f"it is {brief(kind)}; only byte-level BPE, BPE of SentencePiece's kind and Unigram are written"
        )
    spaces = spaces_of(tokenizer)
    pieces = _ranked(model) if kind == "BPE" else _unigram(model)
    return _vocabulary(pieces, spaces, greedy=kind == "BPE")


def _vocabulary(
    pieces: dict[int, Piece], spaces: Spaces, *, greedy: bool, special: Mapping[str, int] | None = None
) -> Vocabulary:
    unknown = [number for number, piece in pieces.items() if piece.type == UNKNOWN]
    special = {**(special or {}), **({"unk": unknown[0]} if unknown else {})}
    bytes_ = {piece.text for piece in pieces.values() if piece.type == BYTE}
    if greedy and (spaces.merged or spaces.charsmap):
        what = "merges spaces" if spaces.merged else "replaces characters"
        raise ValueError(f"it is BPE that {what} before, which llama.cpp does not")
    if greedy and bytes_ != BYTES:
        raise ValueError(f"it has {len(bytes_)} of the 256 tokens for bytes, without which llama.cpp fails")
    if not greedy and bytes_:
        raise ValueError("it is Unigram with tokens for bytes, which llama.cpp does not use")
    more: dict[str, Any] = {"add_space_prefix": np.bool_(spaces.prefix)}
    if not greedy:
        more["remove_extra_whitespaces"] = np.bool_(spaces.merged)
        if spaces.charsmap:
            more["precompiled_charsmap"] = np.frombuffer(spaces.charsmap, np.uint8)
    return Vocabulary("llama" if greedy else "t5", "default", pieces, scored=True, more=more, special=special)


def _ranked(model: Mapping[str, Any]) -> dict[int, Piece]:
    """The pieces of BPE, with scores from its merges; below all others that of pieces that no merge makes."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges(model)):
        ranks.setdefault("".join(pair), rank)
    last, unknown = len(items(model.get("merges"))), model.get("unk_token")
    bytes_ = BYTES if model.get("byte_fallback") else frozenset()
    return {
        number: Piece(
            text, UNKNOWN if text == unknown else BYTE if text in bytes_ else NORMAL, -float(ranks.get(text, last))
        )
        for text, number in numbered(model).items()
    }


def _unigram(model: Mapping[str, Any]) -> dict[int, Piece]:
    found: dict[int, Piece] = {}
    for number, entry in enumerate(items(model.get("vocab"))):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)) or not isinstance(
            entry[1], (int, float)
        ):
            raise ValueError(f"its piece {number} is {brief(entry)}, not a text and its score")
        kind = BYTE if model.get("byte_fallback") and entry[0] in BYTES else NORMAL
        found[number] = Piece(entry[0], UNKNOWN if number == model.get("unk_id") else kind, float(entry[1]))
    return found


def spaces_of(tokenizer: Mapping[str, Any]) -> Spaces:
    """What the normalizer and the pre-tokenizer of a tokenizer.json do, if they do what SentencePiece does.

    Raises:
        ValueError: they do something else.

    Example:
        >>> spaces_of({"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}})
        Spaces(prefix=True, merged=False, charsmap=b'')
    """
    prefix = merged = escaped = stripped = False
    charsmap = b""
    for step in [
        *steps(tokenizer.get("normalizer"), "normalizers"),
        *steps(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]:
        kind, pattern = step.get("type"), mapping(step.get("pattern"))
        if kind == "Precompiled":
            charsmap = _decoded(step.get("precompiled_charsmap"))
        elif kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE:
            escaped = True
            prefix |= step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never") != "never"
        elif kind == "WhitespaceSplit" or (kind == "Replace" and pattern == {"Regex": " {2,}"}):
            merged = True
        elif kind == "Replace" and pattern == {"String": " "} and step.get("content") == SPACE:
            escaped = True
        elif kind == "Strip":
            stripped = True
        elif not (kind == "Split" and escaped and pattern == {"String": " "}):
            raise ValueError(f"its step {brief(step, 300)} is not in llama.cpp")
    if not escaped:
        raise ValueError(f"it does not write spaces as {SPACE!r}, which llama.cpp does")
    if stripped and not merged:
        raise ValueError("it takes spaces away at the ends alone, which llama.cpp does not")
    return Spaces(prefix, merged, charsmap)


def _decoded(text: Any) -> bytes:
    """The bytes of base64."""
    if text is None or not re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", text if isinstance(text, str) else "-"):
        raise ValueError(f"its precompiled_charsmap is {brief(text)}, not text in base64")
    return base64.b64decode(text)
