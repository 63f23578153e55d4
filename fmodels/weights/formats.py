"""The formats of weights: their names in a folder, how a file of each begins, and who reads and writes it."""

from __future__ import annotations

import importlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmodels.weights import safetensors
from fmodels.weights.tensors import File, Tensor, is_floating, is_lfs_pointer, lfs_error, listing

Tensors = dict[str, Tensor]
Metadata = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        module: of `fmodels.weights`, with `read(path) -> (tensors, metadata)` and `write(path, tensors, metadata, *, advance)`;
            imported when it is used.
        stem: of the file's name in a folder.
        suffix: of that name.
        dialect: whose names the tensors have, if the metadata of the file do not tell: a key of `fmodels.dialects`.
        others: regular expression of further names that such a file may have.
        beside: the ending of a file that is written beside, and belongs to it.
        sharded: whether it may be several files.
        indexed: whether an index then says which tensor is in which; else the first of them stands for all.
        shard_size: of what is written, if nothing else is asked for; None for one file.
        directory: whether it is a folder of files.
        blocks: whether its tensors may be quantised in blocks (`ggml.Blocks`); else they are written as the arrays.
        types: what a dtype's name asks `of_type(tensors, type)` of the module for, beyond a dtype: blocks, and their arrays.
    """

    module: str
    stem: str
    suffix: str
    dialect: str = "pt"
    others: str | None = None
    beside: str | None = None
    sharded: bool = True
    indexed: bool = True
    shard_size: str | None = "5GB"
    directory: bool = False
    blocks: bool = False
    types: Mapping[str, str] = field(default_factory=dict)

    @property
    def read(self) -> Callable[..., tuple[Tensors, Metadata]]:
        return self._module.read

    @property
    def write(self) -> Callable[..., None]:
        return self._module.write

    def of_type(self, tensors: Tensors, type: str) -> Tensors:
        """The tensors of a file with those that can be of the type in it; the others are the same objects."""
        return self._module.of_type(tensors, type)

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"fmodels.weights.{self.module}")

    def in_shard(self, name: str) -> str:
        """How one of several files names the tensor that the index has under `name`."""
        return self._module.in_shard(name) if hasattr(self._module, "in_shard") else name

    def of_shard(self, metadata: Metadata, number: int, shards: Sequence[Tensors]) -> Metadata:
        """The metadata of one of several files, counted from 0."""
        return self._module.of_part(metadata, number, shards) if hasattr(self._module, "of_part") else metadata

    def parts(self, name: str) -> list[str]:
        """The files that belong to the one that stands for all: itself, unless an index lists them."""
        return self._module.parts(name) if hasattr(self._module, "parts") else [name]

    def single(self, variant: str | None = None) -> str:
        """The name of the file when there is one."""
        return self._stem(variant) + _dotted(self.suffix)

    def files(self, variant: str | None = None) -> list[str]:
        """The names of all that is written when there is one: what belongs to the file, then the file."""
        return [self._stem(variant) + _dotted(self.beside)] * (self.beside is not None) + [self.single(variant)]

    def index(self, variant: str | None = None) -> str:
        """The name of the index when there are several."""
        return f"{self.stem}.{self.suffix}.index{_dotted(variant)}.json"

    def shard(self, number: int, count: int, variant: str | None = None) -> str:
        """The name of one of several files, counted from 1."""
        return f"{self._stem(variant)}-{number:05d}-of-{count:05d}.{self.suffix}"

    def owns(self, name: str, variant: str | None = None) -> bool:
        """Whether a file of that name is weights of this format and variant, as `save` names them."""
        if name in (*self.files(variant), *self.candidates(variant)):
            return True
        return self.sharded and self._is_shard(name, r"\d{5}", variant)

    def candidates(self, variant: str | None = None) -> list[str]:
        """The names to look for: the file, then the index."""
        return [self.single(variant), *([self.index(variant)] if self.sharded and self.indexed else [])]

    def find(self, names: Iterable[str], variant: str | None = None) -> str | None:
        """The file, or the index or file that stands for several, as `save` names them."""
        names = list(names)
        found = [name for name in self.candidates(variant) if name in names]
        first = [name for name in names if self._is_shard(name, "00001", variant)]
        if self.sharded and not self.indexed and len(first) == 1:
            found += first
        return found[0] if found else None

    def matches(self, names: Iterable[str], variant: str | None = None) -> list[str]:
        """The files of `names` that have one of the further names; with a variant, those whose names hold it."""
        if self.others is None:
            return []
        return sorted(n for n in names if re.fullmatch(self.others, n) and (variant or "").lower() in n.lower())

    def _is_shard(self, name: str, number: str, variant: str | None) -> bool:
        pattern = rf"{re.escape(self._stem(variant))}-{number}-of-\d{{5}}\.{self.suffix}"
        return re.fullmatch(pattern, name) is not None

    def _stem(self, variant: str | None) -> str:
        return self.stem + _dotted(variant)


FORMATS: dict[str, Format] = {  # in the order in which a folder is searched: transformers', then what it does not read
    "safetensors": Format("safetensors", "model", "safetensors"),
    "torch": Format("torch_bin", "pytorch_model", "bin"),
    "flax": Format("flax_msgpack", "flax_model", "msgpack", dialect="flax"),
    "tf": Format("tf_h5", "tf_model", "h5", dialect="tf"),
    "gguf": Format(
        "gguf",
        "model",
        "gguf",
        dialect="gguf",
        others=r"(?!.*-(?!00001)\d{5}-of-\d{5}\.gguf$).*\.gguf",
        indexed=False,
        shard_size=None,
        blocks=True,
        types={"q8_0": "q8_0", "float32": "f32"},
    ),
    "tf-checkpoint": Format(
        "tf_checkpoint",
        "model.ckpt",
        "index",
        dialect="tf-original",
        others=r".+\.ckpt[\w.-]*\.index",
        beside="data-00000-of-00001",
        sharded=False,
    ),
    "npz": Format("npz", "model", "npz", sharded=False),
    "orbax": Format("orbax", "params", "", dialect="fmodels", sharded=False, directory=True),
}
OTHERS = ("*.ckpt", "*.onnx", "*.h5", "*.msgpack", "*.pth", "adapter_model.*")


def _dotted(part: str | None) -> str:
    return f".{part}" if part else ""


def find_weights(names: Iterable[str], variant: str | None = None, format: str | None = None) -> tuple[str, str] | None:
    """The format and the file, index or folder that holds a checkpoint's weights, by the order of `FORMATS`.

    Args:
        names: of what is in the folder.
        variant: as in `model.<variant>.safetensors`, or a part of the name of a file with a free name (`Q8_0`).
        format: look for this one only.

    Raises:
        ValueError: an unknown format, or several files with free names of which none is preferred.

    Example:
        >>> find_weights(["pytorch_model.bin", "model.safetensors.index.json"])
        ('safetensors', 'model.safetensors.index.json')
    """
    names = set(names)
    check_format(format)
    kinds = {name: kind for name, kind in FORMATS.items() if format in (None, name)}
    for name, kind in kinds.items():
        if (found := kind.find(names, variant)) is not None:
            return name, found
    for name, kind in kinds.items():
        found = kind.matches(names, variant)
        if len(found) > 1:
            raise ValueError(
                f"read: {len(found)} files could be meant: {listing(found)}; give the path of one, or a part of its name "
                "as variant="
            )
        if found:
            return name, found[0]
    return None


def check_format(format: str | None, *, verb: str = "read") -> None:
    """Raises a ValueError for a name that is not in `FORMATS`."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"{verb}: format {format!r} is not known; use one of {', '.join(FORMATS)}")


