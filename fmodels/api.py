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
from fmodels.low_rank import check_rows
from fmodels.models import Config, family
from fmodels.nn import kernels
from fmodels.nn.experts import check_how, explained
from fmodels.types import Array, Cache, Keep, Key, Output, Params

CHOICE_TASKS = ("multiple-choice", "double-heads")


def init(config: Config, key: Key, *, dtype: Any = "float32") -> Params:
    """Random parameters for a config, by the family's own scheme.

    Args:
        config: a family's config, such as `fm.models.llama.Config(...)`.
        key: random key.
        dtype: of all leaves.

    Returns:
        A stacked tree; a tuple of layers where the config makes layers differ: pruned heads, layers without experts.

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
    tokens: Array | None,
    *,
    mask: Array | None = None,
    decoder_tokens: Array | None = None,
    decoder_mask: Array | None = None,
    positions: Array | None = None,
    token_types: Array | None = None,
    cache: Cache | None = None,
    select: Array | None = None,
    hidden_states: bool = False,
    attentions: bool = False,
    router_logits: bool = False,
    experts: str | None = None,
    attention: str = "xla",
    remat: bool = False,
) -> Output:
    """Runs the model; what comes out depends on `config.task`.

    Compiled once per config and shapes. Inside of your own `jit`, `grad`, `vmap` or `scan` it is traced in.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: the family's config; static.
        tokens: `(b t)` int token ids; `(b n t)` for multiple choice and double heads, `n` choices each. For an
            encoder-decoder model, of the encoder; None where the cache holds what it has read (`Cache.cross`), which
            goes before tokens and mask.
        mask: `(b t)` bool or 0/1, True for real tokens; all real if None. With a cache: of the new tokens.
        decoder_tokens: `(b t)` int token ids of an encoder-decoder model's decoder. None: `tokens` shifted to the
            right, for the tasks in which transformers does so; BART's, classification and question answering.
        decoder_mask: as `mask`, of `decoder_tokens`.
        positions: `(b t)` int, the decoder's if there is one; the default is `cumsum(mask) - 1`, BERT's and BART's is
            the column. T5 has none.
        token_types: `(b t)` int, zeros if None.
        cache: from `fm.init_cache`; the new tokens are written to it and see what it holds. An encoder-decoder model
            adds what its encoder has read.
        select: `(b)` int, compute a language model's logits only at this place of each row; then they are `(b 1 v)`.
        hidden_states: also return the input of every layer.
        attentions: also return the weights of every attention.
        router_logits: also return what the routers of a mixture of experts gave; for `load_balancing_loss`.
        experts: how a mixture runs its experts: `"grouped"`, the tokens sorted by expert; `"dense"`, all experts on all
            tokens; None for the platform's own, dense on CPU. The numbers are the same. Under `vmap` only dense.
        attention: the kernel of attention: `"xla"`, everywhere and the one with transformers' numbers; `"cudnn"` on NVIDIA's
            GPUs in float16 or bfloat16; `"splash"` on TPUs, for texts and heads of a multiple of 128.
        remat: gradients keep only the input of every layer and compute the layer once more: less memory, about a third
            more work (gradient checkpointing). The outputs are the same.

    Returns:
        An `Output`; logits are float32.

    Raises:
        ValueError: wrong shapes; no tokens; inputs that the model does not take; tokens outside of the vocabulary or
            positions beyond the table (these two are only seen outside of `jit`); a kernel that the platform does not have,
            or that does not fit the shapes, the dtype or the model; `remat` with a cache.
        NotImplementedError: `experts="grouped"` under `vmap`.

    Example:
        >>> import jax, fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> fm.forward(params, config, jax.numpy.array([[5, 6, 7]])).logits.shape == (1, 3, config.vocab_size)
        True
    """
    keep = Keep(hidden_states, attentions, router_logits, bool(remat))
    if remat and cache is not None:
        raise ValueError(
            "forward: remat saves memory of gradients, for which there is no cache; leave remat or cache out"
        )
    kernel = kernels.check(attention)
    if attentions and kernel != "xla":
        raise ValueError(
            f"forward: attention={attention!r} has no weights to return; leave attention or attentions out"
        )
    asked = {} if experts is None else {"experts": check_how(experts)}
    if (asked or router_logits) and not hasattr(config, "num_experts"):
        raise ValueError(f"forward: {config.model_type} has no experts; leave experts and router_logits out")
    if config.is_encoder_decoder:
        if token_types is not None:
            raise ValueError(f"forward: {config.model_type} has no token types; leave token_types out")
        pairs, given = _pair(params, config, tokens, mask, decoder_tokens, decoder_mask, positions, cache)
        return _forward(params, config, pairs, kernel, **given, cache=cache, select=select, keep=keep)
    if decoder_tokens is not None or decoder_mask is not None:
        raise ValueError(
            f"forward: {config.model_type} of task {config.task!r} is one stack of layers; pass tokens and mask in place "
            "of decoder_tokens and decoder_mask"
        )
    tokens, arrays = inputs(
        params, config, tokens, mask=mask, positions=positions, token_types=token_types, cache=cache
    )
    if family(config).encode is not None and arrays.pop("token_types") is not None:
        raise ValueError(f"forward: {config.model_type} has no token types; leave token_types out")
    lead = tokens.shape[:-1]
    if len(lead) == 2:
        tokens = tokens.reshape(-1, tokens.shape[-1])
        arrays = {name: None if a is None else a.reshape(tokens.shape) for name, a in arrays.items()}
    with explained():
        out = _forward(params, config, tokens, kernel, **arrays, cache=cache, select=select, keep=keep, **asked)
    return _unflatten_choices(out, config, lead) if len(lead) == 2 else out


def inputs(
    params: Params, config: Config, tokens: Any, *, cache: Cache | None = None, part: str = "", **given: Any
) -> tuple[Array, dict[str, Array | None]]:
    """The tokens, and those of mask, positions and token types that are `given`, as arrays that `forward` can take.

    Args:
        params: the tree.
        config: its config.
        tokens: as those of `forward`.
        cache: the cache that they go to.
        part: `"encoder"` or `"decoder"`, whose tokens they are; nothing where there is one stack.
        given: by the names of `forward`, without `decoder_`.

    Raises:
        ValueError: as `forward`.
    """
    prefix = "decoder_" if part == "decoder" else ""
    if tokens is None:
        raise ValueError(f"forward: {config.model_type} needs {prefix}tokens, (b t) integers; got None")
    tokens = _as_array(f"{prefix}tokens", tokens)
    arrays = {name: None if a is None else _as_array(name, a) for name, a in given.items()}
    _check_inputs(params, config, tokens, arrays, cache, part)
    if arrays.get("mask") is not None:
        arrays["mask"] = jnp.asarray(arrays["mask"], bool)
    return tokens, arrays


def _pair(
    params: Params, config: Any, tokens: Any, mask: Any, decoder_tokens: Any, decoder_mask: Any, positions: Any,
    cache: Cache | None,
) -> tuple[Array | None, dict[str, Array | None]]:  # fmt: skip
    """An encoder's inputs and a decoder's, as `inputs`; the encoder's are None where it does not run."""
    read = cache is not None and cache.cross is not None
    arrays: dict[str, Array | None] = {"mask": None, "decoder_tokens": None, "decoder_mask": None, "positions": None}
    if not read or tokens is not None:
        tokens, found = inputs(params, config, tokens, mask=None if read else mask, part="encoder")
        arrays["mask"] = found["mask"]
    if decoder_tokens is None and config.task in config.SHIFTS and tokens is not None:
        decoder_tokens = jnp.roll(tokens, 1, axis=-1).at[..., 0].set(config.decoder_start_token_id)
    decoder_tokens, found = inputs(
        params, config, decoder_tokens, mask=decoder_mask, positions=positions, cache=cache, part="decoder"
    )
    arrays |= {"decoder_tokens": decoder_tokens, "decoder_mask": found["mask"], "positions": found["positions"]}
    rows = cache.cross.mask.shape[0] if read and cache is not None and cache.cross is not None else None
    rows = tokens.shape[0] if rows is None and tokens is not None else rows
    if decoder_tokens.shape[0] != rows:
        raise ValueError(f"forward: the encoder has {rows} rows, decoder_tokens have shape {decoder_tokens.shape}")
    if config.task == "sequence-classification" and tokens is not None:
        _check_ends(config, tokens, decoder_tokens)
    return tokens, arrays


