"""`tf_model.h5`: the HDF5 files of Keras 2, as transformers' TensorFlow classes wrote them.

A file alone has a group for each layer of the model, with the names of its variables in an attribute; a variable that two
layers share is there twice. One of several files has the variables without groups and without the model's part of their
names. Read with h5py, which is only asked where things are: plain blocks of numbers in the file itself, mapped as other
formats' are. Links, compression, and all else that HDF5 can do and Keras does not is refused.
Source: keras 2.15, `saving/legacy/hdf5_format.py`; transformers 4.57.6, `modeling_tf_utils.py`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fmodels.weights.hdf5_texts import texts_in
from fmodels.weights.tensors import (
    ALIGNMENT,
    File,
    Tensor,
    brief,
    is_lfs_pointer,
    lfs_error,
    listing,
    replacing,
    row_major,
    shape_problem,
)

MAGIC = b"\x89HDF\r\n\x1a\n"
LIMIT = 64512  # bytes of an attribute; longer lists of names are split
MAX_NAMES = 1_000_000
AGAIN = "copy or download it again, or save it again with transformers' TensorFlow class"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads where the variables of a `tf_model.h5`, or of one of several such files, lie.

    Args:
        path: the file.

    Returns:
        The variables by name, in the order of the layers, each once; the metadata, of which `layers` says which layer holds
        which variables.

    Raises:
        ValueError: no such file of Keras 2, or one that is damaged or holds anything but plain arrays. The copies of a
            variable are compared when its array is asked for.
        ModuleNotFoundError: h5py is not there.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/tf_model.h5"
        >>> write(path, {"m/dense/bias:0": Tensor.lazy("", np.float32, (3,), lambda: np.ones(3, np.float32))})
        >>> tensors, metadata = read(path)
        >>> tensors["m/dense/bias:0"].array(), metadata["layers"]
        (array([1., 1., 1.], dtype=float32), {'dense': ['m/dense/bias:0']})
    """
    import h5py

    file = File(path)
    head = file.read(0, 200)
    if is_lfs_pointer(head):
        raise lfs_error(file.path)
    if not head.startswith(MAGIC):
        raise ValueError(
            f"read: {str(path)!r} is no HDF5 file: it begins with {head[:8]!r}, expected {MAGIC!r}; {AGAIN}"
        )
    try:
        # The descriptor, not the path, is opened: both readers see the same file.
        # Without a buffer: a buffered stream raises ValueError, not OverflowError, for places beyond 2⁶³.
        with open(os.dup(file.fd), "rb", buffering=0) as stream, h5py.File(stream, "r") as root:
            return _read(root, file)
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"read: {str(path)!r} is damaged ({brief(str(error))}); {AGAIN}") from None


