"""A number is a number: what is NaN or infinite is an error, and what cannot mean what it says is said."""

import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
from pictures import deep_file, write_folder, write_image
from PIL import Image
from training import quiet, tiny

import lape
from lape.cli.app import USER_ERROR, app, run
from lape.data.augment import EvalTransform
from lape.data.fast import read_levels
from lape.data.images import assumption, load_image
from lape.data.open import load_data
from lape.errors import CheckpointError, LapeError, NotFiniteError
from lape.files.export import ExportResult, _judge
from lape.look.probe import attention, last_norm, token_and_position, where_am_i
from lape.recipe import Recipe
from lape.study.compare import _finished_and_missing, _other_run, cell_folder
from lape.train.evaluate import evaluate_checkpoint
from lape.train.loop import train
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
        _judge(ExportResult("onnx", "m", 1.0, difference, 1.0, 2, {}), tolerance, quiet)


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
    assert len(_finished_and_missing([recipe], tmp_path)[0]) == 1
    cell["run"]["accuracy"] = math.nan
    (home / "result.json").write_text(json.dumps(cell))
    with pytest.raises(LapeError, match="no result of a comparison"):
        _finished_and_missing([recipe], tmp_path)
    torch.save({"model": build_model(recipe, 10, quiet).state_dict()}, tmp_path / "checkpoint.pth")
    (tmp_path / "log.txt").write_text('{"test_acc1": NaN}\n')
    with pytest.raises(LapeError, match="no log of a training"):
        _other_run(tmp_path, recipe)


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


# -- values of more than 8 bits, strips, turned images -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif<", "tif>", "tif<z", "tif>z"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_values_of_any_depth_are_no_black_image(tmp_path, suffix, channels, bits):
    if channels == 2 and suffix != "png":
        pytest.skip("Pillow reads no such TIFF")
    values = np.random.default_rng(0).integers(0, 2**bits, (9, 7, channels))
    values[0, 0] = 2**bits - 1
    values[1, 1] = [0, 1, 2, 3][:channels]
    (path := tmp_path / f"a.{suffix[:3]}").write_bytes(deep_file(values, suffix))
    colours = values[..., : channels - 1 + channels % 2]
    expected = np.round(colours * 255 / (2**bits - 1)) if channels == 1 or bits < 16 else colours // 256
    pixels = np.asarray(load_image(path))
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (9, 7, 3)))
    kept = "the upper 8 bits kept" if channels > 1 and bits == 16 else f"taken for values of {bits} bits"
    assert assumption(path) == f"16-bit {'grayscale' if channels == 1 else 'colour'}, {kept}"
    levels = read_levels(str(path), 3, load_image).expand(3, -1, -1).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(levels, pixels)


@pytest.mark.parametrize(("most", "bits"), [(200, 8), (4000, 12), (60000, 16)])
def test_32_bit_grey_is_taken_for_what_its_values_need(tmp_path, most, bits):
    values = np.linspace(0, most, 63).astype(np.int32).reshape(9, 7)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.round(values * 255 / (2**bits - 1))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.tif", 1)), expected)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.pgm")  # whose header says the range
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.pgm", 1)), np.round(values / 257))