def _check_ends(config: Config, tokens: Array, decoder_tokens: Array) -> None:
    if tokens.shape != decoder_tokens.shape:
        raise ValueError(
            f"forward: a sequence is classified at its end token's column; tokens have shape {tokens.shape}, "
            f"decoder_tokens {decoder_tokens.shape}"
        )
    end = config.eos_token_ids[0]
    if not isinstance(tokens, Tracer) and not (np.asarray(tokens) == end).any(-1).all():
        raise ValueError(
            f"forward: a sequence is classified at its end token {end}, which is not in each row of tokens"
        )


@functools.partial(jax.jit, static_argnames=("config", "kernel", "keep", "experts"))
def _forward(params: Params, config: Config, tokens: Array | None, kernel: str, **inputs: Any) -> Output:
    with kernels.using(kernel):
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
    params: Params, config: Config, tokens: Array, arrays: dict[str, Array | None], cache: Cache | None, part: str
) -> None:
    problems = []
    name = "decoder_tokens" if part == "decoder" else "tokens"
    choices = config.task in CHOICE_TASKS
    if tokens.ndim != (3 if choices else 2):
        want = "(b n t), n choices each" if choices else "(b t)"
        raise ValueError(f"forward: {name} of task {config.task!r} have shape {want}; got {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"forward: {name} are integers; got {tokens.dtype}")
    if tokens.size == 0:
        raise ValueError(f"forward: there are no tokens; {name} have shape {tokens.shape}")
    problems += [
        f"{'decoder_' if part == 'decoder' and other == 'mask' else ''}{other} has shape {a.shape}, {name} have {tokens.shape}"
        for other, a in arrays.items()
        if a is not None and a.shape != tokens.shape
    ]
    check_rows("forward", params, tokens.shape[0])
    positions, types = arrays.get("positions"), arrays.get("token_types")
    numbers = {"positions": positions, "token_types": types}
    problems += [
        f"{other} are integers; got {getattr(a, 'dtype', None)}" for other, a in numbers.items() if not _is_integer(a)
    ]
    part = part or next((stack for stack in ("decoder", "encoder") if stack in params), "")
    embed = params["embed"] | params.get(part, {}).get("embed", {})
    vocab = embed["tokens"].shape[0]
    problems += _outside(name, tokens, vocab, "the vocabulary; see resize_embeddings")
    if types is not None and "types" in embed:
        problems += _outside("token_types", types, embed["types"].shape[0], "the table of token types")
    if "positions" in embed:
        table = embed["positions"].shape[0] - config.position_offset
        if positions is not None:
            problems += _outside("positions", positions, table, "the table of positions")
        elif (length := _longest(config, tokens, arrays.get("mask"), cache)) > table:
            problems.append(f"{length} {name} are more than the {table} positions of this model")
    if cache is not None and cache.mask.shape[0] != tokens.size // tokens.shape[-1]:
        problems.append(f"the cache has {cache.mask.shape[0]} rows, {name} have shape {tokens.shape}")
    if cache is not None and not isinstance(cache.length, Tracer):
        used, slots = int(np.max(cache.length)), cache.mask.shape[1]
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
        return tokens.shape[-1] if config.counts_columns else 0
    if config.counts_columns:
        return tokens.shape[-1] + (0 if cache is None else int(np.max(cache.length)))
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
    found: dict[str, set[int]] = {}
    letters: dict[str, str] = {}
    for place, size in schema.measured(params).items():
        letter = place.rpartition(".")[2]
        name = schema.field(config, place, letter)
        letters[name] = letter
        found[name] = found.get(name, set()) | size
    changes: dict[str, Any] = {}
    ragged = {name for name, size in found.items() if len(size) > 1}
    heads = ("num_heads", "num_kv_heads")
    pruned = [schema.heads(config, i) for i in range(config.num_layers)]
    want = {name: {counts[i] for counts in pruned} for i, name in enumerate(heads)} | {
        "num_layers": {config.num_layers}
    }
    fits = all(found.get(name, size) == size for name, size in want.items())
    if ragged and not (fits and ragged <= {*heads}):
        sizes = ", ".join(f"{schema.LETTERS[letters[name]]}: {sorted(found[name])}" for name in sorted(ragged))
        raise ValueError(
            f"match_config: layers differ in size ({sizes}), which config.pruned_heads does not explain; use prune_heads"
        )
    for name, size in found.items():
        fixed = (name in heads and fits) or (letters[name] == "c" and config.task in schema.CLASSES)
        if not fixed and hasattr(config, name):
            changes[name] = next(iter(size)) - (config.position_offset if letters[name] == "p" else 0)
    if not fits:
        changes["pruned_heads"] = ()
    leaves = {schema.stacked_path(path) for path in tree.flatten(params)}
    if "lm_head.weight" in leaves:
        changes["tie_word_embeddings"] = False
    biases = {"attention_bias": ("query", "latent"), "mlp_bias": ("up",)}
    for field, names in biases.items():
        if hasattr(config, field):
            changes[field] = any(f"layers.{field.removesuffix('_bias')}.{name}.bias" in leaves for name in names)
    changes = {field: value for field, value in changes.items() if getattr(config, field) != value}
    return dataclasses.replace(config, **changes) if changes else config


def partition_specs(params: Params, mesh_axes: dict[str, str]) -> Params:
    """A `PartitionSpec` per leaf, from a rule per letter; see `fmodels.schema.partition`.

    The axes of the mesh are to be Auto. `jax.make_mesh` makes Explicit ones if nothing else is said, with which every operation
    would have to state its sharding; jax then raises a ShardingTypeError in `forward` and `generate`.

    Example:
        >>> import jax, fmodels as fm
        >>> specs = fm.partition_specs(fm.abstract(fm.models.gpt2.Config()), {"h": "model", "f": "model", "v": "model"})
        >>> specs["layers"]["mlp"]["up"]["weight"]
        P(None, 'model', None)
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> place = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    """
    return schema.partition(params, mesh_axes)
