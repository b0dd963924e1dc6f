"""The command lines of the original: `main.py` and `similarity_visualize.py`."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from cyclopts import App

from lape.cli.app import original, run


def original_main() -> NoReturn:
    """Run the original's `main.py`, with the exit codes of `main`."""
    sys.exit(run(original, sys.argv[1:]))


def visualize_main(tokens: Sequence[str] | None = None) -> int:
    """The command line of the authors' `similarity_visualize.py`; returns the exit code, 2 for wrong use.

    What no flag is given for, the checkpoint decides; a flag that contradicts it is refused.
    """
    app = App(
        name="similarity_visualize.py",
        help_format="plaintext",
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )

    @app.default
    def draw(
        *,
        ckpt_path: str = "result/deit_t_LaPE/best_checkpoint.pth",
        save_dir: str = "visualize/similarity/",
        model_name: str = "deit_t_LaPE",
        pe: str | None = None,
        join_type: str | None = None,
        token: int | None = None,
    ) -> None:
        """Draw the position correlation of every layer.

        Parameters
        ----------
        ckpt_path: the checkpoint
        save_dir: where the folder MODEL_NAME is written
        model_name: names that folder; deit_{t,s,b}[_distill]_JOIN also says the model if the checkpoint does not
        pe: kind of position embedding that the checkpoint must hold
        join_type: join that the checkpoint must hold
        token: the patch that is compared with all others, row x columns + column [default: the centre]
        """
        from lape.look.figures import visualize

        written = visualize(ckpt_path, save_dir, model_name=model_name, token=token, join=join_type, pe=pe)
        print(f"Visualization done! {len(written)} files in {written[0].parent}")

    return run(app, sys.argv[1:] if tokens is None else tokens)
