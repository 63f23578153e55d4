"""`load` and `save`: between a folder or a Hub id and `(params, config)`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fmodels import dialects, hub, layout, schema, tree
from fmodels.api import check
from fmodels.arrays import Quantized, check_plain
from fmodels.dialects.tree import from_leaves
from fmodels.generation.config import GenerationConfig
from fmodels.models import Config, family
from fmodels.pooling import read_pooling
from fmodels.reading import read_tree
from fmodels.transforms.adapters import check_merged
from fmodels.transforms.stacking import unstack_layers
from fmodels.types import Key, Params
from fmodels.weights import FORMATS, Tensor, quantized, read_file, read_folder, write_folder
from fmodels.weights.formats import check_dtype, check_format, dtype_and_type, is_alone
from fmodels.weights.ggml import Blocks
from fmodels.weights.tensors import as_bytes, cast, computed


class Checkpoint(NamedTuple):
    """A checkpoint on disk, whose tensors are not read yet.

    Attributes:
        path: the folder or file.
        config: what it says about the model.
        tensors: under the names and with the axes that PyTorch's files have; one for all parts of a quantised weight.
        raw: the same as the files have them.
        metadata: of the files; the entry `format` says whose names `raw` has.
    """

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    raw: dict[str, Tensor]
    metadata: dict[str, Any]


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    task: str | None = None,
    variant: str | None = None,
    format: str | None = None,
    **hub_options: Any,
) -> Checkpoint:
    """Reads the config and the headers of a folder, a file of weights, or a Hub id; in any format.

    Raises:
        ValueError, OSError, pickle.UnpicklingError: as `load`.
    """
    path = hub.resolve(source, variant=variant, format=format, **hub_options)
    folder = path.is_dir() and not is_alone(path)
    try:
        raw, metadata = read_folder(path, variant=variant, format=format) if folder else read_file(path, format)
    except FileNotFoundError as error:
        if (folder_of(path) / "config.json").exists():
            raise
        raise FileNotFoundError(f"load: no config.json in {str(path)!r}, and no weights: {error}") from None
    config = _config(path, metadata, raw, task)
    tensors = dialects.read(raw, config, metadata["format"])
    return Checkpoint(path, config, layout.joined(tensors, config), raw, metadata)


def load_config(source: str | os.PathLike[str], *, task: str | None = None, **hub_options: Any) -> Config:
    """The config of a checkpoint folder or Hub id: config.json, generation_config.json and the pooling, if it has any.

    Raises:
        ValueError: config.json is broken, or says something that is not supported; the message lists everything.
        OSError: there is no config.json.
    """
    path = hub.resolve(source, **hub_options)
    if (folder_of(path) / "config.json").exists():
        return _config(path, {}, {}, task)
    try:
        tensors, metadata = read_folder(path) if path.is_dir() else read_file(path)
    except FileNotFoundError:
        tensors, metadata = {}, {}
    return _config(path, metadata, tensors, task)


def folder_of(path: Path) -> Path:
    """Where config.json lies: in a folder, or beside a file of weights."""
    return path if path.is_dir() and not is_alone(path) else path.parent


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], task: str | None) -> Config:
    folder = folder_of(path)
    data = _read_json(folder / "config.json")
    if data is None:
        if (config := dialects.config_of(metadata, tensors, task=task)) is not None:
            return config
        raise FileNotFoundError(
            f"load: no config.json in {str(folder)!r}; a checkpoint folder has one beside its weights"
        )
    if "model_type" not in data:
        raise ValueError(f"load: {str(folder / 'config.json')!r} has no 'model_type'")
    try:
        config = family(data["model_type"]).config.from_hf(data, task=task)
    except ValueError as error:
        raise ValueError(f"{error}\n(in {str(folder / 'config.json')!r})") from None
    options = _read_json(folder / "generation_config.json")
    if options is None and config.task in schema.LM_TASKS:
        options = {
            name: data[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if data.get(name) is not None
        }
    generation = None if options is None else GenerationConfig.from_hf(options)
    return dataclasses.replace(config, generation=generation, **read_pooling(folder))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {str(path)!r} is not valid JSON: {error}; download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"load: {str(path)!r} must hold a JSON object, got {type(data).__name__}")
    return data


def load(
    source: str | os.PathLike[str],
    *,
    task: str | None = None,
    dtype: Any = None,
    layers: str = "stacked",
    sharding: Any = None,
    key: Key | None = None,
    dequantize: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    format: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> tuple[Params, Config]:
    """Loads a checkpoint as a parameter tree and a config.

    Args:
        source: a folder, a file of weights beside its config.json, or a Hub id such as `"openai-community/gpt2"`.
        task: which head to load; None reads `architectures` of config.json. A head that the checkpoint lacks is
            initialised from `key`.
        dtype: floating leaves are cast to it; None keeps what is on disk.
        layers: `"stacked"` for leaves with a layer axis, run by `lax.scan`; `"list"` for a tuple of layers, which on CPU
            are memory-mapped without a copy. Unevenly pruned checkpoints are always a tuple.
        sharding: a `jax.sharding.Sharding` for all leaves, or a tree of them; see `partition_specs`.
        key: random key for a new head.
        dequantize: whether quantised weights become the arrays that they stand for. If False they are leaves that are
            expanded where they are used and are saved as they are: those of a quantised checkpoint, and q8_0 and q4_0 of a
            GGUF file, fused and transposed matrices too. None: GGUF files are dequantised, others are not. `fm.dequantize`
            does it later. Activations are never quantised, which some of these libraries do as well (fp8, W8A8).
        revision: branch, tag or commit on the Hub.
        subfolder: of the source.
        variant: as in `model.<variant>.safetensors`, or a part of the name of a GGUF file.
        format: a key of `fm.FORMATS`, where there are several; the first of them that is there if None.
        cache_dir: of the Hub's client.
        token: for private and gated repositories.
        local_files_only: use the cache and no network.

    Returns:
        `(params, config)`.

    Raises:
        ValueError: a broken file; a config that is not supported; tensors that are missing, unexpected or of another
            shape (all listed).
        OSError: the source or its files are not there.
        pickle.UnpicklingError: a `pytorch_model.bin` that asks for more than tensors.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> config.model_type, config.task, params["embed"]["tokens"].dtype.name
        ('llama', 'causal-lm', 'bfloat16')
    """
    stacked = layout.check_layers(layers)
    check_dtype("load", dtype)
    opened = open_checkpoint(
        source, task=task, variant=variant, format=format, revision=revision, subfolder=subfolder, cache_dir=cache_dir,
        token=token, local_files_only=local_files_only,
    )  # fmt: skip
    if dequantize:
        config = dataclasses.replace(opened.config, quantization=None)
        opened = opened._replace(config=config, tensors=quantized.expanded(opened.tensors))
    elif dequantize is not None:
        opened = opened._replace(tensors=quantized.kept(opened.tensors))
    tensors = opened.tensors
    config, planned = plan(opened, new_head=task is not None and key is not None)
    _check_dtypes(planned, tensors, dtype)
    params = read_tree(planned, tensors, config, dtype=dtype, stacked=stacked, sharding=sharding)
    if planned.missing:
        params = _with_new_head(params, planned, config, key, dtype)
    return params, config


def plan(opened: Checkpoint, *, new_head: bool = False) -> tuple[Config, layout.Plan]:
    """Which tensor is which, and the config that the tensors give: a tied head that differs makes it untied.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; all are listed.
    """
    config, tensors = opened.config, opened.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    planned = layout.plan(shapes, config, new_head=new_head)
    if (different := _tied_but_different(planned, tensors)) is not None:
        layout.logger.warning(
            "load: config.json ties the head, but %r differs from %r; loaded untied, as in transformers 5", *different
        )
        config = dataclasses.replace(config, tie_word_embeddings=False)
        planned = layout.plan(shapes, config, new_head=new_head)
        if (different := _tied_but_different(planned, tensors)) is not None:
            raise ValueError("load: {!r} differs from {!r}, of which this family has one".format(*different))
    old = family(config).weights.are_old(planned.tensors)
    return dataclasses.replace(config, module_names=planned.module, old_names=old), planned


def _tied_but_different(planned: layout.Plan, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first tensor that should repeat another and does not, with that other."""
    where = {path: name for name, place in planned.tensors.items() if place.layer is None for path in place.rule.leaves}
    for name, leaf in planned.tied:
        if leaf in where and not _same(tensors[name], tensors[where[leaf]]):
            return name, where[leaf]
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and as_bytes(a) == as_bytes(b)


