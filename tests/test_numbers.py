"""A number is a number: what is NaN or infinite is an error, and what cannot mean what it says is said."""

import json
import math
import shutil

import pytest
import timm
import torch
from pictures import write_folder, write_image
from training import quiet, tiny

import lape
from lape.cli.app import USER_ERROR, app, run
from lape.data.augment import EvalTransform
from lape.errors import CheckpointError, LapeError, NotFiniteError
from lape.files.export import Exported, _judge
from lape.look.probe import attention, last_norm, token_and_position, where_am_i
from lape.recipe import Recipe
from lape.study.compare import _other, _sort_out, cell_folder
from lape.train.evaluate import evaluate_checkpoint
from lape.train.start import build_model, load_teacher

CPU = torch.device("cpu")

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


# -- classes by their names --------------------------------------------------------------------------------------------

NAMES = ["eel", "cat", "dog", "fox"]  # of a checkpoint, in no order


def named(path, classes=NAMES, **changes) -> str:
    """A checkpoint whose outputs have names."""
    recipe = tiny(in_chans=3, **changes)
    model = build_model(recipe, len(classes) or 4, quiet).eval()
    content = {"model": lape.to_reference_state_dict(model), "args": recipe.model_dump(mode="json")}
    torch.save(content | ({"classes": classes} if classes else {}), path)
    return str(path)


@pytest.mark.parametrize("fields", [{}, {"data_on_device": True}, {"decode": "fast"}])
@pytest.mark.parametrize("train", ["none", "all", "lacking"])
def test_a_test_set_that_lacks_classes_is_evaluated_by_their_names(tmp_path, train, fields):
    data, checkpoint = write_folder(tmp_path / "data", classes=("cat", "dog", "eel"), val=4), named(tmp_path / "a.pth")
    fields = {"data_path": str(data), "device": "cpu", "num_workers": 0, "resume": checkpoint, **fields}
    whole = evaluate_checkpoint(Recipe(**fields), say=quiet)
    shutil.rmtree(data / "val/dog")
    (data / "val/empty").mkdir()
    if train == "none":
        shutil.rmtree(data / "train")
    elif train == "all":
        write_image(data / "train/empty/0.png")
    else:
        (data / "val/empty").rmdir()
    said: list[str] = []
    part = evaluate_checkpoint(Recipe(**fields), say=said.append)
    alone = write_folder(tmp_path / "alone", classes=("dog",), val=0)
    for number in range(4):
        write_image(alone / "val/dog" / f"{number}.png", seed=100 + number)
    shutil.rmtree(alone / "train")
    rest = evaluate_checkpoint(Recipe(**{**fields, "data_path": str(alone)}), say=quiet)
    assert "2 of the 4 classes have no image here: dog, fox" in said
    assert (part.count, rest.count, whole.count) == (8, 4, 12)
    assert part.loss * 8 + rest.loss * 4 == pytest.approx(whole.loss * 12, rel=1e-5)
    assert part.acc1 * 8 + rest.acc1 * 4 == pytest.approx(whole.acc1 * 12)


def test_classes_that_no_name_matches_are_said(tmp_path):
    data = write_folder(tmp_path / "data")
    fields = {"data_path": str(data), "device": "cpu", "num_workers": 0}
    said: list[str] = []
    evaluate_checkpoint(Recipe(**fields, resume=named(tmp_path / "a.pth", [])), say=said.append)
    assert any("stores no class names and has 4 outputs" in text for text in said)
    with pytest.raises(LapeError, match=r"not trained on \(cat; it knows 2: dog, fox\)"):
        evaluate_checkpoint(Recipe(**fields, resume=named(tmp_path / "b.pth", ["dog", "fox"])), say=quiet)
    model = timm.create_model("test_resnet", num_classes=4)
    content = {"model": model.state_dict(), "classes": NAMES}
    torch.save(content, tmp_path / "teacher.pth")
    settings = {"teacher_model": "test_resnet", "distillation_type": "soft", "input_size": 32}
    recipe = tiny(**settings, teacher_path=str(tmp_path / "teacher.pth"))
    with pytest.raises(CheckpointError, match=r"other classes, it lacks ant"):
        load_teacher(recipe, 4, CPU, quiet, ["ant", "cat", "dog", "fox"])
    pixels = torch.rand(2, 3, 32, 32)
    teacher, first = (load_teacher(recipe, 2, CPU, quiet, names) for names in (["dog", "eel"], NAMES[:2]))
    same = load_teacher(recipe, 4, CPU, quiet, NAMES)
    assert torch.equal(teacher(pixels), same(pixels)[:, [2, 0]])
    assert torch.equal(first(pixels), same(pixels)[:, :2])
    torch.save({"model": {k: v * math.nan for k, v in model.state_dict().items()}}, tmp_path / "teacher.pth")
    with pytest.raises(NotFiniteError, match="teacher"):
        load_teacher(recipe, 4, CPU, quiet)


def test_a_head_for_other_classes_is_said_and_one_in_another_order_is_put_right(tmp_path):
    finetune = named(tmp_path / "a.pth")
    head = torch.load(finetune, weights_only=True)["model"]["head.weight"]
    said: list[str] = []
    moved = build_model(tiny(finetune=finetune), 4, said.append, sorted(NAMES))
    assert torch.equal(moved.head.weight, head[[1, 2, 0, 3]])
    kept = build_model(tiny(finetune=finetune), 4, said.append, ["cat", "dog", "eel", "gnu"])
    assert torch.equal(kept.head.weight, head)
    build_model(tiny(finetune=finetune), 4, said.append, NAMES)
    assert "put into the order" in said[0]
    assert "other classes (gnu were not among them)" in said[1]
    assert said[2] == f"Fine-tuning from {finetune}."
