"""Constrained decoding: what a text must be, as automata over tokens that run on the device, and stop strings."""

from fmodels.generation.constraints.automaton import TokenAutomaton as TokenAutomaton
from fmodels.generation.constraints.automaton import advance as advance
from fmodels.generation.constraints.automaton import allowed as allowed
from fmodels.generation.constraints.automaton import require_room as require_room
from fmodels.generation.constraints.automaton import stack as stack
from fmodels.generation.constraints.automaton import unconstrained as unconstrained
from fmodels.generation.constraints.constraint import Constraint as Constraint
from fmodels.generation.constraints.constraint import choices as choices
from fmodels.generation.constraints.constraint import compile_rows as compile_rows
from fmodels.generation.constraints.constraint import json_schema as json_schema
from fmodels.generation.constraints.constraint import regex as regex
from fmodels.generation.constraints.dfa import TooLargeError as TooLargeError
from fmodels.generation.constraints.guidance import Guidance as Guidance
from fmodels.generation.constraints.guidance import unpack as unpack
from fmodels.generation.constraints.stop import read_stop as read_stop
from fmodels.generation.constraints.stop import stop_strings as stop_strings
from fmodels.generation.constraints.vocabulary import Vocabulary as Vocabulary
from fmodels.generation.constraints.vocabulary import read_vocabulary as read_vocabulary
