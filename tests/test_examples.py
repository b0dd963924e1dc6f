"""The examples of dense tasks: they run, learn with finite losses, and their position gets gradients."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from formula import of_position
from pictures import write_folder

import lape
from lape.errors import LapeError

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = ["--steps", "2", "--batch-size", "2", "--scenes", "4", "2"]


@pytest.fixture
def example(monkeypatch):
    """example(name): the module of an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_scenes_are_the_same_again_and_their_boxes_hold_their_masks(example):
    make = example("scenes").scenes
    first, again, other = make("val", 5, (48, 64)), make("val", 5, (48, 64)), make("train", 5, (48, 64))
    for scene, same, train in zip(first, again, other, strict=True):
        assert torch.equal(scene.pixels_3HW, same.pixels_3HW)
        assert not torch.equal(scene.pixels_3HW, train.pixels_3HW)
        assert scene.pixels_3HW.shape == (3, 48, 64)
        assert len(scene.boxes_k4) == len(scene.labels_k) >= 1
        inside = torch.zeros_like(scene.mask_HW, dtype=torch.bool)
        for box, label in zip(scene.boxes_k4.int().tolist(), scene.labels_k.tolist(), strict=True):
            part = scene.mask_HW[box[1] : box[3], box[0] : box[2]]
            assert set(part.unique().tolist()) <= {0, label}
            assert (part > 0).any(0)[[0, -1]].all(), "the box is tight"
            inside[box[1] : box[3], box[0] : box[2]] = True
        assert not scene.mask_HW[~inside].any()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "score"), [("segmentation", "miou"), ("detection", "ap50")])
