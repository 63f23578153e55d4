"""Constrained decoding: what a text must be, as automata over tokens that run on the device, and stop strings."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmodels.generation.constraints.automaton import TokenAutomaton as TokenAutomaton
from fmodels.generation.constraints.automaton import advance as advance
from fmodels.generation.constraints.automaton import allowed as allowed
from fmodels.generation.constraints.automaton import require_room as require_room
from fmodels.generation.constraints.automaton import stack as stack
from fmodels.generation.constraints.automaton import unconstrained as unconstrained
from fmodels.generation.constraints.dfa import TooLargeError as TooLargeError
from fmodels.generation.constraints.vocabulary import Vocabulary as Vocabulary
from fmodels.generation.constraints.vocabulary import read_vocabulary as read_vocabulary

if TYPE_CHECKING:
    from fmodels.generation.constraints.constraint import Constraint as Constraint
    from fmodels.generation.constraints.constraint import choices as choices
    from fmodels.generation.constraints.constraint import compile_rows as compile_rows
    from fmodels.generation.constraints.constraint import json_schema as json_schema
    from fmodels.generation.constraints.constraint import regex as regex
    from fmodels.generation.constraints.guidance import Guidance as Guidance
    from fmodels.generation.constraints.guidance import unpack as unpack
    from fmodels.generation.constraints.stop import read_stop as read_stop
    from fmodels.generation.constraints.stop import stop_strings as stop_strings

_LATER = {
    "Constraint": "constraint",
    "choices": "constraint",
    "compile_rows": "constraint",
    "json_schema": "constraint",
    "regex": "constraint",
    "Guidance": "guidance",
    "unpack": "guidance",
    "read_stop": "stop",
    "stop_strings": "stop",
}
"""What compiles constraints, by the file that has it: loaded when it is asked for, so that `import fmodels` stays light."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