def _check_dtypes(planned: layout.Plan, tensors: Mapping[str, Tensor], dtype: Any) -> None:
    wide = [n for n in planned.tensors if tensors[n].dtype.name in ("float64", "int64", "uint64", "complex128")]
    if wide and dtype is None and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"load: {len(wide)} tensors have 64 bits ({wide[0]!r} is {tensors[wide[0]].dtype}), which jax would cut to 32; "
            'pass dtype="float32", or set jax.config.update("jax_enable_x64", True)'
        )


def _with_new_head(params: Params, planned: layout.Plan, config: Config, key: Key | None, dtype: Any) -> Params:
    wanted = dtype if dtype is not None else params["embed"]["tokens"].dtype
    leaves = dict.fromkeys(path for place in planned.missing.values() for path in place.rule.leaves)
    assert key is not None
    layout.logger.info("load: new leaves %s", ", ".join(leaves))

    @jax.jit  # which leaves out what is not asked for
    def draw(key: Key) -> dict[str, Any]:
        fresh = tree.flatten(family(config).init(config, key, dtype=wanted))
        return {path: fresh[path] for path in leaves}

    stacked = tree.is_stacked(params)
    params = tree.update(params, draw(key))
    return params if stacked else unstack_layers(params)


def save(
    params: Params,
    config: Config,
    folder: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    dtype: Any = None,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
) -> None:
    """Saves a checkpoint that transformers loads: config.json, generation_config.json and the weights.

    All or nothing: whatever happens, the folder holds the whole old checkpoint or the whole new one. Files that `save`
    did not make (the tokenizer, a README) stay; shards of an older save go. A GGUF file gets the tokenizer of a tokenizer.json
    or tokenizer.model that is there.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: its config.
        folder: made if it is not there.
        format: a key of `fm.FORMATS` that can be written: `"safetensors"`, `"torch"` for `pytorch_model.bin`, ….
        dtype: floating tensors are cast to it; None keeps what they are. `"q8_0"` for format `"gguf"`: the matrices that
            llama.cpp's converter quantises, where rows are a multiple of 32 numbers.
        max_shard_size: bytes of a file, or text such as `"5GB"`; None for 5GB, and for one file of GGUF.
        variant: as in `model.<variant>.safetensors`.

    Raises:
        ValueError: the tree does not fit the config; an unknown format or size.
        OSError: the folder cannot be written; the old checkpoint is as it was.

    Example:
        >>> import fmodels as fm, tempfile
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> folder = tempfile.mkdtemp()
        >>> fm.save(params, config, folder)
        >>> again, _ = fm.load(folder)
        >>> bool((again["embed"]["tokens"] == params["embed"]["tokens"]).all())
        True
    """
    check_format(format, verb="save")
    check(params, config)
    needed = quantized.dialects_of(params)
    if "pt" not in needed:
        config = dataclasses.replace(config, quantization=None)
    able = next((name for name, kind in FORMATS.items() if kind.dialect in needed), format)
    if needed - {FORMATS[format].dialect} or ("pt" in needed and config.quantization is None):
        raise ValueError(
            f"save: the tree has quantised leaves, which format {format!r} or a config without quantization cannot hold; "
            f'save with the config that load gave, as "{able}", or use fm.dequantize(params) first'
        )
    numbers, type = dtype_and_type("save", dtype, format)
    if "pt" in needed and numbers is not None:
        raise ValueError(
            f"save: the tree has quantised leaves, which have no dtype {dtype!r}; use fm.dequantize(params) first"
        )
    tensors = disk_tensors(params, config)
    if numbers is not None:
        tensors = {name: cast(tensor, numbers) for name, tensor in tensors.items()}
    said = np.dtype(params["embed"]["tokens"].dtype if numbers is None else numbers).name
    tensors, metadata, files = as_written(tensors, config, said, format, Path(folder))
    if type is not None:
        tensors = FORMATS[format].of_type(tensors, type)
    write_folder(
        folder, tensors, format=format, max_shard_size=max_shard_size, variant=variant, metadata=metadata, files=files
    )


