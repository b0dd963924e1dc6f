"""Pictures: the files of the original's script, and the numbers beside them."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize
from PIL import Image
from zoo import make_wide

import lape
from lape.cli import app as cli
from lape.cli.original import visualize_main
from lape.files.restore import deit_named
from lape.look import figures
from lape.look.figures import (
    COLOUR_MAP,
    COSINE,
    Strip,
    colour_range,
    curves,
    draw_together,
    named_tokens,
    overview,
    visualize,
)
from lape.look.options import DrawOptions

ROOT = Path(__file__).parents[2]
SHARED = Path(__file__).parents[3] / "shared"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}


def model_with(
    join: str, pe: str = "learnable", name: str = "deit_tiny_patch16_224", **kwargs: object
) -> torch.nn.Module:
    torch.manual_seed(0)
    return lape.create_model(name, join, pe, **{**SMALL, **kwargs}).eval()


def written(tmp_path: Path, model: torch.nn.Module, **options: object) -> tuple[set[str], dict[str, np.ndarray]]:
    files = visualize(model, tmp_path, DrawOptions(model_name="m", **{"dpi": 40, **options}))  # type: ignore[arg-type]
    assert all(file.stat().st_size > 0 for file in files)
    assert {file.name for file in files} == {file.name for file in (tmp_path / "m").iterdir()}
    with np.load(tmp_path / "m" / "positions.npz") as numbers:
        return {file.name for file in files}, dict(numbers)


def checkpoint(path: Path, network: torch.nn.Module, **args: object) -> Path:
    """A file as DeiT-style training writes it; with no `args`, bare weights."""
    torch.save({"model": lape.to_reference_state_dict(network)} | ({"args": args} if args else {}), path)
    return path


# --- files and numbers ------------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("join", ["LaPE", "basic", "share", "unshare", "LaPE-sharing"])
@pytest.mark.usefixtures("drafts")
def test_files_have_the_names_of_the_original(tmp_path: Path, join: str) -> None:
    files, numbers = written(tmp_path, model_with(join))
    expected = {f"{join}_layer{i}_sim_{what}.jpg" for i in range(2) for what in ("overall", "5thToken")}
    expected |= {f"{stem}.{kind}" for stem in ("overview", "places", "measures") for kind in ("png", "pdf", "svg")}
    expected |= {"positions.npz", "caption.txt"}
    assert files == expected | ({"PE_token_sim.jpg"} if join != "unshare" else set())
    assert (str(numbers["join"]), str(numbers["pe"]), str(numbers["view"])) == (join, "learnable", "seen")


@pytest.mark.usefixtures("drafts")
def test_token_90_is_drawn_on_14_by_14(tmp_path: Path) -> None:
    files, numbers = written(tmp_path, model_with("LaPE", img_size=224, patch_size=16, depth=1))
    assert "LaPE_layer0_sim_90thToken.jpg" in files
    assert numbers["token"] == 90
    assert numbers["grid"].tolist() == [14, 14]


@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize("view", ["seen", "received"])
def test_numbers_are_those_of_positions(tmp_path: Path, view: str) -> None:
    model = model_with("basic", "learnable", "deit_tiny_distilled_patch16_224")
    _, numbers = written(tmp_path, model, view=view, token=7)
    assert np.array_equal(numbers["positions"], lape.positions(model, view=view).detach().numpy())  # type: ignore[arg-type]
    assert np.array_equal(numbers["correlation"], lape.correlation(model, view=view).numpy())  # type: ignore[arg-type]
    assert np.array_equal(numbers["token_maps"].reshape(2, 16), numbers["correlation"][:, 7])
    assert numbers["num_prefix_tokens"] == 2
    assert np.array_equal(numbers["table"], lape.positions(model)[0].detach().numpy())


@pytest.mark.slow
def test_a_wide_grid(tmp_path: Path, drafts: set[str]) -> None:
    drafts.add("jpg")
    _, numbers = written(tmp_path, model_with("LaPE", "2D_sin", img_size=(28, 112), patch_size=4))
    assert numbers["token_maps"].shape == (2, 7, 28)
    assert numbers["token"] == 3 * 28 + 13
    with Image.open(tmp_path / "m" / "LaPE_layer0_sim_97thToken.jpg") as picture:
        assert picture.width > 2 * picture.height
    with Image.open(tmp_path / "m" / "LaPE_layer0_sim_overall.jpg") as picture:
        assert 0.8 < picture.width / picture.height < 1.3


@pytest.mark.usefixtures("drafts")
def test_another_image_size(tmp_path: Path) -> None:
    model = model_with("LaPE")
    _, numbers = written(tmp_path, model, size=(16, 64))
    assert numbers["grid"].tolist() == [2, 8]
    assert np.array_equal(numbers["positions"], lape.positions(model, (16, 64)).detach().numpy())


def test_a_video_is_drawn_frame_by_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames side by side in a picture, a row a frame in the overview; the patch is framed where it is."""
    pytest.importorskip("transformers", minversion="5.20")
    drawn: dict[str, list[tuple[np.ndarray, int]]] = {}

    def keep(self: figures.Pictures, figure: Any, name: str, **_: Any) -> None:
        drawn[name] = [
            (axes.images[0].get_array().filled(-9), len(axes.patches)) for axes in figure.axes if axes.images
        ]

    def numbers_of(**options: object) -> dict[str, np.ndarray]:
        visualize(model, tmp_path, DrawOptions(model_name="m", **options))  # type: ignore[arg-type]
        with np.load(tmp_path / "m" / "positions.npz") as numbers:
            return dict(numbers)

    monkeypatch.setattr(figures.Pictures, "add", keep)
    model = lape.apply_(make_wide("vivit"))
    numbers = numbers_of(token=21, layers=(1,))
    (of_token,) = numbers["token_maps"][1:]
    assert of_token.shape == (2, 4, 4)
    assert np.array_equal(of_token.ravel(), numbers["correlation"][1, 21])
    ((film, framed),) = drawn["LaPE_layer1_sim_21thToken.jpg"]
    assert (film.shape, framed) == ((4, 9), 1)
    assert np.array_equal(film, np.concatenate([of_token[0], np.full((4, 1), -9), of_token[1]], axis=1))
    every, *frames = drawn["overview.png"]
    assert np.array_equal(every[0], numbers["correlation"][1])
    assert [framed for _, framed in frames] == [0, 1]
    assert np.array_equal(np.stack([frame for frame, _ in frames]), of_token)
    centre = drawn["places.png"][2][0]
    assert np.array_equal(centre.ravel(), numbers["correlation"][1, 5, :16])
    assert {"locality_radius", "monotonicity"} <= set(numbers)
    assert not {"asymmetry", "anisotropy", "directed_monotonicity"} & set(numbers)
    with pytest.raises(lape.LapeError, match=r"choose 0 to 31 \(frame x 4 \+ row x 4 \+ column\)"):
        numbers_of(token=32)
    assert numbers_of(size=(8, 8, 16))["grid"].tolist() == [4, 2, 4]


