"""Stop strings as an automaton over tokens: how much of one the text ends with, and whether a token completes one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.generation.constraints.automaton import TokenAutomaton, advance, stack, walk
from fmodels.generation.constraints.dfa import MAX_STATES, Dfa, TooLargeError
from fmodels.generation.constraints.vocabulary import Vocabulary, read_vocabulary
from fmodels.types import Array


def stop_strings(strings: str | Iterable[str], vocabulary: Any, *, pad: bool = True) -> TokenAutomaton:
    """Compiles stop strings for a vocabulary.

    Args:
        strings: one or more. They may name special tokens, such as `<eos>`.
        vocabulary: a `Vocabulary`, or what `read_vocabulary` takes.
        pad: whether the tables grow to rounded sizes, so that other strings need no other program.

    Raises:
        ValueError: no string, an empty one, or more than the tables hold.
        TypeError: something else than strings.

    Returns:
        An automaton that allows everything. `final` are the states in which a stop string ended within the newest token,
        at its end or before; it goes on from there as if there had been none. It follows tokens by `advance`.

    Example:
        >>> stop = stop_strings("ab", [b"a", b"b", b"xab", b"ba"])
        >>> state = read_stop(stop, [[0, 3]])  # "aba" ends with "a"
        >>> [bool(stop.accepts(advance(stop, state, jnp.array([token])))[0]) for token in range(4)]
        [False, True, True, True]

    Source: Aho and Corasick 1975, lifted to tokens; stops where transformers 5's `StopStringCriteria` does: as soon as a
    stop string ends within the newest token, at its end or before, wherever it began.
    """
    texts = [strings] if isinstance(strings, str) else list(strings)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"stop_strings: expected str or a list of them, got {strings!r}")
    if not texts or not all(texts):
        raise ValueError(f"stop_strings: expected at least one string and none that is empty; got {strings!r}")
    vocabulary = _with_special(read_vocabulary(vocabulary))
    dfa, n = _aho_corasick([text.encode() for text in texts])
    if n > MAX_STATES:
        raise TooLargeError(f"stop_strings: they have {n} bytes in all, more than {MAX_STATES}; make them shorter")
    columns, classes = walk(dfa, vocabulary, starts=n)
    # Class 0 is for tokens without text, which change nothing; after them no string has just ended.
    table = np.concatenate([np.arange(n)[None], columns]).T.astype(np.int32)
    table = np.concatenate([table, table])
    final = np.arange(2 * n) >= n
    zero, classes = np.zeros(2 * n, np.int32), (classes + 1)[None].astype(np.int32)
    automaton = TokenAutomaton(classes, table, final, zero, zero, np.zeros(len(vocabulary), bool), zero[:1])
    return stack([automaton], pad=pad)


def _with_special(vocabulary: Vocabulary) -> Vocabulary:
    """A vocabulary in which special tokens are text, as they are when a text is decoded with them."""
    tokens = list(vocabulary.tokens)
    for i, name in vocabulary.special:
        tokens[i] = name
    return Vocabulary(tuple(tokens))


def _aho_corasick(strings: Sequence[bytes]) -> tuple[Dfa, int]:
    """An automaton of `2 n` states and `n`: `state + n` where a string has been completed since the text began."""
    edges: list[dict[int, int]] = [{}]
    ends = [False]
    for string in strings:
        at = 0
        for byte in string:
            if byte not in edges[at]:
                edges[at][byte] = len(edges)
                edges.append({})
                ends.append(False)
            at = edges[at][byte]
        ends[at] = True
    n = len(edges)
    alphabet = sorted({byte for string in strings for byte in string})
    classes = np.full(256, len(alphabet), np.int32)
    classes[alphabet] = np.arange(len(alphabet))
    table = np.zeros((n, len(alphabet) + 1), np.int32)
    # In the order of depth, each state starts with the row of its longest proper suffix.
    todo = deque([(0, 0)])
    while todo:
        state, suffix = todo.popleft()
        ends[state] |= ends[suffix]
        row = table[suffix].copy()
        for byte, below in edges[state].items():
            todo.append((below, int(row[classes[byte]]) if state else 0))
            row[classes[byte]] = below
        table[state] = row
    done = np.array(ends)[table]
    both = np.concatenate([table + n * done, table + n])
    return Dfa(classes, both.astype(np.int32), np.arange(2 * n) >= n), n


def read_stop(stop: TokenAutomaton, tokens: Any, mask: Any = None) -> Array:
    """The states `(b)` int32 after the prompts: a stop string may begin in them and end in what is generated.

    One that ends in a prompt does not count, but a state may say that it has just ended there: ask `accepts` only after
    the first new token. `stop._replace(start=read_stop(stop, tokens, mask))` starts each row behind its prompt.

    Args:
        stop: of `stop_strings`.
        tokens: `(b t)` int32.
        mask: `(b t)` bool, True for real tokens; all if None.
    """
    tokens = jnp.asarray(tokens)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)

    def step(state: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        token, real = column
        return jnp.where(real, advance(stop, state, token), state), None

    return jax.lax.scan(step, jnp.zeros(tokens.shape[0], jnp.int32), (tokens.T, mask.T))[0]
