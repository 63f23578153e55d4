"""NumPy's `.npz`: a zip archive with one `.npy` member for each tensor, stored without compression.

`np.load` reads what is written here. It has no name for bfloat16 and the small floats of `ml_dtypes`, of which it gives
the bytes (`array.view(ml_dtypes.bfloat16)`); so the member `metadata.json` keeps their names. Where it is absent, elements
of two bytes without a type are bfloat16, which is what `jnp.savez` makes of it.
"""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fmodels.weights.safetensors import CODES
from fmodels.weights.tensors import (
    ALIGNMENT,
    File,
    Tensor,
    as_bytes,
    brief,
    is_lfs_pointer,
    lfs_error,
    listing,
    parse_json,
    replacing,
    shape_problem,
)

METADATA = "metadata.json"
MAX_METADATA = 2**24  # bytes
MAX_HEADER = 2**16  # bytes of a member before its elements
MAX_RATIO = 1100  # of deflate, at most 1032
TYPES = {dtype.name: dtype for dtype in CODES}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the directory of an archive; the bytes of the tensors stay on disk until they are asked for.

    Args:
        path: the file, as `np.savez` or `np.savez_compressed` writes it.

    Returns:
        The tensors by name, in the order of the file, and the metadata.

    Raises:
        ValueError: the file is cut or contradicts itself, or holds anything but arrays of numbers; all bad ones are named.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.npz"
        >>> np.savez(path, x=np.arange(3))
        >>> read(path)[0]["x"].array()
        array([0, 1, 2])
    """
    file = File(path)
    if is_lfs_pointer(head := file.read(0, 200)):
        raise lfs_error(file.path)
    if not head.startswith(b"PK"):
        raise ValueError(
            f"read: {str(path)!r} is no zip archive, it begins with {head[:8]!r}; copy or download it again"
        )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    problems: list[str] = []
    with open(path, "rb") as raw, _archive(raw, path) as archive:
        entries = archive.infolist()
        content = _metadata(archive, path)
        metadata = {str(key): value for key, value in content.items() if isinstance(value, str)}
        named = content.get("dtypes")
        named = named if isinstance(named, dict) else {}
        for entry in entries:
            if entry.filename == METADATA:
                continue
            name = entry.filename.removesuffix(".npy")
            try:
                if name in tensors:
                    raise ValueError("is there twice")
                tensors[name] = _tensor(name, entry, archive, file, named.get(name))
            except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged header
                problems.append(f"{brief(entry.filename)}: {error}")
    if problems:
        raise ValueError(
            f"read: {str(path)!r} has members that are no arrays of numbers: {listing(problems, sep='; ')}; "
            "write it again with np.savez"
        )
    return tensors, metadata


def _archive(raw: io.BufferedIOBase, path: str | os.PathLike[str]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(raw)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"read: {str(path)!r} is a damaged zip archive: {error}; copy or download it again") from None


def _metadata(archive: zipfile.ZipFile, path: str | os.PathLike[str]) -> dict[str, Any]:
    if METADATA not in archive.NameToInfo:
        return {}
    try:
        with archive.open(METADATA) as member:
            text = member.read(MAX_METADATA + 1)
    except Exception as error:  # zipfile and zlib raise a dozen kinds for a damaged member
        raise ValueError(f"read: {METADATA} of {str(path)!r} is damaged: {error}; copy the file again") from None
    if len(text) > MAX_METADATA:
        raise ValueError(f"read: {METADATA} of {str(path)!r} has more than {MAX_METADATA} bytes; write the file again")
    return parse_json(text, f"read: {METADATA} of {str(path)!r}")


def _tensor(name: str, entry: zipfile.ZipInfo, archive: zipfile.ZipFile, file: File, named: object) -> Tensor:
    """Describes a member, after a look at its first bytes."""
    if not entry.filename.endswith(".npy"):
        raise ValueError("is no .npy")
    if entry.flag_bits & 1:
        raise ValueError("is encrypted")
    if entry.file_size > MAX_RATIO * max(entry.compress_size, 1) or entry.compress_size > file.size:
        raise ValueError(f"says that its {entry.compress_size} bytes hold {entry.file_size}")
    with archive.open(entry) as member:
        head = member.read(MAX_HEADER)
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"has version {version} of .npy, known are 1.0 and 2.0")
    shape, fortran, dtype = reader(stream, max_header_size=MAX_HEADER)
    start = stream.tell()
    dtype = _dtype(dtype, named)
    if problem := shape_problem(shape, dtype.itemsize):
        raise ValueError(problem)
    count = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if count != entry.file_size - start:
        raise ValueError(f"{dtype}{list(shape)} needs {count} bytes, it has {entry.file_size - start}")
    big = dtype.byteorder == ">"
    if entry.compress_type == zipfile.ZIP_STORED and not fortran and not big:
        return Tensor.in_file(name, dtype, shape, file, _offset(entry, file) + start)

    def get() -> np.ndarray:
        try:
            with open(file.path, "rb") as raw, zipfile.ZipFile(raw) as again:
                flat = np.frombuffer(again.read(entry.filename), dtype=dtype, offset=start)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise ValueError(f"read: {name!r} of {str(file.path)!r} is damaged: {error}; copy it again") from None
        array = flat.reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("=")) if big else array

    return Tensor.lazy(name, dtype.newbyteorder("=") if big else dtype, shape, get)


def _dtype(found: np.dtype, named: object) -> np.dtype:
    if found.kind == "V" and found.names is None and found.subdtype is None:
        if named is None and found.itemsize == 2:
            return np.dtype(ml_dtypes.bfloat16)
        if isinstance(named, str) and named in TYPES and TYPES[named].itemsize == found.itemsize:
            return TYPES[named]
        raise ValueError(f"has elements of {found.itemsize} bytes without a type")
    if found.newbyteorder("=") not in CODES:
        raise ValueError(f"has elements of type {found}, known are {' '.join(str(d) for d in CODES)}")
    return found


def _offset(entry: zipfile.ZipInfo, file: File) -> int:
    """Where the content of a member begins: its local header has names of a length of its own."""
    local = file.read(entry.header_offset, 30)
    if len(local) < 30 or local[:4] != b"PK\3\4":
        raise ValueError("has no header where the directory says")
    start = entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if start + entry.compress_size > file.size:
        raise ValueError("ends after the file")
    return start


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Writes an archive that `np.load` reads, one tensor at a time, each on a 64-byte boundary.

    Args:
        path: the file, replaced only when all is written.
        tensors: by name; the names in the archive are the keys.
        metadata: text by text, kept in the member `metadata.json`.
        advance: called with the number of bytes written after each tensor.

    Raises:
        ValueError: a dtype that no other format has.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.npz"
        >>> write(path, {"x": Tensor.lazy("x", np.float32, (2,), lambda: np.ones(2, np.float32))})
        >>> np.load(path)["x"]
        array([1., 1.], dtype=float32)
    """
    if wrong := [f"{name!r} is {t.dtype}" for name, t in tensors.items() if t.dtype not in CODES]:
        raise ValueError(f"write: npz has {' '.join(str(d) for d in CODES)}; {listing(wrong)}; cast them")
    dtypes = {name: t.dtype.name for name, t in tensors.items() if _is_foreign(t.dtype)}
    with replacing(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        entry = zipfile.ZipInfo(METADATA)  # its date is fixed: the same tensors give the same bytes
        archive.writestr(entry, json.dumps({**(metadata or {}), "dtypes": dtypes}))
        for name, tensor in tensors.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            # An extra field of the right length puts the elements on a boundary; 20 bytes are those of a large member.
            header = _header(tensor)
            before = archive.start_dir + 30 + len(entry.filename.encode()) + 20 + len(header)
            entry.extra = _padding(-(before + 4) % ALIGNMENT)
            with archive.open(entry, "w", force_zip64=True) as member:
                member.write(header)
                member.write(as_bytes(tensor))
            if advance is not None:
                advance(tensor.nbytes)


def _is_foreign(dtype: np.dtype) -> bool:
    """Whether numpy has the dtype from a library; not so h5py's copies of its own, for which `isbuiltin` is 0."""
    return dtype.isbuiltin == 2


def _padding(count: int) -> bytes:
    return b"\xda\xda" + count.to_bytes(2, "little") + bytes(count)


def _header(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    stored = np.dtype(f"V{tensor.dtype.itemsize}") if _is_foreign(tensor.dtype) else tensor.dtype
    descr = np.lib.format.dtype_to_descr(stored)
    fields = {"descr": descr, "fortran_order": False, "shape": tensor.shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()
