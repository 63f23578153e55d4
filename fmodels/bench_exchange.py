"""Speed of the exchange: conversions against copying the file, exported programs against the native ones."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
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


def convert(*, repeats: int = 5) -> Iterator[Result]:
    """Conversion against copying the file; both end when the disk has it."""
    import jax

    import fmodels as fm

    config = bench_config("llama-50m")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        fm.save(fm.init(config, jax.random.key(0)), config, place / "from")
        source = place / "from" / "model.safetensors"
        size = source.stat().st_size / 1e9

        def copy() -> None:
            shutil.copyfile(source, place / "copy")
            with open(place / "copy", "rb") as file:
                os.fsync(file.fileno())

        def into(format: str) -> Callable[[], None]:
            def run() -> None:
                shutil.rmtree(place / format, ignore_errors=True)
                fm.convert(place / "from", place / format, format=format, verify=False)

            return run

        formats = ("safetensors", "torch", "npz", "flax")
        copied, *others = median_of(copy, *(into(format) for format in formats), repeats=repeats)
        for format, seconds in zip(formats, others, strict=True):
            yield Result(
                f"convert to {format} (against copying)",
                size / seconds,
                size / copied,
                "GB/s",
                copied / seconds,
                ">= 0.7",
            )


BENCHES: dict[str, Callable[[], Iterator[Result]]] = {"exports": exports, "convert": convert}
"""Name -> benchmark."""
