"""One model, computed in JAX, in the PyTorch and TensorFlow wrappers and in transformers, on the same random input.

Each run gives the hidden states of every layer, the outputs and, of a random linear function of them, the gradients.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.api import CHOICE_TASKS, forward
from fmodels.layout import to_disk
from fmodels.models import Config, family
from fmodels.types import Array, Output, Params

LENGTH = 12
"""Tokens in a row of the random input."""
HEADS = ("logits", "sequence_logits")
FIELDS = ("hidden_states", "hidden", "pooled", *HEADS)
THEIRS = {"token_types": "token_type_ids", "decoder_tokens": "decoder_input_ids"}
"""Our name of an input, beside tokens and mask, -> transformers'."""


class Given(NamedTuple):
    """The random input: `tokens`, `mask`, what else the model takes, and a random weight for every output's elements."""

    tokens: np.ndarray
    mask: np.ndarray
    others: dict[str, np.ndarray]
    seed: int

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """What the output `name` is multiplied with before everything is summed to the loss; 0 at padded places."""
        random = np.random.default_rng([self.seed, *name.encode()])
        weight = random.standard_normal(shape).astype(np.float32)
        return np.where(self.where(shape), weight, np.float32(0))

    def where(self, shape: tuple[int, ...]) -> np.ndarray:
        """True at the elements that are compared: all but padded places."""
        if len(shape) > self.mask.ndim and shape[: self.mask.ndim] == self.mask.shape:
            return np.broadcast_to(self.mask.reshape(self.mask.shape + (1,) * (len(shape) - self.mask.ndim)), shape)
        return np.ones(shape, bool)


class Result(NamedTuple):
    """What one way to compute the model gives: outputs by the names of `fm.Output`, gradients by names on disk."""

    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    note: str = ""


