"""Exact evaluation: every image once, any number of processes, and the checkpoint decides what it knows."""

import dataclasses
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import run_together
from torch import nn

import lape
from lape.data.augment import eval_transform
from lape.data.loaders import eval_loader
from lape.data.open import load_data
from lape.errors import CheckpointError, DataError, LapeError
from lape.files.exported import all_names
from lape.recipe import Recipe
from lape.train.evaluate import autocast, evaluate, evaluate_checkpoint, predict

KWARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
CPU = torch.device("cpu")


def tiny(**changes) -> Recipe:
    settings = {"model": "vit_tiny_patch16_224", "model_kwargs": KWARGS, "input_size": 16, "join_type": "LaPE"}
    return Recipe(**{**settings, "device": "cpu", "num_workers": 0, "batch_size": 64, **changes})


def write_pth(path, recipe: Recipe, *, num_classes: int = 10, **entries):
    """A checkpoint as training writes it, of an untrained model."""
    torch.manual_seed(1)
    model = lape.create_model(
        recipe.model,
        recipe.join_type,
        recipe.pe,
        img_size=recipe.input_size,
        num_classes=num_classes,
        in_chans=recipe.in_chans,
        **recipe.model_kwargs,
    )
    content = {"model": lape.to_reference_state_dict(model), "args": recipe.model_dump(mode="json"), **entries}
    torch.save(content, path)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """Two classes, 7 images in val: divides by no number of processes."""
    random = np.random.default_rng(0)
    for split, counts in {"train": (2, 2), "val": (4, 3)}.items():
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


class Table(nn.Module):
    """A "model" whose logits for image i are row i of a table; the image carries its number."""

    def __init__(self, logits_nC):
        super().__init__()
        self.logits_nC = logits_nC

    def forward(self, images):
        return self.logits_nC[images[:, 0].long()]


@pytest.mark.parametrize("classes", [3, 7])
def test_metrics_equal_the_written_formulas(classes):
    n, batch = 23, 6
    logits = torch.randn(n, classes, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(n) % classes
    items = torch.utils.data.TensorDataset(torch.arange(n)[:, None].float(), targets)
    found = evaluate(Table(logits), torch.utils.data.DataLoader(items, batch_size=batch), CPU)
    rank_of_target = (logits > logits.gather(1, targets[:, None])).sum(1)
    losses = -torch.log_softmax(logits.double(), 1)[torch.arange(n), targets]
    assert found.count == n
    assert found.acc1 == pytest.approx(100 * (rank_of_target < 1).double().mean().item(), abs=1e-9)
    assert found.acc5 == pytest.approx(100 * (rank_of_target < 5).double().mean().item(), abs=1e-9)
    assert found.loss == pytest.approx(losses.mean().item(), abs=1e-6)
    means = [losses[first : first + batch].mean().item() for first in range(0, n, batch)]
    assert found.batch_loss == pytest.approx(sum(means) / len(means), abs=1e-6)


def test_an_image_that_is_missed_is_noticed():
    items = torch.utils.data.TensorDataset(torch.arange(5)[:, None].float(), torch.zeros(5, dtype=torch.long))
    loader = torch.utils.data.DataLoader(items, batch_size=2, drop_last=True)
    with pytest.raises(AssertionError, match="1 of 5 images"):
        evaluate(Table(torch.zeros(5, 3)), loader, CPU)


def evaluate_in_a_share(settings: dict, folder: Path) -> None:
    metrics = evaluate_checkpoint(Recipe(**settings), say=lambda _text: None)
    name = f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.json"
    (folder / name).write_text(json.dumps(dataclasses.asdict(metrics)))


@pytest.mark.distributed
def test_one_two_and_three_processes_give_the_same_numbers(tmp_path):
    write_pth(tmp_path / "a.pth", tiny())
    settings = {"resume": str(tmp_path / "a.pth"), "dist_eval": True, "device": "cpu", "batch_size": 30}
    alone = evaluate_checkpoint(Recipe(**settings), say=lambda _text: None)
    assert alone.count == 359
    for processes in (2, 3):
        run_together(processes, evaluate_in_a_share, settings, tmp_path)
    for processes, rank in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
        told = json.loads((tmp_path / f"{processes}-{rank}.json").read_text())
        assert (told["acc1"], told["acc5"], told["count"]) == (alone.acc1, alone.acc5, 359)
        assert told["loss"] == pytest.approx(alone.loss, abs=1e-6)
        assert told["batch_loss"] == pytest.approx(alone.batch_loss, abs=1e-6)


def test_the_file_decides_what_no_flag_says(tmp_path, capsys):
    trained = tiny(join_type="LaPE-sharing", pe="2D_sin", in_chans=1, mean=[0.5], std=[0.4])
    model = write_pth(tmp_path / "a.pth", trained)
    evaluate_checkpoint(Recipe(resume=str(tmp_path / "a.pth"), device="cpu", num_workers=0))
    data = load_data(trained, train=False)
    expected = evaluate(model, eval_loader(data.val, trained), CPU)
    lines = capsys.readouterr().out.splitlines()
    assert str(expected) in lines
    assert f"Accuracy of the network on the 359 test images: {expected.acc1:.1f}%" in lines


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"join_type": "basic"}, ("basic", "LaPE")),
        ({"pe": "2D_sin"}, ("2D_sin", "learnable")),
        ({"model": "vit_small_patch16_224"}, ("vit_small_patch16_224", "vit_tiny_patch16_224")),
    ],
)
def test_a_flag_that_contradicts_the_file_is_named_with_both(tmp_path, given, named):
    write_pth(tmp_path / "a.pth", tiny())
    with pytest.raises(CheckpointError) as caught:
        evaluate_checkpoint(Recipe(resume=str(tmp_path / "a.pth"), device="cpu", **given))
    assert all(word in str(caught.value) for word in (*named, "a.pth"))
    assert "\n" not in str(caught.value)


