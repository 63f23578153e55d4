"""The options as arrays, and all logits functions in transformers' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.generation import logits as rules
from fmodels.generation.config import GenerationConfig
from fmodels.generation.constraints.automaton import allowed
from fmodels.generation.history import Automata, History
from fmodels.generation.logits import Bias
from fmodels.generation.sampling import Warp, everyone
from fmodels.generation.synthid import SynthID
from fmodels.generation.watermark import Watermark
from fmodels.types import Array

Processor = Callable[[Array, History], Array]
"""A logits function of the user's: `(b v)` float32 logits and the `History` to `(b v)` logits."""


class Rows(NamedTuple):
    """What each row can have for itself, `(b)` each.

    Attributes:
        sample: bool, whether the row samples or takes the likeliest token.
        repetition_penalty, min_length, min_new_tokens, renormalize, remove_invalid: as in `GenerationConfig`.
        no_repeat_ngram, encoder_no_repeat_ngram, encoder_repetition_penalty, decay_start, decay_factor: likewise; None
            where no row asks for it, and then it is not in the program.
        warp: the parameters of sampling.
    """

    sample: Array
    repetition_penalty: Array
    min_length: Array
    min_new_tokens: Array
    renormalize: Array
    remove_invalid: Array
    warp: Warp
    no_repeat_ngram: Array | None = None
    encoder_no_repeat_ngram: Array | None = None
    encoder_repetition_penalty: Array | None = None
    decay_start: Array | None = None
    decay_factor: Array | None = None


class Options(NamedTuple):
    """The options as arrays, so that other values need no other program.

    Attributes:
        rows: those that each row has for itself.
        eos: `(e)` int32, the end tokens, filled up with -1.
        pad: `()` int32, what rows emit after their end.
        max_new_tokens: `()` int32.
        sequence_bias, bad_words: tables, or None.
        forced_bos, forced_eos, suppress, begin_suppress: `(n)` int32 tokens filled up with -1, or None.
        begin: `()` int32, the number of new tokens at which `begin_suppress` works.
        automata: the automaton of the constraint and that of the stop strings.
        mask: `(b v)` bool, the tokens that the host allows at the next step, or None.
        watermark: static; it comes after all cuts.
    """

    rows: Rows
    eos: Array
    pad: Array
    max_new_tokens: Array
    sequence_bias: Bias | None = None
    bad_words: Bias | None = None
    forced_bos: Array | None = None
    forced_eos: Array | None = None
    suppress: Array | None = None
    begin_suppress: Array | None = None
    begin: Array | None = None
    automata: Automata = Automata()
    mask: Array | None = None
    watermark: Watermark | SynthID | None = None

    @property
    def ngrams(self) -> bool:
        """Whether the history must know of n-grams."""
        return self.rows.no_repeat_ngram is not None

    @property
    def context(self) -> bool:
        """Whether the history must know the context."""
        return self.rows.encoder_no_repeat_ngram is not None or self.rows.encoder_repetition_penalty is not None

    def take(self, index: Array) -> Options:
        """Of the rows with these numbers."""
        rows, mask = jax.tree.map(lambda x: x[index], (self.rows, self.mask))
        automata = Automata(*(a if a is None else a._replace(start=a.start[index]) for a in self.automata))
        return self._replace(rows=rows, mask=mask, automata=automata)

    def repeat(self, count: int) -> Options:
        """For `count` rows where there was one."""
        rows, mask = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), (self.rows, self.mask))
        return self._replace(rows=rows, mask=mask)


