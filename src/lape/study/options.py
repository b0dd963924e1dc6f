"""The options of the commands that run studies, as in `lape.look.options`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from lape.look.options import option
from lape.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Seeds count from 0; beyond the first two (the first of the longer budget) one may be left out, for all rows."""

    output_dir: str = option("lape-demo", "where report.md, results.json and the figures go")
    seeds: int = option(5, "trainings of each join")
    epochs: int | None = option(None, "length of a training (default: the packaged recipe's)")
    long_factor: int = option(3, "the longer budget, as a multiple of the epochs")
    long_seeds: int = option(1, "trainings of each join with the longer budget; 0: none")
    workers: int = option(2, "trainings side by side, one thread each")
    time_limit: float | None = option(150.0, "seeds that would end later, in seconds, are left out; none: all are run")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Other image sizes and changed images."""

    sizes: tuple[str, ...] = option((), "image sizes, SIDE or HEIGHTxWIDTH in pixels, beside the training size")
    corruptions: tuple[str, ...] = option((), "corrupted images: all, or some by name")
    severities: tuple[int, ...] = option((1, 2, 3, 4, 5), "of the corruptions")
    shuffle_patches: bool = option(False, "images whose patches are shuffled")
    shift: tuple[int, ...] = option((), "images moved right and down by so many pixels")
    occlude: tuple[float, ...] = option((), "images with this share of their patches hidden")

    @property
    def extras(self) -> dict[str, Any]:
        """These fields, by name; empty where there is nothing beside the plain evaluation."""
        values = {one.name: getattr(self, one.name) for one in fields(Conditions)}
        return values if values != asdict(Conditions(severities=self.severities)) else {}


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Conditions):
    """The rows of a comparison, their seeds, and what they are compared with and shown beside.

    A rival is trained once a seed (pe="own"), whether it can be converted or not. Nothing says that the budget of
    `runs` was the same: folders with log.txt and checkpoint.pth, or checkpoints, evaluated on the recipe's data.
    """

    output_dir: str = field(metadata={"help": "where cells and report go; what is done there is skipped"})
    joins: tuple[str, ...] = option(("basic", "LaPE"), "joins to compare")
    pes: tuple[str, ...] = option(("learnable",), "kinds of position embedding")
    pe_stds: tuple[float, ...] = option((), "starts of the position table, each a row (default: the model's own)")
    pe_norms: tuple[str, ...] = option((), "what replaces LN' in joins that have one, each a row (default: nothing)")
    preset: Literal["table7", "table8", "rivals"] | None = option(
        None, "rows of a table of the paper (joins x kinds, LN' apart), or every position that is a rival"
    )
    models: tuple[str, ...] = option((), "timm names (default: the recipe's)")
    rivals: tuple[str, ...] = option((), "timm names, each trained as it is, by the same recipe")
    rival_kwargs: Mapping[str, Any] | None = option(None, "--model-kwargs of the rivals (default: the same)")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of each combination")
    baseline: str | None = option(None, "join that the others are compared with (default: basic, or the first)")
    runs: tuple[str, ...] = option((), "finished runs and checkpoints to show beside, in a table of their own")
    workers: int = option(2, "trainings side by side, one thread each; also on one GPU")
    probe: int = option(0, "images on which the features of each row's first model are probed for position; 0: none")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Models, and how they are measured. The folded form is of joins with LN'; fp16 needs CUDA and scales gradients."""

    model: str = option(Recipe.model_fields["model"].default, "timm name of the Vision Transformer")
    model_kwargs: Mapping[str, Any] | None = option(None, "more arguments of the timm model: KEY=VALUE pairs or JSON")
    joins: tuple[str, ...] = option(("basic", "LaPE"), "joins; the first is what others are compared with")
    pe: str | None = option(None, "kind of position embedding (default: the model's own)")
    fold: bool = option(False, "folded forms as well, for inference")
    compile: bool = option(False, "measure compiled models")
    amp: Literal["none", "bf16", "fp16"] = option("none", "mixed precision")
    batch_size: int = option(Recipe.model_fields["batch_size"].default, "images a step")
    image_size: int | None = option(None, "side in pixels (default: the model's)")
    device: str = option("auto", "auto (CUDA when there is one), cpu, cuda, cuda:N")
    threads: int = option(0, "CPU threads of torch; 0: torch decides")
    rounds: int = option(20, "how often each variant is timed, in turn")
    train: bool = option(True, "time a training step")
    inference: bool = option(True, "time inference, and the latency of one image")
    peers: tuple[str, ...] = option((), "the same ViT without lape beside it, of timm, torchvision, transformers")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is probed for position, and what is written."""

    images: tuple[str, ...] = option((), "image files (default: validation images of --data-path)")
    data_path: str = option("", "folder with val/ (default: the packaged digits)")
    count: int = option(64, "images of --data-path, evenly spread, half to fit and half to test")
    energy: float = option(0.95, "share of the mean image's variance that the position subspace holds")
    ema: bool = option(False, "probe the averaged weights of checkpoints")
    pretrained: bool = option(True, "a model that is no file has timm's published weights; else random ones")
    json: str | None = option(None, "write the numbers to this JSON file")
    plot: str | None = option(None, "draw them to this .png, .pdf or .svg")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Conditions):
    """Other image sizes and changed images, on which `lape eval` measures a model as well."""

    json: str | None = option(None, "write the numbers of sizes and changes to this JSON file")
    plot: str | None = option(None, "draw them to this .png, .pdf or .svg")
