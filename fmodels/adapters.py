"""Adapters of PEFT: read from a folder and written to it, made anew, and put on a tree of parameters."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmodels import hub, tree
from fmodels.adapter_config import ALL_LINEAR, AdapterConfig
from fmodels.adapter_parts import LINEAR, PREFIX, TABLE, Base, Role, model, roles
from fmodels.low_rank import LowRank
from fmodels.models import Config
from fmodels.transforms import _leaves
from fmodels.transforms.adapters import Factors, low_rank, merge_adapters
from fmodels.types import Array, Key, Params
from fmodels.weights import Tensor, read_file, rules, safetensors, torch_bin
from fmodels.weights.folder import commit
from fmodels.weights.tensors import listing, parse_json

CONFIG = "adapter_config.json"
FILES = {
    "safetensors": ("adapter_model.safetensors", safetensors.write),
    "torch": ("adapter_model.bin", torch_bin.write),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as PEFT stores it: a pytree of its tensors, to be trained as it is, and its config, which is static.

    Attributes:
        tensors: by the names of PEFT's files, with their shapes. PEFT saves the model's own tables of embeddings beside, where
            it adapts them or where they were resized; they have no gradient.
        config: which modules are adapted, and how.
    """

    tensors: dict[str, Array]
    config: AdapterConfig = dataclasses.field(metadata={"static": True})

    @property
    def trained(self) -> Adapter:
        """A tree of bools: False for the model's own tables, which `optax.masked` keeps from weight decay."""
        return dataclasses.replace(self, tensors={name: self._is_trained(name) for name in self.tensors})

    def _is_trained(self, name: str) -> bool:
        module, _, kind = name.removeprefix(PREFIX).rpartition(".")
        ends = (*LINEAR.values(), *TABLE.values(), f"{LINEAR['magnitude']}.weight", ".trainable_tokens_delta")
        if name.endswith(ends):
            return True
        own = kind == "bias" and self.config.bias != "none" and ".original_module" not in module
        return own or (not module.endswith((".base_layer", ".original_module")) and bool(self.config.saved([module])))


def load_adapter(source: str | os.PathLike[str], **hub_options: Any) -> Adapter:
    """Reads an adapter that PEFT, or `save_adapter`, has written: `adapter_config.json` and the tensors beside it.

    Args:
        source: a folder or a Hub id.
        hub_options: `revision`, `subfolder`, `cache_dir`, `token` and `local_files_only`, as for `load`.

    Returns:
        The adapter, with the dtypes on disk; `add_adapter` puts it on a model.

    Raises:
        ValueError: a broken file; a config that is not supported, with all its reasons.
        OSError: the files are not there.
        pickle.UnpicklingError: an `adapter_model.bin` that asks for more than tensors.

    Example:
        See `save_adapter`.
    """
    folder = hub.resolve_adapter(source, **hub_options)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"load_adapter: no {CONFIG} in {str(folder)!r}; an adapter's folder has one")
    config = AdapterConfig.from_peft(parse_json(path.read_bytes(), f"load_adapter: {str(path)!r}"))
    file = next((folder / name for name, _ in FILES.values() if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"load_adapter: {str(folder)!r} has none of {', '.join(name for name, _ in FILES.values())}"
        )
    arrays = {name: np.array(tensor.array()) for name, tensor in read_file(file)[0].items()}
    tensors = jax.device_put(arrays)
    if wide := [name for name, array in arrays.items() if tensors[name].dtype != array.dtype]:
        raise ValueError(
            f"load_adapter: {len(wide)} tensors have 64 bits ({wide[0]!r} is {arrays[wide[0]].dtype}), which jax would cut to "
            '32; set jax.config.update("jax_enable_x64", True)'
        )
    return Adapter(tensors, config)


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], *, format: str = "safetensors") -> None:
    """Writes an adapter that PEFT reads, all or nothing; the inverse of `load_adapter`.

    Args:
        adapter: the adapter.
        folder: made if it is not there; other files in it stay.
        format: `"safetensors"`, or `"torch"` for `adapter_model.bin`.

    Raises:
        ValueError: an unknown format.
        OSError: the folder cannot be written.

    Example:
        >>> import jax, tempfile, fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> spec = fm.AdapterConfig(r=4, target_modules=("q_proj", "v_proj"))
        >>> adapter = fm.init_adapter(params, config, spec, jax.random.key(0))
        >>> folder = tempfile.mkdtemp()
        >>> fm.save_adapter(adapter, folder)
        >>> again = fm.load_adapter(folder)
        >>> again.config == spec, again.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape
        (True, (4, 256))
    """
    if format not in FILES:
        raise ValueError(f"save_adapter: format {format!r} is not supported; one of {', '.join(FILES)}")
    arrays = {name: np.asarray(adapter.tensors[name]) for name in sorted(adapter.tensors)}
    lazy = {n: Tensor.lazy(n, a.dtype, a.shape, lambda a=a: np.ascontiguousarray(a)) for n, a in arrays.items()}
    name, write = FILES[format]

    def fill(stage: Path) -> None:
        write(stage / name, lazy, {"format": "pt"})
        text = json.dumps(adapter.config.to_peft(), indent=2, sort_keys=True) + "\n"
        (stage / CONFIG).write_text(text, encoding="utf-8")

    commit(Path(folder), fill, [name, CONFIG], lambda other: other in [file for file, _ in FILES.values()])