def test_what_is_assumed_of_deep_images_is_said(tmp_path, capsys):
    data = write_folder(tmp_path / "data")
    (data / "val/cat/0.png").write_bytes(deep_file(np.arange(400).reshape(20, 20), "png"))
    (data / "val/dog/0.png").write_bytes(deep_file(np.full((20, 20, 3), 4000), "png"))
    assert run(app, ["check-data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "1 image(s) with 16-bit grayscale, taken for values of 12 bits: val/cat/0.png" in shown
    assert "1 image(s) with 16-bit colour, taken for values of 12 bits: val/dog/0.png" in shown
    fields = {"data_path": str(data), "device": "cpu", "num_workers": 0, "input_size": 16}
    assert "16-bit grayscale, taken for values of 12 bits" in load_data(Recipe(**fields), train=False).name
    files = [str(data / "val" / name / "0.png") for name in ("cat", "dog")]
    assert run(app, ["predict", *files, "--checkpoint", named(tmp_path / "a.pth")]) == 0
    assert capsys.readouterr().err == f"{files[0]}: {assumption(files[0])}; said of the first such image\n"


@pytest.mark.matrix
@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (3, 3001)])
def test_a_strip_that_would_fill_the_memory_is_named_everywhere(tmp_path, capsys, size, suffix):
    data = write_folder(tmp_path / "data")
    Image.new("RGB", size).save(path := data / f"val/cat/strip.{suffix}")
    assert run(app, ["check-data", str(data)]) == USER_ERROR
    assert f"val/cat/strip.{suffix} ({size[0]} x {size[1]} pixels: no side" in capsys.readouterr().out
    assert run(app, ["predict", str(path), "--checkpoint", named(tmp_path / "a.pth")]) == USER_ERROR
    assert f"{path} ({size[0]} x {size[1]} pixels" in capsys.readouterr().err
    fields = {"data_path": str(data), "batch_size": 2, "mixup": 0, "cutmix": 0}
    for more in ({}, {"decode": "fast"}, {"data_on_device": True}):
        with pytest.raises(LapeError, match=f"strip.{suffix} .*no side may be more than 1000 times"):
            evaluate_checkpoint(Recipe(resume=named(tmp_path / "a.pth"), device="cpu", **fields, **more), say=quiet)
    with pytest.raises(LapeError, match=f"strip.{suffix} .*no side"):
        train(tiny(**fields, output_dir=str(tmp_path / "out")), say=quiet)
    assert torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["step"] == 3  # all that was trained
    with pytest.raises(LapeError, match="no side"):
        read_levels(str(path), 3, load_image)


# -- what lies in a data folder without a word -------------------------------------------------------------------------

SILENT = {
    "a hidden class": (
        lambda d: shutil.copytree(d / "train/cat", d / "train/.ipynb_checkpoints"),
        "1 folder(s) of the system or of a program, not read: train/.ipynb_checkpoints",
    ),
    "a hidden folder in a class": (
        lambda d: [shutil.copytree(d / "train/cat", d / "train/cat" / name) for name in ("@eaDir", ".cache")],
        "2 folder(s) of the system or of a program, not read: train/cat/.cache, train/cat/@eaDir",
    ),
    "a hidden image": (
        lambda d: shutil.copy(d / "train/cat/0.png", d / "train/cat/.0.png"),
        "1 file(s) that are no images by their names, not read: train/cat/.0.png",
    ),
    "a circle": (
        lambda d: (d / "train/cat/again").symlink_to(d / "train"),
        "1 folder(s) not read, links to one that holds them or is read already: train/cat/again",
    ),
    "a circle as a class": (
        lambda d: (d / "train/again").symlink_to(".."),
        "1 folder(s) not read, links to one that holds them or is read already: train/again",
    ),
    "a link beside its folder": (
        lambda d: [shutil.copytree(d / "val/cat", d / "train/cat/a"), (d / "train/cat/b").symlink_to("a")],
        "1 folder(s) not read, links to one that holds them or is read already: train/cat/b",
    ),
    "two classes": (
        lambda d: shutil.copy(d / "train/cat/0.png", d / "train/dog/copy.png"),
        "1 image(s) are there more than once under two classes: train/cat/0.png = train/dog/copy.png",
    ),
    "copies": (
        lambda d: [shutil.copy(d / "val/cat/1.png", d / "val/cat" / f"1 ({n}).png") for n in (1, 2)],
        "1 image(s) are there more than once in one class: val/cat/1 (1).png = val/cat/1 (2).png = val/cat/1.png",
    ),
    "a turned image": (lambda d: turn(d / "train/cat/0.png"), "1 image(s) with a rotation or mirror"),
    "a turned photograph": (
        lambda d: turn(d / "train/cat/0.jpg"),
        "1 image(s) with a rotation or mirror",
    ),
}


