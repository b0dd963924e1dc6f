"""Other sizes and changed images: a sweep at the own size is the plain evaluation, changes are what they say."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur
from training import quiet, tiny

import lape
from lape.cli.app import app, run
from lape.convert.positions import positions
from lape.data.augment import eval_transform
from lape.data.changes import CORRUPTIONS, occluded, shifted, shuffled
from lape.data.sets import Images
from lape.errors import LapeError
from lape.recipe import Recipe
from lape.study.options import Conditions, SweepOptions
from lape.study.sweep import ChangedImages, Outcome, conditions_of, draw, parse_size, summary_of
from lape.train.evaluate import evaluate_checkpoint
from lape.train.loop import train


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def picture(channels: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    smooth = torch.rand(1, channels, 5, 5, generator=seeded(3))
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")[0].clamp(0, 1)


# --- changes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 32), (3, 32), (3, 96)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_grows_with_its_severity_and_repeats(name: str, channels: int, side: int) -> None:
    image = picture(channels, side, side + 8)
    made = [CORRUPTIONS[name](image, seeded(), severity=s) for s in (1, 2, 3, 4, 5)]
    far = [(m - image).square().mean().item() for m in made]
    assert far[-1] > far[0] > 0
    assert all(m.shape == image.shape and m.min() >= 0 and m.max() <= 1 for m in made)
    assert torch.equal(CORRUPTIONS[name](image, seeded(), severity=2), made[1])


def test_noise_has_the_size_that_it_says() -> None:
    grey = torch.full((3, 200, 200), 0.5)
    assert CORRUPTIONS["gaussian_noise"](grey, seeded(), severity=1).std().item() == pytest.approx(0.08, rel=0.02)
    assert CORRUPTIONS["shot_noise"](grey, seeded(), severity=1).std().item() == pytest.approx(
        (0.5 / 60) ** 0.5, rel=0.02
    )
    hit = CORRUPTIONS["impulse_noise"](grey, seeded(), severity=5)
    assert (hit != grey).double().mean().item() == pytest.approx(0.27, rel=0.02)


@pytest.mark.parametrize(("side", "more"), [(64, 0.05), (65, 0.1)])
def test_up_to_64_pixels_severities_are_those_of_small_images(side: int, more: float) -> None:
    made = CORRUPTIONS["brightness"](torch.zeros(3, side, side + 9), seeded(), severity=1)
    assert made.unique().tolist() == pytest.approx([more])


@pytest.mark.parametrize(("side", "reach", "sigma"), [(224, 4, 1.0), (112, 2, 0.5), (448, 8, 2.0)])
def test_a_blur_is_as_wide_as_a_part_of_the_image(side: int, reach: int, sigma: float) -> None:
    image = picture(1, side, side)
    expected = gaussian_blur(image, [2 * reach + 1] * 2, [sigma] * 2)
    assert torch.equal(CORRUPTIONS["gaussian_blur"](image, seeded(), severity=1), expected)


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, (2, 2)), (6, 12, (3, 4)), (7, 9, (2, 2))])
def test_patches_are_shuffled_whole(height: int, width: int, patch: tuple[int, int]) -> None:
    rows, columns = height // patch[0], width // patch[1]
    image = torch.zeros(1, height, width)
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        image[0, row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]] = 1 + number
    made = shuffled(image, seeded(), patch)
    cut = torch.nn.functional.unfold(made[None, :, : rows * patch[0], : columns * patch[1]], patch, stride=patch)[0].T
    assert (cut == cut[:, :1]).all()
    assert sorted(cut[:, 0].tolist()) == list(range(1, rows * columns + 1))
    assert not torch.equal(made, image)


def test_a_shift_moves_content_and_repeats_the_border() -> None:
    image = torch.arange(12.0).reshape(1, 3, 4)
    assert shifted(image, seeded(), 1)[0].tolist() == [[0, 0, 1, 2], [0, 0, 1, 2], [4, 4, 5, 6]]


@pytest.mark.parametrize(("share", "hidden"), [(0.25, 4), (0.5, 8), (0.99, 15)])
def test_a_share_of_the_patches_is_hidden(share: float, hidden: int) -> None:
    image = torch.rand(3, 8, 8, generator=seeded())
    made = occluded(image, seeded(), share, (2, 2))
    changed = torch.nn.functional.unfold((made != image).float()[None], 2, stride=2)[0].amax(0)
    assert changed.sum().item() == hidden
    mean = image.mean((1, 2))[:, None].expand(-1, hidden * 4)
    assert torch.allclose(made[(made != image)].reshape(3, -1), mean)


def test_each_image_has_noise_of_its_own_which_repeats() -> None:
    transform = eval_transform(Recipe(input_size=8, in_chans=1)).build()
    plain = Images(["a", "b"], [0, 1], lambda _source: Image.new("L", (8, 8), 128), transform)
    images = ChangedImages(plain, partial(CORRUPTIONS["gaussian_noise"], severity=1))
    (one, _), (other, target), (again, _) = images[0], images[1], images[0]
    assert target == 1
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# --- conditions -------------------------------------------------------------------------------------------------------


def test_sizes_are_read() -> None:
    assert [parse_size(text) for text in ("96", "96x128", "16X56")] == [(96, 96), (96, 128), (16, 56)]
    kinds = [c.kind for c in conditions_of(SweepOptions(sizes=("16", "24"), shift=(2,)), (16, 16), (4, 4))]
    assert kinds == ["clean", "size", "shift"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sizes": ("12x",)}, "12x"),
        ({"sizes": ("0",)}, "'0'"),
        ({"sizes": ("1x2x3",)}, "1x2x3"),
        ({"corruptions": ("snow",)}, "snow"),
        ({"corruptions": ("jpeg",), "severities": (6,)}, "6"),
        ({"shift": (16,)}, "1 to 15"),
        ({"occlude": (1.0,)}, "1.0"),
        ({"occlude": (float("nan"),)}, "nan"),
    ],
)
def test_what_is_out_of_range_is_refused(options, text) -> None:
    with pytest.raises(LapeError, match=text):
        conditions_of(SweepOptions(**options), (16, 16), (4, 4))


# --- a trained model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "class_token": False, "global_pool": "avg"}
    plain = {"epochs": 2, "batch_size": 32, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "lr": 1e-2}
    for name, changes in {"lape": {}, "none": {"pe": "none", "join_type": "basic"}}.items():
        train(tiny(output_dir=str(folder / name), model_kwargs=kwargs, **plain, **changes), say=quiet)
    return folder


def sweep_of(trained, name: str, *words: str) -> dict:
    out = trained / f"{name}.json"
    command = ["eval", str(trained / name / "checkpoint.pth"), "--device", "cpu", "--num-workers", "0"]
    assert run(app, [*command, *words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    (model,) = found["models"]
    return {**found, "outcomes": model["outcomes"][0], "summary": model["summary"]}


def test_a_sweep_at_the_own_size_is_the_evaluation(trained) -> None:
    found = sweep_of(trained, "lape", "--sizes", "16", "12", "12x20", "--plot", str(trained / "sizes.png"))
    plain = evaluate_checkpoint(
        tiny(eval=True, resume=str(trained / "lape/checkpoint.pth")).replace(input_size=16), say=quiet
    )
    clean, small, oblong = found["outcomes"]
    assert (clean["acc1"], clean["loss"], clean["count"]) == (plain.acc1, plain.loss, plain.count)
    assert (clean["relative"], clean["size"]) == (1.0, [16, 16])
    assert (found["training_size"], small["size"], oblong["size"]) == (16, [12, 12], [12, 20])
    assert "12x20" in oblong["transform"]
    small_by_flag = evaluate_checkpoint(
        tiny(eval=True, resume=str(trained / "lape/checkpoint.pth")).replace(input_size=12), say=quiet
    )
    assert small["acc1"] == small_by_flag.acc1
    with Image.open(trained / "sizes.png") as drawn:
        assert drawn.width > 500


def test_the_table_is_resampled_before_the_chain(trained) -> None:
    from lape.core.position import resample
    from lape.files.read import read_checkpoint
    from lape.files.restore import restore

    checkpoint = read_checkpoint(trained / "lape/checkpoint.pth")
    own, other = restore(checkpoint), restore(checkpoint, size=(12, 20))
    norms, p = other.lape.norms, resample(own.pos_embed, lape.Layout((4, 4), 0), (3, 5))
    for layer in range(2):
        p = norms[str(layer)](p)
        assert torch.allclose(positions(other)[layer], p[0], atol=1e-6)


def test_without_position_the_order_of_patches_says_nothing(trained) -> None:
    found = sweep_of(trained, "none", "--shuffle-patches")["outcomes"]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    other = sweep_of(trained, "lape", "--shuffle-patches")["outcomes"]
    assert abs(other[1]["loss"] - other[0]["loss"]) > 1e-3


def test_the_table_of_changes(trained, capsys) -> None:
    words = ["--corruptions", "contrast", "jpeg", "--severities", "1", "5", "--shift", "2", "--occlude", "0.5"]
    found = sweep_of(trained, "lape", *words, "--plot", str(trained / "changes.svg"))
    assert [(o["name"], o["level"]) for o in found["outcomes"][1:]] == [
        *(("contrast", 1), ("contrast", 5), ("jpeg", 1), ("jpeg", 5), ("shifted", 2), ("occluded", 0.5)),
    ]
    summary = {entry["name"]: entry for entry in found["summary"]}
    each = [summary[name]["relative"] for name in ("contrast", "jpeg", "shifted", "occluded")]
    assert summary["mean of changes"]["relative"] == pytest.approx(sum(each) / 4)
    assert "mean of changes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--sizes", "10"], "not divisible"),
        (["--corruptions", "snow"], "snow"),
        (["--plot", "x.gif", "--sizes", "12"], ".png"),
        (["--decode", "fast", "--shift", "1"], "fast"),
        (["--plot", "x.png"], "nothing to draw"),
    ],
)
def test_wrong_use_is_one_line(trained, capsys, words, text) -> None:
    code = run(app, ["eval", str(trained / "lape/checkpoint.pth"), "--device", "cpu", *words])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert text in error


def test_a_checkpoint_has_one_name_and_what_is_done_is_kept(trained, tmp_path, capsys) -> None:
    (tmp_path / "link.pth").symlink_to(trained / "lape" / "checkpoint.pth")
    twice = ["eval", str(trained / "lape" / "checkpoint.pth"), str(tmp_path / "link.pth"), "--sizes", "12"]
    assert run(app, [*twice, "--device", "cpu"]) == 2
    assert "given twice" in capsys.readouterr().err
    shutil.copyfile(trained / "lape" / "checkpoint.pth", tmp_path / "copy.pth")
    assert run(app, [*twice[:2], str(tmp_path / "copy.pth"), "--sizes", "12", "--device", "cpu"]) == 2
    assert "copy.pth hold the same weights, which are one training" in capsys.readouterr().err
    model = lape.load(trained / "lape" / "checkpoint.pth")
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    lape.save(model, tmp_path / "lost")
    paths = [twice[1], str(tmp_path / "lost")]
    words = ["--sizes", "12", "--json", str(tmp_path / "o.json"), "--device", "cpu", "--num-workers", "0"]
    assert run(app, ["eval", *paths, *words]) == 2
    assert "NaN or infinite" in capsys.readouterr().err
    assert [m["checkpoints"] for m in json.loads((tmp_path / "o.json").read_text())["models"]] == [paths[:1]]


@pytest.mark.parametrize("letters", [8, 24, 48])
@pytest.mark.parametrize("count", [2, 9])
def test_the_legend_is_within_the_figure_and_sizes_of_as_many_pixels_are_named(letters: int, count: int) -> None:
    outcome = partial(Outcome, level=None, transform="", acc5=90.0, loss=1.0, count=3)
    trainings = [
        [
            outcome("clean", "clean", size=(8, 8), acc1=50.0 + n),
            *(outcome("size", "x", size=size, acc1=40.0 + n) for size in ((12, 12), (8, 12), (12, 8))),
        ]
        for n in range(count)
    ]
    figure = draw({f"{n}" * letters: [training] for n, training in enumerate(trainings)}, 8)
    figure.canvas.draw()
    box, width = figure.legends[0].get_window_extent(), figure.bbox.width
    assert (box.x0, box.x1) == (max(box.x0, 0), min(box.x1, width))
    assert "8x12, 12x8" in [text.get_text() for text in figure.axes[0].texts]


def test_a_summary_of_a_model_that_is_never_right_has_no_shares() -> None:
    blank = partial(Outcome, level=None, size=(8, 8), transform="", acc1=0.0, acc5=0.0, loss=1.0, count=3)
    assert [e["relative"] for e in summary_of([[blank("clean", "clean"), blank("shift", "shifted")]])] == [None, None]
    never = [blank("clean", "clean"), blank("shift", "shifted"), blank("occlusion", "occluded")]
    often = [replace(outcome, acc1=50.0, relative=1.0) for outcome in never]
    assert [e["relative"] for e in summary_of([never, often])] == [None] * 4
    assert [e["relative"] for e in summary_of([often])] == [1.0] * 4


def test_the_mean_of_changes_counts_each_change_once_and_no_size() -> None:
    made = partial(Outcome, size=(8, 8), transform="", acc5=100.0, loss=1.0, count=3)
    outcomes = [
        made("clean", "clean", level=None, acc1=80.0, relative=1.0),
        made("size", "12", level=None, acc1=8.0, relative=0.1),
        made("shift", "shifted", level=1, acc1=60.0, relative=0.75),
        made("shift", "shifted", level=2, acc1=40.0, relative=0.5),
        made("occlusion", "occluded", level=0.5, acc1=20.0, relative=0.25),
    ]
    mean = summary_of([outcomes])[-1]
    assert (mean["name"], mean["acc1"], mean["relative"]) == ("mean of changes", 35.0, 0.4375)


@pytest.mark.slow
def test_checkpoints_that_differ_in_their_seed_are_one_model_with_an_interval(trained, capsys) -> None:
    from scipy.stats import t

    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "class_token": False, "global_pool": "avg"}
    plain = {"epochs": 2, "batch_size": 256, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "lr": 1e-2}
    for seed in (1, 2):
        train(tiny(output_dir=str(trained / f"lape{seed}"), model_kwargs=kwargs, seed=seed, **plain), say=quiet)
    paths = [str(trained / name / "checkpoint.pth") for name in ("lape", "lape1", "lape2", "none")]
    words = ["--sizes", "12", "--shift", "2", "--json", str(trained / "all.json"), "--plot", str(trained / "all.png")]
    assert run(app, ["eval", *paths, "--device", "cpu", "--num-workers", "0", *words]) == 0
    told = capsys.readouterr().out
    assert "lape, 3 checkpoints" in told
    assert "none, 1 checkpoint\n" in told
    found = json.loads((trained / "all.json").read_text())
    assert [model["checkpoints"] for model in found["models"]] == [paths[:3], paths[3:]]
    several = found["models"][0]
    for place, entry in enumerate(several["summary"]):
        values = torch.tensor([outcomes[place]["acc1"] for outcomes in several["outcomes"]], dtype=torch.float64)
        half = t.ppf(0.975, 2) * (values.var() / 3).sqrt().item()
        assert entry["acc1"] == pytest.approx(values.mean().item())
        assert entry["interval"] == pytest.approx([entry["acc1"] - half, entry["acc1"] + half])
    alone = sweep_of(trained, "lape", "--sizes", "12", "--shift", "2")
    assert alone["outcomes"] == several["outcomes"][0]
    with Image.open(trained / "all.png") as drawn:
        assert drawn.width > 1000
    for words, text in (([paths[0], paths[0], "--sizes", "12"], "given twice"), (paths[:2], "several are for --sizes")):
        assert run(app, ["eval", *words, "--device", "cpu"]) == 2
        assert text in capsys.readouterr().err


# --- comparisons ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_at_other_sizes(tmp_path, capsys) -> None:
    from lape.recipe import Recipe
    from lape.study.compare import compare
    from lape.study.options import CompareOptions

    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}
    recipe = Recipe.from_yaml("digits", epochs=1, batch_size=256, model_kwargs=kwargs)
    size = recipe.input_size
    asked = {"sizes": (str(size + 4), f"{size}x{size + 8}"), "seeds": (0, 1), "workers": 1, "probe": 8, "shift": (1,)}
    study = compare(
        recipe, CompareOptions(output_dir=str(tmp_path), pes=("learnable", "2D_RPE"), joins=("basic",), **asked)
    )
    trainings, biased = study.results["sizes"].values()
    assert [len(one) for one in biased] == [4, 4]
    assert [o["size"] for o in trainings[0][:3]] == [(size, size), (size + 4, size + 4), (size, size + 8)]
    assert [t[0]["acc1"] for t in trainings] == [cell["accuracy"] for cell in study.results["cells"][:2]]
    mean = sum(t[1]["acc1"] for t in trainings) / 2
    told, _ = study.results["conditions"].values()
    cell = f"{mean:.1f} ({told[1]['interval'][0]:.1f} to {told[1]['interval'][1]:.1f})"
    share = sum(t[3]["acc1"] / t[0]["acc1"] for t in trainings) / 2
    page, explorer = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    for text in (page, explorer):
        assert cell in text
        assert f"{100 * share:.1f} %" in text
    assert explorer.count('src="data:image/png') == 3  # accuracy by epoch, over the size, and in the features
    assert {"sizes.png", "probe.png"} <= {file.name for file in study.files}
    probed, _ = study.results["probe"].values()
    assert (probed["images"], len(probed["plain"]["shift"])) == (8, 3)
    assert f"{size + 4} px" in capsys.readouterr().out


def test_every_row_of_the_rivals_has_a_meaning() -> None:
    from lape.recipe import Recipe
    from lape.study.compare import RIVAL_POSITIONS, combinations
    from lape.study.numbers import Variant

    recipe = Recipe.from_yaml("digits")
    rows = [Variant(recipe.model, *row) for row in RIVAL_POSITIONS]
    assert combinations(recipe, rows) == (rows, {})


def test_what_is_named_twice_is_evaluated_once() -> None:
    options = Conditions(corruptions=("contrast", "contrast"), severities=(1, 1), shift=(2, 2), occlude=(0.5, 0.5))
    kinds = [condition.kind for condition in conditions_of(options, (16, 16), (4, 4))]
    assert kinds == ["clean", "corruption", "shift", "occlusion"]
