"""From the arguments of `generate` to what the compiled programs take: checks, defaults, buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmodels import schema, strategies
from fmodels.generation import constraints
from fmodels.generation.config import GenerationConfig
from fmodels.generation.history import Automata
from fmodels.generation.options import Options, Processor, build
from fmodels.generation.sample import Ask, Predicate
from fmodels.generation.synthid import SynthID
from fmodels.generation.watermark import Watermark, settings
from fmodels.low_rank import check_rows
from fmodels.models import Config
from fmodels.nn.experts import check_how
from fmodels.nn.kernels import check as check_kernel
from fmodels.programs import Inputs, Plan
from fmodels.schema import LM_TASKS
from fmodels.types import Array, Cache, Key, Params


class Generated(NamedTuple):
    """What `generate` returns; several sequences of a prompt lie side by side.

    Attributes:
        tokens: `(b t+n)` int32: the prompt as it came, then the new tokens, pad after a row's end token; `n` is the
            largest of `lengths`.
        mask: `(b t+n)` bool, True for real tokens.
        lengths: `(b)` int32, new tokens of each row, end token included.
        logprobs: `(b n)` float32, log-probability of each new token under the distribution that it was taken from; 0
            after the end.
        sequence_scores: `(b)` float32, the scores of beams; else None.
        beam_indices: `(b n)` int32, of beams: which beam each token's scores come from, -1 after the end; else None.
        cache: keys and values of all tokens but the last of each row; `prefix=` of the next call continues from it.
        outputs: what was asked for, by name: `scores` and `logits` `(b n v)`, `hidden_states` `(b n l+1 d)`,
            `attentions` `(b n l h t+n)` of each token's predecessor, `cross_attentions` `(b n l h c)`, `top_logprobs` and
            `top_tokens` `(b n k)`; of beams, a row for each beam.
    """

    tokens: Array
    mask: Array
    lengths: Array
    logprobs: Array
    sequence_scores: Array | None = None
    beam_indices: Array | None = None
    cache: Cache | None = None
    outputs: dict[str, Array] = {}  # noqa: RUF012  a default that nothing writes to


class Call(NamedTuple):
    """A call, checked and rounded up to buckets: the prompt as it came, and what the compiled programs take.

    Attributes:
        prompt: `(b t)`, of the decoder.
        present: `(b t)` bool.
        read: columns of `tokens`: of the prompt, or of what the encoder reads.
        arguments: of the programs.
        max_time: seconds.
        guidance: of a constraint that the host follows.
    """

    prompt: np.ndarray
    present: np.ndarray
    read: int
    arguments: tuple[Params, Config, Plan, Inputs, Options, Key]
    max_time: float | None
    guidance: constraints.Guidance | None = None

    @property
    def plan(self) -> Plan:
        return self.arguments[2]


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, … that is not below `length`.

    Example:
        >>> [bucket(n) for n in (1, 17, 33, 65, 100)]
        [16, 24, 48, 96, 128]
    """
    size = 16
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def prepare(
    params: Params,
    config: Config,
    tokens: Any,
    mask: Any,
    max_new_tokens: int | None,
    key: Key | None,
    options: GenerationConfig | Sequence[GenerationConfig] | None,
    decoder_tokens: Any,
    decoder_mask: Any,
    negative_tokens: Any,
    negative_mask: Any,
    processors: Sequence[Processor],
    stops: Sequence[Predicate],
    constraint: Any,
    tokenizer: Any,
    draft: tuple[Params, Config] | None,
    prefix: Generated | None,
    keep_cache: bool,
    top_logprobs: int,
    experts: str | None,
    attention: str,
) -> Call:
    """The call of `generate` with these arguments; raises what it raises."""
    encoder_decoder = _check_task(config)
    _check_outside_of_jit(params, tokens, mask, key)
    read, present = _check_prompt(params, tokens, mask, "tokens")
    rows = _rows(config, options, read.shape[0])
    first = rows[0]
    if first.output_attentions and schema.is_ragged(config):
        raise ValueError(
            "generate: output_attentions needs layers with equally many heads; mask_heads instead of prune_heads keeps them so"
        )
    if experts is not None and not hasattr(config, "num_experts"):
        raise ValueError(f"generate: {config.model_type} has no experts; leave experts out")
    if check_kernel(attention, "generate") != "xla" and first.output_attentions:
        raise ValueError(
            f"generate: attention={attention!r} has no weights to return; leave attention or output_attentions out"
        )
    eos = first.eos_token_ids or config.eos_token_ids
    pad = first.pad_token_id if first.pad_token_id is not None else config.pad_token_id
    present = _present(read, present, pad, eos)
    encoder: dict[str, Any] = {}
    prompt = read
    if encoder_decoder:
        encoder = _encoder_inputs(_table(params, config, "encoder"), read, present)
        prompt, present = _decoder_prompt(params, config, first, read.shape[0], decoder_tokens, decoder_mask)
    elif decoder_tokens is not None or decoder_mask is not None:
        raise ValueError(f"generate: {config.model_type} has no encoder; leave decoder_tokens and decoder_mask out")
    if (empty := np.flatnonzero(~present.any(-1))).size and prefix is None:
        raise ValueError(f"generate: rows {empty.tolist()} of the prompt have no real token; give each at least one")
    fed, fed_mask = prompt, present
    if prefix is not None:
        prompt, present, fed, fed_mask = _after(prefix, prompt, present)
    count = _count(_table(params, config), first, max_new_tokens, prompt.shape[1], int(present.sum(-1).max()))
    _check_switch(config, int(present.sum(-1).max()), count)
    if any(row.do_sample for row in rows) and key is None:
        raise ValueError("generate: sampling needs a random key; pass key=jax.random.key(0), or do_sample=False")
    vocabulary = params["embed"]["tokens"].shape[0]
    strategy, sequences, settings, extra = strategies.choose(
        params, config, rows, draft=draft, vocabulary=vocabulary, eos=eos, count=count
    )
    if keep_cache and strategy in strategies.BEAMS:
        raise ValueError(
            "generate: texts that beams have found leave no cache behind; leave keep_cache or num_beams out"
        )
    inputs = Inputs(
        *_left(fed, fed_mask, _table(params, config)),
        text=_left(prompt, present, None) if prefix is not None else None,
        cache=None if prefix is None else prefix.cache,
        **encoder,
        **_negative(params, config, first, fed, fed_mask, negative_tokens, negative_mask),
        extra=extra,
    )
    text = inputs.text or (inputs.tokens, inputs.mask)
    automata, guidance = _automata(constraint, tokenizer, first, text, vocabulary, eos, count)
    if guidance is not None and (strategy != "sample" or sequences > 1 or first.max_time is not None):
        raise ValueError(
            "generate: this constraint is too large for tables; only greedy decoding and sampling can follow it"
        )
    arrays = build(
        rows,
        eos=eos,
        pad=pad,
        max_new_tokens=count,
        vocabulary=vocabulary,
        prompt=prompt.shape[1],
        automata=automata,
        watermark=_watermark(first, strategy),
    )
    plan = Plan(
        strategy=strategy,
        room=bucket(count),
        sequences=sequences,
        settings=settings,
        processors=tuple(processors),
        stops=tuple(stops),
        ask=Ask(
            scores=bool(first.output_scores),
            logits=bool(first.output_logits),
            top_logprobs=top_logprobs,
            hidden_states=bool(first.output_hidden_states),
            attentions=bool(first.output_attentions),
        ),
        chunk=None if first.prefill_chunk_size is None else bucket(first.prefill_chunk_size),
        guided=inputs.guidance is not None,
        keep_cache=keep_cache,
        quantized=first.cache_implementation == "quantized",
        experts=None if experts is None else check_how(experts, "generate"),
        attention=attention,
    )
    key = jax.random.key(0) if key is None else typed(key)
    return Call(prompt, present, read.shape[1], (params, config, plan, inputs, arrays, key), first.max_time, guidance)


