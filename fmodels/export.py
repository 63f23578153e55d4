"""Whole programs for other processes: `forward` and `generate` as files of `jax.export`, for every platform at once.

A file holds the program and no weights: these are its argument, and lie beside it as a checkpoint like any other. An export
is for deployment, not for keeping: JAX promises to read it for six months. What lasts is the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels import programs, tree
from fmodels.api import check, forward
from fmodels.arrays import Target, target
from fmodels.checkpoint import disk_tensors, save
from fmodels.generation.config import GenerationConfig
from fmodels.models import Config
from fmodels.prepare import bucket, prepare
from fmodels.types import Array, Params
from fmodels.weights.quantized import dialects_of

PLATFORMS = ("cpu", "cuda", "tpu")
"""Those that programs are exported for if nothing else is asked for; `"rocm"` is possible, too."""
FIELDS = ("logits", "hidden", "pooled", "sequence_logits", "encoder_hidden")
"""The fields of `Output` that an exported `forward` returns."""
WARPS = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
ROWS = ("repetition_penalty", "min_length", "min_new_tokens")
INTEGERS = ("seed", "max_new_tokens", "top_k", "min_length", "min_new_tokens")
PER_CALL = ("seed", "max_new_tokens", *WARPS, *ROWS)
"""The options of an exported `generate` that can be left to each call."""
RECORD = "export.json"


class Program(NamedTuple):
    """A function that can be exported.

    Attributes:
        function: `(params, inputs by name) -> outputs by name`, for `jax.jit`, with any size of the axes.
        inputs: name -> letters of its axes and dtype, such as `("b t", "int32")`.
        limits: letter -> the largest size of that axis, where there is one.
        info: what a caller has to know, for JSON.
    """

    function: Callable[[Params, dict[str, Array]], dict[str, Array]]
    inputs: dict[str, tuple[str, str]]
    limits: dict[str, int]
    info: dict[str, Any]


def forward_program(params: Params, config: Config, names: Sequence[str] | None = None) -> Program:
    """`fm.forward` as a program.

    Args:
        params: the tree, or one of shapes.
        config: its config.
        names: the inputs; None for tokens and mask, of the decoder too if there is one.

    Raises:
        ValueError: inputs that the model does not take.
    """
    decoder = ("decoder_tokens", "decoder_mask") if config.is_encoder_decoder else ()
    names = ("tokens", "mask", *decoder) if names is None else tuple(names)
    known = ("tokens", "mask", *decoder, "positions", *(() if config.is_encoder_decoder else ("token_types",)))
    if "tokens" not in names or not set(names) <= set(known):
        raise ValueError(f"export: inputs are tokens and any of {', '.join(known[1:])}; got {', '.join(names)}")
    choices = config.task in ("multiple-choice", "double-heads")

    def axes(name: str) -> str:
        own = "decoder_tokens" in names and (name.startswith("decoder_") or name == "positions")
        return "b n t" if choices else "b s" if own else "b t"

    def run(params: Params, given: dict[str, Array]) -> dict[str, Array]:
        out = forward(params, config, **given)  # pyright: ignore[reportArgumentType]
        return {name: getattr(out, name) for name in FIELDS if getattr(out, name) is not None}

    given = {name: (axes(name), "bool" if name.endswith("mask") else "int32") for name in names}
    parts = {"t": "encoder", "s": "decoder"} if config.is_encoder_decoder else {"t": ""}
    limits = {} if "positions" in names else {
        letter: size for letter, part in parts.items() if (size := _positions(params, config, part)) is not None
    }  # fmt: skip
    return Program(run, given, limits, {})


def generate_program(
    params: Params,
    config: Config,
    *,
    max_new_tokens: int,
    options: GenerationConfig | None = None,
    per_call: Sequence[str] | None = None,
) -> Program:
    """`fm.generate` as a program; it aligns padding itself.

    Args:
        params: the tree, or one of shapes.
        config: its config.
        max_new_tokens: how many tokens to add at most.
        options: as for `fm.generate`.
        per_call: names of `PER_CALL` that are scalar inputs of each call; None for seed, temperature, top_k and top_p where
            the options sample, and for none of them where they do not.

    Raises:
        ValueError: what `fm.generate` refuses; unknown names.
        NotImplementedError: options of ways of decoding other than greedy, sampling and beams.
    """
    rows = np.ones((1, 2), np.int32)
    call = prepare(
        params, config, rows, rows, max_new_tokens, jax.random.key(0), options, None, None, None, None, (), (), None, None,
        None, None, False, 0, None, "xla",
    )  # fmt: skip
    plan, fixed, made = call.plan, call.arguments[3], call.arguments[4]
    if (
        plan.strategy not in ("sample", "beams")
        or plan.guided
        or call.max_time is not None
        or made.watermark is not None
    ):
        raise NotImplementedError(
            f"export: only greedy decoding, sampling and beams are exported, not {plan.strategy} with guidance_scale, max_time "
            "or watermarking_config"
        )
    if (
        plan.ask != programs.NOTHING
        or plan.chunk is not None
        or (made.begin is not None and not config.is_encoder_decoder)
    ):
        raise NotImplementedError(
            "export: output_*, prefill_chunk_size and (without an encoder) begin_suppress_tokens are not exported; leave them out"
        )
    samples = bool(made.rows.sample.any())
    if per_call is None:
        per_call = ("seed", "temperature", "top_k", "top_p") if samples else ()
    if unknown := sorted(set(per_call) - set(PER_CALL)):
        raise ValueError(f"export: per_call has unknown names {unknown}; any of {', '.join(PER_CALL)}")
    if samples and "seed" not in per_call:
        raise ValueError("export: sampling needs a seed in each call; add 'seed' to per_call")

    def run(params: Params, given: dict[str, Array]) -> dict[str, Array]:
        tokens, mask = given["tokens"], given["mask"]
        batch = tokens.shape[0]

        def wide(x: Array) -> Array:
            return jnp.broadcast_to(x, (batch, *x.shape[1:]))

        values = {name: wide(given[name][None]) for name in per_call if name in (*WARPS, *ROWS)}
        rows = jax.tree.map(wide, made.rows)
        warp = rows.warp._replace(**{name: value for name, value in values.items() if name in WARPS})
        rows = rows._replace(warp=warp, **{name: value for name, value in values.items() if name in ROWS})
        count = jnp.minimum(given["max_new_tokens"], max_new_tokens) if "max_new_tokens" in per_call else None
        arrays = made._replace(rows=rows, max_new_tokens=made.max_new_tokens if count is None else count)
        if config.is_encoder_decoder:
            read = fixed._replace(
                tokens=wide(fixed.tokens), mask=wide(fixed.mask), encoder_tokens=tokens, encoder_mask=mask
            )
        else:  # all padding goes to the left, that between tokens too
            order = jnp.argsort(mask, axis=1, stable=True)
            read = fixed._replace(**{n: jnp.take_along_axis(given[n], order, axis=1) for n in ("tokens", "mask")})
        key = jax.random.key(given["seed"] if "seed" in per_call else 0)
        out = programs.whole(params, config, plan, read, arrays, key)
        found = {
            "tokens": out.tokens[:, :max_new_tokens],
            "lengths": out.lengths,
            "logprobs": out.logprobs[:, :max_new_tokens],
        }
        return found if out.sequence_scores is None else {**found, "sequence_scores": out.sequence_scores}

    limit = _positions(params, config, "encoder" if config.is_encoder_decoder else "")
    if limit is not None and not config.is_encoder_decoder:
        limit += 1 - max_new_tokens  # the last token is not read
    given = {"tokens": ("b t", "int32"), "mask": ("b t", "bool")}
    given |= {name: ("", "int32" if name in INTEGERS else "float32") for name in per_call}
    info = {
        "max_new_tokens": max_new_tokens,
        "sequences": plan.sequences,
        "start": call.prompt[0].tolist() if config.is_encoder_decoder else None,
        "vocabulary": int(params["embed"]["tokens"].shape[0]),
        "defaults": {name: _default(name, made) for name in per_call},
    }
    return Program(run, given, {} if limit is None else {"t": limit}, info)


def _default(name: str, made: Any) -> Any:
    """What the options of the export say of an input of each call; None if it has to be given."""
    if name in ("seed", "max_new_tokens"):
        return int(made.max_new_tokens) if name == "max_new_tokens" else None
    return getattr(made.rows.warp if name in WARPS else made.rows, name)[0].item()


def _positions(params: Params, config: Config, part: str) -> int | None:
    """Columns that a table of positions allows; None without a table."""
    embed = params["embed"] | params.get(part, {}).get("embed", {})
    return embed["positions"].shape[0] - config.position_offset if "positions" in embed else None


def width(length: int, limit: int | None) -> int:
    """The bucket to which a text of `length` tokens is padded, so that few lengths are compiled."""
    return bucket(length) if limit is None else max(length, min(bucket(length), limit))


def lower(
    program: Program, params: Params, *, platforms: Sequence[str] = PLATFORMS, gradient: bool = False
) -> jax.export.Exported:
    """A program for other processes, of any batch and length.

    Args:
        program: from `forward_program` or `generate_program`.
        params: the tree, or one of shapes.
        platforms: those that it shall run on.
        gradient: whether it shall have one.

    Raises:
        ValueError: no platforms, or unknown ones.
    """
    if not platforms or not set(platforms) <= {*PLATFORMS, "rocm"}:
        raise ValueError(
            f"export: platforms are any of {', '.join(PLATFORMS)}, rocm; got {', '.join(platforms) or 'none'}"
        )
    scope = jax.export.SymbolicScope([f"{letter} <= {size}" for letter, size in program.limits.items()])
    given = {
        name: jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(axes.replace(" ", ", "), scope=scope) if axes else (), dtype
        )
        for name, (axes, dtype) in program.inputs.items()
    }
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    structure = jax.tree.structure(params)

    def run(params: Params, given: dict[str, Array]) -> dict[str, Array]:
        return program.function(jax.tree.unflatten(structure, jax.tree.leaves(params)), given)

    with target(Target(few_rows=not gradient)):
        return jax.export.export(jax.jit(run), platforms=platforms)(bare(shapes), given)


def bare(params: Params) -> Params:
    """The tree as programs take it: a list of its arrays in place of a quantised leaf, which no file of jax.export can name."""
    return tree.map_leaves(lambda _, leaf: jax.tree.leaves(leaf) if hasattr(leaf, "einsum") else leaf, params)


def leaves_of(params: Params) -> dict[str, list[Any]]:
    """Path -> dtype and shape of a leaf, then those of the parts of a quantised one: what a program is made for."""

    def describe(x: Any) -> list[Any]:
        return [x.dtype.name, *x.shape]

    return {
        path: describe(leaf) + (list(map(describe, jax.tree.leaves(leaf))) if hasattr(leaf, "einsum") else [])
        for path, leaf in tree.flatten(params).items()
    }


def export_forward(
    params: Params,
    config: Config,
    folder: str | os.PathLike[str],
    *,
    inputs: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    gradient: bool = False,
) -> None:
    """Writes `fm.forward` as a program for other processes, beside a checkpoint with the weights; see `load_exported`.

    The program takes any batch and length (as far as a table of positions goes). Tokens outside of the vocabulary are only
    seen by what `load_exported` returns, not by the program. It is for deployment and not for keeping: JAX reads it for six
    months; the checkpoint lasts.

    Args:
        params: the tree, stacked or a tuple of layers, as the program will take it. Quantised leaves that `load` gave stay so.
        config: its config.
        folder: gets `forward.jax`, `export.json`, and what `fm.save` writes.
        inputs: those of `fm.forward` that it takes; None for tokens and mask, of the decoder too if there is one.
        platforms: those that it runs on.
        gradient: whether `jax.grad` can go through it.

    Raises:
        ValueError: the tree does not fit the config, or has leaves that `save` cannot write; inputs that the model lacks; unknown
            platforms.

    Example:
        >>> import fmodels as fm, pathlib, tempfile
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> folder = tempfile.mkdtemp()
        >>> fm.export_forward(params, config, folder, platforms=("cpu",))
        >>> sorted(path.name for path in pathlib.Path(folder).iterdir())
        ['config.json', 'export.json', 'forward.jax', 'generation_config.json', 'model.safetensors']
    """
    programs = {"forward": forward_program(params, config, inputs)}
    write(programs, params, config, folder, platforms=platforms, gradient=gradient)


def export_generate(
    params: Params,
    config: Config,
    folder: str | os.PathLike[str],
    *,
    max_new_tokens: int,
    options: GenerationConfig | None = None,
    per_call: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes `fm.generate`, greedy, sampling or with beams, as `export_forward` writes `fm.forward`.

    The program takes any batch, and any length that leaves room for `max_new_tokens` in a table of positions. Its tokens are
    those of `fm.generate` with the same options and `key=jax.random.key(seed)`.

    Args:
        params: as for `export_forward`. On CPU a tuple of layers (`fm.unstack_layers`) decodes faster than a stacked tree.
        config: its config.
        folder: gets `generate.jax`, `export.json`, and what `fm.save` writes.
        max_new_tokens: how many tokens a call adds at most.
        options: as for `fm.generate`.
        per_call: options that each call gives, any of `seed max_new_tokens temperature top_h top_k top_p min_p typical_p
            epsilon_cutoff eta_cutoff repetition_penalty min_length min_new_tokens`; the others are fixed. None for the first
            and temperature, top_k and top_p where the options sample, for none where they do not.
        platforms: those that it runs on.

    Raises:
        ValueError: what `fm.generate` refuses; an unknown name in `per_call`; sampling without a seed in it.
        NotImplementedError: other ways of decoding.

    Example:
        >>> import fmodels as fm, tempfile
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> folder = tempfile.mkdtemp()
        >>> fm.export_generate(params, config, folder, max_new_tokens=3, platforms=("cpu",))
        >>> exported = fm.load_exported(folder)
        >>> exported.generate(exported.params, [[300, 301]]).tokens.shape
        (1, 5)
    """
    program = generate_program(params, config, max_new_tokens=max_new_tokens, options=options, per_call=per_call)
    write({"generate": program}, params, config, folder, platforms=platforms)


