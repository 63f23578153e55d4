"""A TensorFlow SavedModel with signatures for `forward` and for `generate`, which runs where there is no JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tensorflow as tf

import fmodels as fm
from interop.tensorflow.programs import convert

LONGEST = 2**17
"""Texts up to so many tokens are padded to buckets."""


def export(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    inputs: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    options: fm.GenerationConfig | None = None,
    per_call: Sequence[str] | None = None,
    layers: str = "list",
) -> None:
    """Writes a SavedModel for inference, which needs TensorFlow and neither JAX nor fmodels to run.

    Its signatures take inputs by name, of any batch and length; the weights are variables of `loaded.weights`, by their
    PyTorch names, and no constants of the program:

    * `serving_default`: `fm.forward`; takes int32, returns what the fields of `fm.Output` hold. Tokens are not checked against
      the vocabulary.
    * `generate`, with `max_new_tokens`: `fm.generate`, greedy, sampling or with beams; takes `tokens`, `mask` and the scalars of
      `per_call`; returns `tokens` `(b t+n)`, `lengths` and `logprobs` as in `fm.Generated`, with beams `sequence_scores` too.
      Padding on either side changes no token. Prompts are padded to the buckets of `fm.generate`, so that few lengths are
      compiled. What a prompt may not be is checked where the platform of the graph has assertions: TPUs have none.

    It runs where XLA does: on a CPU, GPU or TPU, not in TensorFlow.js or TensorFlow Lite. It is for serving and not for
    keeping: JAX promises to load what it exports for six months. What lasts is a checkpoint (`save_pretrained`). Drawing and
    beams sort the whole vocabulary at each step, because TensorFlow 2.21 cannot read what jax makes of `jax.lax.top_k`.

    Args:
        model: a `TFModel`.
        folder: made if it is not there.
        inputs: of `serving_default`, as for `fm.export_forward`.
        max_new_tokens: how many tokens a call of `generate` adds at most; None for no such signature.
        options: as for `fm.generate`.
        per_call: options that are inputs of `generate`, as for `fm.export_generate`.
        layers: `"list"` runs the layers one after the other; `"stacked"` compiles faster where there are many, and copies
            all weights at each call.

    Raises:
        ValueError: inputs that the model does not take; what `fm.export_generate` refuses.
        NotADirectoryError: `folder` is a file.
        NotImplementedError: other ways of decoding than greedy, sampling and beams.

    Example:
        >>> import tempfile
        >>> from interop.tensorflow import TFModel
        >>> folder = tempfile.mkdtemp()
        >>> export(TFModel.from_pretrained(fm.assets.TINY_LLAMA, dtype="float32"), folder, max_new_tokens=3)
        >>> sorted(tf.saved_model.load(folder).signatures)
        ['generate', 'serving_default']
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(
            f"export: expected a folder, {os.fspath(folder)!r} is a file; give a folder or remove the file"
        )
    variables, config = dict(model.named_variables), model.config
    shapes = {name: jax.ShapeDtypeStruct(v.shape, v.dtype.as_numpy_dtype) for name, v in variables.items()}
    params = jax.eval_shape(lambda tensors: fm.from_disk(tensors, config), shapes)
    forward = fm.export.forward_program(params, config, inputs)
    functions = {"serving_default": (forward, _convert(forward, variables, config, layers))}
    if max_new_tokens is not None:
        program = fm.export.generate_program(
            params, config, max_new_tokens=max_new_tokens, options=options, per_call=per_call
        )
        functions["generate"] = (program, _around(program, _convert(program, variables, config, layers)))
    elif options is not None or per_call is not None:
        raise ValueError("export: options and per_call are of the signature `generate`; pass max_new_tokens, too")
    module = tf.Module(name=model.name)
    module.weights = variables  # pyright: ignore[reportAttributeAccessIssue]
    signatures = {}
    with fm.export.target(fm.export.Target(recent=False)):
        for name, (program, function) in functions.items():
            specs = {
                input: tf.TensorSpec(
                    [None] * len(axes.split()), tf.float32 if dtype == "float32" else tf.int32, name=input
                )
                for input, (axes, dtype) in program.inputs.items()
            }
            signatures[name] = tf.function(function, autograph=False).get_concrete_function(**specs)
    tf.saved_model.save(module, os.fspath(folder), signatures=signatures)