def typed(key: Key) -> Key:
    """A key of `jax.random.key`, also from one of the older `jax.random.PRNGKey`."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _check_task(config: Config) -> bool:
    """Whether the model has an encoder; raises if it makes no text."""
    causal = getattr(config, "causal", True)
    if config.task not in LM_TASKS or not causal or config.task == "masked-lm":
        raise ValueError(
            f"generate: expected a causal language model, got a {config.model_type} for task {config.task!r}; "
            "load it with task='causal-lm'"
            + ("" if causal else ", of a model whose tokens see only those before them (config.causal)")
        )
    return config.task == "seq2seq-lm"


def _check_outside_of_jit(*arguments: Any) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((arguments, jnp.zeros(())))):  # which jit traces, too
        raise ValueError(
            "generate: it compiles its own program, and reads prompts on the host; call it outside of jax.jit, nnx.jit and "
            "other transformations, with arrays and not with tracers"
        )


def _check_prompt(params: Params, tokens: Any, mask: Any, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        prompt = np.asarray(tokens)
    except ValueError:
        raise ValueError(f"generate: rows of {name} differ in length; pad them and pass mask=") from None
    if prompt.ndim != 2 or prompt.size == 0:
        raise ValueError(f"generate: {name} have shape (b t) with at least one token; got {prompt.shape}")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise TypeError(f"generate: {name} are integers; got {prompt.dtype}")
    vocabulary = params["embed"]["tokens"].shape[0]
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(
            f"generate: {name} reach from {prompt.min()} to {prompt.max()}, outside of the vocabulary 0 … {vocabulary - 1}; "
            "see resize_embeddings"
        )
    check_rows("generate", params, prompt.shape[0])
    present = None if mask is None else np.asarray(mask)
    if present is not None and present.shape != prompt.shape:
        raise ValueError(f"generate: mask has shape {present.shape}, {name} have {prompt.shape}")
    return prompt.astype(np.int32), None if present is None else present.astype(bool)


def _present(prompt: np.ndarray, present: np.ndarray | None, pad: int | None, eos: Sequence[int]) -> np.ndarray:
    if present is not None:
        return present
    return np.ones(prompt.shape, bool) if pad is None or pad in eos else prompt != pad


def _rows(config: Config, options: Any, batch: int) -> list[GenerationConfig]:
    """One set of options a row, with the checkpoint's own where they say nothing."""
    own = config.generation.to_hf() if config.generation is not None else {}
    given = [options] * batch if options is None or isinstance(options, GenerationConfig) else list(options)
    if len(given) != batch or any(o is not None and not isinstance(o, GenerationConfig) for o in given):
        raise ValueError(
            f"generate: options is a fm.GenerationConfig or one for each of the {batch} rows; got {type(options).__name__}"
            + (f" of {len(given)}" if isinstance(options, Sequence) else "")
        )
    rows = [GenerationConfig.from_hf({**own, **(option.to_hf() if option is not None else {})}) for option in given]
    for row in rows:
        row.require_supported("generate")
    if mixed := [name for name in SHARED if len({getattr(row, name) for row in rows}) > 1]:
        raise ValueError(f"generate: {', '.join(mixed)} must be the same for all rows")
    return rows


