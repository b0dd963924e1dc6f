"""Files are read without running their code, loaded strictly with messages that name keys, and written whole or not."""

import argparse
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from zoo import TINY

import lape
from lape.files.atomic import write_atomically
from lape.files.read import Checkpoint, read_checkpoint
from lape.files.restore import restore, size_of

NAME = "deit_tiny_patch16_224"
SMALL = {key: TINY[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}


def run_file(path: Path, model: torch.nn.Module, namespace: bool = True, **entries) -> Path:
    """A checkpoint as DeiT's and the authors' code writes it."""
    args = {"model": NAME, "join_type": "LaPE", "pe": "learnable", "input_size": 16, "model_kwargs": SMALL}
    state = lape.to_reference_state_dict(model)
    args = argparse.Namespace(**args) if namespace else args
    torch.save({"model": state, "epoch": 3, "args": args, **entries}, path)
    return path


def make(join: str = "LaPE", pe: str | None = None, **kwargs) -> torch.nn.Module:
    return lape.create_model(NAME, join, pe, **{**TINY, **kwargs}).eval()


def test_a_run_file_says_what_it_is_and_loads(tmp_path):
    model = make()
    checkpoint = read_checkpoint(run_file(tmp_path / "c.pth", model))
    assert checkpoint.args["join_type"] == "LaPE"
    assert (checkpoint.num_classes, checkpoint.raw["epoch"], checkpoint.classes) == (5, 3, None)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(lape.load(tmp_path / "c.pth")(x), model(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    model = make()
    state = {prefix + key: value for key, value in lape.to_reference_state_dict(model).items()}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    lape.load_reference_state_dict(make(), read_checkpoint(tmp_path / "c.pth").model)


def test_averaged_weights_are_a_choice(tmp_path):
    raw, ema = make(), make()
    path = run_file(tmp_path / "c.pth", raw, model_ema=lape.to_reference_state_dict(ema))
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(restore(read_checkpoint(path), ema=True)(x), ema(x))
    without = run_file(tmp_path / "d.pth", raw)
    with pytest.raises(lape.CheckpointError, match="no averaged"):
        restore(read_checkpoint(without), ema=True)


class Hostile:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("where", ["whole", "args", "model"])
def test_a_hostile_pickle_is_refused_and_executes_nothing(tmp_path, where):
    trap = tmp_path / "executed"
    bad = Hostile(trap)
    contents = bad if where == "whole" else {"model": {"head.weight": torch.zeros(1)}, "args": {}} | {where: bad}
    torch.save(contents, tmp_path / "c.pth")
    with pytest.raises(lape.CheckpointError, match=r"wants to run .*mkdir.*refused, nothing was executed") as error:
        read_checkpoint(tmp_path / "c.pth")
    assert not trap.exists()
    assert "\n" not in str(error.value)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(bad))  # not even torch's format
    with pytest.raises(lape.CheckpointError, match="nothing was executed") as error:
        read_checkpoint(tmp_path / "plain.pth")
    assert "weights_only" not in str(error.value)  # torch's own text advises to switch safety off
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a"),
        (b"not a checkpoint at all", "not a"),
        (None, "no such checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint_are_named(tmp_path, content, message):
    path = tmp_path / "c.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(lape.CheckpointError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torn_file_is_named(tmp_path):
    path = run_file(tmp_path / "c.pth", make())
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        with pytest.raises(lape.CheckpointError, match=r"c\.pth is not .*(cut off or damaged|nothing was executed)"):
            read_checkpoint(path)


def test_contents_without_a_model_are_named(tmp_path):
    torch.save({"weights": 1, "epoch": 2}, tmp_path / "c.pth")
    with pytest.raises(lape.CheckpointError, match="no 'model': its keys are weights, epoch"):
        read_checkpoint(tmp_path / "c.pth")
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(lape.CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "c.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "c.pth")
    with pytest.raises(lape.CheckpointError, match="not a state dict"):
        read_checkpoint(tmp_path / "c.pth")


def test_a_checkpoint_for_another_model_names_keys_and_shapes_and_changes_nothing():
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cases = {
        "missing blocks.0.pe_norm.weight, .*and 2 more": lape.to_reference_state_dict(make("basic")),
        "unexpected blocks.3": lape.to_reference_state_dict(make(depth=4)),
        r"head.weight is 7 x 32, the model's 5 x 32": lape.to_reference_state_dict(make(num_classes=7)),
        r"pos_embed is 1 x 26 x 32, the model's 1 x 17 x 32": lape.to_reference_state_dict(make(img_size=20)),
    }
    for message, state in cases.items():
        with pytest.raises(lape.CheckpointError, match=message) as error:
            lape.load_reference_state_dict(model, state)
        assert "\n" not in str(error.value)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_flags_that_contradict_the_file_are_refused(tmp_path):
    checkpoint = read_checkpoint(run_file(tmp_path / "c.pth", make()))
    for words, kwargs in {"`join` share": {"join": "share"}, "`pe` 2D_sin": {"pe": "2d_sin"}}.items():
        with pytest.raises(lape.CheckpointError, match=f"{words} was given, but .*(LaPE|learnable)"):
            restore(checkpoint, **kwargs)
    assert restore(checkpoint, join="lape", pe="LEARNABLE", model=NAME, size=16)
    torch.save({"model": lape.to_reference_state_dict(make())}, tmp_path / "bare.pth")
    with pytest.raises(lape.CheckpointError, match=r"does not say its model: give `model`$"):
        restore(tmp_path / "bare.pth")
    without_table = lape.to_reference_state_dict(make(pe="none", join="basic"))
    torch.save({"model": without_table}, tmp_path / "bare.pth")
    with pytest.raises(lape.CheckpointError, match=r"does not say its image size: give `input_size`$"):
        lape.load(tmp_path / "bare.pth", model=NAME, join="basic", pe="none")


@pytest.mark.parametrize("spelling", ["input_size", "img_size"])
@pytest.mark.parametrize("file", ["run", "weights", "folder", "wide folder"])
def test_another_size_resamples_the_table_of_any_file(tmp_path, file, spelling):
    model = make(img_size=(16, 32)) if file == "wide folder" else make()
    path, said = tmp_path / "c.pth", {}
    if file == "run":
        run_file(path, model)
    elif file == "weights":
        torch.save(lape.to_reference_state_dict(model), path)
        said = {"model": NAME, "join": "LaPE", "pe": "learnable", **SMALL}
    else:
        path = lape.save(model, tmp_path / "folder")
    loaded = lape.load(path, **{spelling: (24, 32)}, **said)
    with torch.no_grad():
        assert torch.equal(lape.positions(loaded), lape.positions(model, (24, 32)))
    with pytest.raises(lape.LapeError, match="more than once"):
        lape.load(path, input_size=16, img_size=16)


def test_a_model_of_one_size_says_which(tmp_path):
    folder = lape.save(lape.fold_(make()), tmp_path / "folded")
    with pytest.raises(lape.CheckpointError, match=r"is folded.* for 16 x 16 pixels; leave `input_size` out"):
        lape.load(folder, img_size=24)
    assert lape.load(folder, img_size=16)


def test_the_grid_of_a_bare_table_is_told_from_its_rows(tmp_path):
    for prefix in (0, 1, 2):
        for side in (1, 2, 3, 14):
            state = {
                "pos_embed": torch.zeros(1, side**2 + prefix, 8),
                "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
            }
            assert size_of(Checkpoint(tmp_path, "pth", state)) == (4 * side, 4 * side)
    assert size_of(Checkpoint(tmp_path, "pth", {"pos_embed": torch.zeros(1, 13, 8)})) is None
    state = {"pos_embed": torch.zeros(1, 17, 8), "patch_embed.proj.weight": torch.zeros(8, 3, 4, 8)}
    assert size_of(Checkpoint(tmp_path, "pth", state)) == (16, 32)


def test_tables_are_resampled_only_when_the_source_grid_is_told():
    wide, square = make(img_size=(8, 32)), make(img_size=16)  # 2 x 8 and 4 x 4: as many patches
    lape.load_reference_state_dict(square, lape.to_reference_state_dict(wide), source_grid=(2, 8))
    resampled = lape.positions(wide, 16)
    with torch.no_grad():
        assert torch.equal(lape.positions(square), resampled)
    lape.load_reference_state_dict(square, lape.to_reference_state_dict(wide), source_grid=(4, 4))  # a no-op
    assert torch.equal(square.pos_embed, wide.pos_embed)
    with pytest.raises(lape.CheckpointError, match="needs 10: give the grid"):
        lape.load_reference_state_dict(square, lape.to_reference_state_dict(wide), source_grid=(3, 3))


def test_a_relative_bias_of_another_grid_is_refused():
    wide, square = make("basic", "2D_RPE", img_size=(8, 32)), make("basic", "2D_RPE", img_size=16)
    with pytest.raises(lape.CheckpointError, match="another grid"):
        lape.load_reference_state_dict(square, lape.to_reference_state_dict(wide))


def test_a_saved_folder_holds_everything(tmp_path):
    model = make("LaPE", "2D_sin")
    transform = {"input_size": 16, "crop_ratio": 1.0}
    folder = lape.save(model, tmp_path / "m", classes=list("abcde"), transform=transform)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.classes, checkpoint.transform) == (list("abcde"), transform)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(lape.load(folder)(x), model(x))
    assert json.loads((folder / "config.json").read_text())["grid"] == [4, 4]
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(lape.CheckpointError, match="SHA-256"):
        lape.load(folder)
    (folder / "config.json").write_text('{"format": "other"}')
    with pytest.raises(lape.CheckpointError, match="format"):
        lape.load(folder)


def test_a_model_of_unknown_origin_needs_its_name(tmp_path):
    model = lape.apply_(VisionTransformer(**TINY))  # not of timm.create_model, which leaves its name
    with pytest.raises(lape.LapeError, match="name="):
        lape.save(model, tmp_path / "m")
    lape.save(model, tmp_path / "m", name=NAME, **TINY)
    lape.load(tmp_path / "m")
    with pytest.raises(lape.LapeError, match="unknown model 'nope'"):
        lape.save(model, tmp_path / "n", name="nope")
    with pytest.raises(lape.LapeError, match=r"is another model: .* arguments that make this model"):
        lape.save(model, tmp_path / "n", name=NAME)
    with pytest.raises(lape.LapeError, match="plain values"):
        lape.save(model, tmp_path / "n", name=NAME, **TINY, norm_layer=partial(LayerNorm, eps=1e-6))
    assert not (tmp_path / "n").exists()


def test_a_saved_folder_forgets_the_file_that_its_weights_began_with(tmp_path):
    timm_made = timm.create_model("vit_tiny_patch16_224", **TINY)
    torch.save(timm_made.state_dict(), tmp_path / "start.pth")
    model = lape.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "start.pth"), **TINY).eval()
    assert torch.equal(model.head.weight, timm_made.head.weight)
    folder = lape.save(model, tmp_path / "saved")
    (tmp_path / "start.pth").unlink()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(lape.load(folder)(x), model(x))


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    """The upload and the download are huggingface_hub's; what they get and give is checked without a network."""
    hub = pytest.importorskip("huggingface_hub")
    stored = tmp_path / "hub"
    calls = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            calls.append((repo_id, kwargs))

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, stored)

    def download(repo_id, allow_patterns):
        assert {path.name for path in stored.iterdir()} <= set(allow_patterns)
        assert all(pattern.endswith((".json", ".safetensors")) for pattern in allow_patterns), "no code, no pickle"
        return str(stored)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    model, x = make(), torch.randn(1, 3, 16, 16)
    address = lape.push_to_hub(model, "somebody/tiny", private=True)
    assert calls == [("somebody/tiny", {"private": True, "exist_ok": True})]
    assert torch.equal(lape.load(address)(x), model(x))

    def refuse(repo_id, allow_patterns):
        raise ValueError("no such repository\nmore words")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(lape.CheckpointError, match=r"hf-hub:somebody/tiny cannot be downloaded: no such repository$"):
        lape.load(address)


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"first"))

    def torn(file):
        file.write(b"sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, torn)
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it where they may read files
    with pytest.raises(lape.LapeError, match="cannot write"):
        write_atomically(tmp_path / "no" / "folder", lambda file: file.write(b""))


def test_files_of_the_authors(shared):
    """Their own files, as far as they lie beside the checkout: full format, and a trained DeiT-Ti."""
    config = json.loads((shared / "reference" / "manifest.json").read_text())["config"]
    names = ("patch_size", "embed_dim", "depth", "num_heads")
    checkpoint = read_checkpoint(shared / "reference" / "tiny_lape_full_format.pth")
    assert checkpoint.raw.keys() == {"optimizer", "lr_scheduler", "epoch", "scaler"}
    for ema in (False, True):
        restore(checkpoint, ema=ema, **{name: config[name] for name in names})
    trained = lape.load(shared / "reference" / "deit_tiny_lape_64px.pth")
    assert trained.num_classes == 1000
    assert lape.grid(trained) == (4, 4)


def test_what_lies_idle_is_loaded_as_well():
    """A bias on logits has no use for the host's table: it is in no file, yet in a state dict, and comes back."""
    torch.manual_seed(0)
    one, other = (lape.create_model("vit_tiny_patch16_224", "LaPE", "2D_RPE", **TINY) for _ in range(2))
    table = one.pos_embed.clone()
    assert not torch.equal(other.pos_embed, table)
    lape.load_reference_state_dict(other, one.state_dict())
    assert torch.equal(lape.remove_(other).pos_embed, table)
