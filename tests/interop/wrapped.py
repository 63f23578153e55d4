"""Both wrappers behind one set of names, for tests that they share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow as tf
import torch

import fmodels as fm
from interop.tensorflow import TFModel
from interop.torch import TorchModel

GPT2 = fm.models.gpt2.Config(
    vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4,
    max_positions=16, task="causal-lm",
)  # fmt: skip
BERT = fm.models.bert.Config(
    vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4,
    max_positions=16, task="masked-lm",
)  # fmt: skip


class Library(NamedTuple):
    """A wrapper and what a test needs of its library."""

    wrapper: Any
    tensor: Any
    numpy: Any

    def model(self, config: Any, dtype: str = "float32") -> Any:
        """With random weights."""
        return self.wrapper(fm.init(config, jax.random.key(0), dtype=dtype), config)


LIBRARIES = {
    "torch": Library(
        TorchModel,
        lambda value, dtype: torch.tensor(value, dtype=getattr(torch, dtype)),
        lambda tensor: tensor.detach().to(torch.float64).numpy(),
    ),
    "tensorflow": Library(
        TFModel,
        lambda value, dtype: tf.constant(value, getattr(tf, dtype)),
        lambda tensor: tf.cast(tensor, tf.float64).numpy(),
    ),
}


def name_of_dtype(dtype: Any) -> str:
    return getattr(dtype, "name", str(dtype).removeprefix("torch."))


def bits(params: Any) -> dict[str, bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in fm.tree.flatten(params).items()}