PER_ROW = frozenset(
    """do_sample temperature top_h top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty min_length
    min_new_tokens renormalize_logits remove_invalid_values no_repeat_ngram_size encoder_no_repeat_ngram_size
    encoder_repetition_penalty exponential_decay_length_penalty bos_token_id""".split()
)
"""Options that each row can have for itself."""
SHARED = tuple(name for name in GenerationConfig.__dataclass_fields__ if name not in PER_ROW and name != "extra")
"""Those that are the same for all rows of a call."""


def _table(params: Params, config: Config, stack: str = "decoder") -> int | None:
    """Positions of the table of the decoder (or of the encoder), if the model has one."""
    if config.task == "seq2seq-lm":
        return config.max_positions if "positions" in params[stack].get("embed", {}) else None
    table = params["embed"].get("positions")
    return None if table is None else table.shape[0]


def _count(table: int | None, options: GenerationConfig, max_new_tokens: int | None, length: int, real: int) -> int:
    """How many tokens to add, by transformers' rules."""
    room = None if table is None else table - real
    if max_new_tokens is not None and (not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1):
        raise ValueError(f"generate: max_new_tokens is an integer of at least 1; got {max_new_tokens!r}")
    count = max_new_tokens or options.max_new_tokens
    if count is None and options.max_length is not None:
        count = options.max_length - length
        if count < 1:
            raise ValueError(
                f"generate: the prompt has {length} tokens, max_length={options.max_length} leaves no room; raise it"
            )
    elif count is None:
        count = 20 if room is None else min(20, max(room, 1))
    if room is not None and count > room + 1:
        raise ValueError(
            f"generate: the prompt has {real} tokens and {count} are to be added, but the model has {room + real} positions; "
            "shorten the prompt or lower max_new_tokens"
        )
    if room is not None and room < 0:
        raise ValueError(f"generate: the prompt has {real} tokens, more than the {room + real} positions of the model")
    return int(count)


