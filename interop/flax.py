"""Flax: trees by the names of transformers 4's Flax classes, and a Linen and an NNX module over our own tree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, linen, nnx

import fmodels as fm


def to_flax(params: fm.Params, config: Any) -> dict[str, Any]:
    """The tree that transformers 4's `FlaxPreTrainedModel` has as `.params`: nested dicts, each layer by its number.

    Args:
        params: the tree, stacked or a tuple of layers; also of tracers inside of `jit`.
        config: its config.

    Returns:
        Nested dicts, sorted by their keys as JAX sorts them.

    Raises:
        ValueError: the tree does not fit the config; the model has something that the Flax class has not.

    Example:
        >>> from interop import flax as ix
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2,
        ...                                num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> tree = ix.to_flax(fm.init(config, jax.random.key(0)), config)
        >>> tree["transformer"]["h"]["1"]["attn"]["c_attn"]["kernel"].shape  # the only ones with output axes first
        (24, 8)
    """
    fm.arrays.check_plain("to_flax", params)
    fm.check(params, config)
    root: dict[str, Any] = {}
    for name, array in fm.dialects.write_arrays(fm.to_disk(params, config), config, "flax").items():
        *keys, last = name.split("/")
        node = root
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = _own(array)
    return root


def from_flax(tree: Mapping[str, Any], config: Any) -> fm.Params:
    """The inverse of `to_flax`: a stacked tree, bit for bit.

    Args:
        tree: the `.params` of a `FlaxPreTrainedModel`, or what `flax.serialization` restores from its file; also as the
            entry `"params"` of a dict.
        config: the config of the model.

    Returns:
        A stacked tree (a tuple of layers where the config makes them differ), each leaf in its array's dtype.

    Raises:
        ValueError: arrays are missing, unexpected or of another shape (all listed); a head that the config ties and that
            differs from the embedding, as Llama's does after training with Flax; 64 bits, unless jax is told to keep them.
        TypeError: something that is not a dict of arrays.

    Example:
        >>> from interop import flax as ix
        >>> config = fm.models.t5.Config(vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2,
        ...                              decoder_num_layers=1, num_kv_heads=2, head_dim=4, task="seq2seq-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> again = ix.from_flax(ix.to_flax(params, config), config)
        >>> bool((again["encoder"]["embed"]["distances"] == params["encoder"]["embed"]["distances"]).all())
        True
    """
    if isinstance(tree, Mapping) and set(tree) == {"params"}:
        tree = tree["params"]
    arrays = fm.dialects.read_arrays(_flat(tree), config, "flax")
    if wide := [name for name, array in arrays.items() if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype]:
        raise ValueError(
            f"from_flax: {len(wide)} arrays have 64 bits ({wide[0]!r} is {arrays[wide[0]].dtype}), which jax would cut to 32; "
            'cast them, or set jax.config.update("jax_enable_x64", True)'
        )
    for name, known in fm.tied_names(config).items():
        if name in arrays and known in arrays and not _same(arrays[name], arrays[known]):
            raise ValueError(
                f"from_flax: the config ties {name!r} to {known!r}, but they differ; "
                "use dataclasses.replace(config, tie_word_embeddings=False)"
            )
    return jax.tree.map(_own, fm.from_disk(arrays, config))


class LinenModel(linen.Module):
    """A Linen module whose parameters are our tree: `apply({"params": params}, tokens)` takes it unchanged.

    `params` may be stacked or a tuple of layers, of any sizes that `fm.forward` takes; `init` draws a stacked tree. There is
    no dropout and no state beside the parameters.

    Attributes:
        config: the config.
        dtype: of the parameters that `init` draws.

    Example:
        >>> from interop import flax as ix
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> model = ix.LinenModel(config)
        >>> tokens = jnp.array([[300, 301, 302]])
        >>> out = jax.jit(model.apply)({"params": params}, tokens)
        >>> out.logits.shape == (1, 3, config.vocab_size)
        True
        >>> drawn = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        >>> jax.tree.structure(drawn) == jax.tree.structure(params)
        True
    """

    config: Any
    dtype: Any = "float32"

    @linen.compact
    def __call__(self, tokens: Any = None, **inputs: Any) -> fm.Output:
        """Runs the model; `inputs` are those of `fm.forward`."""
        if self.is_initializing():
            drawn = fm.init(self.config, self.make_rng("params"), dtype=self.dtype)
            params = {name: self.param(name, lambda key, part=part: part) for name, part in drawn.items()}
        elif "params" in self.variables:
            params = core.unfreeze(dict(self.variables["params"]))
        else:
            raise ValueError('LinenModel: expected {"params": tree}, got no parameters; use model.init or fm.load')
        try:
            return fm.forward(params, self.config, tokens, **inputs)
        except (KeyError, IndexError):
            fm.check(params, self.config)  # which names the leaves that are missing
            raise


class NNXModel(nnx.Module):
    """An NNX module that owns our tree, for `nnx.jit`, `nnx.grad`, `nnx.Optimizer` and `nnx.split`.

    `.tree` has a variable for each leaf: `nnx.Param`, or `nnx.Variable` where nothing is to be trained (integers, what
    PyTorch's module has as a buffer, and quantised leaves, which stay so). Variables start with the arrays of
    `params`, which are never changed.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: its config; the module's is `.config`.

    Example:
        >>> from interop import flax as ix
        >>> model = ix.NNXModel.from_pretrained(fm.assets.TINY_LLAMA)
        >>> model(jnp.array([[300, 301, 302]])).logits.shape == (1, 3, model.config.vocab_size)
        True
        >>> graph, state = nnx.split(model)
        >>> type(state["tree"]["embed"]["tokens"]).__name__
        'Param'
    """

    def __init__(self, params: fm.Params, config: Any) -> None:
        fm.check(params, config)
        self.config = nnx.static(config)
        buffers = fm.models.family(config).weights.of_module.buffers(config)
        fixed = {
            leaf for name, leaves in fm.disk_names(config, module=True).items() if name in buffers for leaf in leaves
        }

        def variable(path: str, leaf: Any) -> Any:
            plain = isinstance(leaf, jax.Array | np.ndarray)
            trained = plain and path not in fixed and jnp.issubdtype(leaf.dtype, jnp.floating)
            return (nnx.Param if trained else nnx.Variable)(jax.tree.map(jnp.asarray, leaf))

        self.tree = nnx.data(fm.tree.map_leaves(variable, params))

    def __call__(self, tokens: Any = None, **inputs: Any) -> fm.Output:
        """Runs the model; `inputs` are those of `fm.forward`."""
        return fm.forward(self.params, self.config, tokens, **inputs)

    @property
    def params(self) -> fm.Params:
        """The tree with the present values."""
        return fm.tree.map_leaves(lambda path, variable: variable.get_value(), self.tree)

    def generate(self, tokens: Any, **options: Any) -> fm.Generated:
        """Continues prompts; `options` are those of `fm.generate`."""
        return fm.generate(self.params, self.config, tokens, **options)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Self:
        """A module from a checkpoint; `source` and `options` are those of `fm.load`."""
        return cls(*fm.load(source, **options))

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Saves a checkpoint; `options` are those of `fm.save`."""
        fm.save(self.params, self.config, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads a checkpoint; `repo_id` and `options` are those of `fm.push_to_hub`. Returns the address."""
        return fm.push_to_hub(self.params, self.config, repo_id, **options)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The arrays by their keys, joined by "/"."""
    if isinstance(tree, Mapping):
        return {
            name: leaf for key, node in tree.items() for name, leaf in _flat(node, f"{path}/{key}".lstrip("/")).items()
        }
    if not hasattr(tree, "dtype") or not hasattr(tree, "shape"):
        raise TypeError(
            f"from_flax: expected nested dicts of arrays, got {type(tree).__name__} at {path!r}; pass model.params"
        )
    return {path: tree}


def _own(array: Any) -> jax.Array:
    """The array as JAX's, whose memory nobody else can change."""
    return array if isinstance(array, jax.Array) else jnp.array(array, copy=True)


def _same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