def test_few_of_many_frames_are_drawn_and_always_the_patchs_own() -> None:
    grid = (16, 2, 2)
    maps = [torch.rand(64, 64)]
    for token in (0, 5, 63):
        strips = figures._strips_of_frames("token", maps, grid, token)
        assert len(strips) <= figures.MOST_FRAMES
        (own,) = [strip for strip in strips if strip.token >= 0]
        assert own.label.endswith(f"frame {token // 4}")
        assert torch.equal(own.maps[0], maps[0][token].reshape(grid)[token // 4])


@pytest.mark.parametrize("join", ["basic", "LaPE"])
def test_biases_are_drawn_per_head(tmp_path: Path, join: str) -> None:
    model = model_with(join, "2D_RPE")
    files, numbers = written(tmp_path, model, token=3)
    expected = {f"{join}_layer{i}_head{j}.jpg" for i in range(2) for j in range(2)}
    assert files == expected | {"overview.png", "overview.pdf", "overview.svg", "positions.npz", "caption.txt"}
    assert np.array_equal(numbers["bias"], lape.position_bias(model).detach().numpy())
    assert np.array_equal(numbers["token_maps"].reshape(2, 2, 16), numbers["bias"][:, :, 3])


def test_the_overview_shows_the_numbers_in_one_colour_range() -> None:
    maps = [torch.full((4, 4), -0.5), torch.eye(4)]
    token = [torch.rand(2, 2) for _ in maps]
    figure = overview("title", [Strip("all", maps, (2, 2)), Strip("token 0", token, (2, 2), 0)], ["a", "b"], *COSINE)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 4
    for image, values in zip(images, maps + token, strict=True):
        assert np.allclose(np.asarray(image.get_array()), values.numpy())
        assert image.get_clim() == (-1, 1)
        assert image.get_cmap().name == COLOUR_MAP
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [None, 3.25, 6.875])
@pytest.mark.parametrize(("layers", "grid"), [(1, (1, 1)), (5, (14, 14)), (7, (2, 9)), (13, (9, 2))])
def test_nothing_in_an_overview_is_clipped_or_overlaps(layers: int, grid: tuple[int, int], width: float | None) -> None:
    n = grid[0] * grid[1]
    strips = [
        Strip("all patches", [torch.zeros(n, n)] * layers, grid),
        Strip("token 0", [torch.zeros(grid)] * layers, grid, 0),
    ]
    title = "deit_tiny_patch16_224_LaPE: join LaPE, pe learnable, 14 x 14 patches"
    figure = overview(title, strips, [f"layer {i}" for i in range(layers)], *COSINE, width)
    assert width in (None, pytest.approx(figure.get_size_inches()[0]))
    figure.canvas.draw()
    whole = figure.bbox
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [text.get_window_extent() for text in figure.texts]
    for box in boxes:
        assert box is not None
        assert box.x0 >= whole.x0
        assert box.y0 >= whole.y0
        assert box.x1 <= whole.x1
        assert box.y1 <= whole.y1
    frames = [axes.get_window_extent() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(frames) for b in frames[:i])


@pytest.mark.slow
@pytest.mark.usefixtures("drafts")
def test_several_models_in_one_figure_with_one_scale(tmp_path: Path) -> None:
    models = {"LaPE": model_with("LaPE"), "unshare, wide": model_with("unshare", img_size=(16, 64), depth=3)}
    files = draw_together(models, tmp_path / "c")
    stems = {f"comparison_{what}" for what in ("overall", "centre", "corner", "edge", "measures")}
    drawn = {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "svg")}
    assert {f.name for f in files} == drawn | {"comparison_caption.txt"}
    with pytest.raises(lape.LapeError, match="1 of 2 models have positions"):
        draw_together({"a": model_with("LaPE"), "b": model_with("LaPE", "2D_RPE")}, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("drafts")
def test_biases_of_several_models_in_one_figure(tmp_path: Path) -> None:
    models = {"basic": model_with("basic", "2D_RPE"), "LaPE, deep": model_with("LaPE", "1D_RPE", depth=4)}
    files = draw_together({**models, "alone": model_with("LaPE")}, tmp_path)
    stems = {f"comparison_bias_{place}" for place in ("centre", "corner", "edge")}
    drawn = {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "svg")}
    assert {f.name for f in files} == drawn | {"comparison_caption.txt"}


