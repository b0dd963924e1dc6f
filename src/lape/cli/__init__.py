"""The command line. `lape` and `python -m lape` run `main`, the repository's `main.py` runs `original_main`.

Whoever imports any of it gets all commands: they put themselves into apps of `lape.cli.app`.
"""

import sys

from lape.errors import LapeError, needs

try:
    with needs("train"):
        from lape.cli import commands as commands
except LapeError as missing:  # nothing here can run, and whoever started it gets no traceback
    print(f"error: {missing}", file=sys.stderr)
    sys.exit(2)
