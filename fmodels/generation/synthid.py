"""SynthID: a watermark that leaves the distribution as it is on average over keys, and bends each draw by the text before it.

Each token has a random bit for each key in each context. For one key after the other the tokens are paired, and of a pair
the one whose bit is set is kept; what the tokens' probabilities are then has a closed form. The bits are those of
transformers on PyTorch, number for number, so that either side detects what the other wrote.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.generation.history import History
from fmodels.types import Array

LARGEST_TABLE = 2**24
"""The most bits that the table may have, as in transformers."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthID:
    """The settings of the watermark, by transformers' names (`SynthIDTextWatermarkingConfig`).

    Attributes:
        ngram_len: tokens that decide the bits of a token, itself included; at least 2.
        keys: the secret, one number for each round.
        context_history_size: a context that was one of so many before it bears no mark.
        sampling_table_seed: of the table of bits.
        sampling_table_size: its length.
        skip_first_ngram_calls: whether the first `ngram_len - 1` tokens bear no mark.

    Raises:
        ValueError: impossible values.

    Example:
        >>> SynthID(ngram_len=5, keys=(654, 400, 836)).bits([[5, 9, 2, 7, 7, 1]]).tolist()
        [[[1, 1, 0], [0, 0, 0]]]

    Source: Dathathri et al. 2024; matches transformers 5's `SynthIDTextWatermarkLogitsProcessor`.
    """

    ngram_len: int
    keys: tuple[int, ...]
    context_history_size: int = 1024
    sampling_table_seed: int = 0
    sampling_table_size: int = 2**16
    skip_first_ngram_calls: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))
        problems = []
        if self.ngram_len < 2:
            problems.append(f"ngram_len must be at least 2, got {self.ngram_len!r}")
        if not self.keys or not all(isinstance(key, int) and -(2**63) <= key < 2**63 for key in self.keys):
            problems.append(f"keys must be integers of 64 bits, at least one, got {list(self.keys)!r}")
        if self.context_history_size < 1:
            problems.append(f"context_history_size must be at least 1, got {self.context_history_size!r}")
        if not 1 <= self.sampling_table_size <= LARGEST_TABLE:
            problems.append(f"sampling_table_size must be in 1 … {LARGEST_TABLE}, got {self.sampling_table_size!r}")
        if problems:
            raise ValueError("watermarking_config: " + "; ".join(problems))

    def mark(self, values: Array, tokens: Array, history: History) -> Array:
        """The log-probabilities of tokens with the mark.

        Args:
            values: `(b c)` float32, logits after all cuts, `-inf` for tokens that are dropped.
            tokens: `(b c)` int32, which tokens they are.
            history: of the rows.

        Returns:
            `(b c)` float32; `values` where a row bears no mark.
        """
        hashes = self._contexts(_said(history, self.ngram_len - 1))
        place = jnp.arange(hashes.low.shape[1], dtype=jnp.int32)[None]
        new = history.new[:, None]
        here = jax.tree.map(lambda x: jnp.take_along_axis(x, new, axis=1), hashes)
        first = self.ngram_len - 1 if self.skip_first_ngram_calls else 0
        before = (place < new) & (place >= jnp.maximum(new - self.context_history_size, first))
        bare = (before & (hashes.low == here.low) & (hashes.high == here.high)).any(-1, keepdims=True) | (new < first)

        def round_(chance: Array, key: _Long) -> tuple[Array, None]:
            bits = self._bit(_step(of_tokens, key)).astype(jnp.float32)
            return chance * (1.0 + bits - (bits * chance).sum(-1, keepdims=True)), None

        of_tokens = _step(here, _long(tokens))
        chance, _ = jax.lax.scan(round_, jax.nn.softmax(values, axis=-1), _long(np.array(self.keys, np.int64)))
        return jnp.where(bare, values, jnp.log(chance))

    def bits(self, tokens: Any) -> np.ndarray:
        """The bits of each token but the first `ngram_len - 1`, `(b t-n+1 keys)` int, for texts `(b t)`."""
        rows = jnp.asarray(np.asarray(tokens), jnp.int32)
        hashes = self._contexts(rows[:, :-1])
        hashes = _step(hashes, _long(rows[:, self.ngram_len - 1 :]))
        keys = jax.tree.map(lambda x: x[None, None], _long(np.array(self.keys, np.int64)))
        return np.asarray(self._bit(_step(jax.tree.map(lambda x: x[..., None], hashes), keys)), np.int64)

    def fresh(self, tokens: Any) -> np.ndarray:
        """Which tokens but the first `ngram_len - 1` were not preceded by a context that had been there: `(b t-n+1)` bool."""
        hashes = self._contexts(jnp.asarray(np.asarray(tokens)[:, :-1], jnp.int32))
        whole = np.asarray(hashes.high).astype(np.uint64) << np.uint64(32) | np.asarray(hashes.low).astype(np.uint64)
        place = np.arange(whole.shape[1])
        since = place[:, None] - place[None]
        before = (since > 0) & (since <= self.context_history_size)
        return ~((whole[:, :, None] == whole[:, None]) & before[None]).any(-1)

    def _contexts(self, tokens: Array) -> _Long:
        """The hash of each run of `ngram_len - 1` tokens `(b t-n+2)`."""
        size = self.ngram_len - 1
        count = tokens.shape[1] - size + 1
        hashes = _Long(jnp.zeros((1, 1), jnp.uint32), jnp.ones((1, 1), jnp.uint32))
        for i in range(size):
            hashes = _step(hashes, _long(tokens[:, i : i + count]))
        return hashes

    def _bit(self, hashes: _Long) -> Array:
        table = jnp.asarray(_table(self.sampling_table_seed, self.sampling_table_size))
        return table[_remainder(hashes, self.sampling_table_size)]