def test_a_place_without_a_map_stays_empty() -> None:
    one, two = torch.eye(4), torch.full((4, 4), 0.5)
    figure = overview("t", [Strip("a", [None, one], (2, 2)), Strip("b", [two, None], (2, 2))], ["P", "0"], *COSINE)
    drawn = [(axes.get_title(), np.asarray(axes.images[0].get_array())) for axes in figure.axes if axes.images]
    assert [title for title, _ in drawn] == ["0", "P"]
    assert np.allclose(drawn[0][1], one)
    assert np.allclose(drawn[1][1], two)


def test_the_frame_is_around_the_patch_of_a_grid_that_is_no_square() -> None:
    figure = overview("t", [Strip("token 4", [torch.rand(2, 3)], (2, 3), 4)], ["0"], *COSINE)
    (frame,) = figure.axes[0].patches
    assert frame.get_xy() == (0.5, 0.5)  # around column 1 of row 1


def test_corner_edge_and_centre() -> None:
    assert named_tokens((14, 14)) == {"corner": 0, "edge": 6, "centre": 90}
    assert named_tokens((7, 28)) == {"corner": 0, "edge": 13, "centre": 97}


def test_curves_are_the_numbers() -> None:
    values = {"monotonicity": torch.tensor([2.0, 1.5]), "layer_change": torch.tensor([torch.nan, 0.1])}
    figure = curves("t", {"a": values, "b": {name: v + 1 for name, v in values.items()}})
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert set(panels) == {"monotonicity", "change from layer to layer"}
    lines = panels["monotonicity"].lines
    assert [line.get_label() for line in lines] == ["a", "b"]
    assert np.allclose(lines[1].get_ydata(), [3.0, 2.5])


