"""The commands that measure what position does in a model: its features, other sizes, changed images."""

from typing import Annotated

from cyclopts import Parameter

from lape.cli.app import app
from lape.cli.options import takes_options
from lape.errors import LapeError, arguments_as
from lape.study.options import ProbeOptions


@app.command
@arguments_as(ema="--ema", energy="--energy", count="--count")
@takes_options(ProbeOptions)
def probe(
    options: ProbeOptions,
    *models: Annotated[str, Parameter(help=".pth files, folders written by lape.save, or names of timm's models")],
) -> None:
    """Measure how much position the features of each layer hold: probes, similarity, what stays in a mean image."""
    if not models:
        raise LapeError("no model was given: lape probe CHECKPOINT... --images FILE...")
    from lape.study.probing import probe_models

    probe_models(models, options)