def init_adapter(params: Params, config: Config, spec: AdapterConfig, key: Key, *, dtype: Any = "float32") -> Adapter:
    """A new adapter, to be trained: it leaves the model as it is, unless `spec.init_lora_weights` is False.

    The first factor is drawn as the weights of PyTorch's `Linear`, the second is zero; of tables of embeddings the first is
    zero and the second normal. What an adapter has whole begins as the model's own.

    Args:
        params: the model's tree.
        config: its config.
        spec: which modules are adapted, and how.
        key: random key.
        dtype: of the tensors.

    Raises:
        ValueError: nothing is adapted, or something that cannot be.

    Example:
        Trains one step; nothing but the adapter has gradients and a place in the optimizer's state:

        >>> import jax, optax, fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA, dtype="float32")
        >>> spec = fm.AdapterConfig(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"))
        >>> adapter = fm.init_adapter(params, config, spec, jax.random.key(0))
        >>> tokens = jax.numpy.array([[5, 6, 7, 8]])
        >>> optimizer = optax.sgd(0.1)
        >>> def loss(adapter):
        ...     logits = fm.forward(fm.add_adapter(params, config, adapter), config, tokens).logits
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()
        >>> before, gradient = jax.value_and_grad(loss)(adapter)
        >>> updates, state = optimizer.update(gradient, optimizer.init(adapter))
        >>> adapter = optax.apply_updates(adapter, updates)
        >>> bool(loss(adapter) < before)
        True

    Source: PEFT's `reset_lora_parameters`.
    """
    if spec.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_adapter: init_lora_weights={spec.init_lora_weights!r} is not supported, only True, False and 'gaussian'"
        )
    base = Base(params, config)
    found = {name: role for name, role in roles(config, spec).items() if role.required and base.has(role.name)}
    if not found:
        raise ValueError(
            f"init_adapter: nothing of {config.model_type} is named by target_modules={spec.target_modules!r}; expected names "
            f"such as {listing([n for n, kind in model(config).modules.items() if kind == 'linear'], 5)}, or {ALL_LINEAR!r}"
        )
    drawn = [name for name, role in found.items() if role.part in ("a", "b", "bias")]
    keys = dict(zip(drawn, jax.random.split(key, max(len(drawn), 1)), strict=False))
    tensors: dict[str, Array] = {}
    for name, role in found.items():
        if name in keys:
            tensors[name] = _draw(role, base.shape(role.name), spec, keys[name]).astype(dtype)
        elif role.part != "magnitude":
            whole = jnp.asarray(base.tensor(role.name), dtype)
            tensors[name] = whole[jnp.asarray(_tokens(config, spec, role))] if role.part == "rows" else whole
    for name, role in found.items():
        if role.part == "magnitude":
            ends = TABLE if role.table else LINEAR
            stem = name.removesuffix(ends["magnitude"])
            a, b = (tensors[stem + ends[part]].astype(jnp.float32) for part in ("a", "b"))
            whole = jnp.asarray(base.matrix(role.name), jnp.float32)
            whole = whole.T if role.table else whole
            tensors[name] = jnp.linalg.norm(whole + spec.scale(role.module) * (b @ a), axis=1).astype(dtype)
    return Adapter(tensors, spec)


def _draw(role: Role, shape: tuple[int, ...], spec: AdapterConfig, key: Key) -> Array:
    """A new factor, or the bias of the second, of a matrix `(out, in)`, of experts `(x, out, in)`, or of a table."""
    rank, count = spec.rank(role.module), shape[0] if len(shape) == 3 else 1
    size = {"a": (rank * count, shape[-1]), "b": (shape[-2], rank * count), "bias": (shape[-2],)}[role.part]
    if role.table:
        size = {"a": (rank, shape[0]), "b": (shape[1], rank)}[role.part]
        return jax.random.normal(key, size) if role.part == "b" or spec.init_lora_weights is False else jnp.zeros(size)
    if role.part != "a" and spec.init_lora_weights is not False:
        return jnp.zeros(size)
    if spec.init_lora_weights == "gaussian":
        return jax.random.normal(key, size) / rank
    bound = 1 / math.sqrt(shape[-1] if role.part == "a" else rank * count)
    return jax.random.uniform(key, size, minval=-bound, maxval=bound)


