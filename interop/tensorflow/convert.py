"""Weights in both directions, and single tensors between numpy and TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow as tf

import fmodels as fm

ALIGNMENT = 64


def to_tensorflow(params: fm.Params, config: Any) -> dict[str, tf.Tensor]:
    """The tensors under the names and in the layout of transformers' PyTorch models, as `interop.torch.to_torch`.

    Tied repetitions are included, as in a `state_dict`; they share memory with what they repeat.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: its config.

    Returns:
        Name -> `tf.Tensor` in the host's memory, which it shares with `params` where the module's docstring says so.

    Raises:
        ValueError: the tree does not fit the config, or holds something else than arrays.

    Example:
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1,
        ...                                num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> from interop.tensorflow import to_tensorflow
        >>> tensors = to_tensorflow(fm.init(config, jax.random.key(0)), config)
        >>> tensors["transformer.wte.weight"].shape, tensors["transformer.h.0.attn.c_attn.weight"].shape
        (TensorShape([11, 8]), TensorShape([8, 24]))
    """
    return {name: to_tensor(array) for name, array in disk_arrays(params, config, "to_tensorflow", tied=True).items()}


def from_tensorflow(tensors_or_module: Any, config: Any) -> fm.Params:
    """A stacked tree from TensorFlow's tensors under transformers' PyTorch names; the inverse of `to_tensorflow`.

    Args:
        tensors_or_module: name -> `tf.Tensor`, `tf.Variable`, Keras variable or numpy array; or a `TFModel`; or any
            object whose `variables` have those names. Repeated tensors of a tied head are accepted.
        config: the config.

    Returns:
        A tree of jax arrays in the dtypes that came, stacked unless the config makes the layers differ.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape, of a 64-bit dtype that jax would cut to 32 bits,
            or a tied head that differs from its embedding; all are listed.
        TypeError: `tensors_or_module` is nothing of the above.

    Example:
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1,
        ...                                num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0), dtype="bfloat16")
        >>> again = from_tensorflow(to_tensorflow(params, config), config)
        >>> bool((again["layers"]["mlp"]["up"]["weight"] == params["layers"]["mlp"]["up"]["weight"]).all())
        True
    """
    named = _named(tensors_or_module)
    arrays = arrays_of("from_tensorflow", named, config)
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        names = ("float64", "int64", "uint64", "complex128")
        if wide := [f"{name!r} is {array.dtype}" for name, array in arrays.items() if array.dtype.name in names]:
            raise ValueError(
                f"from_tensorflow: {len(wide)} tensors have 64 bits, which jax would cut to 32: {', '.join(wide[:20])}"
                '; tf.cast them to float32, or set jax.config.update("jax_enable_x64", True)'
            )
    params = fm.from_disk(arrays, config)
    shared = all(isinstance(value, tf.Tensor) for value in named.values())
    return jax.tree.map(lambda a: jax.device_put(a if shared or a.flags.owndata else a.copy()), params)


def arrays_of(what: str, tensors: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """Tensors by name as arrays, of their own memory where that is possible.

    Raises:
        ValueError, TypeError: see `from_tensorflow`.
    """
    arrays = {name: to_numpy(value, f"{what}: {name!r}") for name, value in tensors.items()}
    _check_repeated(what, config, arrays)
    return arrays


def _check_repeated(what: str, config: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises if a tensor that came as the repetition of another is none: it would get lost."""
    pairs = fm.tied_names(config, module=True).items()
    unequal = [a for a, b in pairs if a in arrays and b in arrays and not _same(arrays[a], arrays[b])]
    if unequal:
        raise ValueError(
            f"{what}: the config ties {', '.join(map(repr, unequal))} to another tensor, but they differ; "
            "use dataclasses.replace(config, tie_word_embeddings=False)"
        )


def disk_arrays(params: fm.Params, config: Any, what: str, *, tied: bool = False) -> dict[str, np.ndarray]:
    """The tensors by their names on disk, as numpy arrays, which are views of the tree where the layout allows it."""
    fm.arrays.check_plain(what, params)
    fm.check(params, config)
    host = fm.tree.map_leaves(lambda path, leaf: np.asarray(leaf), params)
    return fm.to_disk(host, config, tied=tied, module=True)


class _Writable:
    """Lends an array's memory without its read-only flag, which numpy's dlpack cannot pass on; tensors are constant."""

    def __init__(self, array: np.ndarray):
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def to_tensor(array: np.ndarray) -> tf.Tensor:
    """A tensor that shares the array's memory if TensorFlow can read it where it lies, else a copy."""
    dtype = tf.as_dtype(array.dtype)
    plain = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(array.itemsize)
    aligned = array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0 and array.size > 0
    if not aligned or plain is None or dtype.name.startswith("float8") or dtype == tf.bool:
        return tf.convert_to_tensor(array)
    # As integers, because numpy's dlpack knows no bfloat16; bitcast shares memory too.
    lent = np.asarray(_Writable(array.view(plain)))
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(lent.__dlpack__()), dtype)


def to_numpy(value: Any, where: str) -> np.ndarray:
    """A view of the tensor's memory if it is on the host; the caller copies it if it can change."""
    if isinstance(value, np.ndarray | jax.Array):
        return np.asarray(value)
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        kind = type(value).__name__
        raise TypeError(f"{where} must be a tensor, variable or numpy array; got {kind}") from error
    if tf.is_symbolic_tensor(tensor):
        raise ValueError(f"{where} has no value yet; call it outside of tf.function")
    if "CPU" not in tensor.device or tensor.dtype not in (tf.float32, tf.float16, tf.bfloat16):
        return tensor.numpy()
    if tensor.dtype == tf.bfloat16:
        return np.from_dlpack(tf.bitcast(tensor, tf.uint16)).view(tf.bfloat16.as_numpy_dtype)
    return np.from_dlpack(tensor)  # pyright: ignore[reportArgumentType]


def _named(source: Any) -> dict[str, Any]:
    """Name -> tensor or variable."""
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(getattr(source, "named_variables", None), Mapping):  # a TFModel
        return dict(source.named_variables)
    if not hasattr(source, "variables"):
        raise TypeError(
            f"from_tensorflow: expected a dict of tensors or an object with `variables`, got {type(source).__name__}"
        )
    names = [str(getattr(v, "path", v.name)).removesuffix(":0") for v in source.variables]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"from_tensorflow: several variables are called {', '.join(repeated)}; pass a dict of tensors")
    return dict(zip(names, source.variables, strict=True))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, NaNs included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