def test_names_are_compared_without_regard_to_case(tmp_path):
    write_pth(tmp_path / "a.pth", tiny())
    given = {"join_type": "lape", "pe": "LEARNABLE", "num_workers": 0}
    assert evaluate_checkpoint(Recipe(resume=str(tmp_path / "a.pth"), device="cpu", **given), say=str).count == 359


def test_evaluation_at_another_resolution_resamples_the_table(tmp_path):
    write_pth(tmp_path / "a.pth", tiny())
    said: list[str] = []
    recipe = Recipe(resume=str(tmp_path / "a.pth"), device="cpu", num_workers=0, input_size=24)
    evaluate_checkpoint(recipe, say=said.append)
    assert any("grid 6 x 6" in text for text in said)


def test_a_head_with_more_outputs_than_the_data_has_classes_is_allowed(tmp_path, folder):
    write_pth(tmp_path / "a.pth", tiny(), num_classes=1000)
    found = evaluate_checkpoint(
        Recipe(resume=str(tmp_path / "a.pth"), data_path=str(folder), device="cpu", num_workers=0), say=str
    )
    assert found.count == 7


def test_a_head_with_fewer_outputs_is_refused(tmp_path):
    write_pth(tmp_path / "a.pth", tiny(), num_classes=4)
    with pytest.raises(DataError, match=r"10 classes.*4 outputs"):
        evaluate_checkpoint(Recipe(resume=str(tmp_path / "a.pth"), device="cpu"), say=str)


def test_other_classes_than_those_it_was_trained_on_are_refused(tmp_path, folder):
    write_pth(tmp_path / "a.pth", tiny(), num_classes=2, classes=["cat", "horse"])
    with pytest.raises(DataError, match=r"not trained on \(dog; it knows 2: cat, horse\)"):
        evaluate_checkpoint(Recipe(resume=str(tmp_path / "a.pth"), data_path=str(folder), device="cpu"), say=str)


def test_evaluation_needs_a_checkpoint():
    with pytest.raises(CheckpointError, match="--resume"):
        evaluate_checkpoint(Recipe(eval=True, device="cpu"))


