"""Speed of exports: `generate` of a SavedModel and of `jax.export` against the native one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fmodels.bench import Result, bench_config, median_of


def exports(*, new_tokens: int = 64, batches: tuple[int, ...] = (1, 16), repeats: int = 5) -> Iterator[Result]:
    """Greedy decoding of 16 tokens' prompts, everything included but compilation."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax
    import tensorflow as tf

    import fmodels as fm
    from interop import saved_model
    from interop.tensorflow import TFModel

    config = bench_config("llama-50m")
    params = fm.unstack_layers(fm.init(config, jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        saved_model.export(TFModel(params, config), os.path.join(folder, "saved"), max_new_tokens=new_tokens)
        fm.export_generate(params, config, os.path.join(folder, "exported"), max_new_tokens=new_tokens)
        loaded: Any = tf.saved_model.load(os.path.join(folder, "saved"))
        exported = fm.load_exported(os.path.join(folder, "exported"))
        for batch in batches:
            tokens = np.random.default_rng(0).integers(1, 1000, (batch, 16)).astype(np.int32)
            given = {"tokens": tf.constant(tokens), "mask": tf.ones(tokens.shape, tf.int32)}
            native, saved, written = median_of(
                lambda: np.asarray(fm.generate(params, config, tokens, max_new_tokens=new_tokens).tokens),  # noqa: B023
                lambda: loaded.signatures["generate"](**given)["tokens"].numpy(),  # noqa: B023
                lambda: np.asarray(exported.generate(exported.params, tokens).tokens),  # noqa: B023
                repeats=repeats,
            )
            for what, seconds in (("SavedModel", saved), ("jax.export", written)):
                name = f"{what} generate llama-50m, batch {batch} (against native)"
                yield Result(name, seconds * 1e3, native * 1e3, "ms", seconds / native, "<= 1.2")


BENCHES: dict[str, Callable[[], Iterator[Result]]] = {"exports": exports}
"""Name -> benchmark."""
