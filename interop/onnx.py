"""ONNX is not written: what was tried, and where it fails."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import fmodels as fm


def export(params: fm.Params, config: Any, path: str | os.PathLike[str], **options: Any) -> NoReturn:
    """Always raises: there is no way from JAX to ONNX that keeps the numbers of these models for any batch and length.

    jax2onnx 0.17.1 was tried with jax 0.10.2, onnx 1.23.2 and onnxruntime 1.32.0 on `fm.forward` of small models:

    * Batch and length fixed: BERT's logits are right (to 6e-8). GPT-2 and Llama are written, but onnxruntime does not load them:
      "Could not find an implementation for Where(16)", which is a choice between booleans.
    * Batch and length symbolic: nothing is written. GPT-2 and Llama end with "jnp.split requires concrete size along split
      axis", BERT with "'_DynamicDimSentinel' object has no attribute 'rmax'", at `jnp.arange(length)[None]`.
    * It leaves `jax.numpy` patched: computing goes on in the same process only to fail with "MLIR translation rule for
      primitive 'jax.numpy.zeros' not found".

    For other runtimes there are `interop.saved_model.export` (TensorFlow) and `fm.export_forward` (StableHLO).

    Args:
        params: as for `fm.export_forward`.
        config: likewise.
        path: of the file that is not written.
        options: likewise.

    Raises:
        NotImplementedError: always.

    Example:
        >>> export({}, None, "model.onnx")
        Traceback (most recent call last):
        NotImplementedError: onnx.export: jax2onnx 0.17 does not convert these models for any batch and length; ...
    """
    raise NotImplementedError(
        "onnx.export: jax2onnx 0.17 does not convert these models for any batch and length; use interop.saved_model.export "
        "(fmodels export --to tensorflow) or fm.export_forward (--to jax)"
    )
