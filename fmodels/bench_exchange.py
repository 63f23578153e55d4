"""The exchange: tensors that are shared, conversions against copying the file, exported programs against native ones."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmodels.bench import Result, bench_config, median_of


def sharing() -> Iterator[Result]:
    """Tensors that `to_torch` and `to_tensorflow` copy, beside those that have no place in the tree's memory."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    import fmodels as fm
    from interop.tensorflow import to_tensorflow
    from interop.torch import to_torch

    # GPT-2's fused projections join three leaves; its matrices are transposed, which TensorFlow has no strides for.
    fused, matrices = ("attn.c_attn.weight", "attn.c_attn.bias"), ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for model in ("llama-50m", "gpt2-small"):
        config = bench_config(model)
        params = fm.init(config, jax.random.key(0))
        memory = [
            (leaf.unsafe_buffer_pointer(), leaf.unsafe_buffer_pointer() + leaf.nbytes)
            for leaf in jax.tree.leaves(params)
        ]
        for name, give, without in (
            ("to_torch", to_torch, fused),
            ("to_tensorflow", to_tensorflow, (*fused, *matrices)),
        ):
            begin = time.perf_counter()
            tensors: Any = give(params, config)
            elapsed = time.perf_counter() - begin
            places = {n: np.from_dlpack(tensor).ctypes.data for n, tensor in tensors.items()}
            copied = [n for n, place in places.items() if not any(low <= place < high for low, high in memory)]
            listed = [n for n in copied if n.endswith(without)]
            more = len(copied) - len(listed)
            note = f"{elapsed * 1e3:.1f} ms, {len(listed)} listed of {len(tensors)}"
            yield Result(f"{name} {model}: tensors copied beyond the listed", more, 0, "tensors", more, "<= 0", note)


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


BENCHES: dict[str, Callable[[], Iterator[Result]]] = {"sharing": sharing, "exports": exports, "convert": convert}
"""Name -> benchmark."""