def _convert(
    program: fm.export.Program, variables: dict[str, tf.Variable], config: Any, layers: str
) -> Callable[..., dict[str, tf.Tensor]]:
    """The program as a TensorFlow function of its inputs, of any batch and length."""

    def run(tensors: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        return program.function(fm.from_disk(tensors, config, layers=layers), given)

    shapes: Any = [None, {name: axes.replace(" ", ", ") for name, (axes, _) in program.inputs.items()}]
    constraints = [f"{letter} <= {size}" for letter, size in program.limits.items()]
    converted = convert(run, shapes, constraints=constraints, platforms=fm.export.PLATFORMS)
    dtypes = {name: tf.as_dtype(dtype) for name, (_, dtype) in program.inputs.items()}
    return lambda **given: converted(variables, {name: tf.cast(x, dtypes[name]) for name, x in given.items()})


def _around(
    program: fm.export.Program, run: Callable[..., dict[str, tf.Tensor]]
) -> Callable[..., dict[str, tf.Tensor]]:
    """What `fm.generate` does on the host: checks, buckets, and the prompt before the new tokens."""
    info, limit = program.info, program.limits.get("t")
    widths = [fm.export.width(1, limit)]
    while widths[-1] < (limit or LONGEST):
        widths.append(fm.export.width(widths[-1] + 1, limit))

    def generate(tokens: tf.Tensor, mask: tf.Tensor, **per_call: tf.Tensor) -> dict[str, tf.Tensor]:
        batch, length = tf.unstack(tf.shape(tokens))
        tf.debugging.assert_equal(tf.shape(mask), tf.shape(tokens), "generate: mask is not as large as tokens")
        tf.debugging.assert_non_negative(tokens, "generate: tokens are negative")
        tf.debugging.assert_less(tokens, info["vocabulary"], "generate: tokens are outside of the vocabulary")
        tf.debugging.assert_positive(
            tf.reduce_max(tf.cast(mask != 0, tf.int32), axis=1), "generate: a row has no real token"
        )
        if limit is not None:
            tf.debugging.assert_less_equal(length, limit, "generate: more tokens than the model has positions for")
        if "temperature" in per_call:
            tf.debugging.assert_positive(per_call["temperature"], "generate: temperature is above 0")
        if "max_new_tokens" in per_call:
            tf.debugging.assert_positive(per_call["max_new_tokens"], "generate: max_new_tokens is at least 1")
            tf.debugging.assert_less_equal(
                per_call["max_new_tokens"], info["max_new_tokens"], "generate: max_new_tokens is more than was exported"
            )
        wide = tf.constant([*widths, tf.int32.max], tf.int32)
        width = tf.reduce_min(tf.boolean_mask(wide, wide >= length))
        more = tf.where(width == tf.int32.max, 0, width - length)
        encoder = info["start"] is not None
        fill = [[0, 0], [0, more] if encoder else [more, 0]]
        out = run(tokens=tf.pad(tokens, fill), mask=tf.pad(mask, fill), **per_call)
        prompt = tf.tile(tf.constant([info["start"]], tf.int32), [batch, 1]) if encoder else tokens
        prompt = tf.repeat(prompt, info["sequences"], axis=0)
        count = tf.maximum(tf.reduce_max(out["lengths"]), 1)
        return {
            **out,
            "tokens": tf.concat([prompt, out["tokens"][:, :count]], axis=1),
            "logprobs": out["logprobs"][:, :count],
        }

    return generate