def turn(path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path, exif=exif)


@pytest.mark.parametrize("how", SILENT)
def test_what_was_passed_over_in_silence_is_a_warning(tmp_path, capsys, how):
    data = write_folder(tmp_path / "data")
    change, words = SILENT[how]
    change(data)
    assert run(app, ["check-data", str(data), "--json", str(tmp_path / "r.json")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert any(words in line for line in lines), lines
    counts = json.loads((tmp_path / "r.json").read_text())["counts"]
    found = load_data(Recipe(data_path=str(data), batch_size=2, input_size=16))
    assert found.classes == list(counts["train"]) == ["cat", "dog"]
    assert (len(found.train), len(found.val)) == tuple(sum(counts[split].values()) for split in ("train", "val"))
    assert len(found.train) <= 9


# -- learning rates ----------------------------------------------------------------------------------------------------


def rates(**changes) -> tuple[list[float], list[str]]:
    """The learning rate of each epoch of a run, and what it says."""
    said: list[str] = []
    fields = {name: value for name, value in tiny().model_dump(exclude_unset=True).items() if name != "warmup_epochs"}
    result = train(Recipe(**{**fields, "batch_size": 512, "lr": 1e-2, "as_original": (), **changes}), say=said.append)
    return [line["train_lr"] for line in result.history], said


WARM, LATE = "The warm-up is longer than the run allows", "No epoch trains at the learning rate's peak"
LOW, FALLS = "is below --min-lr", "the warm-up falls"
NEVER = "the learning rate does not decay"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("changes", "highest", "lines"),
    [
        ({"epochs": 1}, 1e-2, [WARM]),
        ({"epochs": 5}, 1e-2 * (1 + math.cos(math.pi / 5)) / 2, [WARM]),
        ({"epochs": 2, "warmup_epochs": 2}, 1e-2 / 2, [WARM, LATE]),
        ({"epochs": 7, "schedule_epochs": 2}, 1e-2, [WARM]),
        ({"epochs": 2, "warmup_epochs": 1, "as_original": ("schedule",)}, 1e-6, [LATE]),
        ({"epochs": 1, "sched": "none"}, 1e-2, []),
        ({"epochs": 2, "warmup_epochs": 0}, 1e-2, []),
        ({"epochs": 6}, 8e-3, [LATE]),
        ({"epochs": 2, "warmup_epochs": 1, "lr": 5e-6}, 7.5e-6, [LOW]),
        ({"epochs": 2, "warmup_epochs": 0, "lr": 5e-6}, 7.5e-6, [LOW]),
        ({"epochs": 3, "warmup_epochs": 1, "lr": 1e-4, "warmup_lr": 1e-3}, 1e-3, [FALLS]),
        ({"epochs": 2, "warmup_epochs": 0, "sched": "step"}, 1e-2, [NEVER]),
        ({"epochs": 2, "warmup_epochs": 0, "sched": "step", "decay_epochs": 2}, 1e-2, [NEVER]),
        ({"epochs": 2, "warmup_epochs": 0, "sched": "step", "decay_epochs": 1, "lr": 5e-6}, 5e-6, []),
    ],
)
def test_a_learning_rate_that_cannot_do_what_it_says_is_said(changes, highest, lines):
    found, said = rates(**changes)
    assert max(found) == pytest.approx(highest, rel=0.02)
    assert [mark for mark in (WARM, LOW, FALLS, NEVER, LATE) if any(mark in text for text in said)] == lines


def test_a_learning_rate_that_is_no_number_is_refused_before_anything_is_written(tmp_path):
    for lr, fields in ((math.nan, {}), (math.inf, {}), (1.7e308, {"unscale_lr": False, "batch_size": 1024})):
        with pytest.raises(LapeError, match="lr="):
            train(tiny(lr=lr, output_dir=str(tmp_path / "out"), **fields), say=quiet)
    assert not (tmp_path / "out").exists()
