"""The configuration: defaults, what is refused and with which words, YAML."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lape
from lape.cli.app import app, run
from lape.errors import LapeError
from lape.names import JOIN_NAMES, PE_NAMES, match_name
from lape.recipe import OF_THE_ORIGINAL, Recipe, packaged, topics

RECIPES = Path(__file__).parents[2] / "src/lape/recipes"
DESCRIBED = sorted(path for path in RECIPES.glob("*.yaml") if path.stem != "digits")  # the demo has a test of its own

# Everything where a default departs from the LaPE authors' main.py must be named here, with the reason.
DEPARTURES = {
    "data_path": "empty is the packaged digits; the authors' is a folder of their cluster",
    "device": "auto is cuda where there is one",
    "num_workers": "DeiT's 10; the authors' 16",
}

ORIGINAL = {
    "batch_size": 64,
    "epochs": 300,
    "bce_loss": False,
    "unscale_lr": False,
    "model": "deit_base_patch16_224",
    "pe": "learnable",
    "join_type": "basic",
    "input_size": 224,
    "drop": 0.0,
    "drop_path": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "model_ema_force_cpu": False,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "clip_grad": None,
    "momentum": 0.9,
    "weight_decay": 0.05,
    "sched": "cosine",
    "lr": 5e-4,
    "lr_noise": None,
    "lr_noise_pct": 0.67,
    "lr_noise_std": 1.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "decay_epochs": 30,
    "warmup_epochs": 5,
    "decay_rate": 0.1,
    "color_jitter": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "repeated_aug": True,
    "train_mode": True,
    "three_augment": False,
    "src": False,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "teacher_model": "regnety_160",
    "teacher_path": "",
    "distillation_type": "none",
    "distillation_alpha": 0.5,
    "distillation_tau": 1.0,
    "finetune": "",
    "attn_only": False,
    "data_set": "IMNET",
    "inat_category": "name",
    "output_dir": "",
    "seed": 0,
    "resume": "",
    "start_epoch": 0,
    "eval": False,
    "dist_eval": False,
    "pin_mem": True,
}

OURS = {
    *("eval_crop_ratio", "in_chans", "mean", "std", "model_kwargs", "amp", "threads", "log_every", "model_ema_warmup"),
    *("grad_checkpointing", "compile", "skip_corrupt", "global_batch", "max_skipped", "save_steps", "save_minutes"),
    *("best_by", "log_to", "ema", "deterministic", "dist_timeout", "warm_start", "data_on_device", "decode", "columns"),
    *("scale", "mixup_off_epoch", "schedule_epochs", "pe_std", "pe_norm", "pe_lr_scale", "as_original"),
    *("attention", "rope_jitter"),
}


def refusal(**values: Any) -> str:
    with pytest.raises(LapeError) as caught:
        Recipe(**values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_originals() -> None:
    values = Recipe().model_dump()
    assert {name: values[name] for name in ORIGINAL} == ORIGINAL
    assert set(values) == set(ORIGINAL) | set(DEPARTURES) | OURS


def test_every_field_has_a_topic_and_one_line_of_help() -> None:
    listed = [name for names in topics().values() for name in names]
    assert listed == list(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description, name


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_size", 0),
        ("batch_size", -1),
        ("epochs", 0),
        ("epochs", 1.5),
        ("lr", "fast"),
        ("lr", math.nan),
        ("drop", 1.0),
        ("drop_path", 1.0),
        ("smoothing", 1.0),
        ("reprob", 2),
        ("num_workers", -1),
        ("eval_crop_ratio", 0),
        ("clip_grad", 0),
        ("data_set", "MNIST"),
        ("inat_category", "breed"),
        ("distillation_type", "medium"),
        ("mixup_mode", "half"),
        ("remode", "noise"),
        ("train_interpolation", "cubic"),
        ("amp", "fp8"),
        ("sched", "multistep"),
        ("device", "tpu"),
        ("opt_betas", (0.9,)),
        ("cutmix_minmax", (0.1, 0.2, 0.3)),
        ("lr_noise", (0.1, 0.2, 0.3)),
        ("mean", (0.5,)),
        ("join_type", 3),
        ("model_kwargs", "depth"),
        ("dist_url", "tcp://10.0.0.1:29500"),
        ("resplit", True),
        ("src", True),
        ("scale", (0.8,)),
        ("scale", (0.8, 0.2)),
        ("scale", (0.0, 1.0)),
        ("schedule_epochs", 301),
        ("mixup_off_epoch", -1),
        ("distillation_type", "hard"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(name: str, value: Any) -> None:
    message = refusal(**{name: value})
    assert message.startswith(f"{name}=")
    assert re.search(r"must be|only|needed|needs|known|leave|default", message), message
    if not isinstance(value, tuple):
        assert repr(value) in message


def test_choices_are_listed() -> None:
    message = refusal(mixup_mode="half")
    assert all(repr(choice) in message for choice in ("batch", "pair", "elem"))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("palette", None), ("batchsize", "batch_size"), ("Join-Type", "join_type"), ("pee", "pe")],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str | None) -> None:
    message = refusal(**{key: 1})
    assert f"unknown key {key!r}" in message
    assert (f"did you mean {nearest!r}?" in message) if nearest else ("--help" in message)


def test_all_errors_are_told_at_once() -> None:
    message = refusal(lr=-1, batch_size=0, colour=1)
    assert all(name in message for name in ("lr=", "batch_size=", "'colour'"))


@pytest.mark.parametrize("name", JOIN_NAMES)
def test_joins_are_matched_without_regard_to_case(name: str) -> None:
    assert Recipe(join_type=name.lower()).join_type == name
    assert Recipe(join_type=name.upper()).join_type == name


@pytest.mark.parametrize("name", PE_NAMES)
def test_pe_kinds_are_matched_without_regard_to_case(name: str) -> None:
    assert Recipe(pe=name.lower()).pe == name
    assert Recipe(pe=name.upper()).pe == name


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    message = refusal(join_type="LaPE-shared")
    assert all(name in message for name in JOIN_NAMES)
    assert "did you mean 'LaPE-sharing'?" in message
    with pytest.raises(LapeError, match="did you mean '2D_sin'"):
        match_name("pe", "2d-sine", PE_NAMES)
    with pytest.raises(LapeError, match=r"known are [^;]*$"):
        match_name("pe", "zzz", PE_NAMES)


def test_the_names_are_those_of_the_modules_that_define_them() -> None:
    from lape.core.joins import JOINS
    from lape.core.position import KINDS

    assert tuple(JOINS) == JOIN_NAMES
    assert tuple(KINDS) == PE_NAMES


def test_aa_none_is_off() -> None:
    assert Recipe(aa="none").aa == Recipe(aa=None).aa == ""


def test_distillation_needs_a_teacher_only_to_train() -> None:
    assert Recipe(distillation_type="soft", teacher_path="t.pth").distillation_type == "soft"
    assert Recipe(distillation_type="soft", eval=True).eval


def test_replace_validates_and_remembers_what_was_given() -> None:
    recipe = Recipe(lr=1.0).replace(epochs=2)
    assert recipe.model_fields_set == {"lr", "epochs"}
    assert (recipe.lr, recipe.epochs) == (1.0, 2)
    with pytest.raises(LapeError, match="epochs=0"):
        recipe.replace(epochs=0)


def test_what_only_the_original_reads_is_no_field_and_may_stand_in_a_file(tmp_path: Path) -> None:
    old = {"cooldown_epochs": 1, "patience_epochs": 2, "world_size": 4, "dist_url": "env://", "resplit": False}
    assert set(old) == set(OF_THE_ORIGINAL)
    (tmp_path / "old.yaml").write_text("".join(f"{name}: {value}\n" for name, value in old.items()) + "lr: 1.0\n")
    assert Recipe.from_yaml(tmp_path / "old.yaml") == Recipe(lr=1.0, **old) == Recipe(lr=1.0)
    assert Recipe(**old).model_fields_set == set()


# --- YAML -------------------------------------------------------------------------------------------------------------

ODD = Recipe(
    model="vit_tiny_patch16_224",
    join_type="LaPE",
    pe="none",
    opt_betas=(0.9, 0.95),
    lr=1e-3,
    amp="off",
    aa="none",
    mean=(0.1, 0.2, 0.3),
    model_kwargs={"embed_dim": 64, "init_values": None, "global_pool": "avg", "block": {"deep": [1, 2]}},
    data_path="a folder: with # odd {characters}, 'quotes' and ü",
    output_dir="123",
    resume="yes",
)


@pytest.mark.parametrize("recipe", [Recipe(), ODD], ids=["defaults", "odd"])
def test_yaml_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    text = recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == recipe
    assert (tmp_path / "r.yaml").read_text(encoding="utf-8") == text


def test_dump_round_trip() -> None:
    assert Recipe(**ODD.model_dump(mode="json")) == ODD


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("lr: 1e-3\nbatch-size: 8\namp: off\nteacher_path: t.pth\n")
    recipe = Recipe.from_yaml(path, batch_size=16, distillation_type="hard")
    assert (recipe.lr, recipe.batch_size, recipe.amp, recipe.epochs) == (1e-3, 16, "off", 300)
    assert recipe.model_fields_set == {"lr", "batch_size", "amp", "teacher_path", "distillation_type"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1", "not YAML"),
        ("- lr", "mapping"),
        ("just words", "mapping"),
        ("1: 2", "mapping"),
        ("learn: 1\nbatch_sise: 2", "did you mean 'batch_size'"),
        ("epochs: many", "epochs='many'"),
    ],
)
def test_a_bad_recipe_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(LapeError) as caught:
        Recipe.from_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(LapeError, match=r"cannot be read .*packaged name"):
            Recipe.from_yaml(path)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == Recipe()


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_are_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # of runs, say: no recipe
    assert Recipe.from_yaml(name) == Recipe.from_yaml(f"recipes/{name}.yaml") != Recipe()
    (tmp_path / "recipes").mkdir()
    (tmp_path / f"recipes/{name}.yaml").write_text("seed: 5")
    assert Recipe.from_yaml(f"recipes/{name}.yaml") == Recipe(seed=5), "a file that is there wins"


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(app, ["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == packaged()
    assert run(app, ["recipes", "digits"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert Recipe.from_yaml(tmp_path / "mine.yaml") == Recipe.from_yaml("digits")
    for words in (["recipes", "digit"], ["train", "--recipe", "digit"]):
        assert run(app, words) == 2
        assert "did you mean 'digits'?" in capsys.readouterr().err


def test_the_demos_recipe_is_the_one_that_is_described() -> None:
    recipe = Recipe.from_yaml("digits")
    kwargs = recipe.model_kwargs
    assert (recipe.input_size, kwargs["patch_size"], kwargs["embed_dim"], kwargs["depth"]) == (8, 2, 64, 6)
    assert recipe.data_path == ""


@pytest.mark.parametrize("path", DESCRIBED, ids=lambda p: p.name)
def test_recipes_load_and_say_what_was_measured(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    assert recipe.join_type == "LaPE"
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("Command:", "Hardware:", "Time:", "Published:", "Run here:", "Smoke:"):
        assert word in header, word
    assert re.search(rf"--recipe {path.stem}\b", header)


@pytest.mark.parametrize("path", DESCRIBED, ids=lambda p: p.name)
def test_the_model_of_every_recipe_builds(path: Path) -> None:
    from lape.train.start import build_model

    recipe = Recipe.from_yaml(path)
    with torch.device("meta"):
        model = build_model(recipe, 10)
    pe = "1D_sin" if recipe.model.startswith("t2t") else "learnable"
    assert f"join=LaPE pe={pe}" in str(lape.describe(model))
    small = recipe.input_size == 32
    grids = {"3x1": (16, 16), "swin": (56, 56)}
    expected = next((grid for part, grid in grids.items() if part in recipe.model), (8, 8) if small else (14, 14))
    assert lape.grid(model) == expected


def test_cifar_recipes_are_the_settings_of_the_compact_transformers() -> None:
    common = {"epochs": 310, "schedule_epochs": 300, "warmup_epochs": 10, "min_lr": 1e-5, "opt": "adamw"}
    common |= {"batch_size": 128, "weight_decay": 0.06, "unscale_lr": True, "smoothing": 0.1, "drop_path": 0.1}
    common |= {"mixup": 0.8, "cutmix": 1.0, "aa": "rand-m9-mstd0.5-inc1", "scale": (0.8, 1.0), "repeated_aug": False}
    of = {
        "10": {"lr": 5.5e-4, "warmup_lr": 1e-5, "mixup_off_epoch": 175, "reprob": 0.0},
        "100": {"lr": 6e-4, "warmup_lr": 1e-6, "mixup_off_epoch": None, "reprob": 0.25},
    }
    for family, model in (("vit_lite", "vit_lite_7_4_32"), ("cvt", "cvt_7_4_32"), ("cct", "cct_7_3x1_32")):
        for classes, own in of.items():
            recipe = Recipe.from_yaml(RECIPES / f"{family}_cifar{classes}.yaml")
            for name, value in {**common, **own, "model": model, "model_ema": False}.items():
                assert getattr(recipe, name) == value, (family, classes, name)


def test_imagenet_recipes_are_the_originals_defaults() -> None:
    for path in RECIPES.glob("deit_*_imagenet.yaml"):
        changed = {
            name for name, value in Recipe.from_yaml(path).model_dump().items() if value != getattr(Recipe(), name)
        }
        taught = {"distillation_type", "teacher_path"} if "distilled" in path.name else set()
        assert changed <= {"model", "join_type", "batch_size", *taught}, path.name


def test_the_home_folder_is_meant_by_its_sign(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Recipe(output_dir="~/runs", data_path="~").output_dir == "/home/somebody/runs"
