"""Life with transformers: its Trainer trains a converted model, and save_pretrained loses nothing of it."""

import copy
import json
import warnings

import pytest
import torch
from formula import of_position

import lape
from lape.data.sets import digits
from lape.errors import CheckpointError
from lape.files.read import read_checkpoint
from lape.recipe import Recipe
from lape.train.evaluate import evaluate_checkpoint, predict

transformers = pytest.importorskip("transformers")

NAMES = ("ViTForImageClassification", "Dinov2ForImageClassification")


def made(name: str = NAMES[0], **changes):
    settings = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "intermediate_size": 32, "num_labels": 10, **changes}
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**settings)).eval()


def moved(model):
    """Every weight away from where it starts, LN' and gates too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(count: int = 4):
    return torch.from_numpy(digits("val")[0][:count, None] / 255.0).float()


def logits(model):
    with torch.no_grad():
        return model(images()).logits


CONVERSIONS = {
    "LaPE": lambda model: lape.apply_(model, "LaPE"),
    "LaPE-sharing": lambda model: lape.apply_(model, "LaPE-sharing"),
    "unshare": lambda model: lape.apply_(model, "unshare"),
    "basic": lambda model: lape.apply_(model, "basic", "2D_sin"),
    "relative bias": lambda model: lape.apply_(model, "LaPE", "2D_RPE"),
    "warm start": lambda model: lape.apply_(model, "LaPE", warm_start=True),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
def test_what_save_pretrained_writes_lape_loads(name, conversion, tmp_path):
    if conversion == "relative bias" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("attention takes no mask per head in transformers 4")
    model = moved(CONVERSIONS[conversion](made(name)))
    model.save_pretrained(tmp_path / "saved")
    again = lape.load(tmp_path / "saved")
    assert str(lape.describe(again)) == str(lape.describe(model))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(again), logits(model))
    assert not hasattr(model.config, "lape")
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(lape.load(tmp_path / "copy")), logits(model))


def test_a_folded_model_and_small_shards(tmp_path):
    model = moved(lape.apply_(made(), "LaPE"))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(lape.load(tmp_path / "shards")), wanted)
    lape.fold_(model).save_pretrained(tmp_path / "folded")
    assert lape.describe(lape.load(tmp_path / "folded")).folded
    assert torch.allclose(logits(lape.load(tmp_path / "folded")), wanted, atol=1e-6)


def test_the_unconverted_class_says_that_it_is_another_model(tmp_path):
    model = moved(lape.apply_(made(), "LaPE"))
    model.save_pretrained(tmp_path / "saved")
    plain, told = type(made()).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not told["missing_keys"]  # all that is the host's is there, under its names
    assert set(told["unexpected_keys"]) == {key for key in model.state_dict() if "lape." in key}
    assert len(told["unexpected_keys"]) == 4
    assert torch.equal(plain.vit.embeddings.position_embeddings, model.vit.embeddings.position_embeddings)


def test_removed_means_the_hosts_own_save_pretrained(tmp_path):
    model = made()
    wanted = logits(model)
    lape.remove_(lape.apply_(model, "LaPE"))
    assert "save_pretrained" not in model.__dict__
    model.save_pretrained(tmp_path / "host")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "host")), wanted)
    with pytest.raises(CheckpointError, match="not converted: load it with its from_pretrained"):
        lape.load(tmp_path / "host")


def test_the_pretrained_way_in_and_out(tmp_path):
    """from_pretrained -> apply_ -> save_pretrained -> lape.load -> lape.save -> lape.load"""
    moved(made()).save_pretrained(tmp_path / "host")
    model = moved(lape.apply_(type(made()).from_pretrained(tmp_path / "host"), "LaPE", warm_start=True)).eval()
    model.save_pretrained(tmp_path / "first")
    lape.save(lape.load(tmp_path / "first"), tmp_path / "second")
    assert torch.equal(logits(lape.load(tmp_path / "second")), logits(model))
    assert "lape" not in json.loads((tmp_path / "second" / "config.json").read_text())["model_kwargs"]


def test_the_command_line_reads_it(tmp_path):
    from PIL import Image

    model = moved(lape.apply_(made(id2label={i: f"digit {i}" for i in range(10)}), "LaPE"))
    model.save_pretrained(tmp_path / "saved")
    recipe = Recipe(resume=str(tmp_path / "saved"), device="cpu", num_workers=0)
    assert evaluate_checkpoint(recipe, say=str).count == 359
    said: list[str] = []
    evaluate_checkpoint(recipe.replace(input_size=12), say=said.append)
    assert any("grid 6 x 6" in text for text in said)
    Image.fromarray(digits("val")[0][0]).save(tmp_path / "a.png")
    (found,) = predict(tmp_path / "saved", [tmp_path / "a.png"], device="cpu", top_k=1)
    assert found.classes[0].startswith("digit ")
    assert read_checkpoint(tmp_path / "saved").package == "transformers"


@pytest.mark.parametrize("grey", [False, True])
def test_the_image_processor_beside_it_is_the_transform(tmp_path, grey):
    from lape.files.restore import transform_of

    model = moved(lape.apply_(made(image_size=24, num_channels=1 if grey else 3), "LaPE"))
    model.save_pretrained(tmp_path / "saved")
    chans = 1 if grey else 3
    settings = {"size": {"height": 24, "width": 24}, "resample": 3}
    if not grey:
        settings |= {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
    said = {"image_mean": [0.4] * chans, "image_std": [0.3] * chans, "do_normalize": True, **settings}
    (tmp_path / "saved" / "preprocessor_config.json").write_text(json.dumps(said))
    found = transform_of(read_checkpoint(tmp_path / "saved"))
    assert (found.input_size, found.crop_ratio, found.interpolation) == (24, 1.0 if grey else 0.75, "bicubic")
    assert (found.mean, found.std, found.in_chans) == ((0.4,) * chans, (0.3,) * chans, chans)
    (tmp_path / "saved" / "preprocessor_config.json").write_text('{"size": 24}')
    with pytest.raises(CheckpointError, match="no image processor"):
        read_checkpoint(tmp_path / "saved")


class Digits(torch.utils.data.Dataset):
    def __init__(self, count: int):
        pixels, labels = digits("train")
        self.pixels_nCHW = torch.from_numpy(pixels[:count, None] / 255.0).float()
        self.labels_n = labels[:count]

    def __len__(self):
        return len(self.labels_n)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels_nCHW[index], "labels": int(self.labels_n[index])}


def trainer(model, folder, steps: int):
    settings = {"max_steps": steps, "save_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0}
    settings |= {"lr_scheduler_type": "constant", "logging_steps": 2}
    arguments = transformers.TrainingArguments(str(folder), **settings)
    return transformers.Trainer(model=model, args=arguments, train_dataset=Digits(64))


@pytest.mark.slow
@pytest.mark.parametrize("warm_start", [False, True])
def test_the_trainer_trains_stops_and_goes_on(warm_start, tmp_path):
    pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on versions and terminals, the libraries' own

        def start():
            return lape.apply_(made(), "LaPE", warm_start=warm_start)

        model, before = start(), start().state_dict()
        trainer(model, tmp_path / "whole", 4).train()
        changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        assert len(of_position(model)) == (7 if warm_start else 5)
        assert set(of_position(model)) <= changed

        trainer(start(), tmp_path / "parts", 2).train()
        resumed = start()
        trainer(resumed, tmp_path / "parts", 4).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    assert torch.equal(logits(lape.load(tmp_path / "parts" / "checkpoint-4")), logits(resumed.eval()))
