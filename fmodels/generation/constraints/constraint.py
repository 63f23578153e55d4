"""Descriptions of what a text must be: frozen, hashable, compiled once for each vocabulary."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from fmodels.generation.constraints.automaton import TokenAutomaton, compile_tokens
from fmodels.generation.constraints.dfa import Dfa
from fmodels.generation.constraints.regex import parse_regex
from fmodels.generation.constraints.syntax import Choice, Node, Text, compile_node
from fmodels.generation.constraints.vocabulary import Vocabulary, read_vocabulary


@dataclasses.dataclass(frozen=True)
class Constraint(abc.ABC):
    """What a generated text must be; made by `choices`, `regex` and `json_schema`."""

    @abc.abstractmethod
    def node(self) -> Node:
        """The description as parts of an automaton."""

    def dfa(self) -> Dfa:
        """The smallest automaton over the bytes of the text.

        Raises:
            TooLargeError: too many states.
            ValueError: no text fulfils it.
        """
        return _compile_dfa(self)

    def matches(self, text: str) -> bool:
        r"""Whether a whole text fulfils the constraint and is written as generation may write it.

        Example:
            >>> regex(r"\d+").matches("12")
            True
        """
        return self.dfa().matches(text.encode())

    def compile(self, vocabulary: Any, end_tokens: Iterable[int]) -> TokenAutomaton:
        """Lifts the constraint to tokens; a second time it comes from a cache.

        Args:
            vocabulary: a `Vocabulary`, or what `read_vocabulary` takes.
            end_tokens: ids that end a text.

        Raises:
            TooLargeError: it is too large for tables; `Guidance` takes it.
            ValueError: no text fulfils it, or no tokens spell one.
        """
        return _compile_tokens(self, read_vocabulary(vocabulary), tuple(sorted(set(end_tokens))))


@functools.lru_cache(maxsize=64)
def _compile_dfa(constraint: Constraint) -> Dfa:
    dfa = compile_node(constraint.node())
    if dfa.is_empty:
        raise ValueError(f"constraint: no text fulfils {constraint}")
    return dfa


@functools.lru_cache(maxsize=64)
def _compile_tokens(constraint: Constraint, vocabulary: Vocabulary, ends: tuple[int, ...]) -> TokenAutomaton:
    return compile_tokens(constraint.dfa(), vocabulary, ends)


@dataclasses.dataclass(frozen=True)
class Choices(Constraint):
    """One of some texts."""

    options: tuple[str, ...]

    def node(self) -> Node:
        return Choice(tuple(Text(option.encode()) for option in self.options))


@dataclasses.dataclass(frozen=True)
class Regex(Constraint):
    """What a regular expression matches as a whole."""

    pattern: str
    unicode: bool = False

    def node(self) -> Node:
        return parse_regex(self.pattern, unicode=self.unicode)


def choices(options: Sequence[str]) -> Constraint:
    """The text is one of these.

    Raises:
        ValueError: there are none.
        TypeError: they are not str.

    Example:
        >>> choices(["yes", "no"]).matches("no")
        True
    """
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        raise TypeError(f"choices: expected a list of str, got {options!r}")
    if not options:
        raise ValueError("choices: expected at least one text; got none")
    return Choices(tuple(dict.fromkeys(options)))


def regex(pattern: str, *, unicode: bool = False) -> Constraint:
    r"""The whole text matches a regular expression, as with `re.fullmatch`.

    Args:
        pattern: in the syntax of `re`. `^` and `$` are the beginning and the end of the text.
        unicode: whether `\d`, `\w` and `\s` mean all of Unicode, which needs larger tables; else ASCII, as with `re.ASCII`.

    Raises:
        ValueError: a syntax error, a text that cannot be, or lookaround, word boundaries, backreferences, atomic groups,
            possessive repetitions and the flag `(?m)`, which are named.

    Example:
        >>> regex(r"[a-f]{2,4}").matches("cafe")
        True
        >>> regex(r"(a)\1")
        Traceback (most recent call last):
        ValueError: regex: '(a)\\1' has a backreference, which no finite automaton can follow; write it without
    """
    constraint = Regex(pattern, unicode)
    constraint.node()
    return constraint