def test_an_example_runs_both_joins_and_writes_what_it_found(example, name, score, tmp_path):
    if name == "segmentation":
        pytest.importorskip("transformers")
    module = example(name)
    found = module.main([*FEW, "--size", "48", "64", "--output", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())["joins"] == found["joins"]
    assert list(found["joins"]) == ["basic", "LaPE"]
    for join in found["joins"].values():
        (run,) = join["runs"]
        assert len(run["loss"]) == 2
        assert all(map(math.isfinite, run["loss"]))
        assert 0 <= join[score]["mean"] <= 100
    with pytest.raises(LapeError, match="--pretrained names one"):
        module.main([*FEW, "--pretrained", str(tmp_path / "none"), "--output", str(tmp_path / "x.json")])


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_the_position_of_the_segmenter_learns(example, size):
    pytest.importorskip("transformers")
    module = example("segmentation")
    given = module.parse(["--layers", "1", "3", "--width", "32"])
    model = module.build(given, "LaPE").train()
    scenes = example("scenes").scenes("train", 2, size)
    pixels, mask = module.batch(scenes)
    logits = model(pixels).logits
    assert logits.shape == (2, 11, *size)
    torch.nn.functional.cross_entropy(logits, mask).backward()
    check_gradients(model)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_the_position_of_the_detector_learns(example, size):
    module = example("detection")
    given = module.parse(["--size", "64", "64", "--layers", "0", "-1"])
    model = module.build(given, "LaPE").train()
    maps = model.backbone(torch.rand(2, 3, *size))
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [
        (size[0] // stride, size[1] // stride) for stride in (4, 8, 16)
    ]
    scenes = example("scenes").scenes("train", 2, size)
    targets = [{"boxes": scene.boxes_k4, "labels": scene.labels_k} for scene in scenes]
    losses = model([scene.pixels_3HW for scene in scenes], targets)
    sum(losses.values()).backward()
    check_gradients(model)


def check_gradients(model):
    new = of_position(model)
    assert len(new) == 1 + 2 * lape.describe(model).blocks
    for name, parameter in new.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_average_precision_is_the_area_under_the_curve(example):
    ap = example("detection").average_precision
    assert ap([(0.9, True), (0.8, True)], 2) == 1
    assert ap([(0.9, False), (0.8, True)], 1) == 0.5
    assert ap([(0.9, True), (0.8, False), (0.7, True)], 4) == pytest.approx((1 + 2 / 3) / 4)
    assert ap([], 3) == 0


def test_a_perfect_detector_and_segmenter_score_100(example):
    detection, segmentation = example("detection"), example("segmentation")
    chosen = example("scenes").scenes("val", 8, (48, 48))

    class Oracle(torch.nn.Module):
        def forward(self, pixels):
            if isinstance(pixels, list):
                place = {id(s.pixels_3HW): s for s in chosen}
                found = [place[id(p)] for p in pixels]
                return [
                    {"boxes": s.boxes_k4, "labels": s.labels_k, "scores": torch.ones(len(s.labels_k))} for s in found
                ]
            masks = torch.stack([s.mask_HW for s in chosen])
            logits = torch.nn.functional.one_hot(masks, 11).movedim(-1, 1).float()
            return type("Output", (), {"logits": logits})()

    assert detection.measure(Oracle(), chosen)["ap50"] == 100
    assert detection.measure(Oracle(), chosen)["recall50"] == 100
    assert segmentation.measure(Oracle(), chosen)["miou"] == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sound", "video"])
@pytest.mark.usefixtures("drafts")
def test_sound_and_video_train_each_way_and_show_positions_along_each_axis(example, task, tmp_path):
    pytest.importorskip("transformers", minversion="5.20")
    module = example("sound_and_video")
    places = ["--output", str(tmp_path / "found.json"), "--pictures", str(tmp_path / "pictures")]
    found = module.main([task, "--steps", "40", "--batch-size", "8", "--lr", "0.003", *places])
    assert json.loads((tmp_path / "found.json").read_text())["ways"] == found["ways"]
    assert len(found["grid"]) == len(module.AXES[task])
    assert {"LaPE", "basic", "comparison_centre.png"} <= {path.name for path in (tmp_path / "pictures").iterdir()}
    for way in found["ways"].values():
        (run,) = way["runs"]
        assert min(run["loss"]) < run["loss"][0]
        assert [len(layers) for layers in run["alike"]] == [3] * len(found["grid"])
        assert all(-1 <= value <= 1 for layers in run["alike"] for value in layers)


def weights(kind: str, folder: Path) -> list[str]:
    """Pretrained weights, made on the spot, and the arguments that name them."""
    if kind == "DeiT":
        import timm

        torch.save({"model": timm.create_model("deit_tiny_patch16_224", img_size=32).state_dict()}, folder / "deit.pth")
        return [str(folder / "deit.pth"), "--model", "deit_tiny_patch16_224"]
    transformers = pytest.importorskip("transformers", minversion="5.20")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = {"DINOv2": "Dinov2Config", "DINOv3": "DINOv3ViTConfig"}[kind]
    model = {"DINOv2": "Dinov2Model", "DINOv3": "DINOv3ViTModel"}[kind]
    getattr(transformers, model)(getattr(transformers, config)(**small)).save_pretrained(folder / "saved")
    return [str(folder / "saved")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DeiT", "DINOv2", "DINOv3"])
def test_local_weights_are_fine_tuned_each_way(example, kind, tmp_path):
    module = example("finetune_pretrained")
    few = ["--size", "32", "--head-epochs", "1", "--epochs", "1", "--batch-size", "4"]
    few += ["--data-path", str(write_folder(tmp_path / "images")), "--output", str(tmp_path / "found.json")]
    given = [*weights(kind, tmp_path), *few]
    found = module.main(given)
    assert list(found["ways"]) == list(module.WITHOUT if kind == "DINOv3" else module.WITH_TABLE)
    for way in found["ways"].values():
        assert 0 <= way["runs"][0]["head"] <= 100
        assert 0 <= way["all"]["mean"] <= 100
    with pytest.raises(LapeError, match="name weights on this machine"):
        module.main([str(tmp_path / "none"), *few])


def test_a_warm_start_begins_as_the_pretrained_model(example, tmp_path):
    module = example("finetune_pretrained")
    given = module.parse([*weights("DeiT", tmp_path), "--size", "32"])
    torch.manual_seed(0)
    plain = module.load(given, 5).eval()
    torch.manual_seed(0)
    warm, x = lape.apply_(module.load(given, 5).eval(), warm_start=True), torch.randn(2, 3, 32, 32)
    assert torch.equal(warm(x), plain(x))
    assert torch.equal(plain.pos_embed, torch.load(given.weights)["model"]["pos_embed"])
