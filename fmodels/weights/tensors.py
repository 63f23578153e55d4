"""One description of a tensor that lies in a file, shared by all readers and writers of weights.

A reader returns `Tensor`s without touching their bytes; a writer asks each `Tensor` for its array when its turn has
come. So `write(path, read(other))` streams, and a checkpoint larger than the memory can be converted.
"""

import errno
import io
import json
import math
import mmap
import os
import re
import secrets
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ALIGNMENT = 64  # bytes: what XLA and dlpack want of a buffer that is used without a copy
LIMIT = 2**63 - 1  # of a size in bytes
CHUNK = 2**24  # bytes that one thread reads at a time
READERS = 4  # threads: more than one for memory and for disks, no more than a disk likes
PIECE = 2**22  # elements that are looked at at a time
SQUARE = 256  # elements on a side of what is transposed at a time
SMALL = 2**16  # bytes, of what is transposed at once
LARGE = 2**22  # bytes from which on numpy asks for huge pages
STEP = 2**22  # bytes that are written before the disk is told to begin with them


class File:
    """A file opened for reading, kept open (and mapped) as long as a tensor or an array of it lives.

    The open descriptor, not the path, is the identity: the tensors stay readable when a save replaces the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"read: expected a weights file, {str(path)!r} is a folder; use read_folder")
        if not stat.S_ISREG(mode):  # to open a pipe would wait for who writes to it
            raise OSError(
                f"read: expected a weights file, {str(path)!r} is a pipe, socket or device; copy what it gives to a file"
            )
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.fd)
        self.size = os.fstat(self.fd).st_size
        self._memory: mmap.mmap | None = None

    @cached_property
    def mapped(self) -> np.ndarray:
        """All bytes of the file, mapped privately: writing to them copies the page and never reaches the disk."""
        if self.size == 0:  # an empty file cannot be mapped
            return np.empty(0, np.uint8)
        if hasattr(mmap, "MAP_PRIVATE"):
            # Without NORESERVE a private map counts as memory, and a file larger than the RAM could not be mapped.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
            memory = mmap.mmap(self.fd, self.size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            memory = mmap.mmap(self.fd, self.size, access=mmap.ACCESS_COPY)
        self._memory = memory
        return np.frombuffer(memory, np.uint8)

    def release(self) -> None:
        """Gives the memory of mapped pages back; they are read again if asked for, without what was written to them."""
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def read(self, offset: int, count: int) -> bytes:
        """The `count` bytes at `offset`, fewer at the end of the file."""
        return self.mapped[offset : offset + count].tobytes()

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fills the C-contiguous `out` from `offset` on, without mapping: no page of the file stays in memory."""
        view = out.reshape(-1).view(np.uint8).data
        if not hasattr(os, "preadv"):  # Windows
            view[:] = self.mapped[offset : offset + len(view)].data
            return
        if len(view) <= CHUNK:
            self._read_chunk(view, offset)
            return
        starts = range(0, len(view), CHUNK)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda start: self._read_chunk(view[start : start + CHUNK], offset + start), starts))

    def _read_chunk(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if count == 0:
                raise OSError(f"read: {str(self.path)!r} was cut while it was read; copy or download it again")
            done += count


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which XLA on CPU takes over without a copy.

    A large one is mapped by itself, as numpy would ask for huge pages: a virtual machine gets those from its host one by
    one, and reading into them took twice the time.
    """
    dtype = np.dtype(dtype)
    count = math.prod(shape) * dtype.itemsize
    if count >= LARGE and hasattr(mmap, "MAP_PRIVATE"):
        memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
    raw = np.empty(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named tensor whose bytes are fetched on demand.

    Attributes:
        name: as in the file.
        dtype: a numpy type, of `ml_dtypes` for bfloat16, float8 and smaller.
        shape: in elements, also where several elements share a byte on disk.

    Example:
        >>> import numpy as np
        >>> tensor = Tensor.lazy("ones", np.float32, (2, 3), lambda: np.ones((2, 3), np.float32))
        >>> tensor.nbytes, tensor.array().sum().item()
        (24, 6.0)
        >>> out = np.empty((2, 3), np.float32)
        >>> tensor.read_into(out)
        >>> out[0]
        array([1., 1., 1.], dtype=float32)
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]
    file: File | None = None  # with `offset`: where the elements lie in row-major order, if they do
    offset: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.size * self.dtype.itemsize

    @classmethod
    def lazy(cls, name: str, dtype: Any, shape: Sequence[int], get: Callable[[], np.ndarray]) -> "Tensor":
        """A tensor in memory, or yet to be computed: `get` is called each time the array is asked for."""
        return cls(name, np.dtype(dtype), tuple(shape), get)

    @classmethod
    def in_file(cls, name: str, dtype: Any, shape: Sequence[int], file: File, offset: int) -> "Tensor":
        """A tensor whose elements lie in row-major order at `offset` of `file`."""
        dtype, shape = np.dtype(dtype), tuple(shape)
        count = math.prod(shape) * dtype.itemsize

        def get() -> np.ndarray:
            return file.mapped[offset : offset + count].view(dtype).reshape(shape)

        return cls(name, dtype, shape, get, file, offset)

    def array(self) -> np.ndarray:
        """The elements; for a tensor in a file a view of its mapped bytes, which may be written to and never saved."""
        array = self.get()
        if array.dtype != self.dtype or array.shape != self.shape:
            raise ValueError(
                f"array: tensor {self.name!r} was described as {self.dtype}{list(self.shape)}, its data are "
                f"{array.dtype}{list(array.shape)}; describe it as it is"
            )
        return array

    def read_into(self, out: np.ndarray) -> None:
        """Writes the elements into `out`, a C-contiguous array of the same dtype and shape."""
        self.check_target(out)
        if self.file is None:
            out[...] = self.array()
        else:
            self.file.read_into(out, self.offset)

    def check_target(self, out: np.ndarray) -> None:
        """Raises a ValueError if `read_into` cannot write into `out`."""
        if out.dtype != self.dtype or out.shape != self.shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"read_into: expected a writable C-contiguous array {self.dtype}{list(self.shape)} for tensor "
                f"{self.name!r}, got {out.dtype}{list(out.shape)} with strides {out.strides}"
            )


def computed(tensor: Tensor) -> Tensor:
    """The tensor by its array alone, whatever it is made of."""
    return Tensor.lazy(tensor.name, tensor.dtype, tensor.shape, tensor.array)


def is_floating(dtype: np.dtype) -> bool:
    """Whether numbers are floating, of numpy or `ml_dtypes`.

    Example:
        >>> import ml_dtypes, numpy as np
        >>> [is_floating(np.dtype(kind)) for kind in (np.float64, ml_dtypes.bfloat16, np.int8)]
        [True, True, False]
    """
    return dtype.name.removeprefix("b").startswith("float")


def cast(tensor: Tensor, dtype: Any) -> Tensor:
    """A floating tensor in another floating dtype; its array is a ValueError where that cannot hold its numbers.

    Example:
        >>> import numpy as np
        >>> wide = Tensor.lazy("x", np.float32, (1,), lambda: np.array([1e6], np.float32))
        >>> cast(wide, np.float16).array()
        Traceback (most recent call last):
        ValueError: array: tensor 'x' has values that float16 cannot hold; use bfloat16 or float32
    """
    dtype = np.dtype(dtype)
    if tensor.dtype == dtype or not is_floating(tensor.dtype):
        return tensor

    def get() -> np.ndarray:
        array = tensor.array()
        with np.errstate(over="ignore", invalid="ignore"):
            found = array.astype(dtype)
        before, after = array.reshape(-1), found.reshape(-1)
        for start in range(0, tensor.size, PIECE):  # masks of all of it would need memory
            part = slice(start, start + PIECE)
            if (np.isfinite(before[part]) & ~np.isfinite(after[part])).any():
                raise ValueError(
                    f"array: tensor {tensor.name!r} has values that {dtype} cannot hold; use bfloat16 or float32"
                )
        return found

    return Tensor.lazy(tensor.name, dtype, tensor.shape, get)


def by_kind(name: str) -> tuple[list[str], list[int]]:
    """The name without its numbers, and the numbers: so sorted, the layers of a kind follow each other.

    Example:
        >>> sorted(["layers.10.up", "layers.0.up", "layers.0.down", "layers.2.up"], key=by_kind)
        ['layers.0.down', 'layers.0.up', 'layers.2.up', 'layers.10.up']
    """
    words = re.split(r"(\d+)", name)
    return words[::2], [int(number) for number in words[1::2]]


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of `tensor` in row-major order, as they are written to a file."""
    return row_major(tensor.array()).reshape(-1).view(np.uint8).data


def row_major(array: np.ndarray) -> np.ndarray:
    """The array with its elements in row-major order; itself if they are."""
    if not _is_transposed(array):
        return np.ascontiguousarray(array)
    out = aligned_empty(array.shape, array.dtype)
    for first, rows in zip(range(0, len(out), SQUARE), _rows(array), strict=True):
        out[first : first + SQUARE] = rows
    return out


def put(out: BinaryIO, tensor: Tensor) -> None:
    """Writes the elements of `tensor` in row-major order; of a transposed matrix some rows at a time."""
    array = tensor.array()
    if not _is_transposed(array):
        out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return
    for rows in _rows(array):
        out.write(rows.reshape(-1).view(np.uint8).data)


def _is_transposed(array: np.ndarray) -> bool:
    """Whether it is a large matrix whose columns lie in one piece each, and not its rows."""
    return array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous and array.nbytes >= SMALL


def _rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of a transposed matrix, so many at a time, in an array that is used again.

    A square is copied to the side first, to rows that do not begin at multiples of a power of two: in memory they mostly do,
    and then all of a column wants the same place of the cache. It takes a fifth of the time.
    """
    plain = f"u{array.itemsize}" if array.itemsize in (1, 2, 4, 8) else array.dtype  # numpy copies its own faster
    source, count = array.T.view(plain), len(array)
    square = np.empty((SQUARE, SQUARE + ALIGNMENT // array.itemsize), plain)
    rows = np.empty((min(SQUARE, count), array.shape[1]), plain)
    for i in range(0, count, SQUARE):
        some = rows[: min(SQUARE, count - i)]
        for j in range(0, array.shape[1], SQUARE):
            piece = source[j : j + SQUARE, i : i + SQUARE]
            beside = square[: piece.shape[0], : piece.shape[1]]
            beside[...] = piece
            some[:, j : j + SQUARE] = beside.T
        yield some.view(array.dtype)


def send(out: BinaryIO, tensor: Tensor) -> None:
    """Writes the elements of `tensor` in row-major order, by the kernel alone if they lie so in a file."""
    if tensor.file is None or not hasattr(os, "copy_file_range") or not hasattr(out, "fileno"):
        put(out, tensor)
        return
    out.flush()
    done = 0
    while done < tensor.nbytes:
        try:
            count = min(STEP, tensor.nbytes - done)
            count = os.copy_file_range(tensor.file.fd, out.fileno(), count, tensor.offset + done)
        except OSError as error:
            if done or error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM):
                raise
            put(out, tensor)  # between these two file systems the kernel does not copy
            return
        if count == 0:
            raise OSError(f"write: {str(tensor.file.path)!r} was cut while it was read; copy or download it again")
        done += count
        if isinstance(raw := getattr(out, "raw", None), _Eager):
            raw.begin()


class _Eager(io.FileIO):
    """A new file that the disk begins to write while more of it is made: the end, which waits for it, has less to wait for."""

    begun = 0

    def write(self, data: Any, /) -> int | None:
        count = super().write(memoryview(data).cast("B")[:STEP])
        self.begin()
        return count

    def begin(self) -> None:
        """Linux begins to write what it is told that nobody needs; what is not written yet stays in memory."""
        end = self.tell()
        if end - self.begun >= STEP and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), self.begun, end - self.begun, os.POSIX_FADV_DONTNEED)
            self.begun = end


def shape_problem(shape: object, itemsize: int) -> str | None:
    """Why `shape` cannot be that of an array, or None."""
    if not isinstance(shape, list | tuple) or any(type(n) is not int or n < 0 for n in shape):
        return f"shape must be a list of integers >= 0, got {brief(shape)}"
    if len(shape) > 64:
        return f"an array has at most 64 axes, the shape has {len(shape)}"
    if math.prod(n for n in shape if n) * max(itemsize, 1) > LIMIT:  # numpy counts the others of an empty shape, too
        return f"shape {brief(list(shape))} is larger than any file"
    return None


def brief(value: object, limit: int = 80) -> str:
    """`repr` for messages, cut to `limit` characters.

    Example:
        >>> brief(list(range(100)), 12)
        '[0, 1, 2, 3…'
    """
    if isinstance(value, list | tuple | str | bytes):
        value = value[:limit]
    elif isinstance(value, dict):
        value = dict(list(value.items())[:limit])
    elif isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # deep nesting, integers of more than 4300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listing(items: Sequence[str], limit: int = 20, sep: str = ", ") -> str:
    """All of `items`, or the first `limit` and the number of the others."""
    more = [f"… and {len(items) - limit} more"] if len(items) > limit else []
    return sep.join([*items[:limit], *more])


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object, strictly: duplicate keys, NaN and invalid text are a ValueError that begins with `where`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in items:
            key.encode()  # a lone surrogate is no text
            if key in out:
                raise ValueError(f"key {brief(key)} is there twice")
            out[key] = value
        return out

    def constant(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where}: expected JSON, {reason}; copy or download the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {brief(value)}; copy or download the file again")
    return value


def is_lfs_pointer(raw: bytes) -> bool:
    """Whether a file that begins with `raw` is the small text that git keeps in place of a large file."""
    return raw.startswith(b"version ") and b"git-lfs" in raw[:200]


def lfs_error(path: Path) -> ValueError:
    """What to tell about a pointer."""
    return ValueError(
        f"read: {str(path)!r} is a git-lfs pointer, the weights themselves were not fetched; "
        "run `git lfs pull` in that folder"
    )


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, else nothing changes.

    Never writes into the old file: its tensors may be mapped, perhaps by those that are written.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with io.BufferedWriter(_Eager(staged, "x")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
