"""State dicts in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from torch import Tensor, nn

import fmodels as fm
from interop.torch.arrays import from_numpy, is_too_wide, kind_of, memory, on_host, to_numpy


def to_torch(params: fm.Params, config: Any) -> dict[str, Tensor]:
    """The tensors of a tree by transformers' names, as `state_dict()` gives them, tied repetitions included.

    Nothing is copied but what `copied_tensors` lists: **the tensors are the memory of the tree's arrays**, which JAX
    takes to be constant. Clone what you want to change in place. Tensors that PyTorch keeps transposed (GPT-2's
    `Conv1D`) are views with strides; `safetensors.torch.save_file` wants `.contiguous()` ones.

    Args:
        params: the tree, stacked or a tuple of layers. Arrays that are not on one CPU device are copied to it.
        config: its config.

    Returns:
        name -> tensor, in the order of an `nn.Module`: a module's own tensors before those of its children.

    Raises:
        ValueError: the tree does not fit the config.
        TypeError: a leaf that PyTorch has no type for, or that is traced by `jit`.

    Example:
        >>> import jax
        >>> from interop import torch as it
        >>> config = fm.models.llama.Config(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
        ...                                 num_kv_heads=1, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0), dtype="bfloat16")
        >>> tensors = it.to_torch(params, config)
        >>> tensors["model.layers.1.self_attn.q_proj.weight"].shape, tensors["lm_head.weight"].dtype
        (torch.Size([8, 8]), torch.bfloat16)
        >>> tensors["lm_head.weight"].data_ptr() == params["lm_head"]["weight"].unsafe_buffer_pointer()
        True
    """
    fm.check(params, config)
    if any(hasattr(leaf, "dequantize") for leaf in fm.tree.flatten(params).values()):
        fm.arrays.check_plain("to_torch", params)
    arrays = fm.to_disk(fm.tree.map_leaves(on_host, params), config, tied=True, module=True)
    shared: dict[Any, Tensor] = {}
    for array in arrays.values():
        shared.setdefault(memory(array), from_numpy(array))
    return {name: shared[memory(arrays[name])] for name in _in_module_order(arrays)}


def copied_tensors(config: Any) -> list[str]:
    """The tensors that `to_torch` copies: those in which several leaves lie side by side.

    Example:
        >>> from interop import torch as it
        >>> it.copied_tensors(fm.models.gpt2.Config(num_layers=1))
        ['h.0.attn.c_attn.weight', 'h.0.attn.c_attn.bias']
        >>> it.copied_tensors(fm.models.llama.Config())
        []
    """
    return [name for name, leaves in fm.disk_names(config, module=True).items() if len(leaves) > 1]


def from_torch(source: Mapping[str, Tensor] | nn.Module, config: Any) -> fm.Params:
    """The inverse of `to_torch`: a stacked tree from a state dict, bit for bit. It shares no memory with PyTorch.

    Args:
        source: a state dict by transformers' names, or an `nn.Module` that has one. Tied repetitions and buffers that
            nothing reads are accepted; tensors may need gradients and may lie on any device.
        config: the config of the model.

    Returns:
        A stacked tree (a tuple of layers where the config makes them differ), each leaf in its tensor's dtype.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (all listed); a tied head that differs from the
            embedding; tensors of 64 bits, unless jax is told to keep them.
        TypeError: something that is not a dict of tensors.

    Example:
        >>> import jax
        >>> from interop import torch as it
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2,
        ...                                num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> again = it.from_torch(it.to_torch(params, config), config)
        >>> bool((again["layers"]["mlp"]["up"]["weight"] == params["layers"]["mlp"]["up"]["weight"]).all())
        True
    """
    arrays = arrays_of("from_torch", source.state_dict() if isinstance(source, nn.Module) else source, config)
    params = fm.from_disk(arrays, config)
    if wide := [path for path, leaf in fm.tree.flatten(params).items() if is_too_wide(leaf.dtype)]:
        raise ValueError(
            f"from_torch: {len(wide)} leaves have 64 bits ({wide[0]!r} is {fm.tree.get(params, wide[0]).dtype}), which jax "
            'would cut to 32; convert the module with .float(), or set jax.config.update("jax_enable_x64", True)'
        )
    stacked = fm.tree.is_stacked(params)

    def own(path: str, leaf: Any) -> Any:
        fresh = stacked and "layers" in path.split(".")  # stacking has copied; the others are views of PyTorch's memory
        return jax.tree.map(lambda part: jnp.asarray(part) if fresh else jnp.array(part, copy=True), leaf)

    return jax.block_until_ready(fm.tree.map_leaves(own, params))


def arrays_of(
    what: str, tensors: Mapping[str, Any], config: Any, kinds: tuple[type, ...] = (Tensor,)
) -> dict[str, np.ndarray]:
    """A state dict's tensors as arrays of their own memory; arrays of numpy, if they are of the `kinds`, stay as they are.

    Raises:
        ValueError, TypeError: see `from_torch`.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{what}: expected a state dict or an nn.Module, got {kind_of(tensors)}; pass model.state_dict()"
        )
    odd = {name: kind_of(value) for name, value in tensors.items() if not isinstance(value, kinds)}
    if odd:
        raise TypeError(
            f"{what}: not tensors: {', '.join(f'{name!r} ({kind})' for name, kind in odd.items())}; "
            "pass the state dict itself, of arrays use torch.from_numpy"
        )
    arrays = {
        name: value if isinstance(value, np.ndarray) else to_numpy(value, f"{what}: {name!r}")
        for name, value in tensors.items()
    }
    _check_tied(what, arrays, config)
    return arrays


def _in_module_order(names: Iterable[str]) -> list[str]:
    """Sorts names as `state_dict()` has them: a module's own tensors, then those of its children.

    Example:
        >>> _in_module_order(["cls.transform.weight", "cls.bias", "bert.weight"])
        ['cls.bias', 'cls.transform.weight', 'bert.weight']
    """

    def walk(node: Any) -> list[str]:
        children = list(node.values() if isinstance(node, Mapping) else node)
        own = [child for child in children if isinstance(child, str)]
        return own + [name for child in children if not isinstance(child, str) for name in walk(child)]

    return walk(fm.tree.unflatten({name: name for name in names}))


def _check_tied(what: str, arrays: Mapping[str, np.ndarray], config: Any) -> None:
    """Raises where a repetition, which is not read, differs from what it should repeat."""
    for name, known in fm.tied_names(config, module=True).items():
        if name not in arrays or known not in arrays:
            continue
        a, b = arrays[name], arrays[known]
        same = memory(a) == memory(b) or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
        if not same:
            raise ValueError(
                f"{what}: the config ties {name!r} to {known!r}, but they differ; "
                "use dataclasses.replace(config, tie_word_embeddings=False)"
            )
