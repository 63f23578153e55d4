"""PyTorch's `pytorch_model.bin`, read and written without torch and without running anything a file says.

A checkpoint of torch is a pickle, which is a program. Ours is an interpreter of its harmless part: containers, text and
numbers are built, every *global* is only a name, and the few functions that rebuild tensors are known by that name. No
object of the file can be called, have attributes set, or use more memory than the file has bytes.
Source: torch/serialization.py and torch/_weights_only_unpickler.py of PyTorch 2; the form before 1.6 is read, too.
"""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fmodels.weights.tensors import (
    ALIGNMENT,
    LIMIT,
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

STORAGES: dict[str, Any] = {  # torch.<name>Storage
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
}
DTYPES: dict[str, Any] = {  # torch.<name>; those without a storage of their own live in untyped storages
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
REBUILD = {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")}
WRAP = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
RETYPE = "torch._tensor._rebuild_from_type_v2"
MAPS = {"collections.OrderedDict", "builtins.dict"}
NAMES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.UntypedStorage", "torch.UntypedStorage"}
MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6
MAX_PICKLE = 256 * 2**20  # bytes; the pickle of a model with 100 000 tensors has 20 MB


class _Global(NamedTuple):
    """A name that the pickle refers to. It stays a name."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    start: int  # in elements, of a view of another storage (before torch 1.6)
    size: int
    whole: int  # elements of the storage itself


class _View(NamedTuple):
    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state dict saved by `torch.save`; the bytes of the tensors stay on disk until they are asked for.

    Args:
        path: the file, a flat state dict or one under the key `state_dict` or `model`.

    Returns:
        The tensors by name, in the order of the file; views of one storage stay views of the same bytes.

    Raises:
        pickle.UnpicklingError: the file asks for anything but tensors.
        ValueError: the file is cut or contradicts itself, or is no state dict.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/pytorch_model.bin"
        >>> write(path, {"x": Tensor.lazy("x", np.int32, (3,), lambda: np.arange(3, dtype=np.int32))})
        >>> read(path)["x"].array()
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
    return tensors


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
        >>> read(path)["x"].offset % 64
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
    return _Program(small["data.pkl"], where).run(), spans


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
    program = _Program(file.read(0, MAX_PICKLE), where)
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


class _Program:
    """The interpreter of the harmless part of pickle, protocols 2 to 5."""

    def __init__(self, data: bytes, where: str):
        self.data, self.where, self.position = data, where, 0
        self.storages: dict[str, np.dtype] = {}

    def run(self) -> Any:
        """The next object of the data."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        try:
            while (code := self.take(1)) != pickle.STOP:
                operation = _OPERATIONS.get(code)
                if operation is None:
                    return self.refuse(f"the operation {code!r} at byte {self.position - 1}")
                operation(self)
            (value,) = self.stack
        except pickle.UnpicklingError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
            raise pickle.UnpicklingError(
                f"{self.where}: damaged pickle at byte {self.position} ({type(error).__name__}: {brief(str(error))}); "
                "copy or download the file again"
            ) from None
        return value

    def refuse(self, what: str) -> Any:
        raise pickle.UnpicklingError(
            f"{self.where} asks for {what}; fmodels reads tensors and never runs code from a checkpoint. "
            "Convert the file to safetensors in a trusted place"
        )

    def take(self, count: int) -> bytes:
        begin, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise ValueError("it ends too early")
        return self.data[begin : self.position]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.position) + 1 - self.position)[:-1].decode()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def find(self, module: str, name: str) -> None:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        storage = name.removesuffix("Storage") in STORAGES and module in ("torch", "torch.cuda")
        number = module == "torch" and name in DTYPES
        if not (full in REBUILD | WRAP | MAPS | NAMES or full in (RETYPE, "torch.Size") or storage or number):
            self.refuse(f"the global {brief(full)}")
        self.push(_Global(full))

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack.pop()
        self.push(self.call(function, args))

    def call(self, function: object, args: Any) -> Any:
        name = function.name if isinstance(function, _Global) else brief(function)
        if name in MAPS:
            return {self.key(key): value for key, value in (args[0] if args else ())}
        if name == "torch.Size":
            return tuple(args[0])
        if name in WRAP:
            return args[0]
        if name == RETYPE:  # (function, type, args, state): a subclass of Tensor, or one with attributes
            return self.call(args[0], args[2])
        if name not in REBUILD:
            return self.refuse(f"a call of {name}")
        storage, offset, shape, strides = args[:4]
        metadata = args[-1] if len(args) == (8 if name.endswith("v3") else 7) else None
        if metadata:  # conjugate and negative bits of complex tensors
            self.refuse(f"a tensor with the metadata {brief(metadata)}")
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise ValueError("no storage, shape or strides")
        dtype = storage.dtype
        if name.endswith("v3"):
            dtype = np.dtype(DTYPES[args[6].name.removeprefix("torch.")])
        return _View(storage, dtype, offset, shape, strides)

    def persistent(self) -> None:
        kind, stored, key, _, size, *view = self.stack.pop()
        if kind != "storage" or not isinstance(stored, _Global) or type(size) is not int or not 0 <= size <= LIMIT:
            raise ValueError("no storage")
        stem = stored.name.rpartition(".")[2].removesuffix("Storage")
        dtype = np.dtype(np.uint8 if stem == "Untyped" else STORAGES[stem])
        if not isinstance(key, str) or self.storages.setdefault(key, dtype) != dtype:
            raise ValueError(f"storage {brief(key)} of two types")
        start, length = 0, size
        if view and view[0] is not None:
            _, start, length = view[0]
            if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= size:
                raise ValueError("a view outside of its storage")
        self.push(_Storage(key, dtype, start, length, size))

    def key(self, key: object) -> str | int:
        if not isinstance(key, str | int):
            raise TypeError(f"a key that is neither text nor integer: {brief(key)}")
        return key

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("items for what is no list")
        self.stack[-1].extend(items)

    def build(self) -> None:
        self.stack.pop()  # `_metadata` of a state dict: versions of its modules
        if type(self.stack[-1]) is not dict:
            self.refuse(f"attributes of {brief(self.stack[-1])}")

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def text(self, form: str, encoding: str = "utf-8") -> None:
        self.push(self.take(self.number(form)).decode(encoding, "surrogatepass"))


_OPERATIONS: dict[bytes, Callable[[_Program], object]] = {
    pickle.PROTO: lambda p: p.take(1),
    pickle.FRAME: lambda p: p.take(8),
    pickle.MARK: lambda p: p.marks.append(len(p.stack)),
    pickle.NONE: lambda p: p.push(None),
    pickle.NEWTRUE: lambda p: p.push(True),
    pickle.NEWFALSE: lambda p: p.push(False),
    pickle.BININT: lambda p: p.push(p.number("<i")),
    pickle.BININT1: lambda p: p.push(p.number("<B")),
    pickle.BININT2: lambda p: p.push(p.number("<H")),
    pickle.LONG1: lambda p: p.push(int.from_bytes(p.take(p.number("<B")), "little", signed=True)),
    pickle.BINFLOAT: lambda p: p.push(p.number(">d")),
    pickle.BINUNICODE: lambda p: p.text("<I"),
    pickle.SHORT_BINUNICODE: lambda p: p.text("<B"),
    pickle.BINSTRING: lambda p: p.text("<I", "latin-1"),
    pickle.SHORT_BINSTRING: lambda p: p.text("<B", "latin-1"),
    pickle.EMPTY_DICT: lambda p: p.push({}),
    pickle.EMPTY_LIST: lambda p: p.push([]),
    pickle.EMPTY_TUPLE: lambda p: p.push(()),
    pickle.TUPLE: lambda p: p.push(tuple(p.pop_mark())),
    pickle.TUPLE1: lambda p: p.push(tuple(p.last(1))),
    pickle.TUPLE2: lambda p: p.push(tuple(p.last(2))),
    pickle.TUPLE3: lambda p: p.push(tuple(p.last(3))),
    pickle.APPEND: lambda p: p.extend(p.last(1)),
    pickle.APPENDS: lambda p: p.extend(p.pop_mark()),
    pickle.SETITEM: lambda p: p.set_items(p.last(2)),
    pickle.SETITEMS: lambda p: p.set_items(p.pop_mark()),
    pickle.BINPUT: lambda p: p.memo.__setitem__(p.number("<B"), p.stack[-1]),
    pickle.LONG_BINPUT: lambda p: p.memo.__setitem__(p.number("<I"), p.stack[-1]),
    pickle.MEMOIZE: lambda p: p.memo.__setitem__(len(p.memo), p.stack[-1]),
    pickle.BINGET: lambda p: p.push(p.memo[p.number("<B")]),
    pickle.LONG_BINGET: lambda p: p.push(p.memo[p.number("<I")]),
    pickle.GLOBAL: lambda p: p.find(p.line(), p.line()),
    pickle.STACK_GLOBAL: lambda p: p.find(*p.last(2)),
    pickle.REDUCE: lambda p: p.reduce(),
    pickle.NEWOBJ: lambda p: p.reduce(),
    pickle.BUILD: lambda p: p.build(),
    pickle.BINPERSID: lambda p: p.persistent(),
}