def add_adapter(params: Params, config: Config, adapter: Adapter | Sequence[Adapter], *, choice: Any = None) -> Params:
    """The tree of a model with an adapter, or with several: each function of this library takes it.

    Matrices become leaves that multiply with the factors beside the weight (`LowRank`), which stays as it is and is shared
    with `params`. Tensors that an adapter has whole, and tables of which it has rows, take the place of the model's.
    Differentiable in the adapter, and meant to be called inside of the function whose gradient is taken.

    Args:
        params: the model's tree, stacked or a tuple of layers.
        config: its config.
        adapter: one, or several; without `choice` what they add is summed, as if all were active in PEFT.
        choice: `(b)` int, the number of the adapter of each row of a batch, -1 for none; traced or not. Batches then have
            `b` rows, those of beams excepted. For adapters of low rank and DoRA alone.

    Returns:
        The tree. `merge_adapters` puts the factors into the weights.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, all listed; a module that cannot be adapted, as
            one of two that are tied; adapters that cannot be summed, or chosen by row.
        IndexError: a choice that is no adapter's number; a token outside of the table.

    Example:
        >>> import jax, fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> spec = fm.AdapterConfig(r=2, target_modules=("q_proj",), init_lora_weights=False)
        >>> one, two = (fm.init_adapter(params, config, spec, jax.random.key(seed)) for seed in (0, 1))
        >>> adapted = fm.add_adapter(params, config, [one, two], choice=[1, 0, -1])
        >>> tokens = jax.numpy.array([[5, 6, 7]] * 3)
        >>> logits = fm.forward(adapted, config, tokens).logits
        >>> alone = fm.forward(fm.add_adapter(params, config, two), config, tokens).logits
        >>> bool(abs(logits[0] - alone[0]).max() < 1e-3), bool(abs(logits[1] - alone[1]).max() < 1e-3)
        (True, False)

    Source: PEFT's `PeftModel`, with `adapter_names` for `choice`. A head that is tied to the table of tokens must be given
    its own (`fm.untie`) before an adapter of one of the two is added: in PEFT the other one then stays as it is. With
    `ensure_weight_tying` both have the same factors, and stay tied here too; PEFT's merge would add them twice.
    """
    adapters = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    chosen = None if choice is None else _check_choice(choice, len(adapters))
    base = Base(params, config)
    if any(isinstance(leaf, LowRank) for leaf in base.flat.values()):
        raise ValueError("add_adapter: the tree has adapters; add all at once to the model's own tree")
    wholes: dict[str, Array] = {}
    found: dict[str, dict[int, dict[int, Factors]]] = {}  # path -> adapter -> layer -> factors
    for i, one in enumerate(adapters):
        own = _read(base, one)
        if own.wholes and (chosen is not None or wholes.keys() & own.wholes.keys()):
            names = listing(sorted(own.wholes), 5)
            how = "be chosen by row" if chosen is not None else "be summed with another's"
            raise ValueError(f"add_adapter: adapter {i} has its own {names}, which cannot {how}")
        wholes |= own.wholes
        for path, layers in own.factors.items():
            found.setdefault(path, {})[i] = layers
    flat = {**base.flat, **_placed(base, wholes)}
    for path, by_adapter in found.items():
        depth = flat[path].shape[0] if base.stacked and "layers" in path.split(".") else None
        layers = [by_adapter.get(i, {}) for i in range(len(adapters))]
        dora = any(f.has_lengths for one in layers for f in one.values())
        axes = len(flat[path].shape) - (depth is not None)
        experts = any(f.a.ndim + f.b.ndim - 2 > axes for one in layers for f in one.values())
        if (chosen is not None and experts) or (chosen is None and dora and len(by_adapter) > 1):
            how = "choose experts' adapters by row" if experts else "sum adapters with use_dora"
            raise ValueError(f"add_adapter: cannot {how} ({path!r}); add one at a time")
        flat[path] = low_rank(flat[path], layers, depth, chosen)
    return tree.unflatten(flat)