def process(logits: Array, history: History, options: Options, processors: Sequence[Processor] = ()) -> Array:
    """All logits functions but those of sampling, in transformers' order; the user's own come last.

    Args:
        logits: `(b v)` float32.
        history: of the same rows.
        options: arrays, rows repeated as those of `logits`.
        processors: functions of logits and history.
    """
    rows, new, length = options.rows, history.new, history.length
    if options.sequence_bias is not None:
        logits = rules.sequence_bias(logits, history, options.sequence_bias)
    if rows.encoder_repetition_penalty is not None:
        logits = rules.encoder_repetition_penalty(logits, history, rows.encoder_repetition_penalty)
    logits = rules.repetition_penalty(logits, history.seen, rows.repetition_penalty)
    if rows.no_repeat_ngram is not None:
        logits = rules.no_repeat_ngram(logits, history, rows.no_repeat_ngram)
    if rows.encoder_no_repeat_ngram is not None:
        logits = rules.encoder_no_repeat_ngram(logits, history, rows.encoder_no_repeat_ngram)
    if options.bad_words is not None:
        logits = rules.sequence_bias(logits, history, options.bad_words)
    logits = rules.drop(logits, options.eos, (length < rows.min_length) | (new < rows.min_new_tokens))
    if options.automata.grammar is not None and history.grammar is not None:
        left = options.max_new_tokens - new
        logits = jnp.where(allowed(options.automata.grammar, history.grammar, left), logits, -jnp.inf)
    if options.mask is not None:
        logits = jnp.where(options.mask, logits, -jnp.inf)
    if options.forced_bos is not None:
        logits = rules.force(logits, options.forced_bos, length == 1)
    if options.forced_eos is not None:
        logits = rules.force(logits, options.forced_eos, new == options.max_new_tokens - 1)
    logits = rules.remove_invalid(logits, rows.remove_invalid)
    if rows.decay_start is not None and rows.decay_factor is not None:
        logits = rules.exponential_decay_length(logits, new, options.eos, rows.decay_start, rows.decay_factor)
    if options.suppress is not None:
        logits = rules.drop(logits, options.suppress, jnp.ones(logits.shape[0], bool))
    if options.begin_suppress is not None and options.begin is not None:
        logits = rules.drop(logits, options.begin_suppress, new == options.begin)
    for processor in processors:
        logits = processor(logits, history)
    return logits


def marked(logits: Array, history: History, options: Options) -> Array:
    """With the watermark, which comes after all cuts."""
    return logits if options.watermark is None else options.watermark.mark(logits, everyone(logits), history)


def renormalize(logits: Array, options: Options) -> Array:
    """Log-probabilities in the rows that ask for `renormalize_logits`."""
    return jnp.where(options.rows.renormalize[:, None], jax.nn.log_softmax(logits, axis=-1), logits)