def _read(root: Any, file: File) -> tuple[dict[str, Tensor], dict[str, Any]]:
    where = f"read: {str(file.path)!r}"
    layers = _names(root, "layer_names", where, file)
    if layers is None:
        raise ValueError(
            f"{where} has no attribute layer_names; only files of Keras 2, as transformers wrote them, are read; {AGAIN}"
        )
    tensors: dict[str, Tensor] = {}
    copies: dict[str, list[Tensor]] = {}
    held: dict[str, list[str]] = {}
    problems: list[str] = []
    alone = False
    for layer in layers:
        try:
            if (group := _member(root, layer)) is None:  # one of several files: the names are those of variables
                tensors[layer] = _tensor(root, layer, file)
                continue
        except ValueError as error:
            problems.append(str(error))
            continue
        alone = True
        names = _names(group, "weight_names", where, file)
        held[layer] = names or []
        for name in held[layer]:
            try:
                tensor = _tensor(group, name, file)
            except ValueError as error:
                problems.append(f"layer {brief(layer)}: {error}")
                continue
            if name not in tensors:
                tensors[name] = tensor
            elif (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype):
                copies.setdefault(name, []).append(tensor)
            else:
                problems.append(f"{brief(name)} is there twice, with different shapes or dtypes")
    if problems:
        raise ValueError(f"{where} cannot be read: {listing(problems, sep='; ')}; {AGAIN}")
    tensors |= {name: _compared(tensors[name], others, where) for name, others in copies.items()}
    texts = {key: "".join(_texts(root, key, where, file)) for key in ("backend", "keras_version") if key in root.attrs}
    return tensors, texts | ({"layers": held} if alone else {})


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Writes the variables of a model, one at a time, on 64-byte boundaries; the same tensors give the same bytes.

    Args:
        path: the file, replaced only when all is written; `…-00001-of-00002.h5` is one of several.
        tensors: by the variables' names, with the part of the model.
        metadata: `layers`, which layer holds which variables; by the second part of the names if it does not say.
        advance: called with the number of bytes written after each tensor.

    Raises:
        ValueError: a dtype or name that the format does not have.
        ModuleNotFoundError: h5py is not there.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/tf_model-00001-of-00002.h5"
        >>> write(path, {"m/dense/bias:0": Tensor.lazy("", np.float32, (3,), lambda: np.ones(3, np.float32))})
        >>> list(read(path)[0])
        ['dense/bias:0']
    """
    import h5py

    metadata = metadata or {}
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in "iuf" or tensor.dtype.itemsize > 8:
            raise ValueError(
                f'write: tensor {name!r} is {tensor.dtype}, which HDF5 does not have; cast it to "float32"'
            )
        if not name.isascii() or any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise ValueError(f"write: {brief(name)} cannot be the name of a variable in HDF5; rename it")
    with replacing(path) as out, h5py.File(out.name, "w", alignment_threshold=1, alignment_interval=ALIGNMENT) as root:
        if re.search(r"-\d{5}-of-\d{5}\.h5$", str(path)):
            names = {in_shard(name): name for name in sorted(tensors)}
            _set_names(root, "layer_names", names)
            for short, name in names.items():
                _put(root, short, tensors[name])
                if advance is not None:
                    advance(tensors[name].nbytes)
            return
        layers = _layers(tensors, metadata.get("layers") or {})
        _set_names(root, "layer_names", layers)
        for key, text in (("backend", "tensorflow"), ("keras_version", "2.15.0")):
            root.attrs[key] = str(metadata.get(key, text)).encode()
        written: set[str] = set()
        for layer in sorted(layers):
            group = root.create_group(layer)
            _set_names(group, "weight_names", layers[layer])
            for name in layers[layer]:
                _put(group, name, tensors[name])
                if advance is not None and name not in written:
                    advance(tensors[name].nbytes)
                written.add(name)
        _set_names(root.create_group("top_level_model_weights"), "weight_names", [])


def in_shard(name: str) -> str:
    """How one of several files names the variable that the index has under `name`.

    Source: transformers' `strip_model_name_and_prefix`.

    Example:
        >>> in_shard("tf_bert_model/bert/pooler/dense/bias:0"), in_shard("model.shared/model.shared/embeddings:0")
        ('bert/pooler/dense/bias:0', 'model.shared/model.shared/embeddings:0')
    """
    return name if "model." in name or "/" not in name else name.partition("/")[2]


def _layers(tensors: Mapping[str, Tensor], stated: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Layer -> the variables that it holds, of those that are there; layers of which none is there are left out."""
    layers = {layer: [name for name in names if name in tensors] for layer, names in stated.items()}
    held = {name for names in layers.values() for name in names}
    for name in tensors:
        if name not in held:
            layers.setdefault(re.sub(r":\d+$", "", (name.split("/") * 2)[1]), []).append(name)
    return {layer: names for layer, names in layers.items() if names or not stated[layer]}


def _put(group: Any, name: str, tensor: Tensor) -> None:
    data = group.create_dataset(name, tensor.shape, tensor.dtype)
    if tensor.size:
        data[...] = row_major(tensor.array()).reshape(tensor.shape)


def _set_names(group: Any, key: str, names: Iterable[str]) -> None:
    """A list of names as an attribute, or as several where it is too long for one."""
    raw = [name.encode() for name in names]
    count = 1
    while any(part.nbytes > LIMIT for part in np.array_split(np.asarray(raw), count)):
        count += 1
    if count == 1:
        group.attrs[key] = raw
    for number, part in enumerate(np.array_split(np.asarray(raw), count) if count > 1 else ()):
        group.attrs[f"{key}{number}"] = part


