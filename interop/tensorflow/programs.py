"""JAX functions as TensorFlow's: what `jax.export` makes of them, in the op that runs StableHLO.

`jax.experimental.jax2tf` does the same, in the newest StableHLO that jax's own rules allow. That is newer than what a TensorFlow
of the same month reads: TensorFlow 2.21 does not load programs of jax 0.11 (seen with 0.11.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.extend import mlir
from tensorflow.compiler.tf2xla.python import xla

STABLEHLO = "1.7.0"
"""The version that programs are written in. StableHLO promises that newer ones read it for five years; TensorFlow 2.21 does."""


def convert(
    function: Callable[..., Any],
    shapes: Sequence[Any],
    *,
    constraints: Sequence[str] = (),
    gradient: bool = False,
    platforms: Sequence[str],
) -> Callable[..., Any]:
    """The function on trees of TensorFlow's tensors and variables.

    Args:
        function: from trees of arrays to a tree of arrays.
        shapes: for each argument, a tree of texts like `"b, t"`, or None for the shapes that the tensors have.
        constraints: such as `"t <= 512"`.
        gradient: whether TensorFlow can differentiate it, as often as it likes.
        platforms: of JAX, where it shall run.

    Example:
        >>> import jax.numpy as jnp
        >>> double = convert(lambda x: {"y": 2 * x}, ["n"], gradient=True, platforms=["cpu"])
        >>> x = tf.Variable([1.0, 2.0, 3.0])
        >>> with tf.GradientTape() as tape:
        ...     y = double(x)["y"]
        >>> y.numpy().tolist(), tape.gradient(y, x).numpy().tolist()
        ([2.0, 4.0, 6.0], [2.0, 2.0, 2.0])
        >>> cube = convert(lambda x: x**3, [None], gradient=True, platforms=["cpu"])
        >>> with tf.GradientTape() as outer:
        ...     with tf.GradientTape() as inner:
        ...         y = cube(x)
        ...     slope = inner.gradient(y, x)
        >>> outer.gradient(slope, x).numpy().tolist()
        [6.0, 12.0, 18.0]
    """

    def run(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        tensors = [tf.convert_to_tensor(leaf) for leaf in leaves]
        known = [
            [1 if n is None else n for n in tensor.shape] for tensor in tensors
        ]  # one that is not known has a letter
        given = [jax.ShapeDtypeStruct(s, t.dtype.as_numpy_dtype) for s, t in zip(known, tensors, strict=True)]
        specs = jax.export.symbolic_args_specs(
            jax.tree.unflatten(structure, given), tuple(shapes), constraints=constraints
        )
        exported = jax.export.export(jax.jit(function), platforms=platforms)(*specs)
        outputs = _differentiable(exported)(*tensors) if gradient else _call(exported, tensors)
        return jax.tree.unflatten(exported.out_tree, outputs)

    return run


def _differentiable(exported: jax.export.Exported) -> Callable[..., list[tf.Tensor]]:
    @tf.custom_gradient
    def run(*tensors: tf.Tensor) -> Any:
        outputs = _call(exported, tensors)

        def gradient(*cotangents: Any) -> list[tf.Tensor | None]:
            given = [
                tf.zeros_like(output, tf.bool) if not output.dtype.is_floating else cotangent
                for cotangent, output in zip(cotangents, outputs, strict=True)
            ]
            found = _differentiable(exported.vjp())(*tensors, *given)
            return [g if t.dtype.is_floating else None for g, t in zip(found, tensors, strict=True)]

        return outputs, gradient

    return run


def _call(exported: jax.export.Exported, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The outputs of the program, whose batches and lengths may be anything."""
    outputs: Any = xla.call_module(
        [tensors[i] for i in exported.module_kept_var_idx],
        version=exported.calling_convention_version,
        module=mlir.serialize_portable_artifact(exported.mlir_module(), STABLEHLO),
        Sout=[tf.TensorShape([n if isinstance(n, int) else None for n in out.shape]) for out in exported.out_avals],
        Tout=[_dtype(out.dtype) for out in exported.out_avals],
        platforms=[platform.upper() for platform in exported.platforms],
    )
    return list(outputs)


def _dtype(dtype: Any) -> tf.DType:
    """TensorFlow's; of gradients of integers, which hold nothing, bool."""
    return tf.bool if dtype == jax.dtypes.float0 else tf.as_dtype(np.dtype(dtype))