def build(
    rows: Sequence[GenerationConfig],
    *,
    eos: Sequence[int],
    pad: int | None,
    max_new_tokens: int,
    vocabulary: int,
    prompt: int,
    automata: Automata | None = None,
    watermark: Watermark | SynthID | None = None,
) -> Options:
    """The arrays of a call.

    Args:
        rows: one config a row; what is not per row is taken from the first.
        eos: end tokens.
        pad: pad token, the first end token if None.
        max_new_tokens: how many tokens to add.
        vocabulary: its size.
        prompt: tokens of the longest prompt.
        automata: the compiled constraint and stop strings.
        watermark: of the text.

    Raises:
        ValueError: tokens outside of the vocabulary.
    """
    first = rows[0]

    def column(name: str, default: Any, dtype: Any) -> Array:
        values = [getattr(row, name) for row in rows]
        return jnp.asarray(np.array([default if value is None else value for value in values], dtype))

    def optional(name: str, default: Any, dtype: Any) -> Array | None:
        return column(name, default, dtype) if any(getattr(row, name) not in (None, default) for row in rows) else None

    decay = [row.exponential_decay_length_penalty or (0, 1.0) for row in rows]
    decays = any(row.exponential_decay_length_penalty is not None for row in rows)
    warp = Warp(
        temperature=column("temperature", 1.0, np.float32),
        top_h=column("top_h", 2.0, np.float32),
        top_k=column("top_k", 50, np.int32),
        top_p=column("top_p", 1.0, np.float32),
        min_p=column("min_p", 0.0, np.float32),
        typical_p=column("typical_p", 1.0, np.float32),
        epsilon_cutoff=column("epsilon_cutoff", 0.0, np.float32),
        eta_cutoff=column("eta_cutoff", 0.0, np.float32),
    )
    forced_bos = first.forced_bos_token_id
    return Options(
        rows=Rows(
            sample=column("do_sample", False, bool),
            repetition_penalty=column("repetition_penalty", 1.0, np.float32),
            min_length=column("min_length", 0, np.int32),
            min_new_tokens=column("min_new_tokens", 0, np.int32),
            renormalize=column("renormalize_logits", False, bool),
            remove_invalid=column("remove_invalid_values", False, bool),
            warp=warp,
            no_repeat_ngram=optional("no_repeat_ngram_size", 0, np.int32),
            encoder_no_repeat_ngram=optional("encoder_no_repeat_ngram_size", 0, np.int32),
            encoder_repetition_penalty=optional("encoder_repetition_penalty", 1.0, np.float32),
            decay_start=jnp.asarray([start for start, _ in decay], jnp.int32) if decays else None,
            decay_factor=jnp.asarray([factor for _, factor in decay], jnp.float32) if decays else None,
        ),
        eos=tokens_array(eos),
        pad=jnp.asarray(pad if pad is not None else eos[0] if eos else 0, jnp.int32),
        max_new_tokens=jnp.asarray(max_new_tokens, jnp.int32),
        sequence_bias=_bias(first.sequence_bias, vocabulary, "sequence_bias"),
        bad_words=_bad_words(first.bad_words_ids, eos, vocabulary),
        forced_bos=None if forced_bos is None else tokens_array([forced_bos], vocabulary, "forced_bos_token_id"),
        forced_eos=_some(first.forced_eos_token_id, vocabulary, "forced_eos_token_id"),
        suppress=_some(first.suppress_tokens, vocabulary, "suppress_tokens"),
        begin_suppress=_some(first.begin_suppress_tokens, vocabulary, "begin_suppress_tokens"),
        begin=None
        if not first.begin_suppress_tokens
        else jnp.asarray(int(forced_bos is not None and prompt == 1), jnp.int32),
        automata=Automata() if automata is None else automata,
        watermark=watermark,
    )


def bucket_of(count: int) -> int:
    """The power of two that is not below `count`: tables of about one size share a program."""
    return 1 << (max(count, 1) - 1).bit_length()


def tokens_array(tokens: Sequence[int], vocabulary: int | None = None, name: str = "") -> Array:
    """`(n)` int32 filled up with -1 to a power of two.

    Raises:
        ValueError: a token outside of the vocabulary.
    """
    if vocabulary is not None and (wrong := [token for token in tokens if not 0 <= token < vocabulary]):
        raise ValueError(f"generate: {name} has tokens outside of the vocabulary 0 … {vocabulary - 1}: {wrong}")
    array = np.full(bucket_of(len(tokens)), -1, np.int32)
    array[: len(tokens)] = tokens
    return jnp.asarray(array)


def _some(tokens: Any, vocabulary: int, name: str) -> Array | None:
    if tokens is None or tokens == () or tokens == []:
        return None
    return tokens_array([tokens] if isinstance(tokens, int) else list(tokens), vocabulary, name)


def _bias(given: Any, vocabulary: int, name: str) -> Bias | None:
    if not given:
        return None
    pairs = list(given)
    width = bucket_of(max(len(tokens) for tokens, _ in pairs))
    table = np.full((bucket_of(len(pairs)), width), -1, np.int32)
    values = np.zeros(table.shape[0], np.float32)
    for i, (tokens, value) in enumerate(pairs):
        tokens_array(tokens, vocabulary, name)
        table[i, width - len(tokens) :], values[i] = tokens, value
    return Bias(jnp.asarray(table), jnp.asarray(values))


def _bad_words(given: Any, eos: Sequence[int], vocabulary: int) -> Bias | None:
    """As transformers, which lets an end token by itself be: it would never end."""
    words = [tuple(word) for word in given or () if len(word) != 1 or word[0] not in eos]
    return _bias([(word, float("-inf")) for word in dict.fromkeys(words)], vocabulary, "bad_words_ids")
