"""The command line. `lape` and `python -m lape` run `main`, the repository's `main.py` runs `original_main`.

Whoever imports any of it gets all commands: they put themselves into apps of `lape.cli.app`.
"""

from lape.cli import commands as commands