# --- for a paper -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_for_a_paper(tmp_path: Path) -> None:
    """Of a column's width, without a title, in a range that is stretched, of chosen layers, with embedded letters."""
    looks = DrawOptions(model_name="m", layers=(1,), range="auto", title=False, width="8.255cm", dpi=200)
    model = model_with("LaPE", depth=3)
    files = {file.name: file for file in visualize(model, tmp_path, looks)}
    assert "LaPE_layer1_sim_overall.jpg" in files
    assert not {"LaPE_layer0_sim_overall.jpg", "PE_token_sim.jpg"} & files.keys()
    for name in ("overview.png", "LaPE_layer1_sim_overall.jpg", "measures.png"):
        with Image.open(files[name]) as picture:
            assert picture.width == pytest.approx(3.25 * 200, abs=1), name
            assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    pdf = files["overview.pdf"].read_bytes()
    assert b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf
    assert "VisionTransformer" not in files["overview.svg"].read_text()
    captions = dict(line.split(": ", 1) for line in files["caption.txt"].read_text().splitlines())
    assert captions.keys() == {"overview", "places", "measures", "LaPE_layer*_sim_overall", "LaPE_layer*_sim_5thToken"}
    apart = ~np.eye(16, dtype=bool)
    values = lape.correlation(model)[1].numpy()[apart]
    assert f"colours from {values.min():.3g} to {values.max():.3g}" in captions["overview"]
    with np.load(files["positions.npz"]) as numbers:
        assert len(numbers["positions"]) == 3


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, (-0.5, 0.5)), ("-1..1", (-1, 1)), ("0..1", (0, 1)), ("auto", (-0.25, 0.75))]
)
def test_the_ends_of_the_colours(chosen: str | None, expected: tuple[float, float]) -> None:
    maps = [torch.tensor([[1.0, -0.25], [0.1, 1.0]]), torch.tensor([[1.0, 0.75], [0.1, 1.0]])]
    norm = colour_range(chosen, maps, Normalize(-0.5, 0.5))
    assert (norm.vmin, norm.vmax) == pytest.approx(expected)


