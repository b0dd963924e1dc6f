"""The original's recipe to the digit, and the table of what differs (docs/original.md)."""

import json
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
import yaml
from processes import main_py, run_together
from torch import nn
from training import ALONE, KWARGS, quiet, tiny

from lape.cli import app as cli
from lape.data.augment import eval_transform
from lape.data.loaders import eval_loader
from lape.files.names import reference_names, to_reference_state_dict
from lape.recipe import Habit, Recipe
from lape.train.loop import train
from lape.train.start import OTHER_THERE, build_model
from lape.train.state import initial_state, set_rate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "original.md").read_text()
DISTILLED = "deit_tiny_distilled_patch16_224"
HABITS = [habit for habit in get_args(Habit) if habit != "none"]


def originals_rate(epoch: int, recipe: Recipe) -> float:
    """DeiT's loop: an epoch trains at what timm's cosine gave behind the one before, epoch 0 at the warm-up's start."""
    t, peak, low, warm = max(epoch - 1, 0), recipe.lr, recipe.min_lr, recipe.warmup_epochs
    if t < warm:
        return recipe.warmup_lr + t * (peak - recipe.warmup_lr) / warm
    return low + (peak - low) * (1 + math.cos(math.pi * t / recipe.epochs)) / 2


# ------------------------------------------------------------------------------------------------ schedule


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "rates"),
    [([], [1e-6, 1e-6, 1.008e-4]), (["--as-original", "none"], [1e-6, 1.008e-4, 2.006e-4])],
    ids=["original", "none"],
)
def test_three_epochs_by_the_authors_flags_have_the_authors_rates(flags, rates, tmp_path):
    """`--lr 5e-4 --warmup-epochs 5` are the defaults; 512 images a step leave the rate unscaled."""
    settings = ["--model", "vit_tiny_patch16_224", "--model-kwargs", json.dumps(KWARGS), "--join-type", "LaPE"]
    settings += ["--input-size", "16", "--batch-size", "512", "--epochs", "3", "--aa", "none", "--num_workers", "0"]
    assert cli.run(cli.original, [*settings, "--device", "cpu", "--output_dir", str(tmp_path), *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["train_lr"] for line in lines] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_every_epoch_has_the_rate_of_the_originals_formula(warmup):
    recipe = tiny(epochs=12, warmup_epochs=warmup, lr=5e-4)
    state = initial_state(recipe, build_model(recipe, 10), ALONE)
    for epoch in range(12):
        set_rate(state, recipe, epoch)
        assert state.optimizer.param_groups[0]["lr"] == pytest.approx(originals_rate(epoch, recipe), rel=1e-12)


# ------------------------------------------------------------------------------------------------ start, drop


@pytest.mark.parametrize("original", [True, False])
def test_what_the_class_token_and_biases_start_from(original):
    recipe = tiny(pe="2D_RPE", model_kwargs={**KWARGS, "embed_dim": 256}, **({} if original else {"as_original": ()}))
    model = build_model(recipe, 10)
    deviation = model.cls_token.std().item()
    assert deviation == pytest.approx(0.02 if original else 1e-6, rel=0.2)
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 2
    assert all(table.any() != original for table in tables)


def test_a_checkpoint_decides_what_its_class_token_starts_from(tmp_path):
    trained = build_model(tiny(seed=3), 10)
    torch.save({"model": trained.state_dict(), "args": tiny().model_dump(mode="json")}, tmp_path / "c.pth")
    again = build_model(tiny(finetune=str(tmp_path / "c.pth")), 10, quiet)
    assert torch.equal(again.cls_token, trained.cls_token)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("join", ["LaPE", "unshare"])
def test_how_finetuning_resizes_the_table(tmp_path, join, original):
    trained = build_model(tiny(join_type=join), 10)
    content = {"model": to_reference_state_dict(trained), "args": tiny(join_type=join).model_dump(mode="json")}
    torch.save(content, tmp_path / "c.pth")
    habits = {} if original else {"as_original": ()}
    said: list[str] = []
    larger = tiny(join_type=join, input_size=24, finetune=str(tmp_path / "c.pth"), **habits)
    tables = {
        n: t for n, t in to_reference_state_dict(build_model(larger, 10, said.append)).items() if "pos_embed" in n
    }
    assert len(tables) == (2 if join == "unshare" else 1)
    for name, table in tables.items():
        old = content["model"][name]
        image = old[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(6, 6), mode="bicubic", antialias=not original)
        assert torch.equal(table, torch.cat([old[:, :1], image.flatten(2).mT], dim=1)), name


def test_the_rest_starts_as_the_original_does():
    model = build_model(tiny(model="deit_tiny_patch16_224", model_kwargs={}, input_size=32), 1000)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("model", ["deit_tiny_patch16_224", DISTILLED])
def test_dropout_is_where_the_original_has_it(model):
    """Behind the positions, the projection of attention and both layers of the MLP; timm's is before the head."""
    rates = {}
    for habits in (Recipe().as_original, ()):
        modules = build_model(tiny(model=model, drop=0.1, as_original=habits), 10).named_modules()
        rates[habits] = {name.rpartition(".")[2] for name, m in modules if isinstance(m, nn.Dropout) and m.p}
    assert rates == {Recipe().as_original: {"pos_drop", "proj_drop", "drop1", "drop2"}, (): {"head_drop"}}


# ------------------------------------------------------------------------------------------------ decay, heads


@pytest.mark.parametrize(
    ("settings", "decayed"),
    [
        ({"model": DISTILLED}, {"dist_token"}),
        ({"join_type": "unshare"}, {"pos_embed0", "pos_embed1"}),
        ({"pe": "2D_RPE"}, {f"blocks.{block}.attn.relative_position_bias_table" for block in range(2)}),
    ],
    ids=lambda value: " ".join(sorted(map(str, value))),
)
@pytest.mark.parametrize("original", [True, False])
def test_weight_decay_spares_what_the_original_spares(settings, decayed, original):
    """Table and class token by name, all of one dimension; with none, all of position, too."""
    recipe = tiny(**settings, **({} if original else {"as_original": ()}))
    model = build_model(recipe, 10)
    names = {id(parameter): reference_names(model)[name] for name, parameter in model.named_parameters()}
    groups = initial_state(recipe, model, ALONE).optimizer.param_groups
    spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {name for group in groups for name in (names[id(p)] for p in group["params"])} == set(names.values())
    expected = {name for name in names.values() if model.get_parameter(inner(model, name)).ndim == 1}
    expected |= {"pos_embed", "cls_token"} & set(names.values())
    assert spared == (expected if original else expected | decayed)
    assert "no_weight_decay" not in vars(model)


def inner(model: nn.Module, name: str) -> str:
    return next(key for key, in_files in reference_names(model).items() if in_files == name)


@pytest.mark.parametrize("original", [True, False])
def test_without_a_teacher_the_class_head_learns_alone(original):
    recipe = tiny(model=DISTILLED, weight_decay=0.5, **({} if original else {"as_original": ()}))
    before, after = build_model(recipe, 10), train(recipe, say=quiet).model
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert {"head.weight", "dist_token"} <= changed
    assert ("head_dist.weight" in changed) != original
    images = torch.randn(2, 3, 16, 16)
    features = after.eval().forward_features(images)
    mean = (after.head(features[:, 0]) + after.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(after(images), mean)  # and both are asked, there as here


@pytest.mark.distributed
def test_without_a_teacher_two_processes_train_to_the_numbers_of_one(tmp_path):
    flags = f"--model {DISTILLED} --join-type LaPE --input-size 16 --epochs 1 --lr 0.01 --warmup-epochs 0"
    flags += " --aa none --reprob 0 --mixup 0 --cutmix 0 --no-repeated-aug --device cpu --num_workers 0 --drop-path 0"
    losses = []
    for processes, batch in ((1, 256), (2, 128)):
        folder = tmp_path / str(processes)
        more = ["--batch-size", str(batch), "--model-kwargs", json.dumps(KWARGS), "--output_dir", str(folder)]
        run_together(processes, main_py, *flags.split(), *more)
        losses.append(json.loads((folder / "log.txt").read_text().splitlines()[-1])["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_attention_only_trains_the_biases_of_attention():
    model = build_model(tiny(attn_only=True, pe="2D_RPE"), 10)
    names = reference_names(model)
    learns = {names[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name in names.values() if ".attn." in name or name.startswith("head.")}


# ------------------------------------------------------------------------------------------------ names


def test_vit_small_is_said_to_be_another_model():
    name = "vit_small_patch16_224"
    pairs = re.findall(r"(\w+)=(\S+)", OTHER_THERE[name])
    kwargs = {key: yaml.safe_load(value) for key, value in pairs}
    model = build_model(tiny(model=name, model_kwargs=kwargs, join_type="basic", input_size=224), 1000)
    assert sum(p.numel() for p in model.parameters()) == 48_754_408
    for settings, notes in (({}, 1), ({"model_kwargs": kwargs}, 0)):
        said: list[str] = []
        with torch.device("meta"):
            build_model(tiny(model=name, input_size=224, **{"model_kwargs": {}, **settings}), 10, said.append)
        assert len(said) == notes


# ------------------------------------------------------------------------------------------------ the page


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line] for line in lines]


def test_every_habit_has_its_row():
    assert [row[0].strip("`") for row in rows("Followed")] == HABITS == list(Recipe().as_original)


def test_every_row_has_a_reason_and_flags_that_there_are():
    flags = {name for argument in cli.app["train"].assemble_argument_collection() for name in argument.names}
    for row in rows("Different"):
        assert all(row), row
        for flag in re.findall(r"`(--[\w-]+)", row[-1]):
            assert flag.replace("_", "-") in flags, flag


def test_the_same_values_as_the_page_says():
    for name, value in (row[:2] for row in rows("The same")):
        if re.fullmatch(r"`\w+`", name):
            assert getattr(Recipe(), name.strip("`")) == yaml.safe_load(value.strip("`")), name


def test_evaluation_is_the_originals():
    transform = eval_transform(Recipe())
    assert (transform.crop_ratio, transform.interpolation, tuple(transform.size)) == (1.0, "bicubic", (224, 224))
    loader = eval_loader([], Recipe(batch_size=65, num_workers=0))
    assert loader.batch_sampler.batch_size == 97  # int(1.5 * 65)


def test_what_is_not_the_originals_says_so():
    """Recipes of other authors step their schedule before an epoch, as timm does."""
    for path in [*ROOT.glob("recipes/*.yaml"), ROOT / "src/lape/recipes/digits.yaml"]:
        of_deit = path.name.startswith(("deit_", "ceit_"))
        assert Recipe.from_yaml(path).as_original == (Recipe().as_original if of_deit else ()), path.name
