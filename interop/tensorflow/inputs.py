"""The inputs of `TFModel`: TensorFlow's tensors by our names, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

ALIASES = {
    "input_ids": "tokens",
    "attention_mask": "mask",
    "position_ids": "positions",
    "token_type_ids": "token_types",
    "decoder_input_ids": "decoder_tokens",
    "decoder_attention_mask": "decoder_mask",
}
"""transformers' name of an input -> ours."""


def rank_of(config: Any) -> int:
    """Of the tokens: `(b t)`, or `(b n t)` for tasks with `n` choices."""
    return 3 if config.task in ("multiple-choice", "double-heads") else 2


def read_inputs(what: str, config: Any, given: Mapping[str, Any], aliases: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    """The inputs that are there, as tensors, by our names; checks what can be known before the values."""
    inputs = dict(given)
    for name, value in aliases.items():
        own = ALIASES.get(name, name)
        if own not in given:
            raise TypeError(f"{what}: unknown input {name!r}; expected {', '.join((*given, *ALIASES))}")
        if value is not None and inputs[own] is not None:
            raise TypeError(f"{what}: {name} and {own} are the same input; pass one of them")
        inputs[own] = value if inputs[own] is None else inputs[own]
    tensors = {name: _tensor(what, name, value) for name, value in inputs.items() if value is not None}
    if "tokens" not in tensors:
        raise ValueError(f"{what}: tokens (or input_ids) are missing")
    shape = tensors["tokens"].shape
    problems = []
    rank = rank_of(config)
    if shape.rank != rank:
        letters = "(b n t)" if rank == 3 else "(b t)"
        problems.append(f"tokens have shape {letters} for task {config.task!r}; got {shape}")
    elif 0 in shape:
        problems.append(f"there are no tokens; tokens have shape {shape}")
    for name, tensor in tensors.items():
        other = "decoder_tokens" if length_of(name, tensors) == "s" else "tokens"
        if other in tensors and not tensor.shape.is_compatible_with(tensors[other].shape):
            problems.append(f"{name} has shape {tensor.shape}, {other} have {tensors[other].shape}")
        masks = name.endswith("mask")
        if not (tensor.dtype.is_integer or (masks and (tensor.dtype.is_bool or tensor.dtype.is_floating))):
            wanted = "bool or 0/1" if masks else "integers, int32 or int64"
            problems.append(f"{name} must be {wanted}; got {tensor.dtype.name}")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))
    return tensors


def _tensor(what: str, name: str, value: Any) -> tf.Tensor:
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what}: {name} must be a tensor whose rows are equally long, got {type(value).__name__}; pad them, and pass mask="
        ) from error


def check_values(tables: Any, inputs: Mapping[str, tf.Tensor]) -> None:
    """Checks the inputs against the tables that they index, as far as they are known."""
    problems = []
    length, table = inputs["tokens"].shape[-1], tables.positions
    if length is not None and table is not None and length > table and "positions" not in inputs:
        problems.append(f"{length} tokens are more than the {table} positions of this model")
    for name, what in (
        ("tokens", "the vocabulary; see resize_token_embeddings"),
        ("decoder_tokens", "the vocabulary; see resize_token_embeddings"),
        ("positions", "the table of positions"),
        ("token_types", "the table of token types"),
    ):
        size = getattr(tables, name)
        if size is None or name not in inputs or tf.is_symbolic_tensor(inputs[name]):
            continue
        low, high = int(tf.reduce_min(inputs[name])), int(tf.reduce_max(inputs[name]))
        if low < 0 or high >= size:
            problems.append(f"{name} reach from {low} to {high}, outside of 0 … {size - 1}, {what}")
    for name, tensor in inputs.items():
        if name.endswith("mask") and not (tensor.dtype.is_bool or tf.is_symbolic_tensor(tensor)):
            low, high = float(tf.reduce_min(tensor)), float(tf.reduce_max(tensor))
            if not bool(tf.reduce_all((tensor == 0) | (tensor == 1))):
                problems.append(f"{name} holds 1 for tokens and 0 for padding; got numbers from {low:g} to {high:g}")
    if problems:
        raise ValueError("TFModel: " + "; ".join(problems))


def kind_of(name: str) -> tf.DType:
    """The type of an input."""
    return tf.bool if name.endswith("mask") else tf.int32


def length_of(name: str, names: Iterable[str]) -> str:
    """The letter of an input's length: a decoder has its own, and positions are the decoder's."""
    return "s" if "decoder_tokens" in names and (name.startswith("decoder_") or name == "positions") else "t"
