"""`lape export` checks on the data of the run and says in each file what images need; `lape predict` reads that."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from pictures import write_folder
from training import quiet, tiny

from lape.cli.app import USER_ERROR, app, run
from lape.data.folders import image_files
from lape.errors import CheckpointError, LapeError
from lape.files.exported import DESCRIPTION
from lape.files.read import read_checkpoint
from lape.files.restore import transform_of
from lape.train.evaluate import predict
from lape.train.loop import train

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow  # for the export that they share


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A run on a folder of its own, exported by the command; `said` is what that printed."""
    root = tmp_path_factory.mktemp("work")
    write_folder(root / "data", train=6, val=4)
    changes = {"eval_crop_ratio": 0.9, "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.3), "input_size": 36}
    train(tiny(data_path=str(root / "data"), output_dir=str(root / "run"), batch_size=6, **changes), say=quiet)
    assert run(app, ["export", str(root / "run" / "checkpoint.pth"), "--output-dir", str(root / "out")]) == 0
    return root


def refused(kind: type[LapeError], *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        predict(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_onnx_file_classifies_as_the_checkpoint(work, monkeypatch):
    images = image_files([work / "data" / "val"])
    wanted = predict(work / "run" / "checkpoint.pth", images, device="cpu")
    monkeypatch.setattr("lape.train.evaluate.read_checkpoint", lambda _path: pytest.fail("read a checkpoint"))
    found = predict(work / "out" / "model.onnx", [work / "data" / "val"], top_k=1)
    assert [one.path for one in found] == [one.path for one in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.classes == theirs.classes[:1]
        assert ours.probabilities == pytest.approx(theirs.probabilities[:1], abs=1e-5)


def test_each_exported_file_says_what_images_need(work):
    checkpoint = read_checkpoint(work / "run" / "checkpoint.pth")
    wanted = {"classes": ["cat", "dog"], "transform": transform_of(checkpoint).to_dict()}
    (stored,) = onnx.load(work / "out" / "model.onnx").metadata_props
    assert (stored.key, json.loads(stored.value)) == (DESCRIPTION, wanted)
    with zipfile.ZipFile(work / "out" / "model.pt2") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("lape.json"))
        assert json.loads(archive.read(name)) == wanted
    config = json.loads((work / "out" / "folder" / "config.json").read_text())
    assert {name: config[name] for name in wanted} == wanted


def test_a_pt2_file_is_not_read(work, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *_args, **_kwargs: pytest.fail("unpickled"))
    message = refused(CheckpointError, work / "out" / "model.pt2", [work / "data" / "val"])
    assert message.startswith(f"{work}/out/model.pt2 cannot be read without running what it says")


def described(work: Path, folder: Path, text: str | None) -> Path:
    """The exported ONNX file with another description."""
    graph = onnx.load(work / "out" / "model.onnx")
    onnx.helper.set_model_props(graph, {} if text is None else {DESCRIPTION: text})
    onnx.save(graph, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_file_without_a_description_needs_a_checkpoint_that_has_one(work, tmp_path):
    path, image = described(work, tmp_path, None), work / "data" / "val" / "cat" / "0.png"
    assert "give --described-by CHECKPOINT" in refused(CheckpointError, path, [image])
    checkpoint = work / "run" / "checkpoint.pth"
    (found,) = predict(path, [image], described_by=str(checkpoint))
    assert found == predict(work / "out" / "model.onnx", [image])[0]
    assert "is for .onnx files" in refused(LapeError, checkpoint, [image], described_by=str(checkpoint))
    assert "leave --device out" in refused(LapeError, path, [image], device="cuda")
    path = described(work, tmp_path, json.dumps({"classes": None, "transform": None}))  # of a model in memory
    assert "give --described-by CHECKPOINT" in refused(CheckpointError, path, [image])


TRANSFORM = {"input_size": 32, "crop_ratio": 1.0, "interpolation": "bicubic", "in_chans": 3}
TRANSFORM |= {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 10**5, "has a description that is none"),
        ("[1]", "has a description that is none (no mapping)"),
        (json.dumps({"classes": [1, 2]}), "says classes=a list, which is not a list of names: refused"),
        (json.dumps({"transform": {"input_size": 10**9}}), "which is not a transform"),
        (json.dumps({"transform": TRANSFORM}), "cannot classify images of shape (1, 3, 32, 32)"),
        (json.dumps({"transform": {"input_size": 36}}), "crop_ratio"),
    ],
)
def test_a_description_of_a_stranger_is_checked(work, tmp_path, text, expected):
    path = described(work, tmp_path, text)
    assert expected in refused(LapeError, path, [work / "data" / "val"])


def test_what_is_no_onnx_file_is_one_line(work, tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    assert "is not an ONNX file that can be run" in refused(CheckpointError, tmp_path / "text.onnx", ["a.png"])
    assert "no such file" in refused(CheckpointError, tmp_path / "missing.onnx", ["a.png"])
    values = onnx.helper.make_tensor_value_info
    ends = [values("x", 1, ["n", 3, 32, 32])], [values("y", 1, ["n", 3, 32, 32])]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", *ends)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, {DESCRIPTION: json.dumps({"transform": TRANSFORM})})
    onnx.save(model, tmp_path / "relu.onnx")
    message = refused(CheckpointError, tmp_path / "relu.onnx", ["a.png"])
    assert message.endswith("gives (1, 3, 32, 32) for one image, not one row of class logits")


def test_weights_in_another_file_are_not_read(work, tmp_path):
    """A file may name any other as its weights."""
    (tmp_path / "weights").write_bytes(bytes(8))
    graph = onnx.load(work / "out" / "model.onnx")
    weights = next(one for one in graph.graph.initializer if len(one.raw_data) > 1000)
    onnx.external_data_helper.set_external_data(weights, "weights", offset=0, length=len(weights.raw_data))
    (tmp_path / "weights").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    message = refused(CheckpointError, tmp_path / "model.onnx", [work / "data" / "val"])
    assert "is not an ONNX file that can be run" in message


def test_export_checks_on_the_data_of_the_run_while_it_is_there(work, tmp_path, capsys):
    shutil.copytree(work, tmp_path / "trained")
    content = torch.load(work / "run" / "checkpoint.pth", weights_only=True)
    content["args"]["data_path"] = str(tmp_path / "trained" / "data")
    torch.save(content, tmp_path / "a.pth")
    command = ["export", str(tmp_path / "a.pth"), "--output-dir", str(tmp_path / "out"), "--formats", "folder"]

    def said(*more: str) -> str:
        assert run(app, [*command, *more]) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert said() == f"checked on 8 images of {tmp_path}/trained/data (2 classes, 8 validation images)"
    assert said("--data-path", "") == "checked on 64 images of packaged digits (8x8, UCI)"
    assert said("--data-path", str(work / "data")).startswith(f"checked on 8 images of {work}/data (")
    shutil.rmtree(tmp_path / "trained")
    gone = f"checked on 64 images of packaged digits (8x8, UCI), since {tmp_path}/trained/data is not there"
    assert said() == gone


def test_the_command_classifies_a_folder(work, tmp_path, capsys):
    shutil.copytree(work / "data" / "val", tmp_path / "in")
    (tmp_path / "in" / "cat" / "9.png").write_bytes(b"no image")
    command = ["predict", str(tmp_path / "in"), "--checkpoint", str(work / "out" / "model.onnx")]
    assert run(app, [*command, "--json", str(tmp_path / "in" / "found.json"), "--top-k", "1"]) == USER_ERROR
    assert "1 of 9 images are left out" in capsys.readouterr().err
    rows = json.loads((tmp_path / "in" / "found.json").read_text())
    assert [row["image"] for row in rows] == [
        f"{tmp_path}/in/{name}/{number}.png" for name in ("cat", "dog") for number in range(4)
    ]
    before = (tmp_path / "in" / "dog" / "0.png").read_bytes()
    assert run(app, [*command, "--csv", str(tmp_path / "in" / "dog" / "0.png")]) == USER_ERROR
    assert (tmp_path / "in" / "dog" / "0.png").read_bytes() == before
