"""`--warm-start`: fine-tuning begins with what the pretrained model computes, and ends with position in every layer."""

import pytest
import torch
from training import KWARGS, quiet, read, run_until, same, tiny

import lape
from lape.errors import CheckpointError, LapeError
from lape.recipe import Recipe
from lape.train.evaluate import evaluate_checkpoint
from lape.train.loop import train
from lape.train.start import build_model
from lape.train.state import CHECKPOINT


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pretrained")
    train(tiny(join_type="basic", output_dir=str(folder)), say=quiet)
    return str(folder / CHECKPOINT)


def test_training_begins_with_the_pretrained_function_and_opens_the_gates(pretrained, tmp_path):
    said: list[str] = []
    recipe = tiny(finetune=pretrained, warm_start=True, output_dir=str(tmp_path), epochs=2)
    host = build_model(tiny(finetune=pretrained, join_type="basic"), 10, quiet).eval()
    model = build_model(recipe, 10, said.append).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(pixels), host(pixels))
    assert said[0].count("start anew") == 2
    assert "the norms of position, which the file's join lacks (start anew): blocks.0.pe_norm.weight" in said[0]
    assert "the gates of the warm start, at zero (start anew): blocks.0.pe_gate" in said[0]

    trained = train(recipe, say=quiet).model
    state = lape.to_reference_state_dict(trained)
    assert all(state[f"blocks.{layer}.pe_gate"].abs() > 0 for layer in range(2))
    assert not torch.equal(state["blocks.1.pe_norm.weight"], torch.ones(16))
    assert lape.describe(trained).warm_start

    loaded = lape.load(tmp_path / CHECKPOINT)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), trained(pixels))
    assert evaluate_checkpoint(Recipe(resume=str(tmp_path / CHECKPOINT), device="cpu", num_workers=0), say=str).count


@pytest.mark.slow
def test_a_warm_start_goes_on_without_its_flags(pretrained, tmp_path):
    settings = {"finetune": pretrained, "warm_start": True, "model_ema": False}
    train(tiny(**settings, epochs=2, output_dir=str(tmp_path / "whole")), say=quiet)
    train(tiny(**settings, epochs=1, output_dir=str(tmp_path / "parts")), say=quiet)
    resumed = tiny(model_ema=False, epochs=2, output_dir=str(tmp_path / "parts"), resume="auto")
    train(resumed, say=quiet)
    whole, parts = (read(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert parts["args"]["warm_start"] is True
    assert any(name.endswith("pe_gate") for name in parts["model"])
    # the schedule of the first part ended earlier, so that only names and shapes have to agree
    assert {k: v.shape for k, v in whole["model"].items()} == {k: v.shape for k, v in parts["model"].items()}
    with pytest.raises(CheckpointError, match="warm_start=False contradicts"):
        train(resumed.replace(warm_start=False), say=quiet)


def test_a_stopped_warm_start_ends_with_the_same_bits(pretrained, tmp_path):
    settings = {"finetune": pretrained, "warm_start": True, "model_ema": False, "epochs": 2}
    train(tiny(**settings, output_dir=str(tmp_path / "whole")), say=quiet)
    run_until(1, tiny(**settings, output_dir=str(tmp_path / "parts")))
    train(tiny(**settings, output_dir=str(tmp_path / "parts"), resume="auto"), say=quiet)
    assert same(read(tmp_path / "parts" / CHECKPOINT)["model"], read(tmp_path / "whole" / CHECKPOINT)["model"])


def test_fine_tuning_goes_on_from_a_warm_start(pretrained, tmp_path):
    train(tiny(finetune=pretrained, warm_start=True, output_dir=str(tmp_path)), say=quiet)
    saved = str(tmp_path / CHECKPOINT)
    model = build_model(tiny(finetune=saved, warm_start=True), 10, quiet)
    assert same(lape.to_reference_state_dict(model), read(saved)["model"])
    with pytest.raises(CheckpointError, match="--warm-start"):
        build_model(tiny(finetune=saved), 10, quiet)
    with pytest.raises(CheckpointError, match="has join LaPE: leave --warm-start out"):
        build_model(tiny(finetune=saved, warm_start=True, join_type="LaPE-sharing"), 10, quiet)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"finetune": ""}, "add --finetune CHECKPOINT"),
        ({"pe": "2D_sin"}, "leave --pe out"),
        ({"join_type": "basic"}, "join='basic'"),
        ({"join_type": "share"}, "join='share'"),
        ({"attn_only": True}, "attn_only=True"),
    ],
)
def test_where_it_means_nothing_one_line_says_so(pretrained, tmp_path, changes, reason):
    recipe = tiny(**{"finetune": pretrained, "warm_start": True, "output_dir": str(tmp_path / "out"), **changes})
    with pytest.raises(LapeError, match=reason) as caught:
        train(recipe, say=quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_with_position_in_the_layers_already_are_refused(tmp_path):
    train(tiny(output_dir=str(tmp_path)), say=quiet)
    with pytest.raises(CheckpointError, match="has join LaPE: leave --warm-start out"):
        build_model(tiny(finetune=str(tmp_path / CHECKPOINT), warm_start=True), 10, quiet)
    torch.save({"model": read(tmp_path / CHECKPOINT)["model"]}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="has join LaPE: leave --warm-start out"):
        build_model(tiny(finetune=str(tmp_path / "bare.pth"), warm_start=True), 10, quiet)


def test_what_training_cannot_start_from_is_refused_in_one_line(tmp_path):
    folded = lape.fold_(build_model(tiny(), 10, quiet))
    with pytest.raises(CheckpointError, match="is folded, its positions are constants"):
        build_model(tiny(finetune=str(lape.save(folded, tmp_path / "folded"))), 10, quiet)
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    foreign = lape.save(lape.apply_(VisionTransformer(**sizes)), tmp_path / "torchvision")
    with pytest.raises(CheckpointError, match="a model of torchvision, training builds those of timm"):
        build_model(tiny(finetune=str(foreign)), 10, quiet)


def test_arguments_that_have_a_flag_are_refused():
    for name in ("num_classes", "img_size"):
        with pytest.raises(LapeError, match=f"model_kwargs {name}=4 has a place of its own"):
            build_model(tiny(model_kwargs={**KWARGS, name: 4}), 10, quiet)