def unmerge_adapters(params: Params, config: Config, adapter: Adapter | Sequence[Adapter]) -> Params:
    """Takes out of weights what `merge_adapters` has put into them: the model's own tree again, but for rounding.

    For a checkpoint whose base is lost. The tree of the base model itself is better, which `add_adapter` shares.

    Args:
        params: a tree from `merge_adapters`, or such a checkpoint.
        config: its config.
        adapter: what was merged, one or several.

    Returns:
        The tree; each weight is rounded to its dtype once more.

    Raises:
        ValueError: as `add_adapter`; adapters that put their own in the place of what is then lost: whole tensors, rows of a
            table, the lengths of DoRA.

    Example:
        >>> import jax, fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> spec = fm.AdapterConfig(r=2, target_modules=("q_proj",), init_lora_weights=False)
        >>> adapter = fm.init_adapter(params, config, spec, jax.random.key(0))
        >>> merged = fm.merge_adapters(fm.add_adapter(params, config, adapter))
        >>> again = fm.unmerge_adapters(merged, config, adapter)
        >>> before, after = (tree["layers"]["attention"]["query"]["weight"] for tree in (params, again))
        >>> bool(abs(before - after).max() < 0.02)
        True

    Source: PEFT's `unmerge_adapter`, which keeps what is lost here.
    """
    adapters = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    base = Base(params, config)
    lost: list[str] = []
    for own in (_read(base, one) for one in adapters):
        lost += own.wholes
        lost += [path for path, layers in own.factors.items() if any(f.has_lengths for f in layers.values())]
    if lost:
        raise ValueError(
            f"unmerge_adapters: the model's own {listing(sorted(set(lost)), 5)} cannot be had from the merged tree; load the "
            "base model"
        )

    def negative(leaf: Any) -> Any:
        return leaf.negative() if isinstance(leaf, LowRank) else leaf

    added = add_adapter(params, config, adapters)
    return merge_adapters(jax.tree.map(negative, added, is_leaf=lambda leaf: isinstance(leaf, LowRank)))


def _check_choice(choice: Any, count: int) -> Array:
    chosen = jnp.asarray(choice)
    if chosen.ndim != 1 or not chosen.shape[0] or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(
            f"add_adapter: choice has shape (b), integers, one for each row; got {chosen.dtype} {chosen.shape}"
        )
    if not _is_traced(chosen) and not bool(((chosen >= -1) & (chosen < count)).all()):
        raise IndexError(f"add_adapter: choice has numbers from -1 to {count - 1}; got {np.asarray(chosen).tolist()}")
    return chosen.astype(jnp.int32)


@dataclasses.dataclass
class _Parts:
    """What an adapter has, by PyTorch's names and by paths of the tree."""

    wholes: dict[str, Array] = dataclasses.field(default_factory=dict)
    factors: dict[str, dict[int, Factors]] = dataclasses.field(default_factory=dict)


def _read(base: Base, adapter: Adapter) -> _Parts:
    """Sorts the tensors of an adapter."""
    spec, known = adapter.config, roles(base.config, adapter.config)
    tensors = {_modern(name): tensor for name, tensor in adapter.tensors.items()}
    problems = [f"unexpected {name!r} {list(t.shape)}" for name, t in tensors.items() if name not in known]
    problems += [f"missing {name!r}" for name, role in known.items() if role.required and name not in tensors]
    parts = _Parts()
    factors: dict[str, tuple[Role, dict[str, Array]]] = {}
    for name, tensor in tensors.items():
        role = known.get(name, Role("unused", "", ""))
        if role.part in LINEAR:
            factors.setdefault(role.name, (role, {}))[1][role.part] = tensor
        elif role.part in ("whole", "rows", "base"):
            problems += _whole(base, parts, role, name, tensor, spec)
        elif role.part == "copy" and (other := PREFIX + role.name) in tensors:
            problems += _repeated(name, tensor.T, other, tensors[other])
    for name, (role, pieces) in factors.items():
        if "a" in pieces and "b" in pieces:
            problems += _factors(base, parts, name, role, pieces, spec)
    if problems:
        raise ValueError(
            f"add_adapter: {len(problems)} tensors of the adapter do not fit {base.config.model_type} "
            f"({base.config.task}):\n  " + listing(problems, 200, "\n  ")
        )
    return parts