def as_written(
    tensors: Mapping[str, Tensor],
    config: Config,
    dtype: str,
    format: str,
    folder: Path,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, bytes]]:
    """What the files of a checkpoint in some format hold: tensors under its names, metadata, and the JSON files beside.

    Args:
        tensors: by PyTorch's names.
        config: of the model.
        dtype: what config.json says.
        format: a key of `FORMATS`.
        folder: of the tokenizer, for formats whose files hold it.
        metadata: more of them than follows from the config.
    """
    files = {"config.json": _json({**config.to_hf(), "dtype": dtype})}
    if config.generation is not None and config.task in schema.LM_TASKS:
        files["generation_config.json"] = _json(config.generation.to_hf())
    names = FORMATS[format].dialect
    metadata = dialects.metadata_of(config, names, metadata, folder)
    if not FORMATS[format].blocks:
        tensors = {name: computed(tensor) if isinstance(tensor, Blocks) else tensor for name, tensor in tensors.items()}
    return dialects.write(tensors, config, names), metadata, files


def disk_tensors(params: Params, config: Config) -> dict[str, Tensor]:
    """The tensors that `save` writes, by name; each is brought to the host when its array is asked for."""
    check_merged("save", params)
    flat = tree.flatten(params)
    check_plain("save", {path: leaf for path, leaf in flat.items() if not isinstance(leaf, Quantized)})
    return from_leaves(flat, config, lambda path: np.asarray(flat[path]))[0]


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
