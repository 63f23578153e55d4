"""An interpreter of the harmless part of pickle, for `torch_bin`: tensors are described, nothing is run.

Containers, text and numbers are built, every *global* is only a name, and the few functions that rebuild tensors are
known by that name. No object of the file can be called, have attributes set, or use more memory than the file has bytes.
Source: torch/serialization.py and torch/_weights_only_unpickler.py of PyTorch 2.
"""

import pickle
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fmodels.weights.tensors import LIMIT, brief

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


class _Global(NamedTuple):
    """A name that the pickle refers to. It stays a name."""

    name: str


class _Storage(NamedTuple):
    """Memory that tensors lie in, by its name in the file."""

    key: str
    dtype: np.dtype
    start: int  # in elements, of a view of another storage (before torch 1.6)
    size: int
    whole: int  # elements of the storage itself


class _View(NamedTuple):
    """A tensor: a part of a storage."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Program:
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


_OPERATIONS: dict[bytes, Callable[[Program], object]] = {
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
