"""`python -m fmodels.cli`, the same as `fmodels`."""

import sys

from fmodels.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
