"""Sentence vectors: hidden states pooled as sentence-transformers does, for a batch and for thousands of texts."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels.api import inputs
from fmodels.models import Config, family
from fmodels.pooling import JOIN, MODES, THEN
from fmodels.types import Array, Params


def embed(
    params: Params,
    config: Config,
    tokens: Array,
    *,
    mask: Array | None = None,
    token_types: Array | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
) -> Array:
    """One vector per row of tokens: the hidden states of the real tokens, pooled.

    Args:
        params: the tree; heads in it are not computed.
        config: the config; `config.pooling` and `config.normalize` come from a sentence-transformers folder.
        tokens: `(b t)` int.
        mask: `(b t)` bool or 0/1, True for real tokens; all real if None.
        token_types: `(b t)` int, zeros if None.
        pooling: `"mean"`, `"cls"` (the first real token), `"last"` (the last one), `"max"`, `"mean_sqrt_len"` (the sum over
            the square root of the number of tokens), `"weighted_mean"` (by 1, 2, 3, …), or several side by side, such as
            `"mean+max"`; `config.pooling` if None.
        normalize: whether to scale to length 1; `config.normalize` if None.

    Returns:
        `(b d)` float32, `(b n·d)` for n poolings side by side.

    Raises:
        ValueError: an unknown pooling, or none; what `forward` refuses.
        NotImplementedError: the checkpoint has modules after its pooling (such as Dense) that are not supported.

    Example:
        >>> import fmodels as fm, jax
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> embed(params, config, jax.numpy.array([[5, 6, 7]]), pooling="mean").shape == (1, config.hidden_size)
        True

    Source: Reimers and Gurevych 2019; matches sentence-transformers 6 (`Transformer`, `Pooling`, `Normalize`).
    """
    modes, normalize = _modes(config, pooling, normalize)
    base = dataclasses.replace(config, task="base")
    tokens, arrays = inputs(params, base, tokens, mask=mask, token_types=token_types)
    return _embed(params, base, tokens, arrays, modes, normalize)


def _modes(config: Config, pooling: str | None, normalize: bool | None) -> tuple[tuple[str, ...], bool]:
    chosen = config.pooling if pooling is None else pooling
    if chosen is None:
        raise ValueError(f"embed: this checkpoint does not say how to pool; pass pooling=, one of {', '.join(MODES)}")
    first, *others = chosen.split(THEN)
    modes = tuple(first.split(JOIN))
    unsupported = others if set(modes) <= set(MODES) else [first, *others] if pooling is None else []
    if unsupported:
        raise NotImplementedError(
            f"embed: this checkpoint needs {', '.join(unsupported)}, which is not supported; pass pooling= to pool without it"
        )
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ValueError(
            f"embed: pooling {', '.join(map(repr, unknown))} is not one of {', '.join(MODES)} (or several with +)"
        )
    return modes, bool(config.normalize) if normalize is None else normalize


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _embed(
    params: Params,
    config: Config,
    tokens: Array,
    arrays: dict[str, Array | None],
    modes: tuple[str, ...],
    normalize: bool,
) -> Array:
    def vectors(inputs: tuple[Array, dict[str, Array | None]]) -> Array:
        tokens, arrays = inputs
        hidden = family(config).forward(params, config, tokens, **arrays).hidden
        assert hidden is not None
        return _pool(hidden, arrays["mask"], modes, normalize)

    groups = _groups(*tokens.shape)
    if groups == 1:
        return vectors((tokens, arrays))
    batch = tokens.shape[0]
    rows = -(-batch // groups)

    def split(x: Array) -> Array:
        filled = jnp.pad(x, ((0, groups * rows - batch), (0, 0)), mode="edge")
        return filled.reshape(groups, rows, *x.shape[1:])

    return jax.lax.map(vectors, jax.tree.map(split, (tokens, arrays))).reshape(groups * rows, -1)[:batch]


TOKENS_AT_ONCE = 1024
"""On CPU, a batch runs in groups of rows of so many tokens: what is between the layers then stays in the cache."""


def _groups(batch: Any, length: Any) -> int:
    """In how many groups a batch runs; in one where its size is a symbol, under `jax.export`."""
    if jax.default_backend() != "cpu" or not (isinstance(batch, int) and isinstance(length, int)):
        return 1
    return min(batch, -(-batch * length // TOKENS_AT_ONCE))


def _pool(hidden: Array, mask: Array | None, modes: tuple[str, ...], normalize: bool) -> Array:
    """`(b d)` from `(b t d)` and `(b t)`; a row without a real token gives zeros, or its last token's for `cls`."""
    mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask.astype(bool)
    hidden = hidden.astype(jnp.float32)
    real = mask.astype(jnp.float32)
    first = jnp.argmax(mask, axis=1)
    place = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    count = jnp.maximum(real.sum(1, keepdims=True), 1e-9)
    parts = []
    for mode in modes:
        if mode == "cls":
            part = hidden[jnp.arange(hidden.shape[0]), first]
        elif mode == "last":
            part = hidden[jnp.arange(hidden.shape[0]), jnp.argmax(jnp.where(mask, place, 0), axis=1)]
        elif mode == "max":
            part = jnp.where(mask[:, :, None], hidden, -jnp.inf).max(1)
        elif mode == "weighted_mean":
            weights = real * (place - first[:, None] + 1).astype(jnp.float32)
            part = _weighted(hidden, weights) / jnp.maximum(weights.sum(1, keepdims=True), 1e-9)
        else:
            part = _weighted(hidden, real) / (count if mode == "mean" else jnp.sqrt(count))
        parts.append(part)
    vector = jnp.concatenate(parts, axis=-1)
    if normalize:
        vector = vector / jnp.maximum(jnp.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)
    return vector


