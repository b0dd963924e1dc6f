"""The original's command: `python main.py --model deit_tiny_patch16_224 --data-path D --output_dir O --join-type LaPE`.

It works from a checkout too, without installing the package; `python main.py --help` lists the flags.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lape") is None:
    sys.path.insert(0, str(Path(__file__).parent / "src"))

from lape.cli.original import original_main

if __name__ == "__main__":
    original_main()