def test_half_precision_needs_cuda():
    with pytest.raises(LapeError, match="--amp bf16"):
        autocast("fp16", CPU)
    with autocast("auto", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with autocast("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_predictions_use_the_stored_transform_and_names(tmp_path, folder):
    recipe = tiny(eval_crop_ratio=0.5, mean=[0.4, 0.4, 0.4], std=[0.3, 0.3, 0.3], input_size=36)
    transform = eval_transform(recipe)
    model = write_pth(
        tmp_path / "a.pth", recipe, num_classes=3, classes=["ant", "bee", "cat"], transform=transform.to_dict()
    )
    path = folder / "val" / "dog" / "0.png"
    first, second = predict(tmp_path / "a.pth", [path, folder / "val" / "cat" / "0.png"], device="cpu", top_k=9)
    with torch.no_grad():
        expected = F.softmax(model(transform.build()(Image.open(path))[None]), dim=1)[0]
    order = expected.argsort(descending=True)
    assert first.path == str(path)
    assert first.classes == [["ant", "bee", "cat"][int(i)] for i in order]
    assert first.probabilities == pytest.approx(expected[order].tolist(), abs=1e-6)
    assert second.path != first.path


def test_each_output_has_one_name_its_number_where_there_is_none():
    assert all_names(["ant", "bee"], 2) == ["ant", "bee"]
    assert all_names(["ant"], 3) == ["ant", "1", "2"]
    assert all_names(None, 2) == ["0", "1"]
    assert all_names(["ant", "bee", "cat"], 2) == ["ant", "bee"]


def test_predictions_of_a_saved_folder(tmp_path, folder):
    torch.manual_seed(0)
    model = lape.create_model("vit_tiny_patch16_224", img_size=16, num_classes=2, **KWARGS)
    transform = eval_transform(tiny()).to_dict()
    lape.save(model, tmp_path / "saved", classes=["cat", "dog"], transform=transform)
    (found,) = predict(tmp_path / "saved", [folder / "val" / "dog" / "0.png"], device="cpu", top_k=1)
    assert found.classes[0] in ("cat", "dog")
    assert len(found.probabilities) == 1


def test_a_corrupt_image_is_named_before_anything_is_classified(tmp_path, folder):
    write_pth(tmp_path / "a.pth", tiny(), num_classes=2)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        predict(tmp_path / "a.pth", [folder / "val" / "dog" / "0.png", bad], device="cpu")


@pytest.mark.slow
def test_the_authors_checkpoint_gives_the_authors_numbers(tmp_path, shared):
    with tarfile.open(shared / "data" / "cifar10-jpeg.tar.gz") as archive:
        members = [m for m in archive.getmembers() if m.isfile() and "/val/" in f"/{m.name}"]
        classes = sorted({m.name.split("/")[-2] for m in members})
        chosen = []
        for name in classes:
            chosen += sorted((m for m in members if m.name.split("/")[-2] == name), key=lambda m: m.name)[:100]
        archive.extractall(tmp_path, members=chosen, filter="data")
    resume = str(shared / "reference" / "deit_tiny_lape_64px.pth")
    said: list[str] = []
    settings = {"data_path": str(next(tmp_path.rglob("val")).parent), "model": "deit_tiny_patch16_224"}
    recipe = Recipe(resume=resume, device="cpu", num_workers=0, input_size=64, join_type="LaPE", **settings)
    evaluate_checkpoint(recipe, say=said.append)
    assert "* Acc@1 42.200 Acc@5 87.400 loss 1.619" in said
    assert "Accuracy of the network on the 1000 test images: 42.2%" in said


def test_a_forgotten_data_path_is_not_taken_for_the_digits(tmp_path):
    model = "vit_tiny_patch16_224"
    made = lape.create_model(model, img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=10)
    args = {"model": model, "join_type": "LaPE", "pe": "learnable", "input_size": 16, "data_path": "photographs"}
    torch.save({"model": lape.to_reference_state_dict(made), "args": args}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"no --data-path was given, and .*a\.pth was not trained on the packaged"
    ):
        evaluate_checkpoint(Recipe(resume=str(tmp_path / "a.pth"), device="cpu"), say=str)
