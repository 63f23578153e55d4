"""PyTorch's `pytorch_model.bin`, read and written without torch and without running anything a file says.

A checkpoint of torch is a pickle, which is a program; `torch_pickle` interprets its harmless part. Here are the archives
around it, in both directions.
Source: torch/serialization.py and torch/_weights_only_unpickler.py of PyTorch 2; the form before 1.6 is read, too.
"""

import os
import struct
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

from fmodels.weights.tensors import (
    ALIGNMENT,
    File,
    Tensor,
    as_bytes,
    brief,
    is_lfs_pointer,
    lfs_error,
    listing,
    replacing,
    shape_problem,
)
from fmodels.weights.torch_pickle import DTYPES, STORAGES, Program, _View

MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6
MAX_PICKLE = 256 * 2**20  # bytes; the pickle of a model with 100 000 tensors has 20 MB


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a state dict saved by `torch.save`; the bytes of the tensors stay on disk until they are asked for.

    Args:
        path: the file, a flat state dict or one under the key `state_dict` or `model`.

    Returns:
        The tensors by name, in the order of the file, and no metadata; views of one storage stay views of the same bytes.

    Raises:
        pickle.UnpicklingError: the file asks for anything but tensors.
        ValueError: the file is cut or contradicts itself, or is no state dict.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/pytorch_model.bin"
        >>> write(path, {"x": Tensor.lazy("x", np.int32, (3,), lambda: np.arange(3, dtype=np.int32))})
        >>> read(path)[0]["x"].array()
        array([0, 1, 2], dtype=int32)
    """
    file = File(path)
    head = file.read(0, 200)
    if is_lfs_pointer(head):
        raise lfs_error(file.path)
    if head.startswith(b"PK"):
        state, spans = _read_zip(file)
    elif head.startswith(b"\x80"):
        state, spans = _read_legacy(file)
    else:
        raise ValueError(
            f"read: {str(path)!r} is no file of torch.save: expected a zip archive or a pickle, it begins with "
            f"{head[:8]!r}; copy or download it again"
        )
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, view in _state_dict(state, file).items():
        try:
            tensors[name] = _tensor(name, view, file, spans)
        except ValueError as error:
            problems.append(f"tensor {brief(name)}: {error}")
    if problems:
        raise ValueError(
            f"read: {str(path)!r} has tensors that do not fit its data: {listing(problems, sep='; ')}; "
            "the file is damaged or was cut, copy or download it again"
        )
    return tensors, {}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Writes what `torch.load(path, weights_only=True)` reads as an OrderedDict of contiguous tensors.

    One tensor at a time, on 64-byte boundaries; the same tensors give the same bytes.

    Args:
        path: the file, replaced only when all is written.
        tensors: by name; the names on disk are the keys.
        metadata: ignored, the format has no place for it.
        advance: called with the number of bytes written after each tensor.

    Raises:
        ValueError: a dtype that torch does not have.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/pytorch_model.bin"
        >>> write(path, {"x": Tensor.lazy("x", np.float32, (3,), lambda: np.ones(3, np.float32))})
        >>> read(path)[0]["x"].offset % 64
        0
    """
    program = _program(tensors)
    with replacing(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes | memoryview) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")  # its date is fixed
            large = len(data) >= 2**31
            header = 30 + len(entry.filename) + 4 + 20 * large
            pad = -(out.tell() + header) % ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", pad) + b"\0" * pad  # torch pads in the same way
            with archive.open(entry, "w", force_zip64=large) as target:
                target.write(data)

        add("data.pkl", program)
        add("byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            add(f"data/{number}", as_bytes(tensor))
            if advance is not None:
                advance(tensor.nbytes)
        add("version", b"3\n")


def _program(tensors: Mapping[str, Tensor]) -> bytes:
    """The pickle of an OrderedDict of tensors, as torch writes it but for the memo."""

    def name(text: str) -> bytes:
        return b"c" + text.replace("/", "\n").encode() + b"\n"

    def text(value: str) -> bytes:
        raw = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(raw)) + raw

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    empty = name("collections/OrderedDict") + b")R"
    typed = {np.dtype(dtype): f"torch/{stem}Storage" for stem, dtype in STORAGES.items()}
    untyped = {np.dtype(dtype): f"torch/{stem}" for stem, dtype in DTYPES.items()}
    program = [b"\x80\x02", empty, b"("]
    for number, (key, tensor) in enumerate(tensors.items()):
        dtype, shape = tensor.dtype, tensor.shape
        if dtype not in typed and dtype not in untyped:
            known = " ".join(str(known) for known in [*typed, *untyped])
            raise ValueError(f"write: tensor {key!r} is {dtype}, torch files have {known}; cast it")
        strides = tuple(
            int(np.prod([max(n, 1) for n in shape[axis + 1 :]], dtype=object)) for axis in range(len(shape))
        )
        storage = (typed[dtype], tensor.size) if dtype in typed else ("torch.storage/UntypedStorage", tensor.nbytes)
        program += [
            text(key),
            name("torch._utils/_rebuild_tensor_v2" if dtype in typed else "torch._utils/_rebuild_tensor_v3"),
            b"((" + text("storage") + name(storage[0]) + text(str(number)) + text("cpu") + integer(storage[1]) + b"tQ",
            integer(0) + integers(shape) + integers(strides) + b"\x89" + empty,
            b"" if dtype in typed else name(untyped[dtype]),
            b"tR",
        ]
    return b"".join([*program, b"u."])