def _names(group: Any, key: str, where: str, file: File) -> list[str] | None:
    """The names in an attribute, or in `key0`, `key1`, …; None where there are none."""
    keys = [key] if key in group.attrs else []
    while not keys or keys[-1] != key:
        if f"{key}{len(keys)}" not in group.attrs:
            break
        keys.append(f"{key}{len(keys)}")
    names: list[str] = []
    for one in keys:
        shape = group.attrs.get_id(one).shape
        count = int(np.prod(shape or (0,), dtype=object))
        if len(shape or (0,)) != 1 or len(names) + count > MAX_NAMES:
            raise ValueError(f"{where}: attribute {one} is no list of names, or too long; {AGAIN}")
        names += _texts(group, one, where, file) if count else []
    if repeated := [brief(name) for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: attribute {key} has {listing(repeated)} twice; {AGAIN}")
    return names if keys else None


def _texts(group: Any, key: str, where: str, file: File) -> list[str]:
    try:
        return texts_in(group, key, file)
    except UnicodeDecodeError:
        raise ValueError(f"{where}: attribute {key} has names that are no text; {AGAIN}") from None
    except ValueError as error:
        raise ValueError(f"{where}: attribute {key} is no list of names: {error}; {AGAIN}") from None


def _member(group: Any, name: str) -> Any:
    """The group of that name; None if it is a dataset.

    Raises:
        ValueError: it is not there, or not in this file.
    """
    import h5py

    for part in name.split("/"):
        if part in ("", ".", "..") or not isinstance(group, h5py.Group):
            raise ValueError(f"{brief(name)} cannot be a name")
        link = group.get(part, getlink=True)
        if link is None:
            raise ValueError(f"{brief(name)} is named and not there")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{brief(name)} is a link, {type(link).__name__}, and no array")
        group = group[part]
    return group if isinstance(group, h5py.Group) else None


def _tensor(group: Any, name: str, file: File) -> Tensor:
    """The array of that name, where it lies in one piece in this file."""
    import h5py

    parent, _, last = name.rpartition("/")
    home = _member(group, parent) if parent else group
    if home is None or _member(home, last) is not None:
        raise ValueError(f"{brief(name)} is no array")
    data = home[last]
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{brief(name)} is no array")
    layout, properties, dtype = data.id.get_create_plist().get_layout(), data.id.get_create_plist(), data.dtype
    if layout == h5py.h5d.VIRTUAL or properties.get_external_count():
        raise ValueError(f"{brief(name)} lies in another file")
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT):
        raise ValueError(f"{brief(name)} lies in pieces or is compressed; unpack the file with `h5repack -l CONTI`")
    plain = dtype.kind in "iuf" and dtype.itemsize <= 8 and data.id.get_type() == h5py.h5t.py_create(dtype)
    if not plain:
        raise ValueError(f"{brief(name)} has no numbers, but {brief(str(dtype))}")
    if (problem := shape_problem(data.shape, dtype.itemsize)) is not None:
        raise ValueError(f"{brief(name)}: {problem}")
    native, count = dtype.newbyteorder("="), data.size * dtype.itemsize
    if layout == h5py.h5d.COMPACT or count == 0:
        if count > LIMIT * 2 or count != (data.id.get_storage_size() if count else 0):
            raise ValueError(f"{brief(name)} has another size than its shape")
        array = np.zeros(data.shape, native) if count == 0 else np.asarray(data[()], native)
        return Tensor.lazy(name, native, data.shape, lambda: array)
    offset = data.id.get_offset()
    if offset is None or offset + count > file.size:
        raise ValueError(f"{brief(name)} needs {count} bytes that the file does not have; it was cut")
    tensor = Tensor.in_file(name, native, data.shape, file, offset)
    if dtype == native:
        return tensor
    return Tensor.lazy(name, native, data.shape, lambda: tensor.array().view(dtype).astype(native))


def _compared(tensor: Tensor, copies: list[Tensor], where: str) -> Tensor:
    """The tensor, whose copies must hold the same when it is asked for."""

    def get() -> np.ndarray:
        array = tensor.array()
        if any(array.tobytes() != copy.array().tobytes() for copy in copies):
            raise ValueError(f"{where}: {tensor.name!r} is there twice, with different values; {AGAIN}")
        return array

    return Tensor.lazy(tensor.name, tensor.dtype, tensor.shape, get)
