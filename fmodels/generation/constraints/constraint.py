"""Descriptions of what a text must be: frozen, hashable, compiled once for each vocabulary."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmodels.generation.constraints.automaton import TokenAutomaton, compile_tokens, stack
from fmodels.generation.constraints.dfa import Dfa, TooLargeError
from fmodels.generation.constraints.expressions import parse_regex
from fmodels.generation.constraints.grammars import choices_grammar, regex_grammar, schema_grammar
from fmodels.generation.constraints.guidance import Guidance
from fmodels.generation.constraints.schemas import WHITESPACE, parse_schema
from fmodels.generation.constraints.syntax import Choice, Node, Text, compile_node
from fmodels.generation.constraints.vocabulary import Vocabulary, read_vocabulary


@dataclasses.dataclass(frozen=True)
class Constraint(abc.ABC):
    """What a generated text must be; made by `choices`, `regex` and `json_schema`."""

    @abc.abstractmethod
    def node(self) -> Node:
        """The description as parts of an automaton."""

    @abc.abstractmethod
    def grammar(self) -> str:
        """The description as a grammar of llguidance, for those that are too large for tables."""

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

    def grammar(self) -> str:
        return choices_grammar(self.options)


@dataclasses.dataclass(frozen=True)
class Regex(Constraint):
    """What a regular expression matches as a whole."""

    pattern: str
    unicode: bool = False

    def node(self) -> Node:
        return parse_regex(self.pattern, unicode=self.unicode)

    def grammar(self) -> str:
        return regex_grammar(self.pattern, unicode=self.unicode)


@dataclasses.dataclass(frozen=True)
class JsonSchema(Constraint):
    """A JSON text that fulfils a schema, which is kept as JSON."""

    schema: str
    whitespace: str = "optional"

    def node(self) -> Node:
        return parse_schema(json.loads(self.schema), whitespace=self.whitespace)

    def grammar(self) -> str:
        return schema_grammar(json.loads(self.schema), whitespace=self.whitespace)


def compile_rows(
    constraints: Sequence[Constraint | None], vocabulary: Any, end_tokens: Iterable[int]
) -> TokenAutomaton | Guidance:
    """The constraints of a batch: tables for the device, or, if one of them is too large, llguidance on the host.

    Args:
        constraints: one for each row, None for rows without.
        vocabulary: a `Vocabulary`, or what `read_vocabulary` takes.
        end_tokens: ids that end a text.

    Raises:
        ValueError: no text fulfils a constraint, or no tokens spell one.
        ImportError: one is too large, and llguidance is not installed.
    """
    vocabulary, ends = read_vocabulary(vocabulary), tuple(end_tokens)
    try:
        rows = [None if c is None else c.compile(vocabulary, ends) for c in constraints]
    except TooLargeError:
        return Guidance(constraints, vocabulary, ends)
    return stack(rows, size=len(vocabulary))


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


def json_schema(schema: Any, *, whitespace: str = "optional") -> Constraint:
    r"""The text is JSON that fulfils a schema.

    All texts are valid, but not all valid ones are allowed. Properties come in the order of `properties`, and where
    `additionalProperties` is missing beside them there are no others; where `items` is missing beside `prefixItems`, there
    are none. Where `type` is missing, the other keywords tell it. Strings are written as `json.dumps(ensure_ascii=False)`
    writes them. Integers without bounds have up to 15 digits, numbers up to 15 before and 17 behind the point and an
    exponent of two; with bounds, 15 in all and no exponent. Formats are `date time date-time uuid email ipv4 ipv6 uri`,
    each in its plain form. `oneOf` is taken as `anyOf`: make its parts exclude each other.

    Args:
        schema: a dict, its JSON, or a class with `model_json_schema`, such as a pydantic model.
        whitespace: behind commas and colons: "optional" a space or none, "dumps" always one, as `json.dumps` writes,
            "compact" none.

    Raises:
        ValueError: keywords that are not supported (`patternProperties`, `not`, `if`, `uniqueItems`, …), all listed, never
            ignored; or it is no JSON.

    Example:
        >>> person = json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
        >>> person.matches('{"name": "Ada"}'), person.matches('{"name": 3}')
        (True, False)
    """
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"json_schema: the schema is no JSON: {error}") from None
    if whitespace not in WHITESPACE:
        raise ValueError(f"json_schema: whitespace is one of {', '.join(WHITESPACE)}; got {whitespace!r}")
    if not isinstance(schema, Mapping | bool):
        raise TypeError(
            f"json_schema: expected a dict, JSON, or a model with model_json_schema; got {type(schema).__name__}"
        )
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema: the schema is no JSON: {error}") from None
    constraint = JsonSchema(text, whitespace)
    with contextlib.suppress(TooLargeError):
        constraint.node()
    return constraint