def write(
    programs: Mapping[str, Program],
    params: Params,
    config: Config,
    folder: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = PLATFORMS,
    gradient: bool = False,
) -> None:
    """Writes programs by name, beside a checkpoint with the weights.

    Args:
        programs: `"forward"` from `forward_program`, `"generate"` from `generate_program`, or both.
        params: as for `export_forward`, as are the others.
        config: likewise.
        folder: likewise.
        platforms: likewise.
        gradient: of `"forward"`.

    Raises:
        ValueError: as `export_forward`.
    """
    check(params, config)
    disk_tensors(params, config)  # raises for what cannot be saved
    folder = Path(folder)
    record = read_record(folder) if (folder / RECORD).exists() else {}
    leaves = leaves_of(params)
    if other := [n for n, written in record.items() if n not in programs and written["params"] != leaves]:
        raise ValueError(
            f"export: {str(folder)!r} holds {other[0]}.jax for other leaves (stacked and listed layers differ, too); choose "
            "another folder, or export both from the same tree"
        )
    contents: dict[str, bytes] = {}
    for name, program in programs.items():
        vjp = gradient and name == "forward"
        exported = lower(program, params, platforms=platforms, gradient=vjp)
        contents[f"{name}.jax"] = bytes(exported.serialize(vjp_order=int(vjp)))
        record[name] = {
            "sha256": hashlib.sha256(contents[f"{name}.jax"]).hexdigest(),
            "jax": jax.__version__,
            "calling_convention": exported.calling_convention_version,
            "platforms": list(exported.platforms),
            "inputs": program.inputs,
            "limits": program.limits,
            **program.info,
            "params": leaves,
        }
    save(params, config, folder, format="gguf" if "gguf" in dialects_of(params) else "safetensors")
    for name in programs:
        record[name]["config"] = read_config(folder)
    contents[RECORD] = (json.dumps(record, indent=1) + "\n").encode()
    for name, content in contents.items():
        beside = folder / f"{name}.part"
        beside.write_bytes(content)
        beside.replace(folder / name)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json that lies beside the programs."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def read_record(folder: Path) -> dict[str, Any]:
    """What was written about each program, by name."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"load_exported: no {RECORD} in {str(folder)!r}; export_forward and export_generate write one"
        ) from None
