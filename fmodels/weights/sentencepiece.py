"""The models of SentencePiece: `tokenizer.model`, a message of protocol buffers.

Source: src/sentencepiece_model.proto of SentencePiece.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from fmodels.weights.protobuf import Fields, integer, message, octets, real

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; GGUF has the same numbers for its tokens."""

ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """An entry of the vocabulary, in which spaces are U+2581."""

    text: str
    type: int = NORMAL
    score: float = 0.0


class SentencePiece(NamedTuple):
    """A model.

    Attributes:
        pieces: in the order of their numbers.
        algorithm: `"unigram"`, `"bpe"`, `"word"` or `"char"`.
        special: kind of token, `"bos"`, `"eos"`, `"unk"` or `"pad"` -> its number, for those that there are.
        charsmap: how characters are replaced before, as SentencePiece compiles it; empty if they are not.
        prefix: whether a space is put before a text.
        merges_spaces: whether several spaces become one, and those at the ends none.
        unusual: what else it says that changes how texts are split, in words.
    """

    pieces: list[Piece]
    algorithm: str
    special: dict[str, int]
    charsmap: bytes
    prefix: bool
    merges_spaces: bool
    unusual: tuple[str, ...] = ()


def read_sentencepiece(path: Path) -> SentencePiece:
    """Reads a model.

    Raises:
        ValueError: the file is no model of SentencePiece.
    """
    try:
        return _model(message(path.read_bytes()))
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"read: {path.name!r} is no model of SentencePiece: {error or 'it is cut'}") from None


def _model(fields: Fields) -> SentencePiece:
    trainer, normalizer = (message(octets(fields, number)) for number in (2, 3))
    numbers = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    pieces = [_piece(message(raw)) for raw in fields.get(1, [])]
    if not pieces:
        raise ValueError("it has no pieces")
    special = {kind: integer(trainer, number, default) for kind, (number, default) in numbers.items()}
    unusual = {
        "spaces lie behind words": integer(trainer, 24) == 1,
        "spaces are not escaped": integer(normalizer, 5, 1) == 0,
    }
    return SentencePiece(
        pieces=pieces,
        algorithm=ALGORITHMS.get(integer(trainer, 3, 1), "unknown"),
        special={kind: number for kind, number in special.items() if 0 <= number < len(pieces)},
        charsmap=octets(normalizer, 2),
        prefix=integer(normalizer, 3, 1) == 1,
        merges_spaces=integer(normalizer, 4, 1) == 1,
        unusual=tuple(what for what, is_so in unusual.items() if is_so),
    )


def _piece(fields: Fields) -> Piece:
    return Piece(octets(fields, 1).decode("utf-8", "surrogateescape"), integer(fields, 3, NORMAL), real(fields, 2))
