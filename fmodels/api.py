"""The public functions on parameters and configs: init, forward, check and what the axes table gives for free."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmodels import schema, tree
from fmodels.models import Config, family
from fmodels.types import Array, Cache, Key, Output, Params

CHOICE_TASKS = ("multiple-choice", "double-heads")


def init(config: Config, key: Key, *, dtype: Any = "float32") -> Params:
    """Random parameters for a config, by the family's own scheme.

    Args:
        config: a family's config, such as `fm.models.llama.Config(...)`.
        key: random key.
        dtype: of all leaves.

    Returns:
        A stacked tree; a tuple of layers where `config.pruned_heads` makes layers differ.

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2,
        ...                                num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> params["layers"]["attention"]["query"]["weight"].shape
        (2, 2, 4, 8)
    """
    return family(config).init(config, key, dtype=dtype)


def abstract(config: Config, *, dtype: Any = "float32") -> Params:
    """The tree of `jax.ShapeDtypeStruct` that `init` would fill, without computing anything.

    Example:
        >>> import fmodels as fm
        >>> fm.abstract(fm.models.gpt2.Config())["embed"]["tokens"]
        ShapeDtypeStruct(shape=(50257, 768), dtype=float32)
    """
    return jax.eval_shape(lambda: init(config, jax.random.key(0), dtype=dtype))


def forward(
    params: Params,
    config: Config,
    tokens: Array,
    *,
    mask: Array | None = None,
    positions: Array | None = None,
    token_types: Array | None = None,
    cache: Cache | None = None,
    select: Array | None = None,
    hidden_states: bool = False,
) -> Output:
    """Runs the model; what comes out depends on `config.task`.

    Compiled once per config and shapes. Inside of your own `jit`, `grad`, `vmap` or `scan` it is traced in.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: the family's config; static.
        tokens: `(b t)` int token ids; `(b n t)` for multiple choice and double heads, `n` choices each.
        mask: `(b t)` bool or 0/1, True for real tokens; all real if None. With a cache: of the new tokens.
        positions: `(b t)` int; the default is `cumsum(mask) - 1`, BERT's is the column.
        token_types: `(b t)` int, zeros if None.
        cache: from `fm.init_cache`; the new tokens are written to it and see what it holds.
        select: `(b)` int, compute a language model's logits only at this place of each row; then they are `(b 1 v)`.
        hidden_states: also return the input of every layer.

    Returns:
        An `Output`; logits are float32.

    Raises:
        ValueError: wrong shapes; no tokens; tokens outside of the vocabulary or positions beyond the table (these two
            are only seen outside of `jit`).

    Example:
        >>> import jax, fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> fm.forward(params, config, jax.numpy.array([[5, 6, 7]])).logits.shape == (1, 3, config.vocab_size)
        True
    """
    tokens, arrays = inputs(
        params, config, tokens, mask=mask, positions=positions, token_types=token_types, cache=cache
    )
    lead = tokens.shape[:-1]
    if len(lead) == 2:
        tokens = tokens.reshape(-1, tokens.shape[-1])
        arrays = {name: None if a is None else a.reshape(tokens.shape) for name, a in arrays.items()}
    out = _forward(params, config, tokens, **arrays, cache=cache, select=select, hidden_states=hidden_states)
    return _unflatten_choices(out, config, lead) if len(lead) == 2 else out


def inputs(
    params: Params, config: Config, tokens: Any, *, cache: Cache | None = None, **given: Any
) -> tuple[Array, dict[str, Array | None]]:
    """The tokens, and those of mask, positions and token types that are `given`, as arrays that `forward` can take.

    Raises:
        ValueError: as `forward`.
    """
    if tokens is None:
        raise ValueError(f"forward: {config.model_type} needs tokens, (b t) integers; got None")
    tokens = _as_array("tokens", tokens)
    arrays = {name: None if a is None else _as_array(name, a) for name, a in given.items()}
    _check_inputs(params, config, tokens, arrays, cache)
    if arrays.get("mask") is not None:
        arrays["mask"] = jnp.asarray(arrays["mask"], bool)
    return tokens, arrays


@functools.partial(jax.jit, static_argnames=("config", "hidden_states"))
def _forward(params: Params, config: Config, tokens: Array, **inputs: Any) -> Output:
    return family(config).forward(params, config, tokens, **inputs)


def _unflatten_choices(out: Output, config: Config, lead: tuple[int, ...]) -> Output:
    def split(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(*lead, *x.shape[1:])

    logits = out.logits
    if config.task == "multiple-choice":
        logits = None if logits is None else logits.reshape(lead)
    else:
        logits = split(logits)
    return out._replace(
        logits=logits, hidden=split(out.hidden), pooled=split(out.pooled), sequence_logits=split(out.sequence_logits)
    )


def _check_inputs(
    params: Params, config: Config, tokens: Array, arrays: dict[str, Array | None], cache: Cache | None
) -> None:
    problems = []
    choices = config.task in CHOICE_TASKS
    if tokens.ndim != (3 if choices else 2):
        want = "(b n t), n choices each" if choices else "(b t)"
        raise ValueError(f"forward: tokens of task {config.task!r} have shape {want}; got {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"forward: tokens are integers; got {tokens.dtype}")
    if tokens.size == 0:
        raise ValueError(f"forward: there are no tokens; tokens have shape {tokens.shape}")
    problems += [
        f"{name} has shape {a.shape}, tokens have {tokens.shape}"
        for name, a in arrays.items()
        if a is not None and a.shape != tokens.shape
    ]
    positions, types = arrays.get("positions"), arrays.get("token_types")
    numbers = {"positions": positions, "token_types": types}
    problems += [
        f"{name} are integers; got {getattr(a, 'dtype', None)}" for name, a in numbers.items() if not _is_integer(a)
    ]
    embed = params["embed"]
    vocab = embed["tokens"].shape[0]
    problems += _outside("tokens", tokens, vocab, "the vocabulary; see resize_embeddings")
    if types is not None and "types" in embed:
        problems += _outside("token_types", types, embed["types"].shape[0], "the table of token types")
    if "positions" in embed:
        table = embed["positions"].shape[0]
        if positions is not None:
            problems += _outside("positions", positions, table, "the table of positions")
        elif (length := _longest(config, tokens, arrays.get("mask"), cache)) > table:
            problems.append(f"{length} tokens are more than the {table} positions of this model")
    if cache is not None and cache.mask.shape[0] != tokens.size // tokens.shape[-1]:
        problems.append(f"the cache has {cache.mask.shape[0]} rows, tokens have shape {tokens.shape}")
    if cache is not None and not isinstance(cache.length, Tracer):
        used, slots = int(cache.length), cache.mask.shape[1]
        if used + tokens.shape[-1] > slots:
            problems.append(f"the cache has {slots} slots, {used} are taken, and {tokens.shape[-1]} tokens came")
    if problems:
        raise ValueError("forward: " + "; ".join(problems))


def _as_array(name: str, value: Any) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"forward: {name} are an array of integers; got {type(value).__name__} ({error})") from None


def _is_integer(array: Array | None) -> bool:
    return array is None or jnp.issubdtype(array.dtype, jnp.integer)


def _longest(config: Config, tokens: Array, mask: Array | None, cache: Cache | None) -> int:
    """How many positions the longest row takes, its cached tokens included; as far as it is known outside of `jit`."""
    if not isinstance(tokens.shape[-1], int):  # a symbol, under `jax.export`
        return 0
    if isinstance(mask, Tracer) or (cache is not None and isinstance(cache.length, Tracer)):
        return tokens.shape[-1] if config.model_type == "bert" else 0
    if config.model_type == "bert":
        return tokens.shape[-1] + (0 if cache is None else int(cache.length))
    real = np.full(1, tokens.shape[-1]) if mask is None else (np.asarray(mask) != 0).sum(-1)
    return int((real if cache is None else real + np.asarray(cache.mask).sum(-1)).max())


def _outside(name: str, values: Array, size: int, what: str) -> list[str]:
    if isinstance(values, Tracer):
        return []
    numbers = np.asarray(values)
    low, high = int(numbers.min()), int(numbers.max())
    return [f"{name} reach from {low} to {high}, outside of 0 … {size - 1}, {what}"] if low < 0 or high >= size else []


def check(params: Params, config: Config) -> None:
    """Raises a ValueError that lists every leaf that is missing, unexpected or of another shape than `config` says.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> fm.check(params, config)
    """
    weights = family(config).weights
    schema.check(params, config, weights.leaves(config), weights.leaves(config, optional=True))


def match_config(params: Params, config: Config) -> Config:
    """The config with every size read from the arrays: repairs it after a tree was edited by hand.

    Args:
        params: the tree.
        config: the config that it once had.

    Returns:
        `config` itself where it already fits, else a copy. A head count that is the same in all layers becomes
        `num_heads` (and `pruned_heads` is emptied); biases and a separate head are read from the presence of leaves.

    Raises:
        ValueError: layers differ in their numbers of heads and `config.pruned_heads` does not say which are gone.
    """
    found = schema.measured(params)
    changes: dict[str, Any] = {}
    ragged = {letter for letter, size in found.items() if len(size) > 1}
    pruned = {(len(schema.kept_heads(config, i)), schema.heads(config, i)[1]) for i in range(config.num_layers)}
    fits = (
        found["h"] == {h for h, _ in pruned}
        and found["g"] == {g for _, g in pruned}
        and found["l"] == {config.num_layers}
    )
    if ragged and not (fits and ragged <= {"h", "g"}):
        sizes = ", ".join(f"{schema.LETTERS[letter]}: {sorted(found[letter])}" for letter in sorted(ragged))
        raise ValueError(
            f"match_config: layers differ in size ({sizes}), which config.pruned_heads does not explain; use prune_heads"
        )
    for letter, field in schema.SIZES.items():
        fixed = (letter in "hg" and fits) or (letter == "c" and config.task in schema.CLASSES)
        if letter in found and not fixed and hasattr(config, field):
            changes[field] = next(iter(found[letter]))
    if not fits:
        changes["pruned_heads"] = ()
    if "lm_head.weight" in {schema.stacked_path(p) for p in tree.flatten(params)}:
        changes["tie_word_embeddings"] = False
    layers = params["layers"] if tree.is_stacked(params) else params["layers"][0]
    for field, path in (("attention_bias", "attention.query.bias"), ("mlp_bias", "mlp.up.bias")):
        if hasattr(config, field):
            changes[field] = tree.has(layers, path)
    changes = {field: value for field, value in changes.items() if getattr(config, field) != value}
    return dataclasses.replace(config, **changes) if changes else config


def partition_specs(params: Params, mesh_axes: dict[str, str]) -> Params:
    """A `PartitionSpec` per leaf, from a rule per letter; see `fmodels.schema.partition`.

    Example:
        >>> import fmodels as fm
        >>> specs = fm.partition_specs(fm.abstract(fm.models.gpt2.Config()), {"h": "model", "f": "model", "v": "model"})
        >>> specs["layers"]["mlp"]["up"]["weight"]
        P(None, 'model', None)
    """
    return schema.partition(params, mesh_axes)
