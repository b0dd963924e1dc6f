"""Files that version 0.1.0 wrote are read: same outputs, and a run goes on. `v0_1/` holds tiny models of that version.

Its folders, two that transformers' `save_pretrained` wrote (with the names that the modules had in memory), and the
checkpoint of one epoch on the digits; `outputs.safetensors` has an input and what each model gave for it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lape
from lape.recipe import Recipe
from lape.train.loop import train

FOLDER = Path(__file__).parents[1] / "v0_1"
OUTPUTS = load_file(FOLDER / "outputs.safetensors")
NAMES = sorted(OUTPUTS.keys() - {"input"})


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_0_1_gives_the_same_outputs(name, tmp_path):
    if name.startswith("pretrained"):
        pytest.importorskip("transformers")
    model = lape.load(FOLDER / name)
    for loaded in (model, lape.load(lape.save(model, tmp_path / "again"))):
        with torch.no_grad():
            y = loaded.eval()(OUTPUTS["input"])
        y = y if isinstance(y, torch.Tensor) else y.logits
        assert (y - OUTPUTS[name]).abs().max() <= 2e-6 * OUTPUTS[name].abs().max()


def test_a_run_of_0_1_goes_on(tmp_path):
    content = torch.load(FOLDER / "checkpoint.pth", weights_only=True)
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "mlp_ratio": 1.0}
    digits = Recipe.from_yaml("digits", epochs=2, join_type="LaPE", model_kwargs=kwargs, num_workers=0)
    given = digits.model_dump(exclude_unset=True, exclude={"as_original"})  # its flags, and none of later versions
    recipe = Recipe(**given)
    lines = []
    train(
        recipe.replace(resume=str(FOLDER / "checkpoint.pth"), output_dir=str(tmp_path)),
        on_epoch=lines.append,
        say=lambda _text: None,
    )
    assert [line["epoch"] for line in lines] == [content["epoch"] + 1]
    rate = recipe.warmup_lr + lines[0]["epoch"] * (recipe.lr - recipe.warmup_lr) / recipe.warmup_epochs
    assert lines[0]["train_lr"] == pytest.approx(rate, rel=1e-12)  # as that version trained
    after = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert after.keys() == content["model"].keys()