class _Long(NamedTuple):
    """Integers of 64 bits, which jax has only in a mode of its own: the upper and the lower 32 bits."""

    high: Array
    low: Array


def _long(numbers: Any) -> _Long:
    if isinstance(numbers, np.ndarray):
        bits = numbers.view(np.uint64)
        return _Long(jnp.asarray((bits >> np.uint64(32)).astype(np.uint32)), jnp.asarray(bits.astype(np.uint32)))
    return _Long(jnp.zeros(numbers.shape, jnp.uint32), numbers.astype(jnp.uint32))


def _step(hashes: _Long, data: _Long) -> _Long:
    """`(hash + data) · 6364136223846793005 + 1`, wrapping: a step of newlib's congruential generator."""
    factor = 6364136223846793005
    upper, lower = jnp.uint32(factor >> 32), factor & 0xFFFFFFFF
    low = hashes.low + data.low
    high = hashes.high + data.high + (low < data.low).astype(jnp.uint32)
    more, product = _wide(low, lower)
    high = more + low * upper + high * jnp.uint32(lower)
    low = product + jnp.uint32(1)
    return _Long(high + (low == 0).astype(jnp.uint32), low)


def _wide(x: Array, y: int) -> tuple[Array, Array]:
    """The upper and the lower 32 bits of a product, from those of halves."""
    half = jnp.uint32(0xFFFF)
    x0, x1, y0, y1 = x & half, x >> 16, jnp.uint32(y & 0xFFFF), jnp.uint32(y >> 16)
    lowest, middle, other = x0 * y0, x0 * y1, x1 * y0
    carried = (lowest >> 16) + (middle & half) + (other & half)
    return x1 * y1 + (middle >> 16) + (other >> 16) + (carried >> 16), x * jnp.uint32(y)


def _remainder(hashes: _Long, size: int) -> Array:
    """The hash as a signed number modulo `size`, which is at most 2 ** 24: byte by byte."""
    if size & (size - 1) == 0:
        return hashes.low & jnp.uint32(size - 1)
    rest = jnp.zeros_like(hashes.low)
    for word in hashes:
        for shift in (24, 16, 8, 0):
            rest = ((rest << 8) | ((word >> shift) & jnp.uint32(0xFF))) % jnp.uint32(size)
    negative = hashes.high >> 31
    return (rest + negative * jnp.uint32(size - 2**64 % size)) % jnp.uint32(size)


def _said(history: History, before: int) -> Array:
    """The new tokens of each row after so many zeros, filled up at the end to one length."""
    columns = history.prompt[:, None] + jnp.arange(-before, history.tokens.shape[1], dtype=jnp.int32)[None]
    inside = (columns >= history.prompt[:, None]) & (columns < history.end[:, None])
    last = history.tokens.shape[1] - 1
    return jnp.where(inside, jnp.take_along_axis(history.tokens, jnp.clip(columns, 0, last), axis=1), 0)


@functools.lru_cache(maxsize=4)
def _table(seed: int, size: int) -> np.ndarray:
    """`torch.randint(0, 2, (size,))` on CPU after `manual_seed(seed)`: the lowest bits of the same Mersenne twister."""
    random = np.random.RandomState(seed & 0xFFFFFFFF)
    return (random.randint(0, 2**32, size=size, dtype=np.uint32) & 1).astype(np.int32)
