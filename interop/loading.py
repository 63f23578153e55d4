"""`from_pretrained` with the arguments of transformers', on top of `fm.load`.

Weights are assigned: what a checkpoint holds is never initialised first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fmodels as fm

NO_EFFECT = {
    "low_cpu_mem_usage": "tensors are mapped and read once, in any case",
    "_fast_init": "nothing is initialised that is loaded",
    "mirror": "transformers does not read it either",
    "resume_download": "the Hub's client resumes by itself",
    "from_pt": "formats are recognised by their content",
    "tqdm_class": "progress is shown by fm.load",
}
"""Arguments that are accepted, and why they change nothing."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "weights_only": ((True,), "no code of a checkpoint ever runs"),
    "trust_remote_code": ((None, False), "no code of a checkpoint ever runs"),
    "code_revision": ((None,), "no code of a checkpoint ever runs"),
    "device_map": ((None, "cpu"), "weights are read to JAX's default device; pass sharding= for others"),
    "max_memory": ((None,), "weights are read to JAX's default device; pass sharding= for others"),
    "offload_folder": ((None,), "weights are mapped from where they lie"),
    "offload_state_dict": ((None, False), "weights are mapped from where they lie"),
    "offload_buffers": ((None, False), "weights are mapped from where they lie"),
    "quantization_config": ((None,), "a quantised checkpoint says so itself, and is dequantised"),
    "tp_plan": ((None,), "use fm.partition_specs and sharding="),
    "tp_size": ((None,), "use fm.partition_specs and sharding="),
    "device_mesh": ((None,), "use fm.partition_specs and sharding="),
    "distributed_config": ((None,), "use fm.partition_specs and sharding="),
    "attn_implementation": ((None, "eager"), "forward has transformers' eager numbers"),
    "experts_implementation": ((None, "eager"), "fm.forward takes experts="),
    "use_kernels": ((None, False), "fm.forward takes attention="),
    "kernel_config": ((None,), "fm.forward takes attention="),
    "force_download": ((None, False), "delete the Hub's cache of the model, or give another cache_dir"),
    "proxies": ((None,), "set HTTPS_PROXY in the environment"),
    "load_weight_prefix": ((None, ""), "names are matched by the family's rules; pass key_mapping="),
    "tf_to_pt_weight_rename": ((None,), "names are matched by the family's rules; pass key_mapping="),
    "adapter_kwargs": ((None,), "adapters are not loaded with the model"),
    "adapter_name": ((None, "default"), "adapters are not loaded with the model"),
}
"""Arguments of which only some values are possible, and what to do for others."""

FORMATS = {"from_tf": "tf", "from_flax": "flax", "use_safetensors": "safetensors"}
"""Argument that is true -> the format that it names."""


class Loaded(NamedTuple):
    """A tree, its config, and transformers' loading info."""

    params: fm.Params
    config: Any
    info: dict[str, list[Any]]