def check_dtype(verb: str, dtype: Any) -> np.dtype | None:
    """The dtype, or a ValueError if it is no floating one; None stays."""
    try:
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found is not None and not is_floating(found):
        raise ValueError(f"{verb}: expected a floating dtype such as 'bfloat16', got {dtype!r}")
    return found


def dtype_and_type(verb: str, dtype: Any, format: str) -> tuple[np.dtype | None, str | None]:
    """What to cast floating tensors to, and the type that `Format.of_type` is to give those of the file; None to leave them.

    Raises:
        ValueError: no floating dtype, nor a type of the format.
    """
    name = dtype if isinstance(dtype, str) else None
    owner = next((one for one, kind in FORMATS.items() if name in kind.types.values()), None)
    if owner not in (None, format):
        raise ValueError(f"{verb}: {dtype!r} is a type of format {owner!r}, which {format!r} does not have")
    if owner is not None:
        return None, name
    found = check_dtype(verb, dtype)
    return found, None if found is None else FORMATS[format].types.get(found.name)


def candidates(variant: str | None = None, format: str | None = None) -> list[str]:
    """The names of files that `find_weights` looks for."""
    return [file for name, kind in FORMATS.items() if format in (None, name) for file in kind.candidates(variant)]


def format_of(path: str | os.PathLike[str]) -> str:
    """The format of a file or folder, by its content.

    Raises:
        ValueError: a git-lfs pointer, or the index of a checkpoint.
        OSError: it cannot be read, or is no file.
    """
    path = Path(path)
    if path.is_dir():
        return "orbax"
    file = File(path)
    head, tail = file.read(0, 200), file.read(max(0, file.size - 8), 8)
    if is_lfs_pointer(head):
        raise lfs_error(path)
    if path.suffix == ".json":
        raise ValueError(f"read: {str(path)!r} holds no weights; give the folder that it lies in")
    if safetensors.looks_like(path):
        return "safetensors"
    if head.startswith(b"PK"):
        return "npz" if _has_arrays(path) else "torch"
    if re.match(rb"\x80[\x02-\x05]", head):  # a pickle
        return "torch"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "tf"
    if tail == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb":  # of a table of LevelDB
        return "tf-checkpoint"
    if re.match(rb"(?s)\x80$|[\x81-\x8f\xde\xdf].", head):  # a map
        return "flax"
    return "safetensors"  # whose reader says what is wrong


def _has_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def is_alone(path: Path) -> bool:
    """Whether a folder is itself what a format with several files makes, and not a checkpoint's folder around it."""
    return path.is_dir() and any((path / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA"))


def read_file(path: str | os.PathLike[str], format: str | None = None) -> tuple[Tensors, Metadata]:
    """Reads one file of weights, recognised by its content, not by its name.

    Args:
        path: the file.
        format: refuse any other.

    Returns:
        The tensors by the names that the file has for them, and the file's metadata; its entry `format` says whose names
        they are.

    Raises:
        ValueError: no known format, another than `format`, or a damaged file.
        pickle.UnpicklingError: a pickle that asks for more than tensors.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/weights"
        >>> safetensors.write(path, {"x": Tensor.lazy("x", np.int8, (), lambda: np.array(7, np.int8))})
        >>> read_file(path)[0]["x"].array().item()
        7
    """
    found = format_of(path)
    check_format(format)
    if format not in (None, found):
        raise ValueError(f"read: {str(path)!r} is a file of format {found!r}, not {format!r}; leave format= away")
    kind = FORMATS[found]
    tensors, metadata = kind.read(path)
    return tensors, {"format": kind.dialect, **metadata}
