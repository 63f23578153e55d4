"""Text for people and for models: aligned tables, the tokenizer of a folder, how well a model predicts a text."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels.api import forward
from fmodels.models import Config
from fmodels.transforms.importance import head_importance
from fmodels.types import Array, Params


class TextLoss(NamedTuple):
    """How well a model predicts a text.

    Attributes:
        bits_per_byte: cross entropy of all tokens but the first of each window, in bits, per byte of the text.
        nats_per_token: the same in nats, per token.
        tokens: how many were predicted.
    """

    bits_per_byte: float
    nats_per_token: float
    tokens: int


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), *, right: Collection[int] = ()) -> str:
    """Rows as aligned columns, two spaces apart.

    Args:
        rows: the cells, each turned into text; all rows have the same number.
        header: names of the columns, with a line below; none if empty.
        right: the columns that are aligned to the right.

    Example:
        >>> print(table([["embed", 12], ["layers", 3456]], ["leaf", "size"], right=[1]))
        leaf    size
        ------  ----
        embed     12
        layers  3456
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if header:
        cells.insert(0, list(header))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if header:
        cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def size(count: int) -> str:
    """Bytes for people, in powers of ten.

    Example:
        >>> size(999), size(6_590_000), size(16_060_000_000)
        ('999 B', '6.6 MB', '16.1 GB')
    """
    if count < 1000:
        return f"{count} B"
    exponent = min(int(math.log10(count)) // 3, 5)
    return f"{count / 1000**exponent:.1f} {'kMGTP'[exponent - 1]}B"


def read_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint's tokenizer.json, without padding and truncation.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ImportError: the package `tokenizers` is not installed.
        ValueError: the file is broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = [
            name for name in ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json") if (folder / name).is_file()
        ]
        hint = (
            f" (it has {', '.join(found)}, which transformers' AutoTokenizer converts: save_pretrained)"
            if found
            else ""
        )
        raise FileNotFoundError(
            f"tokenizer: {str(folder)!r} has no tokenizer.json{hint}; put one beside the weights, or give token ids"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("tokenizer: text needs the package tokenizers: pip install 'fmodels[text]'") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises Exception itself
        raise ValueError(f"tokenizer: {str(path)!r} cannot be read: {error}; copy or download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def windows(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    """The tokens of a text, cut into rows of at most `length` + 1; each begins with the last token of the one before.

    Raises:
        ValueError: the text has less than two tokens.
    """
    ids = tokenizer.encode(text).ids
    if len(ids) < 2:
        raise ValueError(f"windows: the text has {len(ids)} tokens; at least two are needed to predict one")
    return [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]


def batches(rows: Sequence[Sequence[int]], batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows padded to one shape, `batch` at a time: `(tokens (b t), weight (b t-1))`, weight 0 where there is padding.

    Example:
        >>> [(tokens.tolist(), weight.tolist()) for tokens, weight in batches([[1, 2, 3], [3, 4]], 2)]
        [([[1, 2, 3], [3, 4, 0]], [[1.0, 1.0], [1.0, 0.0]])]
    """
    width = max(map(len, rows))
    height = math.ceil(len(rows) / batch) * batch
    tokens, weight = np.zeros((height, width), np.int32), np.zeros((height, width - 1), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], weight[i, : len(row) - 1] = row, 1
    return [(tokens[i : i + batch], weight[i : i + batch]) for i in range(0, height, batch)]


def nats(params: Params, config: Config, tokens: Array, weight: Array) -> Array:
    """The sum of the cross entropy of each token after the first of its row, times its weight."""
    logits = forward(params, config, tokens[:, :-1]).logits
    assert logits is not None
    logprobs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0] * weight)


_nats = functools.partial(jax.jit, static_argnames="config")(nats)


def text_loss(params: Params, config: Config, rows: Sequence[Sequence[int]], count: int, *, batch: int = 8) -> TextLoss:
    """How well a causal language model predicts a text.

    Args:
        params: the tree.
        config: its config.
        rows: the text, from `windows`.
        count: bytes of the text.
        batch: windows computed at a time.
    """
    chunks = batches(rows, min(batch, len(rows)))
    bar = tqdm(chunks, desc="loss", unit="batch", disable=None, leave=False)
    total = sum(float(_nats(params, config, jnp.asarray(tokens), jnp.asarray(weight))) for tokens, weight in bar)
    tokens = sum(len(row) - 1 for row in rows)
    return TextLoss(total / math.log(2) / count, total / tokens, tokens)


def text_importance(params: Params, config: Config, rows: Sequence[Sequence[int]], *, batch: int = 2) -> Any:
    """The importance of each attention head for predicting a text; see `fm.head_importance`.

    Args:
        params: the tree.
        config: its config.
        rows: the text, from `windows`.
        batch: windows computed at a time; fewer come closer to the paper.
    """

    def loss(params: Params, batch: tuple[Array, Array]) -> Array:
        return nats(params, config, *batch) / jnp.maximum(batch[1].sum(), 1.0)

    chunks = [(jnp.asarray(tokens), jnp.asarray(weight)) for tokens, weight in batches(rows, min(batch, len(rows)))]
    return head_importance(params, config, loss, chunks)