def load(
    to_arrays: Callable[[Mapping[str, Any], Any], dict[str, np.ndarray]],
    source: str | os.PathLike[str] | None,
    *,
    output_loading_info: bool = False,
    config: Any = None,
    state_dict: Mapping[str, Any] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    dtype: Any = None,
    torch_dtype: Any = None,
    generation_config: Any = None,
    gguf_file: str | None = None,
    task: str | None = None,
    layers: str = "stacked",
    sharding: Any = None,
    key: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Loaded:
    """Reads a checkpoint; quantised weights become the arrays that they stand for.

    Args:
        to_arrays: makes arrays of numpy of the library's tensors by name, for a config; arrays stay as they are.
        source: a folder, a file or a Hub id; None with `state_dict`.
        output_loading_info: fill `info`.
        config: in place of the checkpoint's: a config of `fmodels` or transformers, a config.json as a dict, or the path of a
            checkpoint.
        state_dict: tensors by name, in place of a source; needs `config`.
        key_mapping: regular expression -> replacement, for the names in the checkpoint; the first that matches counts.
        ignore_mismatched_sizes: tensors whose shape is not the config's are drawn anew, from `key` or `seed`.
        dtype: floating weights are cast to it; None and "auto" keep what is on disk.
        torch_dtype: old name of `dtype`.
        generation_config: in place of the checkpoint's.
        gguf_file: as `format="gguf"`, the file of that name.
        task: see `fm.load`.
        layers: see `fm.load`.
        sharding: see `fm.load`.
        key: JAX's random key for a new head and mismatched tensors.
        seed: a number, in place of a key.
        **options: those of `fm.load` (revision, subfolder, variant, format, cache_dir, token, local_files_only);
            `from_tf`, `from_flax`, `use_safetensors`, which name a format; what `NO_EFFECT` and `REFUSED` list; and fields of
            the config, by our name or transformers', which go before the checkpoint's.

    Raises:
        TypeError: an argument that does not exist, or two that say the same.
        ValueError: an argument that cannot be followed; what `fm.load` raises.
    """
    if dtype is not None and torch_dtype is not None:
        raise TypeError("from_pretrained: dtype and torch_dtype are the same; pass one of them")
    if key is not None and seed is not None:
        raise TypeError("from_pretrained: pass one of key= and seed=")
    dtype = _dtype_name(torch_dtype if dtype is None else dtype)
    key = key if seed is None else jax.random.key(seed)
    options = _readable(options)
    if gguf_file is not None:
        options |= {"format": "gguf", "variant": gguf_file.removesuffix(".gguf")}
    hub = {
        n: options.pop(n) for n in ("revision", "subfolder", "cache_dir", "token", "local_files_only") if n in options
    }
    form = {n: options.pop(n) for n in ("variant", "format") if n in options}
    if (source is None) == (state_dict is None):
        raise TypeError("from_pretrained: pass a source, or None and state_dict=")
    if state_dict is not None and config is None:
        raise TypeError("from_pretrained: a state_dict does not say what model it is; pass config=")
    own = read_config(config, task)
    special = own is not None or options or key_mapping or ignore_mismatched_sizes
    if state_dict is None and not special:
        assert source is not None
        params, found = fm.load(
            source, task=task, dtype=dtype, layers=layers, sharding=sharding, key=key, **form, **hub
        )
        info: dict[str, list[Any]] = {}
        if output_loading_info:
            tensors = fm.open_checkpoint(source, task=task, **form, **hub).tensors
            info = _info(fm.loading_info(_shapes(tensors), found), {})
        return Loaded(fm.dequantize(params), _finished(found, generation_config), info)
    if sharding is not None:
        raise ValueError(
            "from_pretrained: sharding is for checkpoints as they are; leave config, state_dict, key_mapping, "
            "ignore_mismatched_sizes and fields of the config out, or use jax.device_put"
        )
    if state_dict is None:
        assert source is not None
        opened = fm.open_checkpoint(source, task=task, **form, **hub)
        tensors = {name: tensor.array() for name, tensor in opened.tensors.items()}
        own = opened.config if own is None else own
    else:
        check_state_dict("from_pretrained", state_dict)
        tensors = dict(state_dict)
    found = _with_fields(own, options)
    arrays = to_arrays({_renamed(name, key_mapping or {}): tensor for name, tensor in tensors.items()}, found)
    differ = fm.loading_info(_shapes(arrays), found)
    mismatched = differ.mismatched if ignore_mismatched_sizes else {}
    types = [a.dtype for a in arrays.values() if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize > 1]
    arrays = {name: array for name, array in arrays.items() if name not in mismatched}
    if mismatched or (task is not None and key is not None):
        arrays |= _drawn(found, fm.loading_info(_shapes(arrays), found).missing, key, next(iter(types), "float32"))
    params = fm.from_disk(arrays, found, layers=layers)
    params = params if dtype is None else fm.cast(params, dtype)
    return Loaded(fm.dequantize(params), _finished(found, generation_config), _info(differ, mismatched))


def check_state_dict(what: str, state_dict: Any) -> None:
    """Raises a TypeError, for the method `what`, if `state_dict=` is no tensors by name."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{what}: state_dict must be tensors by name, got {type(state_dict).__name__}; pass what model.state_dict() gives, or "
            "fm.to_disk(params, config)"
        )


def _drawn(config: Any, names: list[str], key: Any, dtype: Any) -> dict[str, np.ndarray]:
    """Tensors as the family draws them; others are not drawn."""
    if key is None:
        raise ValueError(f"from_pretrained: {', '.join(names)} must be drawn anew; pass key=jax.random.key(…) or seed=")

    @jax.jit  # which leaves out what is not asked for
    def draw(key: Any) -> dict[str, Any]:
        drawn = fm.to_disk(fm.init(config, key, dtype=dtype), config)
        return {name: drawn[name] for name in names}

    return {name: np.asarray(array) for name, array in draw(key).items()}


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _info(info: fm.LoadingInfo, mismatched: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        "missing_keys": list(info.missing),
        "unexpected_keys": list(info.unexpected),
        "mismatched_keys": [(name, *shapes) for name, shapes in mismatched.items()],
        "error_msgs": [],
    }


def _readable(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that have no effect, and with `format` for those that name one."""
    rest = {name: value for name, value in options.items() if name not in NO_EFFECT}
    problems = []
    for name, (allowed, instead) in REFUSED.items():
        if name in rest and not any(value is rest[name] or value == rest[name] for value in allowed):
            problems.append(f"{name}={rest[name]!r} is not possible: {instead}")
        rest.pop(name, None)
    asked = {name: rest.pop(name) for name in FORMATS if name in rest}
    formats = {FORMATS[name] for name, wanted in asked.items() if wanted}
    if asked.get("use_safetensors") is False and not formats:
        formats = {"torch"}
    if rest.get("format") is not None:
        formats.add(rest.pop("format"))
    if len(formats) > 1:
        problems.append(f"several formats are asked for: {', '.join(sorted(formats))}")
    if problems:
        raise ValueError("from_pretrained: " + "; ".join(problems))
    return {**rest, **({"format": formats.pop()} if formats else {})}


def read_config(config: Any, task: str | None = None) -> Any:
    """A config of `fmodels` from what `config=` may be: one, transformers', a config.json as a dict, a path; None if it is None."""
    if isinstance(config, str | os.PathLike):
        return fm.load_config(config, task=task)
    if hasattr(config, "to_json_string"):
        config = json.loads(config.to_json_string())
    if isinstance(config, Mapping):
        if "model_type" not in config:
            raise ValueError(
                f"from_pretrained: config has no 'model_type', but {', '.join(map(repr, config)) or 'nothing'}; pass a whole "
                "config.json, or single fields as arguments"
            )
        return fm.models.family(config["model_type"]).config.from_hf(config, task=task)
    if config is not None and not hasattr(config, "to_hf"):
        raise TypeError(
            f"from_pretrained: config must be one of fmodels or transformers, a dict or a path, got {type(config).__name__}"
        )
    if config is not None and task is not None and task != config.task:
        return dataclasses.replace(config, task=task)
    return config


def setting(config: Any, name: str, default: Any) -> Any:
    """What config.json says of a key that changes no number of `forward`, such as `output_attentions`."""
    value = json.loads(dict(config.extra).get(name, "null"))
    return default if value is None else value


def _with_fields(config: Any, options: Mapping[str, Any]) -> Any:
    """The config with other values of some of its fields, by our names, or by those of a config.json."""
    fields = {field.name for field in dataclasses.fields(config)}
    changed = {name: value for name, value in options.items() if name in fields}
    if theirs := {name: value for name, value in options.items() if name not in fields}:
        before = config.to_hf()
        try:
            old, new = (config.from_hf(data, task=config.task) for data in (before, {**before, **theirs}))
        except ValueError as error:
            kind = TypeError if "unknown key" in str(error) else ValueError
            names = ", ".join(map(repr, theirs))
            raise kind(
                f"from_pretrained: {names}: neither arguments nor fields of {config.model_type}.Config: {error}"
            ) from None
        changed = {name: getattr(new, name) for name in fields if getattr(new, name) != getattr(old, name)} | changed
    return dataclasses.replace(config, **changed) if changed else config


def _finished(config: Any, generation: Any) -> Any:
    """The config of plain arrays, with the options for generation if there are any."""
    options = config.generation if generation is None else generation_options(generation)
    return dataclasses.replace(config, generation=options, quantization=None)


def generation_options(generation: Any) -> fm.GenerationConfig:
    """A `fm.GenerationConfig` from one, from that of transformers, or from a generation_config.json as a dict.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(generation, fm.GenerationConfig):
        return generation
    data = generation.to_dict() if hasattr(generation, "to_dict") else generation
    if not isinstance(data, Mapping):
        raise TypeError(
            f"generation_config must be an fm.GenerationConfig, transformers' or a dict, got {type(generation).__name__}"
        )
    return fm.GenerationConfig.from_hf({n: value for n, value in data.items() if value is not None})


def _dtype_name(dtype: Any) -> Any:
    """The dtype for `fm.load`: of PyTorch's and TensorFlow's the name."""
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, Mapping):
        raise ValueError("from_pretrained: one dtype is for all weights; cast parts with to_bf16(mask) and its like")
    if hasattr(dtype, "as_numpy_dtype"):
        return dtype.as_numpy_dtype
    return str(dtype).removeprefix("torch.") if str(dtype).startswith("torch.") else dtype


def _renamed(name: str, mapping: Mapping[str, str]) -> str:
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
