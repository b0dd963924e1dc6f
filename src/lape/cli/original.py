"""The command lines of the original: `main.py` and `similarity_visualize.py`."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, Self

from cyclopts import App, Parameter
from pydantic import NonNegativeInt, PositiveInt, model_validator

from lape.cli.app import GROUPS, original, run
from lape.errors import LapeError, arguments_as
from lape.options import Options


def _flag(text: str, topic: str = "Launcher", **settings: Any) -> Parameter:
    return Parameter(help=text, group=GROUPS[topic], **settings)


class OriginalFlags(Options):
    """Flags that choose nothing here: taken because the original has them, refused where they would do something."""

    cooldown_epochs: Annotated[
        NonNegativeInt, _flag("not run, as in DeiT: give more --epochs than --schedule-epochs", "Schedule")
    ] = 10
    patience_epochs: Annotated[
        NonNegativeInt, _flag("read by the plateau schedule only, which is refused", "Schedule")
    ] = 10
    resplit: Annotated[bool, _flag("refused: DeiT accepts it without any effect", "Augmentation", show=False)] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resplit:
            raise LapeError("resplit=True is refused: it has no effect in DeiT either; leave it out, or use --reprob 0")
        return self


class LauncherFlags(Options):
    """What the original's flags say of its processes. Here the launcher's environment decides."""

    world_size: Annotated[PositiveInt, _flag("must be what the launcher started; use torchrun --nproc_per_node")] = 1
    dist_url: Annotated[str, _flag("must be env://; use torchrun's --rdzv-endpoint or --master-port")] = "env://"
    local_rank: Annotated[int | None, _flag("accepted and ignored: the launcher's environment says it")] = None
    distributed: Annotated[bool, _flag("accepted under a launcher, which decides", negative=())] = False
    cosub: Annotated[bool, _flag("refused: not part of this project", negative=(), show=False)] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cosub:
            raise LapeError("--cosub is not supported: leave it out, or train with facebookresearch/deit")
        processes = os.environ.get("WORLD_SIZE")
        if self.distributed and processes is None:
            raise LapeError("--distributed needs a launcher: start with torchrun --nproc_per_node=N main.py ...")
        if self.dist_url != "env://":
            fix = "start with torchrun --rdzv-endpoint HOST:PORT, or --master-addr and --master-port"
            raise LapeError(f"dist_url={self.dist_url!r} is refused, only 'env://' is allowed: {fix}")
        count = int(processes) if processes and processes.isdecimal() else 1  # else refused where processes meet
        if self.world_size not in (1, count):
            raise LapeError(
                f"world_size={self.world_size} but {count} process(es) were started: "
                f"leave the flag out and start with torchrun --nproc_per_node={self.world_size}"
            )
        return self


def original_main() -> NoReturn:
    """Run the original's `main.py`, with the exit codes of `main`."""
    sys.exit(run(original, sys.argv[1:]))


def visualize_main(tokens: Sequence[str] | None = None) -> int:
    """The command line of the authors' `similarity_visualize.py`; returns the exit code, 2 for wrong use.

    The checkpoint decides what no flag says; a flag that contradicts it is refused.
    """
    app = App(
        name="similarity_visualize.py",
        help_format="plaintext",
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )

    @app.default
    @arguments_as(model="--model-name deit_t_LaPE", join="--join-type", pe="--pe")
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
        from lape.look.options import DrawOptions

        options = DrawOptions(model_name=model_name, token=token, join_type=join_type, pe=pe)
        files = visualize(ckpt_path, save_dir, options)
        print(f"Visualization done! {len(files)} files in {files[0].parent}")

    return run(app, sys.argv[1:] if tokens is None else tokens)
