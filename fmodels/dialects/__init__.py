"""The names that other frameworks give to the same tensors: between their files and those of PyTorch's transformers.

A dialect is a module with `read(tensors, config)`, which gives the names and axes of PyTorch's files, and its inverse
`write(tensors, config)`; both are lazy. One whose files say what model they hold has `config(metadata, tensors, *, task)` and
`metadata(config, given)` as well, and with the tokenizer in them `with_tokenizer(given, folder, config)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmodels.models import Config, family
from fmodels.weights import Tensor

DIALECTS: dict[str, str | None] = {
    "pt": None,
    "mlx": None,
    "fmodels": "tree",
    "flax": "flax",
    "tf": "tensorflow",
    "tf-original": "tensorflow_original",
    "gguf": "gguf",
}
"""Name, as in the metadata of safetensors -> module here; None where the names are PyTorch's."""


def read(tensors: Mapping[str, Tensor], config: Config, name: str) -> dict[str, Tensor]:
    """The tensors of a file under the names that PyTorch's files have for them; names that are not known stay.

    Args:
        tensors: by the names in the file.
        config: of the model.
        name: of the dialect.

    Raises:
        ValueError: an unknown dialect.
    """
    module = _module(name)
    return dict(tensors) if module is None else module.read(tensors, config)


def write(tensors: Mapping[str, Tensor], config: Config, name: str) -> dict[str, Tensor]:
    """The inverse of `read`; PyTorch's names are those of old files where the checkpoint had them (`Config.old_names`)."""
    module = _module(name)
    if module is not None:
        return module.write(tensors, config)
    weights = family(config).weights
    return {weights.old_name(name) if config.old_names else name: tensor for name, tensor in tensors.items()}


def read_arrays(arrays: Mapping[str, Any], config: Config, name: str) -> dict[str, Any]:
    """`read` for arrays, of any library that has `dtype`, `shape` and `T`, or for what JAX traces."""
    return {key: tensor.array() for key, tensor in read(_tensors(arrays), config, name).items()}


def write_arrays(arrays: Mapping[str, Any], config: Config, name: str) -> dict[str, Any]:
    """The inverse of `read_arrays`."""
    return {key: tensor.array() for key, tensor in write(_tensors(arrays), config, name).items()}


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: Tensor.lazy(key, array.dtype, array.shape, lambda array=array: array) for key, array in arrays.items()}


def config_of(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], *, task: str | None = None) -> Config | None:
    """The config that a file's metadata, and which tensors it has, hold, for the dialects whose files hold one."""
    module = _module(metadata.get("format", "pt"))
    return module.config(metadata, tensors, task=task) if hasattr(module, "config") else None


def metadata_of(
    config: Config, name: str, given: Mapping[str, Any] | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """The metadata of a file that holds a model with this config, and what `given` and the checkpoint's folder have beside."""
    module = _module(name)
    if folder is not None and hasattr(module, "with_tokenizer"):
        given = module.with_tokenizer(given or {}, folder, config)
    own = module.metadata(config, given) if hasattr(module, "metadata") else given or {}
    return {**own, "format": name}


def has_own_metadata(source: str, target: str) -> bool:
    """Whether what a file of one dialect says beside its tensors goes into a file of the other."""
    return source == target and hasattr(_module(source), "metadata")


def _module(name: str) -> Any:
    if name not in DIALECTS:
        raise ValueError(
            f"load: the metadata of the weights name the format {name!r}; expected one of {', '.join(DIALECTS)}"
        )
    module = DIALECTS[name]
    return None if module is None else importlib.import_module(f"fmodels.dialects.{module}")
