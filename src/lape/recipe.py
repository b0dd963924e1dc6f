"""The typed configuration of a run: one model, THE set of defaults, unknown keys refused.

Field names are the flags of DeiT's `main.py` in snake_case with the defaults of the LaPE fork; the command line
(`lape.cli`) is generated from the fields, and a YAML recipe is nothing but these keys. Departures from the
original's defaults are four, each because the original's would fail on a fresh machine: `data_path` (empty: the
packaged digits), `device` (auto), `num_workers` (DeiT's 10, the fork has 16) and `amp` (fp16 on CUDA as in the
original, off on a CPU). docs/original.md lists these and every other difference.

Neither torch nor timm is imported here, so that `lape --help` answers at once.
"""

import os
import re
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from lape.errors import LapeError, check_file, needs
from lape.names import JOIN_NAMES, PE_NAMES, PE_NORM_NAMES, match_name, nearest
from lape.options import Options

with needs("train"):
    from pydantic import Field, field_validator, model_validator

DataSet = Literal["CIFAR", "IMNET", "INAT", "INAT19"]
InatCategory = Literal["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"]
Schedule = Literal["cosine", "tanh", "step", "plateau", "poly", "constant", "none"]
Habit = Literal["init", "resize", "drop", "schedule", "decay", "heads", "none"]
Interpolation = Literal["random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]

DEEPEST = 20  # nesting of a recipe's values
DEVICE = re.compile(r"auto|cpu|mps|xpu|cuda(:\d+)?")


def _flag(topic: str, default: Any, text: str, *, spelling: str | None = None, **limits: Any) -> Any:
    """Describe one field: the topic it is listed under, its default, one line of help, another spelling, its limits."""
    return Field(default, description=text, json_schema_extra={"topic": topic, "spelling": spelling}, **limits)


_model, _data, _training, _optimizer = (partial(_flag, t) for t in ("Model", "Data", "Training", "Optimizer"))
_schedule, _augmentation, _distillation = (partial(_flag, t) for t in ("Schedule", "Augmentation", "Distillation"))
_run, _launcher = (partial(_flag, t) for t in ("Run", "Launcher"))


# Keys of DeiT's that choose nothing (`lape.cli.original` has their flags), with the only value allowed: recipes and
# checkpoints of version 0.1 hold them.
OF_THE_ORIGINAL = {
    "cooldown_epochs": None,
    "patience_epochs": None,
    "world_size": None,
    "dist_url": "env://",
    "resplit": False,
}


class Recipe(Options):
    """Everything that a training or an evaluation depends on.

    Raises:
        LapeError: an unknown key (the nearest is suggested) or a value that is not allowed, in one line.
    """

    # fmt: off
    # Model
    model: str = _model("deit_base_patch16_224", "timm name of the Vision Transformer", min_length=1)
    join_type: str = _model("basic", f"how the position embedding is joined: {', '.join(JOIN_NAMES)}")
    pe: str = _model("learnable", f"kind of position embedding: {', '.join(PE_NAMES)}")
    pe_std: float | None = _model(None, "deviation a new table starts with (default: the model's)", ge=1e-6, le=1e6)
    pe_norm: str | None = _model(None, f"what replaces position's LayerNorm: {', '.join(PE_NORM_NAMES)}")
    rope_jitter: tuple[float, ...] | None = _model(None, "RoPE in training: shift, factors of each axis and of all")
    input_size: int = _model(224, "side of the square input image, pixels", gt=0)
    in_chans: int = _model(3, "channels of the input image", gt=0)
    drop: float = _model(0.0, "dropout rate", ge=0, lt=1)
    drop_path: float = _model(0.1, "stochastic depth rate", ge=0, lt=1)
    model_kwargs: dict[str, Any] = _model({}, "more arguments of the timm model: KEY=VALUE pairs or JSON")
    model_ema: bool = _model(True, "keep an exponential moving average of the weights")
    model_ema_decay: float = _model(0.99996, "decay of the moving average", ge=0, le=1)
    model_ema_force_cpu: bool = _model(False, "keep the moving average in host memory")
    model_ema_warmup: bool = _model(False, "short runs: the average starts as a plain mean and slows to its decay")
    grad_checkpointing: bool = _model(False, "less memory: compute activations twice instead of keeping them")
    attention: Literal["auto", "fused", "plain"] = _model(
        "auto", "how attention is computed; auto: plain for bf16 on a CPU, where that is faster, else torch's fused one"
    )
    compile: bool = _model(False, "compile the training step with torch.compile")

    # Data
    data_path: str = _data(
        "", "folder with train/<class>/* and val/<class>/*, or parquet, arrow or tar files; empty: the packaged digits"
    )
    data_set: DataSet = _data("IMNET", "layout of --data-path (IMNET: images; CIFAR: CIFAR-100 in its own files)")
    columns: tuple[str, ...] = _data((), "of parquet and arrow files: the image's column and the class's, if in doubt")
    inat_category: InatCategory = _data("name", "which label of an INAT data set")
    num_workers: int = _data(10, "loader processes per training process", ge=0)
    pin_mem: bool = _data(True, "page-locked loader memory on CUDA")
    data_on_device: bool = _data(False, "small data: keep the images on the device as bytes, augment batches there")
    skip_corrupt: bool = _data(False, "train on the next image instead of an unreadable one; named and counted")
    decode: Literal["exact", "fast"] = _data(
        "exact", "exact: Pillow, as the original; fast: pixels differ by 2 levels at most, in training or by lape eval"
    )
    eval_crop_ratio: float = _data(1.0, "side of evaluation's crop over side of the resized image", gt=0, le=1)
    mean: tuple[float, ...] | None = _data(None, "channel means of the normalisation (default: ImageNet's)")
    std: tuple[float, ...] | None = _data(None, "channel deviations of the normalisation (default: ImageNet's)")

    # Training
    epochs: int = _training(300, "epochs to train", gt=0)
    batch_size: int = _training(64, "images per process and step", gt=0)
    global_batch: int = _training(
        0, "images of a step over all processes, in parts of at most --batch-size; 0: --batch-size each", ge=0
    )
    max_skipped: int = _training(10, "stop after so many steps in a row without a finite loss and gradient", gt=0)
    seed: int = _training(0, "seed of everything random", ge=0, lt=2**64)
    start_epoch: int = _training(0, "first epoch to run, when not resuming", ge=0)
    bce_loss: bool = _training(False, "binary cross-entropy instead of softmax cross-entropy")
    smoothing: float = _training(0.1, "label smoothing", ge=0, lt=1)
    train_mode: bool = _training(True, "--no-train-mode: train without dropout and stochastic depth")
    finetune: str = _training("", "checkpoint whose weights training starts from (head and grid may differ)")
    warm_start: bool = _training(
        False, "begin as the model of --finetune or --model-kwargs pretrained=True; position enters by gates from zero"
    )
    attn_only: bool = _training(False, "train only attention, position embedding and head")
    as_original: tuple[Habit, ...] = _training(
        ("init", "resize", "drop", "schedule", "decay", "heads"),
        "what follows the LaPE authors' code where timm does otherwise (docs/original.md); none: nothing",
    )

    # Optimizer
    opt: str = _optimizer("adamw", "timm name of the optimizer", min_length=1)
    opt_eps: float = _optimizer(1e-8, "epsilon of the optimizer", ge=0)
    opt_betas: tuple[float, ...] | None = _optimizer(None, "betas of the optimizer (its own when not given)")
    momentum: float = _optimizer(0.9, "momentum of SGD", ge=0, lt=1)
    weight_decay: float = _optimizer(0.05, "weight decay", ge=0)
    clip_grad: float | None = _optimizer(None, "clip the gradient to this norm", gt=0)
    lr: float = _optimizer(5e-4, "learning rate for 512 images a step; scaled by the total batch", ge=0)
    pe_lr_scale: float = _optimizer(1.0, "learning rate of the position table, as a multiple of the others'", ge=0)
    unscale_lr: bool = _optimizer(False, "take --lr as it is, do not scale it by the total batch")

    # Schedule
    sched: Schedule = _schedule("cosine", "learning rate schedule; plateau is refused, it cannot be resumed exactly")
    warmup_epochs: int = _schedule(5, "epochs of linear warm-up", ge=0)
    warmup_lr: float = _schedule(1e-6, "learning rate the warm-up starts at", ge=0)
    min_lr: float = _schedule(1e-5, "lowest learning rate", ge=0)
    decay_epochs: float = _schedule(30, "epochs between decays (step)", gt=0)
    decay_rate: float = _schedule(0.1, "factor of one decay (step), exponent (poly)", spelling="--dr", gt=0)
    schedule_epochs: int | None = _schedule(None, "of --epochs, those of the schedule; later ones: --min-lr", gt=0)
    lr_noise: tuple[float, ...] | None = _schedule(None, "noise starts (and ends) at these parts of the epochs")
    lr_noise_pct: float = _schedule(0.67, "largest noise, as a part of the learning rate", ge=0)
    lr_noise_std: float = _schedule(1.0, "standard deviation of the noise", ge=0)

    # Augmentation
    color_jitter: float = _augmentation(0.3, "colour jitter, where --aa is off or --three-augment on", ge=0)
    aa: str = _augmentation("rand-m9-mstd0.5-inc1", "AutoAugment/RandAugment policy of timm; none: off")
    scale: tuple[float, ...] | None = _augmentation(
        None, "areas of the random resized crop (default: 0.08 1; up to 32 pixels a padded random crop instead)"
    )
    train_interpolation: Interpolation = _augmentation("bicubic", "resizing in training")
    repeated_aug: bool = _augmentation(True, "three views of a sample in a batch, as in DeiT")
    three_augment: bool = _augmentation(False, "DeiT III: grey, solarise or blur, not --aa", spelling="--ThreeAugment")
    src: bool = _augmentation(False, "with --three-augment: simple random crop")
    reprob: float = _augmentation(0.25, "probability of random erasing", ge=0, le=1)
    remode: Literal["const", "rand", "pixel"] = _augmentation("pixel", "what random erasing writes")
    recount: int = _augmentation(1, "areas that random erasing erases", gt=0)
    mixup: float = _augmentation(0.8, "mixup alpha; 0: off", ge=0)
    cutmix: float = _augmentation(1.0, "cutmix alpha; 0: off", ge=0)
    cutmix_minmax: tuple[float, ...] | None = _augmentation(None, "bounds of cutmix's side, replaces --cutmix")
    mixup_prob: float = _augmentation(1.0, "probability of mixup or cutmix", ge=0, le=1)
    mixup_switch_prob: float = _augmentation(0.5, "probability of cutmix when both are on", ge=0, le=1)
    mixup_mode: Literal["batch", "pair", "elem"] = _augmentation("batch", "what shares one mixup draw")
    mixup_off_epoch: int | None = _augmentation(None, "no mixup and no cutmix from this epoch on (0: always)", ge=0)

    # Distillation
    distillation_type: Literal["none", "soft", "hard"] = _distillation("none", "kind of distillation")
    teacher_model: str = _distillation("regnety_160", "timm name of the teacher", min_length=1)
    teacher_path: str = _distillation("", "checkpoint of the teacher")
    distillation_alpha: float = _distillation(0.5, "weight of the teacher in the loss", ge=0, le=1)
    distillation_tau: float = _distillation(1.0, "temperature of soft distillation", gt=0)

    # Run
    output_dir: str = _run("", "where checkpoints and logs go; empty: nothing is written")
    save_steps: int = _run(0, "save within an epoch, too, every so many steps; 0: after each epoch only", ge=0)
    save_minutes: float = _run(0.0, "save within an epoch, too, when so many minutes have passed; 0: do not", ge=0)
    best_by: Literal["raw", "ema"] = _run("raw", "whose top-1 makes best_checkpoint.pth: the weights or their average")
    log_to: tuple[Literal["wandb", "trackio"], ...] = _run((), "send the curves there as well: wandb, trackio")
    resume: str = _run("", "checkpoint to go on from (auto: the newest in --output-dir) or to evaluate")
    eval: bool = _run(False, "evaluate only")
    ema: bool = _run(False, "with --eval: evaluate the averaged weights")
    dist_eval: bool = _run(False, "share the evaluation among the processes, exactly")
    device: str = _run("auto", "auto (CUDA when there is one), cpu, cuda, cuda:N")
    amp: Literal["auto", "off", "fp16", "bf16"] = _run("auto", "mixed precision; auto: fp16 on CUDA, else off")
    threads: int = _run(0, "CPU threads of torch; 0: torch decides", ge=0)
    deterministic: bool = _run(False, "algorithms that give the same bits again on one machine, where slower, too")
    log_every: int = _run(10, "steps between progress lines off a terminal", gt=0)

    # Launcher
    dist_timeout: float = _launcher(60.0, "seconds without an answer after which a process counts as dead", gt=0)
    # fmt: on

    @model_validator(mode="before")
    @classmethod
    def _without_the_originals(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, constant in OF_THE_ORIGINAL.items():
            if constant is not None and values.get(name, constant) != constant:
                raise LapeError(f"{name}={values[name]!r} is refused, it has no effect here: leave it out")
        return {name: value for name, value in values.items() if name not in OF_THE_ORIGINAL}

    @field_validator("join_type")
    @classmethod
    def _join(cls, value: str) -> str:
        return match_name("join", value, JOIN_NAMES)

    @field_validator("pe")
    @classmethod
    def _pe(cls, value: str) -> str:
        return match_name("pe", value, PE_NAMES)

    @field_validator("pe_norm")
    @classmethod
    def _pe_norm(cls, value: str | None) -> str | None:
        return None if value is None else match_name("pe_norm", value, PE_NORM_NAMES)

    @field_validator("data_path", "output_dir", "resume", "finetune", "teacher_path")
    @classmethod
    def _home(cls, value: str) -> str:
        return os.path.expanduser(value)

    @field_validator("amp", mode="before")
    @classmethod
    def _amp(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as a boolean

    @field_validator("aa", mode="before")
    @classmethod
    def _aa(cls, value: Any) -> Any:
        return "" if value is None or value == "none" else value

    @field_validator("as_original")
    @classmethod
    def _habits(cls, value: tuple[Habit, ...]) -> tuple[Habit, ...]:
        if "none" in value and len(value) > 1:
            raise LapeError(f"as_original={' '.join(value)}: give none alone, or the habits that are wanted")
        return tuple(habit for habit in value if habit != "none")

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not DEVICE.fullmatch(value):
            raise LapeError(f"device={value!r} is not known: use auto, cpu, cuda, cuda:N, mps or xpu")
        return value

    @field_validator("columns")
    @classmethod
    def _columns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _require("columns", value, (0, 2))
        return value

    @field_validator("opt_betas", "cutmix_minmax", "scale")
    @classmethod
    def _pair(cls, value: tuple[float, ...] | None, info: Any) -> tuple[float, ...] | None:
        _require(info.field_name, value, (2,))
        return value

    @field_validator("lr_noise")
    @classmethod
    def _one_or_pair(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        _require("lr_noise", value, (1, 2))
        return value

    @field_validator("rope_jitter")
    @classmethod
    def _jitter(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        _require("rope_jitter", value, (3,))
        if value is not None and not (0 <= value[0] <= 10 and all(1 <= factor <= 100 for factor in value[1:])):
            raise LapeError(f"rope_jitter={list(value)} is not allowed: a shift of 0 to 10 and two factors of 1 to 100")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        for name in ("mean", "std"):
            _require(name, getattr(self, name), (self.in_chans,))
        if self.distillation_type != "none" and not self.teacher_path and not self.eval:
            raise LapeError(
                f"distillation_type={self.distillation_type!r} needs a teacher: give --teacher-path CHECKPOINT"
            )
        if self.ema and not self.eval:
            raise LapeError("ema=True chooses what is evaluated: add --eval; training averages with --model-ema")
        if self.best_by == "ema" and not self.model_ema:
            raise LapeError("best_by='ema' needs the average: leave --no-model-ema out, or use --best-by raw")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise LapeError(f"scale={list(self.scale)} is not allowed: must be two areas, 0 < least <= most <= 1")
        if self.scale is not None and self.src:
            raise LapeError("scale and src=True are two crops: leave one of them out")
        if self.cutmix_minmax is not None:
            least, most = self.cutmix_minmax
            if not (0 <= least <= most <= 1 and int(self.input_size * least) < int(self.input_size * most)):
                raise LapeError(
                    f"cutmix_minmax={list(self.cutmix_minmax)} is not allowed: must be two parts of the side, "
                    f"0 <= least < most <= 1, at least a pixel of {self.input_size} apart"
                )
        if self.schedule_epochs is not None and self.schedule_epochs > self.epochs:
            raise LapeError(
                f"schedule_epochs={self.schedule_epochs} is more than epochs={self.epochs}: the schedule would not "
                "end; raise --epochs, or leave --schedule-epochs out"
            )
        if self.src and not self.three_augment:
            raise LapeError("src=True is a part of DeiT III's augmentation: add --three-augment, or leave --src out")
        return self

    def replace(self, **changes: Any) -> "Recipe":
        """Return a copy with some fields changed, validated like a new one; `model_fields_set` is kept."""
        return Recipe(**{**self.model_dump(exclude_unset=True), **changes})

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """Read a recipe; `overrides` win over the file, the file wins over the defaults.

        Args:
            path: a YAML file, or the bare name of a recipe inside the package (`digits`; `lape recipes` lists them).

        Raises:
            LapeError: the file is missing or no mapping of known keys to allowed values.
        """
        text, origin = _read(path)
        try:
            return cls(**{**_mapping(text), **overrides})
        except LapeError as error:
            raise LapeError(f"{origin}: {error}") from None

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return every field as YAML under its topic, with its help as a comment; write it to `path` if given."""
        import yaml

        values, lines = self.model_dump(mode="json"), []
        for topic, names in topics().items():
            lines.append(f"# {topic}")
            for name in names:
                flow = yaml.safe_dump({name: values[name]}, default_flow_style=True, width=10**6).rstrip("\n")
                lines.append(f"{flow[1:-1]}  # {type(self).model_fields[name].description}")
        text = "\n".join(lines) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def topics() -> dict[str, list[str]]:
    """Return the names of the fields by topic, in the order of the class."""
    names: dict[str, list[str]] = {}
    for name in Recipe.model_fields:
        names.setdefault(topic_of(name), []).append(name)
    return names


def topic_of(name: str) -> str:
    """Return the topic that a field is listed under in the help."""
    return str(_extra(name)["topic"])


def spelling_of(name: str) -> str | None:
    """Return the flag that DeiT uses for a field where it is not the field's own name, else None."""
    spelling: str | None = _extra(name)["spelling"]
    return spelling


def packaged() -> list[str]:
    """Return the names of the recipes inside the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml"))


def text_of(name: str) -> str:
    """Return the YAML of a recipe inside the package, whose first line is a comment that says what it trains."""
    return str((_folder() / f"{match_name('recipe', name, packaged())}.yaml").read_text(encoding="utf-8"))


def _extra(name: str) -> dict[str, Any]:
    extra = Recipe.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra


def _folder() -> Any:
    return resources.files("lape") / "recipes"


def _read(path: str | Path) -> tuple[str, str]:
    """Return the text of a recipe and what to call it in a message."""
    name = re.sub(r"^recipes/(\w+)\.yaml$", r"\1", str(path))  # where the repository had them before 0.2.0
    try:
        if name in packaged() and not Path(path).is_file():  # a folder of that name is none
            return text_of(name), f"recipe {name}"
        check_file(path)
        return Path(path).read_text(encoding="utf-8"), str(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = "not a text file" if isinstance(error, UnicodeDecodeError) else reason
        guess = nearest(Path(path).stem, packaged())
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise LapeError(
            f"recipe {str(path)!r} cannot be read ({reason}): "
            f"give a YAML file or a packaged name (`lape recipes` lists them){hint}"
        ) from None


def _mapping(text: str) -> dict[str, Any]:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text):  # a nesting costs time as the square of its depth, a reference more
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST or isinstance(event, yaml.AliasEvent):
                raise LapeError("a recipe is a mapping of flag names to values, without *references and deep nesting")
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LapeError(f"not YAML: {' '.join(str(error).split())}") from None
    data = {} if data is None else data
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise LapeError(f"a recipe is a mapping of flag names to values, this is a {type(data).__name__}")
    return {key.replace("-", "_"): value for key, value in data.items()}


def _require(name: str, value: tuple[Any, ...] | None, lengths: tuple[int, ...]) -> None:
    if value is not None and len(value) not in lengths:
        raise LapeError(f"{name}={list(value)} has {len(value)} value(s), {' or '.join(map(str, lengths))} are needed")
