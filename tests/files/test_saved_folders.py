"""Every folder that `lape.save` writes can be evaluated, used for prediction and looked at, whatever its library."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import lape
from lape.cli import app as cli
from lape.cli import commands
from lape.data.augment import EvalTransform
from lape.data.loaders import eval_loader
from lape.data.open import load_data
from lape.errors import CheckpointError, DataError
from lape.options import PredictOptions
from lape.recipe import Recipe
from lape.train.evaluate import PREDICT_BATCH, evaluate, evaluate_checkpoint, predict

CPU = torch.device("cpu")
TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}


def of_timm(**kwargs):
    return lape.create_model("vit_tiny_patch16_224", **{**TIMM, **kwargs})


def of_huggingface(name: str, join: str = "LaPE", pe: str | None = None, **config):
    transformers = pytest.importorskip("transformers")
    settings = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "num_labels": 10, **config}
    cls = getattr(transformers, name)
    return lape.apply_(cls(cls.config_class(**settings)), join, pe)


def of_torchvision(join: str = "LaPE"):
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return lape.apply_(VisionTransformer(**sizes, num_classes=10), join)


def gated():
    model = of_timm(warm_start=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("lape.gate"):
                parameter += 0.5
    return model


MODELS = {
    "timm": of_timm,
    "timm, grey, no image size said": lambda: lape.create_model("vit_tiny_patch16_224", depth=1, in_chans=1),
    "timm, warm start": gated,
    "timm, folded": lambda: lape.fold_(of_timm()),
    "timm, warm start, folded": lambda: lape.fold_(gated()),
    "timm, relative bias, folded": lambda: lape.fold_(of_timm(pe="2D_RPE")),
    "transformers ViT": lambda: of_huggingface("ViTForImageClassification"),
    "transformers ViT, grey": lambda: of_huggingface("ViTForImageClassification", num_channels=1),
    "transformers ViT, folded": lambda: lape.fold_(of_huggingface("ViTForImageClassification")),
    "transformers ViT, basic": lambda: of_huggingface("ViTForImageClassification", "basic"),
    "transformers DINOv2": lambda: of_huggingface("Dinov2ForImageClassification", "unshare"),
    "torchvision": of_torchvision,
    "torchvision, folded": lambda: lape.fold_(of_torchvision()),
}


@pytest.fixture(params=list(MODELS))
def saved(request, tmp_path):
    """(the model, its folder)"""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for name, tensor in model.state_dict().items():  # a position that shows, and a head that is not zero
        if any(part in name for part in ("pos", "lape.", "head")) and tensor.is_floating_point():
            tensor += 0.3 * torch.randn_like(tensor)
    return model, lape.save(model, tmp_path / "saved")


def logits(model, pixels):
    with torch.no_grad():
        output = model(pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def channels(model) -> int:
    return next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)).in_channels


def test_arguments_that_no_weight_shows_come_back(tmp_path):
    import timm
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    foreign = lape.apply_(VisionTransformer(**sizes, dropout=0.1, attention_dropout=0.2))
    block = lape.load(lape.save(foreign, tmp_path / "torchvision")).encoder.layers[0]
    assert (block.self_attention.dropout, block.dropout.p) == (0.2, 0.1)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 4, "pre_norm": True}
    ours = lape.apply_(timm.create_model("vit_tiny_patch16_224", **small)).eval()
    loaded, x = lape.load(lape.save(ours, tmp_path / "timm")), torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(x), ours(x))


def test_evaluation_needs_nothing_but_the_folder(saved, monkeypatch):
    import lape.data.sets

    model, folder = saved
    height = lape.grid(model)[0] * lape.convert.converted.conversion_of(model).anatomy.patch_size[0]
    few = lape.data.sets.digits
    monkeypatch.setattr(lape.data.sets, "digits", lambda split: tuple(part[:24] for part in few(split)))
    monkeypatch.setattr(lape.data.sets, "_STILL", {})  # or later tests would find 24 images there
    recipe = Recipe(resume=str(folder), device="cpu", num_workers=0)
    found = evaluate_checkpoint(recipe, say=str)
    own = recipe.replace(input_size=height, in_chans=channels(model), resume="")
    wanted = evaluate(model, eval_loader(load_data(own, train=False).val, own), CPU)
    assert found == wanted


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.usefixtures("drafts")
def test_prediction_and_pictures_of_any_folder(saved, tmp_path, capsys):
    model, folder = saved
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    (found,) = predict(folder, [path], device="cpu", top_k=10)
    side = lape.grid(model)[0] * lape.convert.converted.conversion_of(model).anatomy.patch_size[0]
    grey = {"mean": (0.449,), "std": (0.226,), "in_chans": 1} if channels(model) == 1 else {}
    pixels = EvalTransform(side, **grey).build()(Image.open(path))[None]
    wanted = logits(model, pixels).softmax(1)[0].sort(descending=True)
    assert found.probabilities == pytest.approx(wanted.values[:10].tolist(), abs=1e-6)
    labels = getattr(getattr(model, "config", None), "id2label", None) or {i: str(i) for i in range(1000)}
    assert found.classes == [labels[i] for i in wanted.indices[:10].tolist()]
    if side == 16:
        pictures = ["--save-dir", str(tmp_path / "p"), "--dpi", "40"]
        for where in (["--html", str(tmp_path / "p.html"), "--image", str(path)], pictures):
            assert cli.run(cli.app, ["visualize", str(folder), *where]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("make", ["timm", "timm, warm start", "transformers ViT", "torchvision"])
def test_another_image_size_resamples_the_table(make, tmp_path):
    model = MODELS[make]()
    folder = lape.save(model, tmp_path / "saved")
    said: list[str] = []
    evaluate_checkpoint(
        Recipe(resume=str(folder), device="cpu", num_workers=0, input_size=24, batch_size=300), say=said.append
    )
    assert any("grid 6 x 6" in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_huggingface("ViTModel"), "without a classifier"),
        (lambda: of_huggingface("ViTForMaskedImageModeling", encoder_stride=4), "without a classifier"),
        (lambda: of_timm(num_classes=0), "without a classifier"),
    ],
)
@pytest.mark.filterwarnings("ignore:logits attribute is deprecated")  # transformers 4
@pytest.mark.usefixtures("drafts")
def test_a_model_without_a_classifier_is_refused_in_one_line(make, reason, tmp_path, capsys):
    folder = lape.save(make(), tmp_path / "saved")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    capsys.readouterr()  # what packages say when they are imported
    for tokens in (["eval", str(folder)], ["predict", str(tmp_path / "a.png"), "--checkpoint", str(folder)]):
        assert cli.run(cli.app, [*tokens, "--device", "cpu"]) == cli.USER_ERROR
        shown = capsys.readouterr()
        assert shown.out == ""
        assert reason in shown.err
        assert "lape visualize" in shown.err
        assert shown.err.count("\n") == 1
    assert cli.run(cli.app, ["visualize", str(folder), "--save-dir", str(tmp_path / "pictures"), "--dpi", "40"]) == 0


def test_what_a_folder_cannot_be_is_refused(tmp_path):
    folded = lape.save(lape.fold_(of_timm()), tmp_path / "folded")
    with pytest.raises(CheckpointError, match=r"is folded.*16 x 16 pixels; leave --input-size out"):
        evaluate_checkpoint(Recipe(resume=str(folded), device="cpu", input_size=24), say=str)
    with pytest.raises(CheckpointError, match="in_chans=1 contradicts"):
        evaluate_checkpoint(Recipe(resume=str(folded), device="cpu", in_chans=1), say=str)
    foreign = lape.save(of_torchvision(), tmp_path / "torchvision")
    with pytest.raises(CheckpointError, match="leave model_kwargs out"):
        evaluate_checkpoint(Recipe(resume=str(foreign), device="cpu", model_kwargs={"depth": 2}), say=str)
    few = lape.save(of_huggingface("ViTForImageClassification", num_labels=4), tmp_path / "few")
    with pytest.raises(DataError, match=r"10 classes.*4 outputs"):
        evaluate_checkpoint(Recipe(resume=str(few), device="cpu"), say=str)
    with pytest.raises(lape.LapeError, match="--finetune"):
        commands.train(resume=str(foreign), device="cpu")


def test_images_that_are_not_square_are_for_predict(tmp_path):
    model = of_timm(img_size=(8, 24)).eval()
    folder = lape.save(model, tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"8 x 24 pixels.*lape predict"):
        evaluate_checkpoint(Recipe(resume=str(folder), device="cpu"), say=str)
    Image.new("RGB", (48, 16), (200, 30, 90)).save(tmp_path / "a.png")
    (found,) = predict(folder, [tmp_path / "a.png"], device="cpu", top_k=1)
    pixels = EvalTransform((8, 24)).build()(Image.open(tmp_path / "a.png"))[None]
    assert found.probabilities == pytest.approx(logits(model, pixels).softmax(1).max(1).values.tolist(), abs=1e-6)


def test_many_images_are_decoded_in_batches(tmp_path, monkeypatch, capsys):
    """The first result is there before the last image is decoded, and equal to that of the image alone."""
    import lape.train.evaluate
    from lape.train.evaluate import predictions

    folder = lape.save(of_timm(), tmp_path / "saved")
    paths = [tmp_path / f"{i}.png" for i in range(PREDICT_BATCH + 3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (16, 16), (7 * i % 255, 50, 200)).save(path)
    alone = [predict(folder, [path], device="cpu", top_k=2)[0] for path in (paths[1], paths[-1])]
    decoded, load_image = [], lape.train.evaluate.load_image
    monkeypatch.setattr(
        lape.train.evaluate, "load_image", lambda path, chans: decoded.append(path) or load_image(path, chans)
    )
    found = predictions(paths, PredictOptions(checkpoint=str(folder), device="cpu", top_k=2))
    first = next(found)
    assert decoded == paths[:PREDICT_BATCH]
    rest = list(found)
    assert [p.path for p in (first, *rest)] == [str(path) for path in paths]
    for one, several in zip(alone, (rest[0], rest[-1]), strict=True):
        assert one.classes == several.classes
        assert one.probabilities == pytest.approx(several.probabilities, abs=1e-6)
    tokens = ["predict", *map(str, paths), "--checkpoint", str(folder), "--json", str(tmp_path / "p.json")]
    assert cli.run(cli.app, [*tokens, "--top-k", "2"]) == 0
    assert len(json.loads((tmp_path / "p.json").read_text())) == 2 * len(paths)
    assert capsys.readouterr().out.count(".png") == len(paths)


def test_a_missing_image_costs_no_work_and_neither_does_a_missing_folder(tmp_path, monkeypatch, capsys):
    import lape.train.evaluate

    folder = lape.save(of_timm(), tmp_path / "saved")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(lape.train.evaluate, "load_image", lambda *_: pytest.fail("decoded"))
    for tokens in ([str(tmp_path / "missing.png")], ["--json", str(tmp_path / "none" / "p.json")]):
        command = ["predict", str(tmp_path / "a.png"), *tokens, "--checkpoint", str(folder)]
        assert cli.run(cli.app, command) == cli.USER_ERROR
        message = capsys.readouterr().err
        assert "missing.png" in message or "no folder" in message


@pytest.mark.slow
@pytest.mark.usefixtures("drafts")
def test_pictures_of_an_earlier_drawing_are_named(tmp_path, capsys):
    folder = lape.save(of_timm(), tmp_path / "saved")
    command = ["visualize", str(folder), "--save-dir", str(tmp_path / "p"), "--model-name", "m", "--dpi", "40"]
    (tmp_path / "p" / "m").mkdir(parents=True)
    (tmp_path / "p" / "m" / "notes.txt").write_text("mine")
    for token, left in (("1", ""), ("1", ""), ("2", "2 of an earlier drawing"), ("2", "2 of an earlier drawing")):
        assert cli.run(cli.app, [*command, "--token", token]) == 0
        said = capsys.readouterr().out
        assert left in said
        assert ("LaPE_layer0_sim_1thToken.jpg" in said) == bool(left)
        assert "notes" not in said


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_in_the_model_that_was_saved(attention, tmp_path):
    """In transformers 4 the two are modules of different classes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ViTModel._from_config(transformers.ViTConfig(**sizes), attn_implementation=attention)
    loaded = lape.load(lape.save(lape.apply_(model), tmp_path / "model"))
    assert loaded.config._attn_implementation == attention
    assert [type(module).__name__ for module in loaded.modules()] == [type(m).__name__ for m in model.modules()]


def test_what_transformers_4_notes_in_a_configuration_is_no_entry(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = lape.apply_(transformers.ViTModel(transformers.ViTConfig(**sizes)))
    lape.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    for folder in (tmp_path / "saved", tmp_path / "pretrained"):
        config = json.loads((folder / "config.json").read_text())
        entries = config.get("model_kwargs", config)
        assert "_attn_implementation_autoset" not in config.get("model_kwargs", ())
        entries["_attn_implementation_autoset"] = True
        (config.get("lape") or config)["sha256"].pop("config.json")
        (folder / "config.json").write_text(json.dumps(config))
        classes = [type(module).__name__ for module in model.modules()]
        assert [type(module).__name__ for module in lape.load(folder).modules()] == classes
