"""`Vocabulary`: the bytes that each token adds to the text, read from a tokenizer of any kind."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PREFIX = "abcdef"  # decoders treat the first token apart: a token is decoded behind this one


class Trie(NamedTuple):
    """The tokens' bytes as a tree, its nodes in order of depth; node 0 is the root.

    Attributes:
        levels: for each depth from 1 on, the nodes `(first, last + 1)`.
        parent: `(nodes)` int32, the node above.
        byte: `(nodes)` uint8, the byte that leads to a node.
        node: `(v)` int32, where each token ends; -1 for tokens without text.
    """

    levels: tuple[tuple[int, int], ...]
    parent: np.ndarray
    byte: np.ndarray
    node: np.ndarray


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    r"""What each token id adds to the text.

    Attributes:
        tokens: the bytes of each id; None for special tokens, for ids that the tokenizer does not use and for tokens
            without text, none of which are ever part of a text.
        special: the names of the special tokens by id, such as `(2, b"<eos>")`: stop strings may name them.

    Example:
        >>> read_vocabulary([b"a", "é", None]).tokens
        (b'a', b'\xc3\xa9', None)
    """

    tokens: tuple[bytes | None, ...]
    special: tuple[tuple[int, bytes], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.tokens, self.special))

    @functools.cached_property
    def trie(self) -> Trie:
        """The tree of all tokens with text."""
        return build_trie(self.tokens)

    def text(self, ids: Sequence[int]) -> bytes:
        """The bytes of a sequence of tokens, special tokens left out."""
        return b"".join(self.tokens[i] or b"" for i in ids)


def build_trie(tokens: Sequence[bytes | None]) -> Trie:
    """The tree of the given byte strings; empty ones and None are left out."""
    children: dict[int, int] = {}
    parent, byte, depth = [0], [0], [0]
    node = np.full(len(tokens), -1, np.int32)
    for i, token in enumerate(tokens):
        if not token:
            continue
        at = 0
        for value in token:
            key = at * 256 + value
            below = children.get(key)
            if below is None:
                below = children[key] = len(parent)
                parent.append(at)
                byte.append(value)
                depth.append(depth[at] + 1)
            at = below
        node[i] = at
    order = np.argsort(np.array(depth), kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    edges = np.searchsorted(np.array(depth)[order], np.arange(1, max(depth) + 2))
    levels = tuple((int(a), int(b)) for a, b in itertools.pairwise(edges))
    return Trie(
        levels,
        rank[np.array(parent)[order]],
        np.array(byte, np.uint8)[order],
        np.where(node >= 0, rank[node], -1).astype(np.int32),
    )


def read_vocabulary(source: Any, *, size: int | None = None) -> Vocabulary:
    """Reads the bytes of each token.

    Args:
        source: a `tokenizers.Tokenizer`; a tokenizer.json or a folder that has one; a tokenizer of transformers; a list
            of bytes, str and None; or a `Vocabulary`.
        size: tokens of the model. More than the tokenizer has are never part of a text; fewer raise.

    Raises:
        FileNotFoundError: no tokenizer.json.
        ValueError: a decoder whose text is not the sum of its tokens' bytes, or more tokens than `size`.
        TypeError: something else.

    Source: byte for byte what `tokenizers` decodes, apart from the space that SentencePiece and WordPiece decoders take
    away at the very beginning: in the middle of a text, where generation goes on, it stays.
    """
    vocabulary = _read(source)
    if size is None or size == len(vocabulary):
        return vocabulary
    if size < len(vocabulary):
        if any(token is not None for token in vocabulary.tokens[size:]):
            raise ValueError(
                f"read_vocabulary: the tokenizer has {len(vocabulary)} tokens, the model {size}; "
                "take the model's own tokenizer, or see resize_embeddings"
            )
        return Vocabulary(vocabulary.tokens[:size], tuple(item for item in vocabulary.special if item[0] < size))
    return Vocabulary(vocabulary.tokens + (None,) * (size - len(vocabulary)), vocabulary.special)


def _read(source: Any) -> Vocabulary:
    if isinstance(source, Vocabulary):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"read_vocabulary: there is no {str(path)!r}; give a folder with a tokenizer.json")
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    extra = frozenset(getattr(source, "all_special_ids", ()) or ())
    backend = getattr(source, "backend_tokenizer", source)
    if hasattr(backend, "to_str"):
        return _from_json(json.loads(backend.to_str()), extra)
    if hasattr(source, "convert_ids_to_tokens"):
        pieces = source.convert_ids_to_tokens(list(range(len(source))))
        kind = "byte-level" if any(piece and "Ġ" in piece for piece in pieces) else "sentencepiece"
        return _from_pieces(dict(enumerate(pieces)), {}, extra, _decoder({"type": _KINDS[kind]}))
    if isinstance(source, Sequence) and all(token is None or isinstance(token, bytes | str) for token in source):
        tokens = (token.encode() if isinstance(token, str) else token for token in source)
        return Vocabulary(tuple(token or None for token in tokens))
    raise TypeError(
        f"read_vocabulary: expected a tokenizer, a tokenizer.json, its folder, or a list of bytes; got {type(source).__name__}"
    )


_KINDS = {"byte-level": "ByteLevel", "sentencepiece": "Metaspace"}


def _from_json(data: Mapping[str, Any], extra: frozenset[int] = frozenset()) -> Vocabulary:
    """The vocabulary of a tokenizer.json."""
    model = data["model"]
    table = model["vocab"]
    if isinstance(table, Mapping):
        pieces = {int(i): piece for piece, i in table.items()}
    else:
        pieces = {i: piece for i, (piece, _) in enumerate(table)}
    added = {int(token["id"]): token for token in data.get("added_tokens") or ()}
    special = {i for i, token in added.items() if token["special"]} | extra
    return _from_pieces(pieces, {i: token["content"] for i, token in added.items()}, special, _decoder(data["decoder"]))


def _from_pieces(pieces: Mapping[int, str], added: Mapping[int, str], special: Any, decode: Any) -> Vocabulary:
    tokens: list[bytes | None] = [None] * (max([*pieces, *added], default=-1) + 1)
    names = []
    for i, piece in {**pieces, **added}.items():
        if i in special:
            names.append((i, piece.encode()))
        else:
            tokens[i] = decode(piece) or None
    return Vocabulary(tuple(tokens), tuple(sorted(names)))


def _decoder(data: Any) -> Any:
    """A function from a piece to its bytes, for the decoder of a tokenizer.json."""
    if data is None:
        return lambda piece: f" {piece}".encode()
    parts = data["decoders"] if data["type"] == "Sequence" else [data]
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        if unknown := kinds - {"ByteLevel", "Fuse"}:
            raise _unknown(unknown)
        table = byte_characters()
        return lambda piece: bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
    if unknown := kinds - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}:
        raise _unknown(unknown)

    def decode(piece: str) -> bytes:
        text = piece
        for part in parts:
            kind = part["type"]
            if kind == "ByteFallback" and (match := _BYTE_TOKEN.fullmatch(text)):
                return bytes([int(match[1], 16)])
            if kind == "Replace":
                pattern = part["pattern"]
                old = re.escape(pattern["String"]) if "String" in pattern else pattern["Regex"]
                content = part["content"]
                text = re.sub(old, lambda _, content=content: content, text)
            elif kind == "Metaspace":
                text = text.replace(part.get("replacement", "▁"), " ")
            elif kind == "WordPiece":
                prefix = part.get("prefix", "##")
                text = text[len(prefix) :] if text.startswith(prefix) else " " + text
                text = _clean(_PREFIX + text)[len(_PREFIX) :] if part.get("cleanup", True) else text
        return text.encode()

    return decode


def _unknown(kinds: set[Any]) -> ValueError:
    return ValueError(
        f"read_vocabulary: the tokenizer's decoder {', '.join(sorted(map(str, kinds)))} does not give each token bytes of its "
        "own; give the bytes of all tokens as a list"
    )


def _clean(text: str) -> str:
    """The cleanup of the WordPiece decoder."""
    for old in (" .", " ?", " !", " ,"):
        text = text.replace(old, old[1:])
    text = text.replace(" ' ", "'")
    for old in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old[1:])
    return text


@functools.lru_cache(maxsize=1)
def byte_characters() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte.

    Source: GPT-2's `bytes_to_unicode`.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
