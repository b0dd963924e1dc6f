"""What is shipped equals the eager model, takes any batch, holds nothing to compute for positions, and fails loudly."""

import inspect
import json

import pytest
import timm
import torch
from zoo import TINY

import lape
from lape.files.export import _WRITERS, export
from lape.options import ExportOptions

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16)


def converted(join: str = "LaPE", pe: str | None = None, **kwargs) -> torch.nn.Module:
    """A model whose every value shows, the position's too."""
    model = lape.create_model("vit_tiny_patch16_224", join, pe, **TINY, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("join", "pe"),
    [
        ("basic", "learnable"),
        ("share", "2D_sin"),
        ("LaPE", None),
        ("LaPE", "2D_RPE"),
    ],
)
def test_every_format_equals_the_eager_model(join, pe, images, tmp_path, capsys):
    model = converted(join, pe)
    done = export(model, tmp_path, images)
    assert [result.format for result in done] == ["folder", "torch", "onnx"]
    for result in done:
        assert result.max_difference <= 1e-4
        assert (result.top1_agreement, result.images) == (1.0, 5)
    assert not lape.describe(model).folded  # the model that was given stays as it is
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "folder", "model.onnx", "model.pt2"]
    assert json.loads((tmp_path / "export.json").read_text())["files"][2]["operations"] == done[2].operations
    assert (lape.load(tmp_path / "folder")(images) - model(images)).abs().max() <= 1e-5
    assert "top-1 equal" in capsys.readouterr().out
    # nothing is left to compute for positions: a norm of each would be one more, and another size a Resize
    assert done[2].operations["LayerNormalization"] == 2 * TINY["depth"] + 1
    assert "Resize" not in done[2].operations


@pytest.mark.slow
def test_a_folded_graph_has_no_norm_of_a_position_and_no_resize(images, tmp_path):
    (folded,) = export(converted(dynamic_img_size=True), tmp_path / "folded", images, formats=["onnx"])
    assert "Resize" not in folded.operations
    assert folded.operations["LayerNormalization"] == 2 * TINY["depth"] + 1
    (unfolded,) = export(converted(), tmp_path / "unfolded", images, formats=["onnx"], fold=False)
    assert unfolded.operations["LayerNormalization"] > 2 * TINY["depth"] + 1


@pytest.mark.slow
def test_a_difference_above_the_tolerance_fails_and_keeps_what_was_there(images, tmp_path, monkeypatch):
    export(converted(), tmp_path, images, formats=["torch"])
    before = (tmp_path / "model.pt2").read_bytes()
    monkeypatch.setattr("lape.files.export.fold_", lambda model: torch.nn.init.constant_(model.head.bias, 3.0))
    with pytest.raises(lape.LapeError, match=r"torch: outputs differ .* more than the tolerance"):
        export(converted(), tmp_path, images, formats=["torch"])
    assert (tmp_path / "model.pt2").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.pt2"]


def test_a_report_says_that_all_is_in_place(images, tmp_path, monkeypatch):
    """So there is none where a process was killed while files of an earlier export were replaced."""
    export(converted(), tmp_path, images, formats=["folder"])
    assert (tmp_path / "export.json").exists()

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lape.files.export.put_folder_in_place", killed)
    with pytest.raises(KeyboardInterrupt):
        export(converted(), tmp_path, images, formats=["folder"])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("shift", "passes"), [(5e-5, True), (2e-4, False)])
def test_the_largest_difference_of_any_output_is_held_to_the_tolerance(shift, passes, images, tmp_path, monkeypatch):
    """One class of five is off by a part of the largest output: a mean would hide it."""
    model = converted()
    largest = model(images).abs().max()

    def spoil(shipped):
        shipped.head.bias.data[0] += shift * largest

    monkeypatch.setattr("lape.files.export.fold_", spoil)
    if passes:
        (result,) = export(model, tmp_path, images, formats=["folder"])
        assert result.max_difference == pytest.approx(shift, rel=0.05)
    else:
        with pytest.raises(lape.LapeError, match=r"2\.0e-04 of the largest, more than the tolerance of 1\.0e-04"):
            export(model, tmp_path, images, formats=["folder"])


def test_the_command_has_the_defaults_of_the_function():
    """`lape export` hands all of its options on, so a default of its own would win."""
    fields, parameters = ExportOptions.model_fields, inspect.signature(export).parameters
    shared = [name for name in fields if name in parameters and name != "output_dir"]
    assert {name: fields[name].default for name in shared} == {name: parameters[name].default for name in shared}
    assert (shared, fields["tolerance"].default) == (["formats", "fold", "tolerance"], 1e-4)


def test_the_command_hands_all_that_it_was_given_on(images, monkeypatch):
    from lape.cli.app import app, run

    calls, transform = [], {"input_size": 16}
    monkeypatch.setattr("lape.files.read.read_checkpoint", lambda path: path)
    monkeypatch.setattr("lape.cli.commands.sample_images", lambda *_args: (images, "somewhere", transform))
    monkeypatch.setattr("lape.files.export.export", lambda source, **options: calls.append((source, options)))
    flags = ["--output-dir", "out", "--formats", "onnx", "--no-fold", "--tolerance", "0.5"]
    assert run(app, ["export", "c.pth", *flags]) == 0
    ((source, options),) = calls
    assert source == "c.pth"
    assert options.pop("images_BCHW") is images
    assert options.pop("say")
    expected = {"output_dir": "out", "formats": ("onnx",), "fold": False, "tolerance": 0.5, "transform": transform}
    assert options == expected


def test_wrong_input_is_one_line(images, tmp_path):
    with pytest.raises(lape.LapeError, match=r"unknown format 'onxx'.*did you mean 'onnx'"):
        export(converted(), tmp_path, images, formats=["onxx"])
    with pytest.raises(lape.LapeError, match="2 or more"):
        export(converted(), tmp_path, images[:1])
    (tmp_path / "file").write_text("")
    with pytest.raises(lape.LapeError, match="cannot write into"):
        export(converted(), tmp_path / "file", images)
    with pytest.raises(lape.LapeError, match="not converted"):
        export(timm.create_model("vit_tiny_patch16_224", **TINY), tmp_path, images)


def test_what_is_written_runs_on_one_image_and_on_the_others(images, tmp_path, monkeypatch):
    sizes = []

    def watched(*args):
        path, run_model, operations = write(*args)
        return path, lambda pixels: sizes.append(len(pixels)) or run_model(pixels), operations

    write = _WRITERS["folder"]
    monkeypatch.setitem(_WRITERS, "folder", watched)
    export(converted(), tmp_path, images, formats=["folder"])
    assert sizes == [1, 4]


def test_images_to_check_on_are_spread_over_all(tmp_path):
    from lape.cli.commands import sample_images
    from lape.data.open import load_data
    from lape.files.read import read_checkpoint
    from lape.recipe import Recipe

    pixels, *_ = sample_images(read_checkpoint(lape.save(converted(), tmp_path / "model")), "", 7)
    val = load_data(Recipe(input_size=16), train=False).val
    assert len(val) == 359
    assert torch.equal(pixels, torch.stack([val[51 * number][0] for number in range(7)]))


def test_the_command_checks_on_real_images(tmp_path, capsys):
    from lape.cli.app import app, run

    checkpoint = lape.save(converted(), tmp_path / "model")
    code = run(app, ["export", str(checkpoint), "--output-dir", str(tmp_path / "out"), "--formats", "torch", "folder"])
    assert code == 0
    out = capsys.readouterr().out
    assert "64 images" in out
    assert "packaged digits" in out
    assert run(app, ["export", str(tmp_path / "missing"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