def _weighted(hidden: Array, weights: Array) -> Array:
    return (hidden * weights[:, :, None]).sum(1)


def embed_texts(
    params: Params,
    config: Config,
    texts: Iterable[Any],
    tokenizer: Any = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    buckets: Sequence[int] | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
) -> np.ndarray:
    """Embeds any number of texts, sorted by length into batches of few different shapes.

    Each batch is padded to the next length in `buckets`, so that a model is compiled at most once per bucket (and at most
    `log2(batch_size)` times more for what is left over at the end). A progress bar is shown on terminals.

    Args:
        params: the tree.
        config: the config.
        texts: strings, or lists of token ids.
        tokenizer: what makes token ids of strings, special tokens included: a `tokenizers.Tokenizer`, the path of a
            tokenizer.json or of a folder that has one, or a function from a text to ids. None where `texts` are ids.
        batch_size: rows of a batch.
        max_length: longer texts are cut by a `tokenizers.Tokenizer` (special tokens stay); ids that are longer are an
            error. None: what sentence_bert_config.json beside the tokenizer.json says, at most `config.max_positions`.
        buckets: lengths that batches are padded to, in order; 16, 24, 32, 40, … 64, 80, … if None.
        pooling: as in `embed`.
        normalize: as in `embed`.

    Returns:
        `(n d)` float32, in the order of `texts`.

    Raises:
        ValueError: ids that are too long or empty, and what `embed` refuses.
        OSError: there is no tokenizer.json.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> embed_texts(params, config, [[5, 6, 7], [8]], pooling="mean").shape == (2, config.hidden_size)
        True
    """
    if batch_size < 1:
        raise ValueError(f"embed_texts: batch_size is at least 1; got {batch_size}")
    modes, _ = _modes(config, pooling, normalize)
    limit = config.max_positions if max_length is None else max_length
    rows, limit = _tokenize(list(texts), tokenizer, limit, given=max_length is not None)
    lengths = np.array([len(row) for row in rows], np.int64)
    for problem, wrong in (("has no tokens", lengths == 0), (f"is longer than {limit} tokens", lengths > limit)):
        if wrong.any():
            where = int(np.argmax(wrong))
            raise ValueError(
                f"embed_texts: text {where} {problem} (it has {lengths[where]}), and so {int(wrong.sum())} in all"
            )
    vectors = np.empty((len(rows), config.hidden_size * len(modes)), np.float32)
    sizes = sorted(size for size in buckets or _buckets(limit) if size <= limit)
    order = np.argsort(-lengths, kind="stable")  # the longest first: what does not fit in memory fails at once
    with tqdm(total=len(rows), desc="embed", unit="text", disable=None, leave=False) as bar:
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            longest = int(lengths[chosen[0]])
            width = next((size for size in sizes if size >= longest), limit)
            height = min(batch_size, 1 << (len(chosen) - 1).bit_length())
            tokens, mask = np.zeros((height, width), np.int32), np.zeros((height, width), bool)
            for i, row in enumerate(chosen):
                tokens[i, : lengths[row]], mask[i, : lengths[row]] = rows[row], True
            batch = embed(
                params, config, jnp.asarray(tokens), mask=jnp.asarray(mask), pooling=pooling, normalize=normalize
            )
            vectors[chosen] = np.asarray(batch)[: len(chosen)]
            bar.update(len(chosen))
    return vectors


def _buckets(limit: int) -> list[int]:
    """Four lengths per octave up to `limit`, so that above 32 the longest text of a batch is padded by at most a quarter."""
    sizes = [16]
    while sizes[-1] < limit:
        sizes.append(sizes[-1] + max(8, (1 << sizes[-1].bit_length() - 1) // 4))
    return [*(size for size in sizes if size < limit), limit]


def _tokenize(texts: list[Any], tokenizer: Any, limit: int, *, given: bool) -> tuple[list[Sequence[int]], int]:
    """The ids of each text, and the limit, lowered to what lies beside the tokenizer's file unless `given`."""
    if tokenizer is None:
        strings = [i for i, text in enumerate(texts) if isinstance(text, str)]
        if strings:
            raise TypeError(f"embed_texts: text {strings[0]} is a string; pass tokenizer=, or lists of token ids")
        return texts, limit
    if callable(tokenizer):
        return [_ids(tokenizer, text) for text in texts], limit
    from tokenizers import Tokenizer

    if isinstance(tokenizer, str | os.PathLike):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"embed_texts: there is no {str(path)!r}; pass a tokenizers.Tokenizer or a function"
            )
        tokenizer = Tokenizer.from_file(str(path))
        limit = limit if given else min(limit, _max_length(path.parent, limit))
    elif isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_str(tokenizer.to_str())  # the caller's own keeps its settings
    else:
        raise TypeError(
            f"embed_texts: a tokenizer is a tokenizers.Tokenizer, a path or a function; got {type(tokenizer).__name__}"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)], limit


def _ids(tokenizer: Callable[[Any], Any], text: Any) -> Sequence[int]:
    ids = tokenizer(text)
    return ids["input_ids"] if isinstance(ids, Mapping) else ids


def _max_length(folder: Path, default: int) -> int:
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        path = folder / name
        if path.is_file():
            try:
                value = json.loads(path.read_text(encoding="utf-8")).get(key)
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"embed_texts: {str(path)!r} is not a JSON object: {error}; download it again"
                ) from None
            if value is not None:
                return int(value)
    return default