def _check_switch(config: Config, real: int, count: int) -> None:
    edge = config.longest_short
    if edge is not None and real <= edge < real + count - 1:
        raise NotImplementedError(
            f"generate: beyond {edge} tokens {config.model_type} has other rotary factors, for which the cache would have to be "
            f"computed again; the prompt has {real} tokens and {count} are to be added. Pass max_new_tokens={edge + 1 - real}, and "
            "go on from the text that comes"
        )


def _left(prompt: np.ndarray, present: np.ndarray, table: int | None) -> tuple[Array, Array]:
    """Tokens and mask in a bucket, with all padding on the left, that between tokens too."""
    order = np.argsort(present, axis=1, kind="stable")
    tokens, mask = (np.take_along_axis(x, order, axis=1) for x in (prompt, present))
    width = bucket(tokens.shape[1])
    if table is not None:
        width = max(tokens.shape[1], min(width, table))
    before = ((0, 0), (width - tokens.shape[1], 0))
    return jnp.asarray(np.pad(tokens, before)), jnp.asarray(np.pad(mask, before))


def _encoder_inputs(table: int | None, read: np.ndarray, present: np.ndarray) -> dict[str, Array]:
    """What the encoder reads, in a bucket with padding on the right: some encoders count columns."""
    if table is not None and read.shape[1] > table:
        raise ValueError(
            f"generate: {read.shape[1]} tokens are more than the {table} positions of the encoder; shorten them"
        )
    width = bucket(read.shape[1]) if table is None else min(bucket(read.shape[1]), table)
    after = ((0, 0), (0, width - read.shape[1]))
    return {
        "encoder_tokens": jnp.asarray(np.pad(read, after)),
        "encoder_mask": jnp.asarray(np.pad(present, after)),
    }