def _modern(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _whole(base: Base, parts: _Parts, role: Role, name: str, tensor: Array, spec: AdapterConfig) -> list[str]:
    place = base.place(role.name)
    shape = rules.disk_shape(place.rule, place.sizes(base.config))
    if role.part == "rows":
        tokens = _tokens(base.config, spec, role)
        if tuple(tensor.shape) != (len(tokens), *shape[1:]):
            return [f"{name!r} has shape {list(tensor.shape)}, expected {[len(tokens), *shape[1:]]}"]
        if tokens and not 0 <= min(tokens) <= max(tokens) < shape[0]:
            raise IndexError(
                f"add_adapter: trainable_token_indices of {role.module!r} are outside of 0 … {shape[0] - 1}"
            )
        tensor = _set_rows(base.tensor(role.name), tokens, tensor)
    elif tuple(tensor.shape) != shape:
        return [f"{name!r} has shape {list(tensor.shape)}, expected {list(shape)}; see resize_embeddings"]
    elif role.part == "base":
        tensor = jax.lax.stop_gradient(tensor)
        if _same(tensor, base.tensor(role.name)):
            return []
    same = base.same.get(role.name, role.name)
    before = parts.wholes.setdefault(same, tensor)
    if role.part == "base" and _is_traced(before, tensor):
        return []
    return _repeated(name, tensor, same, before)


def _repeated(name: str, tensor: Array, other: str, before: Array) -> list[str]:
    """What is wrong with a tensor that is tied to another."""
    if before is tensor or _same(before, tensor):
        return []
    if not _is_traced(before, tensor):
        return [f"{name!r} differs from that of {other!r}, to which it is tied"]
    return [f"{name!r} repeats {other!r}; to train the adapter, leave it out of its tensors"]


def _set_rows(table: Any, rows: Sequence[int], new: Array) -> Array:
    table = jnp.asarray(table)
    return table.at[jnp.asarray(rows, jnp.int32)].set(new.astype(table.dtype))


def _same(one: Any, other: Any) -> bool:
    """Whether two arrays are equal; not if they are traced."""
    traced = _is_traced(one, other)
    return not traced and one.dtype == other.dtype and bool((jnp.asarray(one) == jnp.asarray(other)).all())


def _is_traced(*arrays: Any) -> bool:
    return any(isinstance(array, Tracer) for array in arrays)


def _tokens(config: Config, spec: AdapterConfig, role: Role) -> tuple[int, ...]:
    names = model(config)
    return spec.tokens(names.modules, names.embedding)[role.module]


def _factors(
    base: Base, parts: _Parts, name: str, role: Role, pieces: Mapping[str, Array], spec: AdapterConfig
) -> list[str]:
    place = base.place(name)
    wide = {part: x if x.dtype.itemsize > 2 else x.astype(jnp.float32) for part, x in pieces.items()}
    a, b = (wide["b"].T, wide["a"].T) if role.table else (wide["a"], wide["b"])
    bias, magnitude = wide.get("bias"), pieces.get("magnitude")  # never both
    scale = jnp.asarray(spec.scale(role.module), b.dtype)
    columns = magnitude if role.table else None
    rows = bias * scale if bias is not None else magnitude if columns is None else None
    try:
        found = rules.low_rank_from_disk(place.rule, place.sizes(base.config), a, b * scale, rows, columns)
    except ValueError as error:
        return [f"the factors of {name!r}: {error}"]
    where = place.leaves(stacked=base.stacked)
    for leaf, (a, b, rows, columns) in found.items():
        if b.shape[-1] != spec.rank(role.module):
            return [
                f"the factors of {name!r} have rank {b.shape[-1]}, adapter_config.json says {spec.rank(role.module)}"
            ]
        layer = place.layer if base.stacked and place.layer is not None else 0
        more = {"magnitude" if bias is None else "bias": rows}
        parts.factors.setdefault(where[leaf], {})[layer] = Factors(a, b, columns=columns, **more)
    return []


def _placed(base: Base, wholes: Mapping[str, Array]) -> dict[str, Any]:
    """Path -> leaf, for the leaves that have tensors of an adapter in place of the model's."""
    parts: dict[str, dict[int | None, Any]] = {}
    for name, tensor in wholes.items():
        place = base.place(name)
        where = place.leaves(stacked=base.stacked)
        for path, part in rules.from_disk(place.rule, tensor, place.sizes(base.config)).items():
            layer = place.layer if base.stacked else None
            parts.setdefault(where[path], {})[layer] = jnp.asarray(part)
    found: dict[str, Any] = {}
    for path, layers in parts.items():
        old: Any = base.flat.get(path, layers.get(None))  # optional leaves may be new
        if not _leaves.is_plain(old):
            raise NotImplementedError(f"add_adapter: {path!r} is a {type(old).__name__}; turn it into an array first")
        new = {layer: part.astype(old.dtype) for layer, part in layers.items()}
        found[path] = new[None] if None in new else jnp.stack([new.get(i, old[i]) for i in range(old.shape[0])])
    return found
