"""What each `quant_method` of a config.json means: the tensors of a quantised weight, and the codec that reads them.

Every builder tells all that does not fit of one weight's tensors: what is missing, of another shape, dtype or range.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmodels.arrays import Codec, Quantized
from fmodels.codecs import Awq, AwqFast, AwqRows, Blocks, Bnb4, Bnb8, Gptq, Mxfp4, PackedBlocks
from fmodels.weights.tensors import Tensor, brief, parse_json

Options = Mapping[str, Any]
FLOATS = ("bfloat16", "float16", "float32")
STATE = "weight.quant_state.bitsandbytes__"
MAX_STATE = 4096  # bytes of a quant_state


@dataclass(frozen=True, eq=False)
class Packed(Tensor):
    """A quantised weight: `dtype` and `shape` are those of the array that it stands for, which `array` computes.

    Attributes:
        codec: how its parts make a matrix.
        parts: the tensors on disk.
        derived: small arrays that were made from them.
        turned: whether the shape has the matrix's columns before its rows.
    """

    codec: Codec = dataclasses.field(default_factory=Codec)
    parts: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    turned: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.parts.values())

    @property
    def kind(self) -> Any:
        """What must be the same in all layers of a stack."""
        shapes = {n: (t.dtype, None if n in self.codec.padded else t.shape) for n, t in self.parts.items()}
        return self.codec, self.shape, self.dtype, tuple(sorted(shapes.items()))


def packed_of(
    name: str, codec: Codec, shape: tuple[int, ...], dtype: Any, parts: Mapping[str, Tensor], **more: Any
) -> Packed:
    """A `Packed` whose array is computed from its parts."""

    def get() -> np.ndarray:
        arrays: dict[str, Any] = {part: tensor.array() for part, tensor in parts.items()} | {**packed.derived}
        size = (shape[-1], shape[-2]) if packed.turned else shape[-2:]
        array = np.asarray(Quantized(arrays, codec, size, np.dtype(dtype)).dequantize())
        return array.swapaxes(-1, -2) if packed.turned else array

    packed = Packed(name, np.dtype(dtype), shape, get, codec=codec, parts=parts, **more)
    return packed


def transposed(packed: Packed) -> Packed:
    """The weight whose matrix lies as `packed`, with its columns first."""
    shape = packed.shape[::-1]
    return packed_of(
        packed.name, packed.codec, shape, packed.dtype, packed.parts, derived=packed.derived, turned=not packed.turned
    )


class Group:
    """The tensors of one weight, and what is wrong with them."""

    def __init__(self, stem: str, tensors: dict[str, Tensor], problems: list[str]):
        self.stem, self.tensors, self.problems = stem, tensors, problems

    def fail(self, problem: str) -> None:
        self.problems.append(f"{self.stem!r}: {problem}")

    def expect(self, part: str, dtypes: Sequence[str], shape: Sequence[int | None] | None = None) -> Tensor | None:
        """The tensor if it is there, of one of the dtypes and of the shape, in which None is any size."""
        tensor = self.tensors.get(part)
        if tensor is None:
            self.fail(f"{part!r} is missing")
        elif tensor.dtype.name not in dtypes:
            self.fail(f"{part!r} is {tensor.dtype}, expected {' or '.join(dtypes)}")
        elif shape is not None and not (
            len(shape) == len(tensor.shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        ):
            want = ", ".join("?" if n is None else str(n) for n in shape)
            self.fail(f"{part!r} has shape {list(tensor.shape)}, expected [{want}]")
        else:
            return tensor
        return None


@dataclass(frozen=True)
class Method:
    """A `quant_method`.

    Attributes:
        parts: the names of a weight's tensors; `marks` are those that only quantised weights have.
        build: `(options, group) -> Packed`, or None after it has told what is wrong.
        check: `(options) -> problems` of the options themselves.
        ignored: the option that lists modules which are not quantised.
    """

    parts: tuple[str, ...]
    marks: tuple[str, ...]
    build: Callable[[Options, Group], Packed | None]
    check: Callable[[Options], list[str]]
    ignored: str = "modules_to_not_convert"
    separator: str = "."


def _only(options: Options, **allowed: tuple[Any, ...]) -> list[str]:
    """Problems with options that are there and have another value than those allowed."""
    return [
        f"{key}={brief(options[key])} is not supported, only {' or '.join(map(repr, values))}"
        for key, values in allowed.items()
        if key in options and not any(type(options[key]) is type(v) and options[key] == v for v in values)
    ]


def _blocks(shape: tuple[int, ...], block: Sequence[int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _check_fp8(options: Options) -> list[str]:
    block = options.get("weight_block_size", [128, 128])
    problems = _only(options, activation_scheme=("dynamic", "static"), fmt=("e4m3",), scale_fmt=(None, "float"))
    if not (block is None or _is_block(block)):
        problems.append(f"weight_block_size={brief(block)} is not two positive integers")
    return problems


def _is_block(block: Any) -> bool:
    return isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)


def _build_fp8(options: Options, group: Group) -> Packed | None:
    weight = group.expect("weight", ("float8_e4m3fn",), (None, None))
    if weight is None:
        return None
    block = options.get("weight_block_size", [128, 128])
    own = tuple(min(n, max(m, 1)) for n, m in zip(block or weight.shape, weight.shape, strict=True))
    scale = group.expect("weight_scale_inv", ("float32", "bfloat16"), _blocks(weight.shape, own) if block else None)
    if scale is None:
        return None
    if not block and scale.size != 1:
        return group.fail(f"'weight_scale_inv' has shape {list(scale.shape)}, expected one number")
    dtype = "bfloat16" if scale.dtype == np.float32 else scale.dtype
    return packed_of(f"{group.stem}.weight", Blocks((own[0], own[1])), weight.shape, dtype, group.tensors)


def _build_mxfp4(options: Options, group: Group) -> Packed | None:
    blocks = group.expect("blocks", ("uint8",), (None, None, None, 16))
    if blocks is None or group.expect("scales", ("uint8",), blocks.shape[:-1]) is None:
        return None
    experts, rows, count, _ = blocks.shape
    shape = experts, count * 32, rows
    return packed_of(group.stem, Mxfp4(), shape, "bfloat16", group.tensors, turned=True)


def _check_gptq(options: Options) -> list[str]:
    problems = _only(options, bits=(2, 3, 4, 8), checkpoint_format=("gptq", "gptq_v2"), format=("gptq", "gptq_v2"))
    if options.get("bits") == 3 and _adds_one(options) and "gptqmodel" in json.dumps(options.get("meta")).lower():
        # Its constants add 4, 1 and 2 to the zeros of three words in turn, where AutoGPTQ adds 1 to each.
        problems.append("zeros of 3 bits that GPTQModel wrote in the format gptq are not supported; save it as gptq_v2")
    return problems + _check_dynamic(options)


def _check_dynamic(options: Options) -> list[str]:
    """Rules that begin with `-:` only list what is not quantised, which the tensors tell, too."""
    rules = options.get("dynamic") or {}
    if isinstance(rules, Mapping) and all(rule.startswith("-:") for rule in rules):
        return []
    return ["dynamic: options of single modules are not supported"]


def _adds_one(options: Options) -> bool:
    return options.get("checkpoint_format", options.get("format", "gptq")) == "gptq"


def _build_gptq(options: Options, group: Group) -> Packed | None:
    bits = options.get("bits", 4)
    codes = group.expect("qweight", ("int32",), (None, None))
    if codes is None:
        return None
    inputs, outputs = codes.shape[0] * 32 // bits, codes.shape[1]
    scales = group.expect("scales", FLOATS, (None, outputs))
    g_idx = group.expect("g_idx", ("int32",), (inputs,))
    if scales is None or g_idx is None:
        return None
    groups = scales.shape[0]
    if group.expect("qzeros", ("int32",), (groups, outputs * bits // 32)) is None:
        return None
    numbers = g_idx.array()
    if outputs * bits % 32 or inputs * bits % 32 or not ((numbers >= 0) & (numbers < groups)).all():
        return group.fail(f"'g_idx' has groups outside of 0 … {groups - 1}, or {outputs} outputs do not fill words")
    codec = Gptq(bits, _adds_one(options))
    return packed_of(f"{group.stem}.weight", codec, (outputs, inputs), scales.dtype, group.tensors)


AWQ = {name: name for name in ("gemm", "gemv", "gemv_fast", "llm-awq")} | dict.fromkeys(("exllama", "ipex"), "gemm")
"""`version` of AWQ -> how its files lie; those for ExLlama's and IPEX' kernels are turned when they are in memory."""


def _awq_version(options: Options) -> Any:
    """As transformers 5 finds it; any other `backend` is only what computes."""
    if options.get("backend") == "llm-awq":
        return "llm-awq"
    keys = ("checkpoint_format", "version", "format")
    stated = next((options[key] for key in keys if options.get(key) is not None), "gemm")
    return stated.lower() if isinstance(stated, str) else stated


def _check_awq(options: Options) -> list[str]:
    # Without zero points GPTQModel and AutoRound write zeros all the same: the middle of the range.
    stated = {**options, "version": _awq_version(options)}
    return _only(stated, bits=(4,), version=tuple(AWQ), zero_point=(True, False)) + _check_dynamic(options)


def _build_awq(options: Options, group: Group) -> Packed | None:
    form, zero = AWQ[_awq_version(options)], "qzeros"
    if form == "llm-awq":  # in 2023 as gemv
        form, zero = ("gemv_fast", "scaled_zeros") if "scaled_zeros" in group.tensors else ("gemv", zero)
    codes = group.expect("qweight", ("int16",) if form == "gemv_fast" else ("int32",), (None, None))
    if codes is None:
        return None
    high, wide = codes.shape
    inputs, outputs = {"gemm": (high, wide * 8), "gemv": (wide * 8, high), "gemv_fast": (wide, high * 4)}[form]
    size = options.get("group_size", options.get("q_group_size", 128))
    size = inputs if size == -1 else size
    if type(size) is not int or size < 1:
        return group.fail(f"group_size={brief(size)} is not a positive integer")
    if form == "gemv_fast" and inputs % 64:
        return group.fail(f"'qweight' has {inputs} inputs of four rows, expected whole blocks of 64")
    groups = -(-inputs // size)
    if form == "gemm":
        codec, dtypes, shape = Awq(size), ("int32",), (groups, outputs // 8)
    elif form == "gemv":
        codec, dtypes, shape = AwqRows(size), ("int32",), (outputs, None)
    else:
        codec, dtypes, shape = AwqFast(size, zero), FLOATS, (None, outputs)
    zeros = group.expect(zero, dtypes, shape)
    filled = None if zeros is None else zeros.shape[-1] * 8 if form == "gemv" else zeros.shape[0]
    scales = group.expect("scales", FLOATS, (outputs, filled) if form == "gemv" else (filled, outputs))
    if filled is None or scales is None:
        return None
    if filled < groups:
        return group.fail(f"{zero!r} has {filled} numbers of an output, expected at least {groups}")
    if len(group.tensors) > 3:
        return group.fail(f"has {sorted(group.tensors)}, expected only 'qweight', 'scales' and {zero!r}")
    return packed_of(f"{group.stem}.weight", codec, (outputs, inputs), scales.dtype, group.tensors)


def _build_bnb(options: Options, group: Group) -> Packed | None:
    if not options.get("load_in_4bit", options.get("_load_in_4bit")):
        codes = group.expect("weight", ("int8",), (None, None))
        if codes is None or group.expect("SCB", ("float32",), codes.shape[:1]) is None:
            return None
        if "weight_format" in group.tensors:
            row = group.expect("weight_format", ("uint8",), ())
            if row is None or row.array().item() != 0:
                return group.fail("'weight_format' is not 0, by rows; save it again with bitsandbytes 0.45 or newer")
        return packed_of(f"{group.stem}.weight", Bnb8(), codes.shape, "float16", group.tensors)
    names = [name for name in group.tensors if name.startswith(STATE)]
    if len(names) != 1:
        return group.fail(f"expected one of {STATE}nf4 and …fp4, got {names or 'none'}")
    text = group.expect(names[0], ("uint8",), (None,))
    if text is None or text.size > MAX_STATE:
        return group.fail(f"{names[0]!r} is no text of at most {MAX_STATE} bytes")
    state = parse_json(text.array().tobytes(), f"load: {text.name!r}")
    shape, block, nested = (state.get(key) for key in ("shape", "blocksize", "nested_blocksize"))
    if not (_is_block(shape) and _is_block([block] * 2) and state.get("dtype") in FLOATS):
        return group.fail(f"{names[0]!r} does not tell shape, blocksize and dtype of a matrix: {brief(state)}")
    assert isinstance(shape, list)
    assert isinstance(block, int)
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    checks = [
        group.expect("weight", ("uint8",), (-(-count // 2), 1)),
        group.expect("weight.absmax", ("uint8",) if nested is not None else ("float32",), (blocks,)),
        group.expect("weight.quant_map", ("float32",), (16,)),
    ]
    derived: dict[str, np.ndarray] = {}
    if nested is not None:
        offset = state.get("nested_offset")
        if (
            not _is_block([nested] * 2)
            or isinstance(offset, bool)
            or not isinstance(offset, int | float)
            or not abs(offset) < 1e38
        ):
            return group.fail(f"{names[0]!r} does not tell nested_blocksize and nested_offset: {brief(state)}")
        derived["nested_offset"] = np.array(offset, np.float32)
        checks += [
            group.expect("weight.nested_absmax", ("float32",), (-(-blocks // nested),)),
            group.expect("weight.nested_quant_map", ("float32",), (256,)),
        ]
    if any(check is None for check in checks):
        return None
    codec = Bnb4((shape[0], shape[1]), block, nested)
    return packed_of(f"{group.stem}.weight", codec, tuple(shape), state["dtype"], group.tensors, derived=derived)


def _schemes(options: Options) -> list[Any]:
    groups = options.get("config_groups")
    return list(groups.values()) if isinstance(groups, Mapping) else []


def _check_compressed(options: Options) -> list[str]:
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    problems = _only(options, format=formats, kv_cache_scheme=(None,))
    schemes = _schemes(options)
    if len(schemes) != 1:
        problems.append(f"config_groups: expected one group of modules, got {len(schemes)}")
    for scheme in schemes:
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if not isinstance(weights, Mapping):
            problems.append(f"config_groups: expected weights of a group, got {brief(scheme)}")
            continue
        problems += _only(
            weights, type=("int", "float"), strategy=("tensor", "channel", "group", "block"), actorder=(None, "weight", "static"),
            num_bits=(2, 4, 8) if options.get("format") == "pack-quantized" else (8,),
        )  # fmt: skip
        size = {"group": [weights.get("group_size")] * 2, "block": weights.get("block_structure")}
        if not _is_block(size.get(str(weights.get("strategy")), (1, 1))):
            problems.append(f"config_groups: {weights.get('strategy')} has no size: {brief(weights)}")
    return problems


def _build_compressed(options: Options, group: Group) -> Packed | None:
    weights = _schemes(options)[0]["weights"]
    bits, even = weights.get("num_bits", 8), weights.get("symmetric", True)
    scale = group.expect("weight_scale", FLOATS)
    tensors = dict(group.tensors)
    if options.get("format") == "pack-quantized":
        stated = group.expect("weight_shape", ("int64",), (2,))
        codes = group.expect("weight_packed", ("int32",), (None, None))
        if codes is None or stated is None:
            return None
        shape = (int(stated.array()[0]), int(stated.array()[1]))
        if codes.shape != (shape[0], -(-shape[1] * bits // 32)):
            return group.fail(
                f"'weight_packed' has shape {list(codes.shape)}, which does not fit 'weight_shape' {shape}"
            )
        del tensors["weight_shape"]
    else:
        codes = group.expect("weight", ("int8",) if weights.get("type") == "int" else ("float8_e4m3fn",), (None, None))
        shape = codes.shape if codes is not None else (1, 1)
    if codes is None or scale is None:
        return None
    strategy = weights.get("strategy")
    block = {
        "channel": (1, shape[1]), "group": (1, weights.get("group_size")), "block": weights.get("block_structure"),
    }.get(strategy, shape)  # fmt: skip
    block = (min(block[0], max(shape[0], 1)), min(block[1], max(shape[1], 1)))
    rows, columns = _blocks(shape, block)
    if scale.size != rows * columns or len(scale.shape) > 2:
        return group.fail(f"'weight_scale' has shape {list(scale.shape)}, expected {rows} by {columns} numbers")
    zero = None if even and "weight_zero_point" not in tensors else "weight_zero_point"
    if zero is not None:
        packed = options.get("format") == "pack-quantized" and strategy != "tensor"
        want = (-(-shape[0] * bits // 32), columns) if packed else scale.shape
        if group.expect(zero, ("int32",) if packed else (codes.dtype.name, "int8"), want) is None:
            return None
    if options.get("format") == "pack-quantized":
        codec = PackedBlocks(block, "weight_scale", zero, bits, (shape[0], shape[1]))
    else:
        codec = Blocks(block, "weight_scale", zero)
    return packed_of(f"{group.stem}.weight", codec, shape, scale.dtype, tensors)


METHODS: dict[str, Method] = {
    "fp8": Method(
        ("weight", "weight_scale_inv", "activation_scale", "input_scale"), ("weight_scale_inv",), _build_fp8, _check_fp8
    ),
    "mxfp4": Method(("blocks", "scales"), ("blocks", "scales"), _build_mxfp4, lambda options: [], separator="_"),
    "gptq": Method(
        ("qweight", "qzeros", "scales", "g_idx"), ("qweight", "qzeros", "scales", "g_idx"), _build_gptq, _check_gptq
    ),
    "awq": Method(
        ("qweight", "qzeros", "scales", "scaled_zeros"), ("qweight", "qzeros", "scales"), _build_awq, _check_awq
    ),
    "bitsandbytes": Method(
        (
            "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
            STATE + "nf4", STATE + "fp4", "SCB", "weight_format",
        ),
        (STATE + "nf4", STATE + "fp4", "SCB", "weight.absmax", "weight.quant_map"),
        _build_bnb,
        lambda options: [],
        "llm_int8_skip_modules",
    ),
    "compressed-tensors": Method(
        ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale", "input_zero_point"),
        ("weight_scale", "weight_packed"),
        _build_compressed,
        _check_compressed,
        "ignore",
    ),
}  # fmt: skip
"""`quant_method` -> how its files are read."""


def check_options(options: Any) -> list[str]:
    """What of a `quantization_config` is not supported.

    Example:
        >>> check_options({"quant_method": "gptq", "bits": 5})
        ['bits=5 is not supported, only 2 or 3 or 4 or 8']
    """
    method = options.get("quant_method") if isinstance(options, Mapping) else None
    if not isinstance(method, str) or method not in METHODS:
        return [f"quant_method={brief(method)} is not supported; one of {', '.join(METHODS)}"]
    listed = options.get(METHODS[method].ignored)
    if not (listed is None or (isinstance(listed, list) and all(isinstance(one, str) for one in listed))):
        return [f"{METHODS[method].ignored}={brief(listed)} is not a list of names"]
    return METHODS[method].check(options)
