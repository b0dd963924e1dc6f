"""A number is a number: what is NaN or infinite is an error, and what cannot mean what it says is said."""

import json
import math

import pytest
import torch
from pictures import write_folder
from training import quiet, tiny

import lape
from lape.cli.app import USER_ERROR, app, run
from lape.data.augment import EvalTransform
from lape.errors import LapeError
from lape.files.export import Exported, _judge
from lape.look.probe import attention, last_norm, token_and_position, where_am_i
from lape.study.compare import _other, _sort_out, cell_folder
from lape.train.start import build_model

# -- not a number ------------------------------------------------------------------------------------------------------


def lost(value: float = math.nan, **changes) -> torch.nn.Module:
    """A model one of whose weights is lost."""
    model = build_model(tiny(**changes), 10, quiet).eval()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "pos_embed" in name or "relative" in name)[..., 0] = value
    return model


COMMANDS = {
    "predict": ["predict", "{image}", "--checkpoint", "{model}", "--json", "{out}/p.json", "--csv", "{out}/p.csv"],
    "eval": ["eval", "{model}", "--data-path", "{data}", "--device", "cpu", "--num-workers", "0"],
    "export": ["export", "{model}", "--formats", "folder", "--output-dir", "{out}/e", "--data-path", "{data}"],
    "visualize": ["visualize", "{model}", "--save-dir", "{out}/v"],
    "explorer": ["visualize", "{model}", "--html", "{out}/x.html", "--image", "{image}"],
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_lost_is_one_line_and_no_file(tmp_path, capsys, command, value):
    data = write_folder(tmp_path / "data")
    model = lape.save(lost(value), tmp_path / "model", transform=EvalTransform(16).to_dict())
    (out := tmp_path / "out").mkdir()
    places = {"image": data / "val/cat/0.png", "model": model, "out": out, "data": data}
    assert run(app, [word.format(**places) for word in COMMANDS[command]]) == USER_ERROR
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "NaN or infinite" in shown.err
    assert "nan" not in shown.out
    assert [path for path in out.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("pe", ["learnable", "2D_RPE"])
@pytest.mark.parametrize(
    "look",
    [
        attention,
        token_and_position,
        where_am_i,
        last_norm,
        lambda m, _: lape.correlation(m),
        lambda m, _: lape.explore(m, "x"),
    ],
)
def test_nothing_is_said_of_positions_that_are_lost(look, pe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LapeError):
        look(lost(pe=pe), torch.zeros(2, 3, 16, 16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("difference", "tolerance"), [(math.nan, 1.0), (0.0, math.nan), (math.inf, 1e9)])
def test_a_comparison_with_nan_fails(difference, tolerance):
    with pytest.raises(LapeError, match="differ"):
        _judge(Exported("onnx", "m", 1.0, difference, 1.0, 2, {}), tolerance, quiet)


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_transform_of_numbers_that_are_none_is_refused(name, value):
    with pytest.raises(LapeError, match=f"{name}="):
        EvalTransform(16, **{name: (0.5, value, 0.5)})


def test_a_comparison_refuses_results_that_are_no_numbers(tmp_path):
    recipe = tiny()
    (home := cell_folder(tmp_path, recipe)).mkdir(parents=True)
    fields = {"join": "LaPE", "epochs": 1, "seed": 0, "best": 9, "loss": 1, "seconds": 1, "history": [], "data": ""}
    cell = {"recipe": recipe.model_dump(mode="json"), "run": {**fields, "accuracy": 9}}
    (home / "result.json").write_text(json.dumps(cell))
    assert len(_sort_out([recipe], tmp_path)[0]) == 1
    cell["run"]["accuracy"] = math.nan
    (home / "result.json").write_text(json.dumps(cell))
    with pytest.raises(LapeError, match="no result of a comparison"):
        _sort_out([recipe], tmp_path)
    torch.save({"model": build_model(recipe, 10, quiet).state_dict()}, tmp_path / "checkpoint.pth")
    (tmp_path / "log.txt").write_text('{"test_acc1": NaN}\n')
    with pytest.raises(LapeError, match="no log of a training"):
        _other(tmp_path, recipe)
