"""Watermarks: in each context a random part of the vocabulary is made likelier, which a detector can count later.

The random parts are those of transformers on PyTorch, number for number, so that either side detects what the other wrote.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.generation.history import History
from fmodels.generation.synthid import SynthID
from fmodels.types import Array

TABLE = 1_000_003
"""Size of the table of hashes of `selfhash`."""
TRIED = 40
"""How many of the likeliest tokens `selfhash` asks whether they are green in their own context."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Watermark:
    """The settings of a watermark, by transformers' names (`WatermarkingConfig`).

    Attributes:
        greenlist_ratio: share of the vocabulary that is green in a context, in (0, 1).
        bias: what is added to the logits of green tokens.
        hashing_key: the secret.
        seeding_scheme: `"lefthash"`, by the last token, or `"selfhash"`, by the last ones and the token itself.
        context_width: tokens of the context.

    Raises:
        ValueError: impossible values.

    Source: Kirchenbauer et al. 2023; matches transformers 5's `WatermarkLogitsProcessor`.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 < self.greenlist_ratio < 1.0:
            problems.append(f"greenlist_ratio must be in (0, 1), got {self.greenlist_ratio!r}")
        if self.seeding_scheme not in ("lefthash", "selfhash"):
            problems.append(f"seeding_scheme must be 'lefthash' or 'selfhash', got {self.seeding_scheme!r}")
        if self.context_width < 1:
            problems.append(f"context_width must be at least 1, got {self.context_width!r}")
        if problems:
            raise ValueError("watermarking_config: " + "; ".join(problems))

    def mark(self, values: Array, tokens: Array, history: History) -> Array:
        """The logits `(b c)` of tokens `(b c)` with the mark; the lists are made by the host, a call for each step."""
        batch, vocabulary = history.seen.shape
        columns = history.end[:, None] + jnp.arange(-self.context_width, 0, dtype=jnp.int32)[None]
        context = jnp.take_along_axis(history.tokens, jnp.maximum(columns, 0), axis=1)
        tried = jnp.take_along_axis(tokens, jax.lax.top_k(values, min(TRIED, values.shape[1]))[1], axis=1)
        shape = jax.ShapeDtypeStruct((batch, vocabulary), np.bool_)
        green = jax.pure_callback(
            self._green, shape, context, history.length, tried, vocabulary, vmap_method="sequential"
        )
        return values + jnp.where(jnp.take_along_axis(green, tokens, axis=1), jnp.float32(self.bias), jnp.float32(0.0))

    def _green(self, context: Any, length: Any, tried: Any, vocabulary: Any) -> np.ndarray:
        context, tried = np.asarray(context), np.asarray(tried)
        green = np.zeros((len(context), int(vocabulary)), bool)
        for row, said in enumerate(context.tolist()):
            if int(length[row]) < self.context_width:
                continue
            if self.seeding_scheme == "lefthash":
                green[row, list(self.green(tuple(said), int(vocabulary)))] = True
            else:
                for token in tried[row].tolist():
                    green[row, token] = token in self.green((*said[1:], token), int(vocabulary))
        return green

    def green(self, context: tuple[int, ...], vocabulary: int) -> frozenset[int]:
        """The green tokens after (with `selfhash`: with) a context."""
        return _green_tokens(
            self.hashing_key, self.seeding_scheme, context, vocabulary, int(vocabulary * self.greenlist_ratio)
        )


@functools.lru_cache(maxsize=1024)
def _green_tokens(key: int, scheme: str, context: tuple[int, ...], vocabulary: int, count: int) -> frozenset[int]:
    if scheme == "lefthash":
        seed = key * context[-1]
    else:
        table = _table(key)
        with np.errstate(over="ignore"):  # PyTorch's integers of 64 bits wrap
            hashes = np.int64(key) * (table[np.array(context) % TABLE] + 1) * (table[context[-1] % TABLE] + 1)
        seed = int(hashes.min())
    return frozenset(permutation(seed % (2**64 - 1), vocabulary, count))


@functools.lru_cache(maxsize=4)
def _table(key: int) -> np.ndarray:
    return np.array(permutation(key, TABLE, TABLE), np.int64)


def permutation(seed: int, size: int, count: int) -> list[int]:
    """The first `count` numbers of `torch.randperm(size)` on CPU after `manual_seed(seed)`.

    Example:
        >>> permutation(3, 5, 4)
        [1, 0, 3, 4]
    """
    random = np.random.RandomState(seed & 0xFFFFFFFF)  # the same Mersenne twister, seeded in the same way
    numbers = list(range(size))
    draws = random.randint(0, 2**32, size=min(count, size - 1), dtype=np.uint32).tolist()
    for i, draw in enumerate(draws):
        other = i + draw % (size - i)
        numbers[i], numbers[other] = numbers[other], numbers[i]
    return numbers[:count]


def settings(given: Watermark | SynthID | Mapping[str, Any]) -> Watermark | SynthID:
    """The settings as `GenerationConfig.watermarking_config` has them: of SynthID where there are `ngram_len` and `keys`.

    Raises:
        TypeError: unknown or missing names.
        ValueError: impossible values.
        NotImplementedError: SynthID's `debug_mode`.

    Example:
        >>> settings({"bias": 3.0}).context_width, settings({"ngram_len": 5, "keys": [3, 1]}).keys
        (1, (3, 1))
    """
    if not isinstance(given, Mapping):
        return given
    data = dict(given)
    if not {"ngram_len", "keys"} & data.keys():
        return Watermark(**data)
    if data.pop("debug_mode", False):
        raise NotImplementedError("watermarking_config: debug_mode=True is not supported; leave it out")
    return SynthID(**data)


class Detection(NamedTuple):
    """What a detector says of texts, `(b)` each.

    Attributes:
        num_tokens_scored: how many tokens were looked at; with SynthID each counts once for each key.
        num_green_tokens: how many of them were green; with SynthID, had the bit of the key.
        green_fraction: their share.
        z_score: by how many standard deviations there are more than by chance.
        p_value: probability of so many by chance.
        prediction: whether the text has the watermark.
    """

    num_tokens_scored: np.ndarray
    num_green_tokens: np.ndarray
    green_fraction: np.ndarray
    z_score: np.ndarray
    p_value: np.ndarray
    prediction: np.ndarray


def detect_watermark(
    tokens: Any,
    watermark: Watermark | SynthID | Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    z_threshold: float = 3.0,
    ignore_repeated_ngrams: bool = False,
) -> Detection:
    """Counts green tokens.

    Args:
        tokens: `(b t)` int, best without the prompt.
        watermark: the settings with which the text was generated.
        vocab_size: of the model; SynthID does not need it.
        bos_token_id: where all rows begin with it, it is left out.
        z_threshold: `z_score` from which on a text is said to have the watermark.
        ignore_repeated_ngrams: whether each n-gram counts once; SynthID leaves out what follows a context that was there
            before, always.

    Raises:
        ValueError: too few tokens; no `vocab_size`.

    Example:
        >>> found = detect_watermark([[5, 9, 2, 7, 7, 1]], Watermark(), vocab_size=12)
        >>> found.num_tokens_scored.tolist(), found.num_green_tokens.tolist()
        ([5], [2])

    Source: Kirchenbauer et al. 2023; matches transformers 5's `WatermarkDetector`. For SynthID, the mean score of Dathathri
    et al. 2024, which needs no training, over the bits that transformers' `SynthIDTextWatermarkDetector` looks at.
    """
    watermark = settings(watermark)
    rows = np.asarray(tokens)
    if bos_token_id is not None and rows.size and (rows[:, 0] == bos_token_id).all():
        rows = rows[:, 1:]
    alone = isinstance(watermark, Watermark) and watermark.seeding_scheme == "selfhash"
    width = watermark.ngram_len if isinstance(watermark, SynthID) else watermark.context_width + (not alone)
    if rows.ndim != 2 or rows.shape[1] < width:
        raise ValueError(f"detect_watermark: expected (b t) with at least {width} tokens a row, got {rows.shape}")
    if isinstance(watermark, SynthID):
        fresh = watermark.fresh(rows)
        green = (watermark.bits(rows) * fresh[:, :, None]).sum((1, 2))
        return _detection(fresh.sum(1) * len(watermark.keys), green, 0.5, z_threshold)
    if vocab_size is None:
        raise ValueError("detect_watermark: give vocab_size, the number of tokens of the model")
    scored, green = [], []
    for row in rows.tolist():
        grams = Counter(tuple(row[i : i + width]) for i in range(len(row) - width + 1))
        hits = {gram: gram[-1] in watermark.green(gram if alone else gram[:-1], vocab_size) for gram in grams}
        weights = dict.fromkeys(grams, 1) if ignore_repeated_ngrams else grams
        scored.append(sum(weights.values()))
        green.append(sum(count for gram, count in weights.items() if hits[gram]))
    return _detection(np.array(scored), np.array(green), watermark.greenlist_ratio, z_threshold)


def _detection(n: np.ndarray, k: np.ndarray, share: float, threshold: float) -> Detection:
    z = (k - share * n) / np.sqrt(n * share * (1 - share))
    p = np.asarray(0.5 * jax.scipy.special.erfc(jnp.asarray(z / np.sqrt(2), jnp.float32)))
    return Detection(n, k, k / n, z, p, z > threshold)
