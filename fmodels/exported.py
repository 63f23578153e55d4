"""Programs that `export` has written, read back and run with the weights that lie beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmodels import schema, tree
from fmodels.api import inputs
from fmodels.checkpoint import load
from fmodels.export import RECORD, bare, leaves_of, read_config, read_record, width
from fmodels.generation.config import GenerationConfig
from fmodels.models import Config
from fmodels.prepare import Generated
from fmodels.types import Output, Params


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `load_exported` returns: weights, and the programs that take them.

    Attributes:
        params: the tree, in the form that the programs take.
        config: its config.
        record: what was written about each program, by name.
        programs: the program of each name, under `jax.jit`: `(params, inputs by name) -> outputs by name`.
    """

    params: Params
    config: Config
    record: dict[str, dict[str, Any]]
    programs: dict[str, Callable[..., Any]]

    def forward(self, params: Params, tokens: Any, **given: Any) -> Output:
        """The exported `fm.forward`; can be differentiated if it was exported so.

        Args:
            params: a tree of the same form as `self.params`.
            tokens: as for `fm.forward`.
            given: the other inputs of `fm.forward` that were exported; a mask that is left out is all True.

        Raises:
            ValueError: what `fm.forward` refuses; inputs that were not exported, or that were and are left out.
        """
        run, record = self._program("forward")
        names, decoder = record["inputs"], "decoder_tokens" in record["inputs"]
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"forward: exported without {', '.join(unknown)}; it takes {', '.join(names)}")
        part = "encoder" if self.config.is_encoder_decoder else ""
        own = {
            n: given.get(n)
            for n in ("mask", "positions", "token_types")
            if n in names and not (decoder and n == "positions")
        }
        tokens, arrays = inputs(params, self.config, tokens, part=part, **own)
        arrays = {"tokens": tokens, **arrays}
        if decoder:
            other, found = inputs(
                params, self.config, given.get("decoder_tokens"), part="decoder", mask=given.get("decoder_mask"),
                positions=given.get("positions"),
            )  # fmt: skip
            arrays |= {"decoder_tokens": other, "decoder_mask": found["mask"], "positions": found["positions"]}
        for name in names:
            if arrays[name] is None and not name.endswith("mask"):
                raise ValueError(f"forward: exported with {name}; pass it")
            if arrays[name] is None:
                arrays[name] = jnp.ones(
                    arrays["decoder_tokens" if name.startswith("decoder_") else "tokens"].shape, bool
                )
        return Output(**run(params, {name: arrays[name].astype(dtype) for name, (_, dtype) in names.items()}))

    def generate(self, params: Params, tokens: Any, *, mask: Any = None, **per_call: Any) -> Generated:
        """The exported `fm.generate`; prompts are padded to the same buckets.

        Args:
            params: a tree of the same form as `self.params`.
            tokens: `(b t)` int prompts, or what the encoder reads.
            mask: `(b t)` bool or 0/1; all real if None.
            per_call: the options that were exported as inputs; those that are left out are as at the export.

        Raises:
            ValueError: a row without a real token, tokens outside of the vocabulary, more of them than fit, options that
                were not exported, no seed where there is sampling.
        """
        run, record = self._program("generate")
        prompt = np.asarray(tokens)
        present = np.ones(prompt.shape, bool) if mask is None else np.asarray(mask).astype(bool)
        limit, problems = record["limits"].get("t"), []
        if (
            prompt.ndim != 2
            or not prompt.size
            or not np.issubdtype(prompt.dtype, np.integer)
            or present.shape != prompt.shape
        ):
            raise ValueError(
                f"generate: tokens are (b t) integers and mask is as large; got {prompt.dtype} {prompt.shape}, {present.shape}"
            )
        if prompt.min() < 0 or prompt.max() >= record["vocabulary"]:
            problems.append(
                f"tokens reach from {prompt.min()} to {prompt.max()}, outside of 0 … {record['vocabulary'] - 1}"
            )
        if not present.any(-1).all():
            problems.append(f"rows {np.flatnonzero(~present.any(-1)).tolist()} have no real token")
        if limit is not None and prompt.shape[1] > limit:
            problems.append(f"{prompt.shape[1]} columns of tokens, exported for at most {limit}")
        if unknown := sorted(set(per_call) - set(record["defaults"])):
            problems.append(f"exported without {', '.join(unknown)} in per_call")
        GenerationConfig(
            **{name: value for name, value in per_call.items() if name in record["defaults"] and name != "seed"}
        )  # which checks the values
        values = {**record["defaults"], **per_call}
        if missing := [name for name, value in values.items() if value is None]:
            problems.append(f"pass {', '.join(missing)}")
        if not 1 <= (values.get("max_new_tokens") or 1) <= record["max_new_tokens"]:
            problems.append(
                f"max_new_tokens is exported for 1 … {record['max_new_tokens']}; got {values['max_new_tokens']}"
            )
        if problems:
            raise ValueError("generate: " + "; ".join(problems))
        more = width(prompt.shape[1], limit) - prompt.shape[1]
        encoder = record["start"] is not None
        fill = ((0, 0), (0, more) if encoder else (more, 0))
        given = {"tokens": np.pad(prompt, fill).astype(np.int32), "mask": np.pad(present, fill)}
        given |= {name: np.asarray(value, record["inputs"][name][1]) for name, value in values.items()}
        out = run(params, given)
        if encoder:
            prompt = np.broadcast_to(np.array(record["start"], np.int32), (len(prompt), len(record["start"])))
            present = np.ones(prompt.shape, bool)
        prompt, present = (np.repeat(x, record["sequences"], axis=0) for x in (prompt, present))
        count = max(int(out["lengths"].max()), 1)
        new = np.arange(count)[None] < np.asarray(out["lengths"])[:, None]
        return Generated(
            tokens=jnp.concatenate([jnp.asarray(prompt, jnp.int32), out["tokens"][:, :count]], axis=1),
            mask=jnp.asarray(np.concatenate([present, new], axis=1)),
            lengths=out["lengths"],
            logprobs=out["logprobs"][:, :count],
            sequence_scores=out.get("sequence_scores"),
        )

    def _program(self, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        if name not in self.programs:
            raise ValueError(f"{name}: only {', '.join(self.programs)} was exported; write it with export_{name}")
        return self.programs[name], self.record[name]


def load_exported(folder: str | os.PathLike[str]) -> Exported:
    """What `export_forward` and `export_generate` have written, with its weights. Load only what you trust: it is a program.

    Args:
        folder: theirs.

    Returns:
        An `Exported`.

    Raises:
        FileNotFoundError: nothing was exported to the folder.
        ValueError: a file is broken; this jax does not read the calling convention, or runs on another platform; config.json
            or the shapes of the weights have changed since.

    Example:
        >>> import fmodels as fm, tempfile
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> folder = tempfile.mkdtemp()
        >>> fm.export_forward(params, config, folder, platforms=("cpu",))
        >>> exported = fm.load_exported(folder)
        >>> exported.forward(exported.params, [[300, 301]]).logits.shape == (1, 2, config.vocab_size)
        True
    """
    folder = Path(folder)
    record = read_record(folder)
    stacked = all(schema.split_layer(path)[1] is None for written in record.values() for path in written["params"])
    written = next(iter(record.values()))["params"]
    quantized = {path for path, leaf in written.items() if any(isinstance(part, list) for part in leaf)}
    params, config = load(folder, layers="stacked" if stacked else "list", dequantize=False if quantized else None)

    def as_written(path: str, leaf: Any) -> Any:  # what a quantised leaf stands for no file of weights tells
        return leaf.astype(written[path][0]) if path in quantized else leaf

    params = tree.map_leaves(as_written, params)
    leaves = leaves_of(params)
    found = {}
    for name, written in record.items():
        data = (folder / f"{name}.jax").read_bytes()
        _check(name, written, data, leaves, read_config(folder))
        found[name] = _taking_trees(jax.export.deserialize(bytearray(data)))
    return Exported(params, config, record, found)


def _taking_trees(exported: jax.export.Exported) -> Callable[..., Any]:
    return jax.jit(lambda params, given: exported.call(bare(params), given))


def _check(name: str, written: dict[str, Any], data: bytes, leaves: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises if a program is not what was written, or not for this process and these weights."""
    problems = []
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    if hashlib.sha256(data).hexdigest() != written["sha256"]:
        problems.append(f"{name}.jax is not the file that {RECORD} tells of")
    if not low <= written["calling_convention"] <= high:
        problems.append(
            f"jax {written['jax']} wrote it with calling convention {written['calling_convention']}, this jax {jax.__version__} "
            f"reads {low} to {high}"
        )
    here = jax.export.default_export_platform()
    if here not in written["platforms"]:
        problems.append(f"it is for {', '.join(written['platforms'])}, this is {here}")
    keys = sorted(set(config) | set(written["config"]))
    if changed := [key for key in keys if config.get(key) != written["config"].get(key)]:
        problems.append(f"config.json has another {', '.join(changed)}")
    paths = sorted(set(leaves) | set(written["params"]))
    if changed := [path for path in paths if leaves.get(path) != written["params"].get(path)]:
        shown = [f"{path} is {leaves.get(path)}, was {written['params'].get(path)}" for path in changed[:5]]
        problems.append(f"{len(changed)} leaves have changed: {'; '.join(shown)}")
    if problems:
        raise ValueError(f"load_exported: {name}: " + "; ".join(problems) + f"; export it again with export_{name}")