def _decoder_prompt(
    params: Params, config: Config, options: GenerationConfig, batch: int, tokens: Any, mask: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The decoder's prompt, which begins with `decoder_start_token_id`, as in transformers."""
    start = options.decoder_start_token_id
    start = getattr(config, "decoder_start_token_id", None) if start is None else start
    start = options.bos_token_id if start is None else start
    start = config.bos_token_id if start is None else start
    if start is None:
        raise ValueError("generate: the decoder needs something to begin with; pass decoder_start_token_id in options")
    starts = (
        np.broadcast_to(np.asarray(start, np.int32), (batch,))
        if isinstance(start, int) or len(start) == batch
        else None
    )
    if starts is None:
        raise ValueError(
            f"generate: decoder_start_token_id is one token or one for each of {batch} rows; got {start!r}"
        )
    column = starts[:, None].astype(np.int32)
    if tokens is None:
        return column, np.ones((batch, 1), bool)
    prompt, present = _check_prompt(params, tokens, mask, "decoder_tokens")
    present = np.ones(prompt.shape, bool) if present is None else present
    if len(prompt) != batch:
        raise ValueError(f"generate: decoder_tokens have {len(prompt)} rows, tokens have {batch}")
    if (prompt[:, 0] != starts).all():
        prompt = np.concatenate([column, prompt], axis=1)
        present = np.concatenate([np.ones((batch, 1), bool), present], axis=1)
    return prompt, present


def _after(
    prefix: Generated, prompt: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The whole text and mask, and of those what the cache does not hold."""
    if prefix.cache is None:
        raise ValueError("generate: prefix has no cache; make it with keep_cache=True")
    before, real = np.asarray(prefix.tokens), np.asarray(prefix.mask)
    if len(before) != len(prompt):
        raise ValueError(f"generate: prefix has {len(before)} rows, tokens have {len(prompt)}")
    text, mask = np.concatenate([before, prompt], axis=1), np.concatenate([real, present], axis=1)
    held = np.asarray(prefix.cache.mask).sum(-1)
    rest = [row[keep][count:] for row, keep, count in zip(text, mask, held, strict=True)]
    width = max(map(len, rest))
    fed, fed_mask = np.zeros((len(rest), width), np.int32), np.zeros((len(rest), width), bool)
    for i, row in enumerate(rest):
        fed[i, width - len(row) :], fed_mask[i, width - len(row) :] = row, True
    return text, mask, fed, fed_mask


def _negative(
    params: Params,
    config: Config,
    options: GenerationConfig,
    prompt: np.ndarray,
    present: np.ndarray,
    tokens: Any,
    mask: Any,
) -> dict[str, Any]:
    """The second text of classifier-free guidance: the last token of each prompt where none is given."""
    scale = options.guidance_scale
    if scale is None or scale == 1:
        if tokens is not None:
            raise ValueError("generate: negative_tokens need a guidance_scale other than 1 in options")
        return {}
    if tokens is None:
        last = [np.flatnonzero(row)[-1] for row in present]
        other, real = prompt[np.arange(len(prompt)), last][:, None], np.ones((len(prompt), 1), bool)
    else:
        other, real = _check_prompt(params, tokens, mask, "negative_tokens")
        real = np.ones(other.shape, bool) if real is None else real
    tokens, mask = _left(other, real, _table(params, config))
    return {"other_tokens": tokens, "other_mask": mask, "guidance": jnp.asarray(scale, jnp.float32)}


def _automata(
    constraint: Any,
    tokenizer: Any,
    options: GenerationConfig,
    text: tuple[Array, Array],
    vocabulary: int,
    eos: Any,
    count: int,
) -> tuple[Automata, constraints.Guidance | None]:
    """The compiled automata of a constraint and of stop strings, and what the host follows if one is too large for tables."""
    if constraint is None and options.stop_strings is None:
        return Automata(), None
    if tokenizer is None:
        raise ValueError("generate: constraint and stop_strings are about text; pass tokenizer=")
    words = constraints.read_vocabulary(tokenizer, size=vocabulary)
    grammar, host, stop = None, None, None
    if constraint is not None:
        batch = text[0].shape[0]
        rows = list(constraint) if isinstance(constraint, list | tuple) else [constraint] * batch
        if len(rows) != batch:
            raise ValueError(f"generate: constraint is one, or one for each of the {batch} rows; got {len(rows)}")
        compiled = constraints.compile_rows(rows, words, eos)
        if isinstance(compiled, constraints.Guidance):
            host = compiled
            host.require_room(host.start(), count)
        else:
            grammar = compiled
            constraints.require_room(grammar, count)
    if options.stop_strings is not None:
        stop = constraints.stop_strings(options.stop_strings, words)
        stop = stop._replace(start=constraints.read_stop(stop, *text))
    return Automata(grammar, stop), host


def _watermark(options: GenerationConfig, strategy: str) -> Watermark | SynthID | None:
    if options.watermarking_config is None:
        return None
    if strategy in ("contrastive", "dola"):
        raise NotImplementedError(
            f"generate: watermarking_config is not supported with {strategy}; leave one of them out"
        )
    watermark = settings(dict(options.watermarking_config))
    if isinstance(watermark, SynthID) and strategy in strategies.BEAMS:
        raise NotImplementedError(
            f"generate: SynthID (watermarking_config with keys) is not supported with {strategy}, only for greedy decoding, "
            "sampling and speculation; leave one of them out"
        )
    return watermark