def random_input(params: Params, config: Config, seed: int, other: Params | None) -> Given:
    """Two rows of random tokens, the second padded on the right, which all frameworks understand alike."""
    random = np.random.default_rng(seed)
    tables = [p["embed"] | p.get("decoder", {}).get("embed", {}) for p in (params, other) if p is not None]
    vocabulary = min(table["tokens"].shape[0] for table in tables)
    length = min([LENGTH, *(table["positions"].shape[0] for table in tables if "positions" in table)])
    pad = config.pad_token_id if config.pad_token_id is not None and 0 <= config.pad_token_id < vocabulary else None
    # Without a pad token transformers classifies sequences one at a time.
    rows = 1 if config.task == "sequence-classification" and pad is None else 2
    shape = (rows, 3, length) if config.task in CHOICE_TASKS else (rows, length)
    mask = np.ones(shape, bool)
    mask[1:, ..., length - length // 4 :] = False
    tokens = random.integers(0, vocabulary, shape)
    if pad is not None and vocabulary > 1:
        tokens = np.where(tokens == pad, (pad + 1) % vocabulary, tokens)
    tokens = np.where(mask, tokens, 0 if pad is None else pad).astype(np.int32)
    types = [table["types"].shape[0] for table in tables if "types" in table]
    others = {"token_types": random.integers(0, min(types), shape).astype(np.int32)} if types else {}
    if config.is_encoder_decoder and config.task == "sequence-classification":  # at the last end token of the tokens
        tokens = np.where(tokens == config.eos_token_ids[0], pad or 0, tokens).astype(np.int32)
        tokens[np.arange(rows), mask.sum(-1) - 1] = config.eos_token_ids[0]
    elif config.is_encoder_decoder:
        others["decoder_tokens"] = random.integers(0, vocabulary, shape).astype(np.int32)
    return Given(tokens, mask, others, seed)


def _chosen(names: Sequence[str]) -> list[str]:
    """The outputs that make the loss: the heads' if there are any, else the hidden states and the pooler's."""
    heads = [name for name in HEADS if name in names]
    return heads or [name for name in ("hidden", "pooled") if name in names]


def run_jax(params: Params, config: Config, given: Given, *, gradients: bool) -> Result:
    """The reference: `fm.forward`, on the tree as it is."""

    def run(params: Params) -> Output:
        others: dict[str, Any] = {name: jnp.asarray(value) for name, value in given.others.items()}
        mask = jnp.asarray(given.mask)
        return forward(params, config, jnp.asarray(given.tokens), mask=mask, **others, hidden_states=True)

    def loss(params: Params) -> tuple[Array, Output]:
        out = run(params)
        fields = {name: value for name, value in out._asdict().items() if value is not None}
        weighted = [jnp.sum(fields[name] * given.weight(name, fields[name].shape)) for name in _chosen(list(fields))]
        return sum(weighted, jnp.float32(0)), out

    if gradients:
        found, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        buffers = family(config).weights.of_module.buffers(config)  # which PyTorch does not train
        named = {
            name: np.asarray(value)
            for name, value in to_disk(found, config, module=True).items()
            if name not in buffers
        }
    else:
        out, named = run(params), {}
    return Result({f: np.asarray(getattr(out, f)) for f in FIELDS if getattr(out, f) is not None}, named)


def _run_torch(params: Params, config: Config, folder: Path, given: Given, *, gradients: bool) -> Result:
    import torch

    from interop.torch import TorchModel

    module = TorchModel(params, config)
    inputs = {"tokens": given.tokens, "mask": given.mask, **given.others}
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.set_grad_enabled(gradients):
        out = module(**tensors, hidden_states=True)
        outputs = {name: getattr(out, name) for name in FIELDS if getattr(out, name, None) is not None}
        return _finish_torch(module, outputs, given, gradients=gradients)


def _finish_torch(module: Any, outputs: dict[str, Any], given: Given, *, gradients: bool, note: str = "") -> Result:
    """The outputs and, after the backward pass, the gradients of a `torch.nn.Module`."""
    import torch

    named: dict[str, np.ndarray] = {}
    if gradients:
        weights = {
            name: torch.tensor(given.weight(name, tuple(outputs[name].shape))) for name in _chosen(list(outputs))
        }
        torch.stack([(outputs[name] * weight).sum() for name, weight in weights.items()]).sum().backward()
        for name, parameter in module.named_parameters(remove_duplicate=False):
            gradient = parameter.grad
            named[name] = np.zeros(tuple(parameter.shape), np.float32) if gradient is None else gradient.numpy()
    return Result({name: value.detach().numpy() for name, value in outputs.items()}, named, note)


def _run_tensorflow(params: Params, config: Config, folder: Path, given: Given, *, gradients: bool) -> Result:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    from interop.tensorflow import TFModel

    module = TFModel(params, config)
    inputs = {"tokens": given.tokens, "mask": given.mask, **given.others}
    tensors: dict[str, Any] = {name: tf.constant(value) for name, value in inputs.items()}
    with tf.GradientTape() as tape:
        out = module(**tensors)
        outputs = {name: getattr(out, name) for name in FIELDS if getattr(out, name, None) is not None}
        chosen = {name: outputs[name] for name in _chosen(list(outputs))}
        weighted = [tf.reduce_sum(x * given.weight(name, tuple(x.shape))) for name, x in chosen.items()]
        loss = tf.add_n(weighted)
    named: dict[str, np.ndarray] = {}
    if gradients:
        variables = dict(module.named_variables)
        found = tape.gradient(loss, list(variables.values()), unconnected_gradients=tf.UnconnectedGradients.ZERO)
        named = {name: tf.convert_to_tensor(g).numpy() for name, g in zip(variables, found, strict=True)}
    note = "gives no inner layers; what it gives is compared"
    return Result({name: value.numpy() for name, value in outputs.items()}, named, note)


def _run_transformers(params: Params, config: Config, folder: Path, given: Given, *, gradients: bool) -> Result:
    import torch

    model, note = read_with_transformers(params, config, folder)
    inputs = {"input_ids": torch.tensor(given.tokens).long(), "attention_mask": torch.tensor(given.mask).long()}
    inputs |= {THEIRS[name]: torch.tensor(value).long() for name, value in given.others.items()}
    if config.task == "double-heads":
        inputs["mc_token_ids"] = torch.tensor(np.where(given.mask, np.arange(given.mask.shape[-1]), 0).argmax(-1))
    model.config.use_cache = False
    with torch.set_grad_enabled(gradients):
        outputs = _transformers_outputs(model(**inputs, output_hidden_states=True, return_dict=True))
        return _finish_torch(model, outputs, given, gradients=gradients, note=note)


def _transformers_outputs(out: Any) -> dict[str, Any]:
    """By the names of `fm.Output`."""
    import torch

    states = (
        out.get("hidden_states") or out.decoder_hidden_states
    )  # GPT-2's last is by choices already, where there are choices
    same = [state for state in states if state.shape[-1] == states[0].shape[-1]]  # not OPT's last, which is projected
    found = {"hidden_states": torch.stack([state.reshape(states[0].shape) for state in same])}
    if out.get("last_hidden_state") is not None:
        found["hidden"] = out.last_hidden_state
    if out.get("pooler_output") is not None:
        found["pooled"] = out.pooler_output
    if out.get("start_logits") is not None:
        found["logits"] = torch.stack([out.start_logits, out.end_logits], dim=-1)
    names = {
        "logits": "logits",
        "prediction_logits": "logits",
        "seq_relationship_logits": "sequence_logits",
        "mc_logits": "sequence_logits",
    }
    found |= {ours: out[theirs] for theirs, ours in names.items() if out.get(theirs) is not None}
    return found


def read_with_transformers(params: Params, config: Config, folder: Path) -> tuple[Any, str]:
    """The model of transformers itself in float32, read from the folder by its own reader where it can be; and a note.

    Raises:
        ImportError: torch or transformers is not installed.
        NotImplementedError: transformers has no such model (with pruned heads).
    """
    from interop.transformers import to_transformers

    if config.pruned_heads:
        raise NotImplementedError(
            "transformers 5 cannot represent pruned heads; mask_heads computes the same in full shapes"
        )

    with _quiet():
        model = to_transformers(params, config)
        if not folder.is_dir() or config.quantization is not None:
            why = "A is not a folder" if config.quantization is None else "A is quantised"
            return model.eval(), f"its weights were handed over, as {why}"
        # transformers reads config.json and the weights by itself: nothing of ours is between the disk and its numbers.
        kind: Any = type(model)
        how = {"experts_implementation": "eager"} if hasattr(config, "num_experts") else {}  # others want even sizes
        read = kind.from_pretrained(folder, dtype="float32", attn_implementation=config.reference, **how)
    return read.eval(), "read the folder by itself"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars of others off the terminal; what they wrote is shown if they fail."""
    sink = io.StringIO()
    with contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
        yield


RUNNERS: dict[str, Callable[..., Result]] = {
    "torch": _run_torch,
    "tensorflow": _run_tensorflow,
    "transformers": _run_transformers,
}