@pytest.mark.slow
def test_two_checkpoints_by_one_command(tmp_path: Path, drafts: set[str]) -> None:
    drafts.add("png")
    paths = []
    for join in ("basic", "LaPE"):
        args = {"model": "deit_tiny_patch16_224", "join_type": join, "pe": "learnable", "input_size": 32}
        args["model_kwargs"] = {name: SMALL[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
        paths.append(str(checkpoint(tmp_path / f"{join}.pth", model_with(join), **args)))
    flags = ["--layers", "1", "--range=-1..1", "--no-title", "--width", "3.25in", "--dpi", "72"]
    assert cli.run(cli.app, ["visualize", *paths, "--save-dir", str(tmp_path / "out"), *flags]) == 0
    text = (tmp_path / "out" / "comparison_caption.txt").read_text()
    assert "comparison_centre: positions as each layer sees them: patch in the centre" in text
    assert "From above: basic, LaPE" in text
    with Image.open(tmp_path / "out" / "comparison_overall.png") as picture:
        assert picture.width == 234


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": 16}, "token 16 is outside the 4 x 4 grid"),
        ({"view": "raw"}, "unknown view 'raw'"),
        ({"size": (33,)}, "no multiple of the patch"),
        ({"model_name": "../m"}, "not the name of a folder"),
        ({"join_type": "LaPE"}, "a model was given"),
        ({"layers": (0, 2)}, "layer 2 is not one of the model's 2: choose 0 to 1"),
        ({"width": "3.25"}, "width='3.25' is not allowed"),
        ({"width": "0.1in"}, "width='0.1in' is not allowed"),
        ({"dpi": 0}, "dpi=0 is not allowed"),
        ({"range": "2..3"}, "range='2..3' is not known"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(lape.LapeError, match=message) as caught:
        visualize(model_with("LaPE"), tmp_path / "out", DrawOptions(**options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_has_no_positions_is_refused(tmp_path: Path) -> None:
    for model, options, message in (
        (model_with("basic", "none"), {}, "nothing to show"),
        (model_with("LaPE", "2D_RPE"), {"view": "seen"}, "leave size and view out"),
        (model_with("LaPE", "2D_RPE"), {"size": (64,)}, "leave size and view out"),
        (torch.nn.Linear(2, 2), {}, "not converted"),
    ):
        with pytest.raises(lape.LapeError, match=message):
            visualize(model, tmp_path / "out", DrawOptions(**options))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(lape.LapeError, match=r"cannot create the folder .*choose another"):
        visualize(model_with("LaPE"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- checkpoints and the original's command ---------------------------------------------------------------------------


def test_names_of_the_original() -> None:
    assert deit_named("deit_t_LaPE") == "deit_tiny_patch16_224"
    assert deit_named("deit_s_distill_basic") == "deit_small_distilled_patch16_224"
    assert deit_named("deit_b_share") == "deit_base_patch16_224"
    assert deit_named("deit_b_LaPE", width=192) == "deit_tiny_patch16_224"
    assert deit_named("deit_t_LaPE", width=12) == "deit_tiny_patch16_224"
    assert deit_named("vit_t") is None
    assert deit_named(None) is None


@pytest.mark.matrix
@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize("pe", ["learnable", "2D_sin", "2D_RPE"])
def test_the_original_command_draws_bare_weights(tmp_path: Path, pe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but weights: the name says which model, the shapes say how large."""
    model = model_with("LaPE", pe)
    args = {} if pe != "2D_RPE" else {"input_size": 32}
    path = checkpoint(tmp_path / "weights.pth", model, **args)
    flags = ["--ckpt_path", str(path), "--save_dir", str(tmp_path), "--model_name", "deit_t_LaPE"]
    assert visualize_main([*flags, "--pe", pe, "--join-type", "LaPE"]) == 0
    assert "Visualization done!" in capsys.readouterr().out
    with np.load(tmp_path / "deit_t_LaPE" / "positions.npz") as numbers:
        if pe == "2D_RPE":
            assert np.array_equal(numbers["bias"], lape.position_bias(model).detach().numpy())
        else:
            assert np.array_equal(numbers["positions"], lape.positions(model).detach().numpy())


@pytest.mark.slow
@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize(
    ("join", "pe", "name"),
    [("LaPE", pe, "deit_t_LaPE") for pe in ("learnable", "1D_sin", "2D_sin", "2D_RPE")]
    + [
        ("unshare", "learnable", "deit_t_LaPE"),
        ("basic", "2D_sin", "deit_t_basic"),
        ("share", "1D_sin", "deit_s_share"),
    ],
)
def test_a_file_without_flags_is_read_by_its_weights(tmp_path: Path, join: str, pe: str, name: str) -> None:
    path = checkpoint(tmp_path / "weights.pth", model_with(join, pe))
    assert visualize_main(["--ckpt_path", str(path), "--save_dir", str(tmp_path), "--model_name", name]) == 0
    with np.load(tmp_path / name / "positions.npz") as numbers:
        assert (str(numbers["join"]), str(numbers["pe"])) == (join, pe)


def test_weights_that_do_not_say_their_join_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "weights.pth", model_with("basic"))
    assert visualize_main(["--ckpt_path", str(path), "--save_dir", str(tmp_path)]) == 2
    assert "give --join-type" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("bare", [True, False])
def test_titles_name_the_model_not_the_folder(tmp_path: Path, bare: bool, drafts: set[str]) -> None:
    drafts.add("svg")
    model = model_with("LaPE", embed_dim=192, depth=1)
    args = {} if bare else {"model": "deit_tiny_patch16_224", "join_type": "LaPE", "pe": "learnable", "input_size": 32}
    args |= {} if bare else {"model_kwargs": {"patch_size": 8, "depth": 1}}
    path = checkpoint(tmp_path / "c.pth", model, **args)
    visualize(path, tmp_path, DrawOptions(model_name="deit_b_LaPE", dpi=40))
    text = (tmp_path / "deit_b_LaPE" / "overview.svg").read_text()
    assert "deit_b" not in text
    assert re.search(r"deit_tiny_patch16_224 \((width 192, )?depth 1\): join LaPE, pe learnable", text)


@pytest.mark.usefixtures("drafts")
def test_a_flag_that_contradicts_the_file_names_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"model": "deit_tiny_patch16_224", "join_type": "basic", "pe": "learnable", "input_size": 32}
    path = checkpoint(tmp_path / "c.pth", model_with("basic"), **said)
    flags = ["--ckpt_path", str(path), "--save_dir", str(tmp_path / "out"), "--model_name", "deit_t_LaPE"]
    for wrong, words in ((["--join-type", "LaPE"], ("LaPE", "basic")), (["--pe", "2D_sin"], ("2D_sin", "learnable"))):
        assert visualize_main([*flags, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(word in error for word in words)
    assert not (tmp_path / "out").exists()
    assert visualize_main(flags) == 0
    assert (tmp_path / "out" / "deit_t_LaPE" / "basic_layer1_sim_overall.jpg").exists()


@pytest.mark.parametrize("flags", [["--ckpt_path", "nowhere.pth"], ["--no-such-flag", "1"], ["--token", "x"]])
def test_wrong_flags_exit_with_2_and_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert visualize_main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_script_runs_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "similarity_visualize.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--ckpt_path", "no.pth"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("drafts")
def test_a_checkpoint_of_the_authors(tmp_path: Path) -> None:
    path = SHARED / "reference" / "deit_tiny_lape_64px.pth"
    if not path.exists():
        pytest.skip("the authors' checkpoint is not here")
    files = visualize(path, tmp_path, DrawOptions(model_name="deit_t_LaPE", join_type="LaPE", pe="learnable"))
    names = {file.name for file in files}
    assert {f"LaPE_layer{i}_sim_overall.jpg" for i in range(12)} <= names
    assert "PE_token_sim.jpg" in names


def test_the_explorer_is_of_the_checkpoints_that_flags_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    page = tmp_path / "page.html"
    page.touch()
    monkeypatch.setattr("lape.look.explorer.explore", lambda *args, **how: calls.append((*args, how)) or page)
    flags = ["--ema", "--join-type", "LaPE", "--pe", "2D_sin", "--size", "32", "48", "--image", "a.png"]
    assert cli.run(cli.app, ["visualize", "a.pth", "b.pth", "--html", str(page), *flags]) == 0
    how = {"images": ("a.png",), "model_name": None, "size": (32, 48), "ema": True, "join": "LaPE", "pe": "2D_sin"}
    assert calls == [(("a.pth", "b.pth"), str(page), how)]
