"""The command `fmodels`: what one does with checkpoints without writing a program.

Exit codes: 0 all is well, 1 a check failed, 2 bad usage or bad input. Tables are for people; with `--json` the standard
output is one JSON value and nothing else. Progress bars and warnings go to the standard error, bars only on terminals.
"""

from fmodels.cli.parser import USER_ERRORS as USER_ERRORS
from fmodels.cli.parser import main as main
from fmodels.cli.writing import parse_heads as parse_heads
