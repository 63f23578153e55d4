"""The vocabulary of a tokenizer as llama.cpp has it: what the kinds of tokenizers have in common in a GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from fmodels.weights.sentencepiece import Piece
from fmodels.weights.tensors import brief


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What is made of one kind of tokenizer.

    Attributes:
        model: `tokenizer.ggml.model`.
        pre: `tokenizer.ggml.pre`.
        pieces: number -> token.
        scored: whether the scores of the pieces mean something.
        more: further keys after `tokenizer.ggml.`, with their values.
        special: kind of token (`"bos"`, …) -> its number, where nothing else says it.
    """

    model: str
    pre: str
    pieces: Mapping[int, Piece]
    scored: bool
    more: Mapping[str, Any]
    special: Mapping[str, int] = dataclasses.field(default_factory=dict)


def mapping(value: Any) -> Mapping[str, Any]:
    """The map that stands at a place of tokenizer.json, an empty one if it is something else."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Any]:
    """The list, as `mapping`."""
    return value if isinstance(value, list) else []


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The maps of a list."""
    return [mapping(one) for one in items(value)]


def steps(value: Any, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or processor in their order; those of a `Sequence` lie under the key `inner`.

    Example:
        >>> steps({"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}, "pretokenizers")
        [{'type': 'Digits'}]
    """
    one = mapping(value)
    if one.get("type") != "Sequence":
        return [one] if one else []
    return [step for part in mappings(one.get(inner)) for step in steps(part, inner)]


def numbered(model: Mapping[str, Any]) -> Mapping[str, int]:
    """The vocabulary of BPE: token -> number.

    Raises:
        ValueError: it is something else.
    """
    found = model.get("vocab")
    if not isinstance(found, dict):
        raise ValueError(f"its vocabulary is {brief(found)}, not a map from tokens to numbers")
    owner: dict[int, str] = {}
    for text, number in found.items():
        if type(number) is not int:
            raise ValueError(f"its vocabulary says that {text!r} is {brief(number)}, no number")
        if owner.setdefault(number, text) != text:
            raise ValueError(f"its vocabulary says that {text!r} and {owner[number]!r} both are {number}")
    return found


def merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges of BPE in their order: pairs, or texts with a space between.

    Raises:
        ValueError: there is something else among them.
    """
    for pair in items(model.get("merges")):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
            raise ValueError(f"its merge {brief(pair)} is no pair of texts")
        yield parts[0], parts[1]


def unusual(model: Mapping[str, Any]) -> list[str]:
    """What llama.cpp's BPE does not have and this one does."""
    return [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