def _state_dict(state: object, file: File) -> dict[str, _View]:
    """The flat dict of tensors in `state`."""
    where = f"read: {str(file.path)!r}"
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(inner := state.get(wrapper), dict):
            state = inner
            break
    if not isinstance(state, dict):
        raise ValueError(f"{where} holds a {type(state).__name__}, expected a state dict; save `model.state_dict()`")
    others = [f"{brief(k)}: {brief(v, 40)}" for k, v in state.items() if not isinstance(v, _View) or type(k) is not str]
    if others:
        raise ValueError(
            f"{where} is no flat state dict, it also holds {listing(others)}; save `model.state_dict()` alone"
        )
    return state


def _tensor(name: str, view: _View, file: File, spans: dict[str, tuple[int, int]]) -> Tensor:
    """Checks that `view` lies inside of its storage and of the file."""
    storage, dtype, offset, shape, strides = view
    if storage.key not in spans:
        raise ValueError(f"storage {brief(storage.key)} is missing")
    begin, nbytes = spans[storage.key]
    if storage.whole * storage.dtype.itemsize != nbytes:
        raise ValueError(
            f"storage {brief(storage.key)} should have {storage.whole} elements of {storage.dtype}, has {nbytes} bytes"
        )
    if problem := shape_problem(shape, dtype.itemsize) or shape_problem(strides, dtype.itemsize):
        raise ValueError(problem)
    if len(shape) != len(strides) or type(offset) is not int or offset < 0:
        raise ValueError(
            f"shape {brief(shape)}, strides {brief(strides)} and offset {brief(offset)} do not go together"
        )
    empty = 0 in shape
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    room = storage.size * storage.dtype.itemsize // dtype.itemsize
    if not empty and last >= room:
        raise ValueError(f"reaches element {last} of a storage that has {room}")
    if empty:
        return Tensor.lazy(name, dtype, shape, lambda: np.empty(shape, dtype))
    start = begin + storage.start * storage.dtype.itemsize + offset * dtype.itemsize
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            break
        expected *= n
    else:
        return Tensor.in_file(name, dtype, shape, file, start)
    step = tuple(stride * dtype.itemsize for stride in strides)

    def get() -> np.ndarray:
        flat = file.mapped[start : start + (last - offset + 1) * dtype.itemsize].view(dtype)
        return np.lib.stride_tricks.as_strided(flat, shape, step)

    return Tensor.lazy(name, dtype, shape, get)


def _read_zip(file: File) -> tuple[object, dict[str, tuple[int, int]]]:
    """The pickled object of an archive, and where the storages lie: key -> (offset, bytes)."""
    where = f"read: {str(file.path)!r}"
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
        raise ValueError(f"{where} is a damaged or cut archive ({error}); copy or download it again") from None
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(
            f"{where} is an archive with {len(pickles)} files data.pkl, torch.save writes one; "
            "convert it to safetensors with the program that wrote it"
        )
    root = pickles[0].filename.removesuffix("data.pkl")
    spans: dict[str, tuple[int, int]] = {}
    small: dict[str, bytes] = {}
    for entry in entries:
        name = entry.filename.removeprefix(root)
        if name not in ("data.pkl", "byteorder") and not name.startswith("data/"):
            continue
        span = _span(entry, file, where)
        if name in small or name.removeprefix("data/") in spans:
            raise ValueError(f"{where} has the entry {brief(entry.filename)} twice; copy or download it again")
        if name.startswith("data/"):
            spans[name.removeprefix("data/")] = span
            continue
        if span[1] > MAX_PICKLE:
            raise ValueError(f"{where}: {name} has {span[1]} bytes, at most {MAX_PICKLE} are read; use safetensors")
        small[name] = file.read(*span)
    order = small.get("byteorder", b"little")
    if order != b"little":
        raise ValueError(
            f"{where}: expected byteorder little, got {brief(order)}; load it with torch and save it again on a "
            "little-endian machine"
        )
    return Program(small["data.pkl"], where).run(), spans


def _span(entry: zipfile.ZipInfo, file: File, where: str) -> tuple[int, int]:
    """Where the bytes of an uncompressed entry lie. The name and extra field before them are sized by their header."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise ValueError(
            f"{where}: entry {brief(entry.filename)} is compressed or encrypted, which torch.save never does; "
            "load it with torch and save it again"
        )
    header = file.read(entry.header_offset, 30) if 0 <= entry.header_offset < file.size else b""
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise ValueError(f"{where}: entry {brief(entry.filename)} is not where the archive says; download it again")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > file.size:
        raise ValueError(
            f"{where}: entry {brief(entry.filename)} needs {start + entry.file_size} bytes, the file has {file.size}; "
            "it was cut, copy or download it again"
        )
    return start, entry.file_size


def _read_legacy(file: File) -> tuple[object, dict[str, tuple[int, int]]]:
    """The form before torch 1.6: five pickles, then each storage with its number of elements before it."""
    where = f"read: {str(file.path)!r}"
    program = Program(file.read(0, MAX_PICKLE), where)
    magic = program.run()
    if magic != MAGIC:
        raise ValueError(f"{where} is a pickle, but none of torch.save; convert it to safetensors in a trusted place")
    version, system = program.run(), program.run()
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError(
            f"{where}: expected protocol 1001, little-endian, got {brief(version)}, {brief(system)}; "
            "load it with torch and save it again"
        )
    state, keys = program.run(), program.run()
    position, spans = program.position, {}
    for key in keys if isinstance(keys, list) else [None]:
        dtype = program.storages.get(key) if isinstance(key, str) else None
        count = file.read(position, 8)
        if dtype is None or len(count) < 8:
            raise ValueError(f"{where}: storage {brief(key)} is unknown or missing; copy or download the file again")
        nbytes = struct.unpack("<Q", count)[0] * dtype.itemsize
        if position + 8 + nbytes > file.size:
            raise ValueError(f"{where} ends inside of storage {key!r}; it was cut, copy or download it again")
        spans[key] = position + 8, nbytes
        position += 8 + nbytes
    return state, spans
