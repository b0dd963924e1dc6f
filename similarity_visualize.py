"""The LaPE authors' command: `python similarity_visualize.py --ckpt_path C --save_dir S --model_name deit_t_LaPE`.

It works from a checkout too, without installing the package; `--help` lists the flags.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lape") is None:
    sys.path.insert(0, str(Path(__file__).parent / "src"))

from lape.cli.original import visualize_main

if __name__ == "__main__":
    sys.exit(visualize_main())
