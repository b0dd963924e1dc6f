"""A file from a stranger is data; what is damaged is refused, what is written is whole: docs/trust.md."""

import contextlib
import csv
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Process, python

import lape
from lape.cli import app as cli
from lape.errors import CheckpointError, LapeError
from lape.files import atomic, restore, vet
from lape.files.read import read_checkpoint
from lape.names import printable

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def make(join: str = "LaPE", seed: int = 0):
    torch.manual_seed(seed)
    return lape.create_model("vit_tiny_patch16_224", join, **SIZES).eval()


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the network."""
    calls = []

    def refuse(*args, **_kwargs):
        calls.append(args)
        raise OSError("no network in tests")

    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    return calls


@pytest.fixture
def folder(tmp_path):
    return lape.save(make(), tmp_path / "m", classes=["ant", "bee", "cow"])


def said(folder, **changes):
    """The folder with other entries in its config.json; a dict is added to the one that is there.

    Its own checksum is taken out, as whoever forges a file would."""
    config = json.loads((folder / "config.json").read_text())
    config.get("lape", config).get("sha256", {}).pop("config.json", None)
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


URL = {"url": "http://127.0.0.1:9/x.pth", "hf_hub_id": None}
ELSEWHERE = [
    {"pretrained": True},
    {"pretrained": True, "pretrained_cfg": URL},
    {"pretrained_cfg_overlay": URL},
    {"cache_dir": "elsewhere"},
    {"checkpoint_path": "elsewhere/x.pth"},
    {"device": "meta"},
    {"block_fn": {"pretrained": True}, "cache_dir": "x"},
    {"norm_layer": "http://a/b"},
    {"depth": 2**40},
    pytest.param({"depth": 10**5}, marks=pytest.mark.slow),
    {"img_size": 16000},
    {"embed_dim": 10**6},
    {"num_heads": float("nan")},
    {"num_classes": [[[[[[[[[[[1]]]]]]]]]]]},
]


@pytest.mark.parametrize("kwargs", ELSEWHERE, ids=str)
def test_arguments_that_fetch_write_or_grow_are_refused_by_name(folder, asked, tmp_path, monkeypatch, kwargs):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"{list(kwargs)[-1]}|larger model|NaN") as error:
        lape.load(said(folder, model_kwargs=kwargs))
    assert not asked
    assert set(tmp_path.rglob("*")) == before
    assert "\n" not in str(error.value)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "entries",
    [
        {"backbone": "resnet50"},
        {"use_pretrained_backbone": True, "backbone_config": {"backbone": "resnet50"}},
        {"_attn_implementation": "org/kernel"},
        {"vision_config": {"attn_implementation": "flash_attention_2"}},
        {"auto_map": {"AutoModel": "x.Y"}},
        {"quantization_config": {"quant_method": "x"}},
        {"to_dict": 1},
        {"anything": True},
        {"hidden_size": "large"},
        {"hidden_act": "org/kernel"},
        {"hidden_act": 3},
        {"qkv_bias": 2},
        {"qkv_bias": [True]},
        {"output_hidden_states": [None]},
        {"dtype": "os"},
        {"model_type": "clip"},
        {"trust_remote_code": True},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50"}},
        {"vision_config": {"model_type": ["x"]}},
        {"architectures": ["DetrModel"]},
        {"architectures": ["AutoModel"]},
        {"architectures": None},
        {"num_hidden_layers": 10**5},
        {"lape": {"sha256": "until all files are written"}},
    ],
    ids=str,
)
def test_entries_of_a_transformers_folder_that_fetch_are_refused(tmp_path, asked, entries):
    transformers = pytest.importorskip("transformers")
    config = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**config, intermediate_size=16))
    lape.apply_(model).save_pretrained(tmp_path / "m")
    lape.load(tmp_path / "m")
    with pytest.raises(LapeError) as error:
        lape.load(said(tmp_path / "m", **entries))
    assert not asked
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["org/kernel", "gelu/../x", "gelu\n", "a" * 65])
def test_a_word_of_a_configuration_is_one_from_end_to_end(word):
    transformers = pytest.importorskip("transformers")
    from lape.host.configurations import check_entries

    check_entries(transformers.ViTConfig, {"hidden_act": "gelu_new"})
    with pytest.raises(LapeError, match="'hidden_act' of a ViTConfig is text, not"):
        check_entries(transformers.ViTConfig, {"hidden_act": word})


def test_what_a_transformers_folder_may_say_of_a_model_within_is_held_to_its_own_class(tmp_path, asked):
    """The class around it may declare more in it than its own does: `vocab_size` of a vision tower in LLaVA."""
    transformers = pytest.importorskip("transformers")
    from lape.host.configurations import check_entries

    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "intermediate_size": 16}
    check_entries(transformers.LlavaConfig, {"vision_config": {**vision, "vocab_size": 9}})
    for wrong in ({"backbone": "resnet50"}, {"hidden_act": 1}, {"num_heads": [2]}, {"_attn_implementation": "a/b"}):
        with pytest.raises(LapeError, match=next(iter(wrong))):
            check_entries(transformers.CLIPConfig, {"vision_config": {**vision, **wrong}})
    model = lape.apply_(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)))
    lape.load(lape.save(model, tmp_path / "m"))
    assert not asked


def test_a_model_that_came_from_the_hub_is_saved_without_its_address_and_its_users_notes(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=16, note={"of": "mine"})
    config._name_or_path = "owner/name"
    model = lape.apply_(transformers.ViTModel(config)).eval()
    x = torch.randn(1, 3, 16, 16)
    again = lape.load(lape.save(model, tmp_path / "m"))
    assert torch.equal(again(x).last_hidden_state, model(x).last_hidden_state)
    text = (tmp_path / "m" / "config.json").read_text()
    assert "owner/name" not in text
    assert "mine" not in text


def test_a_checkpoint_is_held_to_the_same(tmp_path, asked):
    args = {"model": "vit_tiny_patch16_224", "join_type": "LaPE", "pe": "learnable", "input_size": 16}
    sizes = {name: SIZES[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    state = lape.to_reference_state_dict(make())

    def saved(kwargs, **entries):
        torch.save({"model": state, "args": {**args, "model_kwargs": {**sizes, **kwargs}}, **entries}, tmp_path / "c")
        return tmp_path / "c"

    lape.load(saved({"pretrained": True}))  # of a run that began with weights of the library
    wrong = [
        ({"cache_dir": "x"}, {}),
        ({}, {"library": "transformers"}),
        ({}, {"epoch": -(10**9)}),
        ({}, {"epoch": True}),
        ({}, {"classes": 3}),
    ]
    wrong += [({}, {"transform": {"input_size": 10**9}}), ({}, {"optimizer": 1}), ({}, {"history": [{"epoch": "x"}]})]
    for kwargs, entries in wrong:
        with pytest.raises(LapeError):
            lape.load(saved(kwargs, **entries))
    state["head.bias"] = torch.zeros(1).expand(3)  # one value that says it is three
    with pytest.raises(CheckpointError, match="holds fewer"):
        lape.load(saved({}))
    assert not asked


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        "9" * 5000,
        "\xef\xbb\xbf{}",
        "\xff",
        '{"format": NaN}',
        '{"format": "lape-1", "format": "x"}',
        "3",
        "{}",
    ],
)
def test_a_config_that_is_not_json_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        lape.load(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        lape.load(folder)


def test_nesting_has_an_end(tmp_path):
    """Python's reader goes deeper than what looks at the values later could."""
    for depth, fits in ((60, True), (70, False), (900, False), (10**5, False)):
        (tmp_path / "x.json").write_text('{"a":' * depth + "1" + "}" * depth)
        if fits:
            vet.read_json(tmp_path / "x.json")
        else:
            with pytest.raises(CheckpointError, match="nested too deep"):
                vet.read_json(tmp_path / "x.json")


def test_a_model_of_a_file_that_cannot_run_is_one_line(folder):
    from lape.files.restore import count_classes

    model = lape.load(folder)
    model.head.forward = lambda _x: [] + 1
    with pytest.raises(CheckpointError, match=r"does not fit together \(TypeError"):
        count_classes(read_checkpoint(folder), model, 16, 3)


def test_whatever_is_built_from_a_file_asks_nothing(tmp_path):
    with pytest.raises(OSError, match="nothing of the network"), vet.bounded(tmp_path, 1, 1):
        socket.create_connection(("127.0.0.1", 9))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 9))


@pytest.mark.slow
def test_attacks_find_nothing():
    """Damage, hostile files, kills and command lines, a twentieth and less of what docs/trust.md counts."""
    folder = ROOT / "benchmarks"
    code = f"""
import runpy, sys
sys.path.insert(0, {str(folder)!r})
runpy.run_path({str(folder / "attack.py")!r}, run_name="__main__")
"""
    done = Process(python, code, "--quick", "--seed", "7")
    output, errors = done.communicate()
    assert done.returncode == 0, output + errors[-2000:]
    assert "\n0 wrong" in output


# --- damaged and unfinished -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bit", "block"])
@pytest.mark.parametrize("what", ["c.pth", "m/model.safetensors"])
def test_damage_is_refused_or_harmless(tmp_path, what, how):
    lape.save(make(), tmp_path / "m")
    state = {"model": lape.to_reference_state_dict(make()), "args": {"input_size": 16}}
    torch.save(state, tmp_path / "c.pth")
    path, rng = tmp_path / what, np.random.default_rng(0)
    opened = path if path.suffix == ".pth" else path.parent
    whole, wanted, refused = path.read_bytes(), read_checkpoint(opened), 0
    for place in rng.integers(0, len(whole), 24):
        raw = bytearray(whole)
        if how == "bit":
            raw[place] ^= 1 << int(rng.integers(8))
        else:
            raw[place : place + 512] = bytes(len(raw[place : place + 512]))
        path.write_bytes(raw)
        try:
            model = read_checkpoint(opened).model
            assert all(torch.equal(model[name], tensor) for name, tensor in wanted.model.items())
        except CheckpointError:
            refused += 1
    assert refused > 12


def parts(value, path=()):
    """The paths of all values in nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in inner for place in parts(part, (*path, key))]


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_config_that_is_not_as_it_was_written_is_refused_whatever_was_changed(tmp_path, library):
    transform = {"input_size": 16, "crop_ratio": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    if library == "timm":
        lape.save(make(), tmp_path / "m", classes=["ant", "bee", "cow"], transform=transform)
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, intermediate_size=16))
        lape.apply_(model).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(whole.items())), indent=7))  # other spaces, another order
    read_checkpoint(tmp_path / "m")
    places = [place for place in parts(whole) if "sha256" not in place or place[-1] == "model.safetensors"]
    assert len(places) > 20
    for *path, last in places:
        for new in ("changed", None):
            config = json.loads(json.dumps(whole))
            owner = config
            for key in path:
                owner = owner[key]
            if new is None and isinstance(owner, list):
                owner.pop()
            elif new is None:
                del owner[last]
            else:
                owner[last] = new if owner[last] != new else "changed again"
            file.write_text(json.dumps(config))
            with pytest.raises(CheckpointError):
                read_checkpoint(tmp_path / "m")
    for name, value in {"pe": "1D_sin", "join": "share"}.items() if library == "timm" else ():
        file.write_text(json.dumps({**whole, name: value}))  # that would load
        with pytest.raises(CheckpointError, match=r"not as it was written.*SHA-256"):
            lape.load(tmp_path / "m")


def test_files_without_checksums_load(folder):
    config = json.loads((folder / "config.json").read_text())
    assert set(config["sha256"]) == {"model.safetensors", "config.json"}
    del config["sha256"]["config.json"]
    (folder / "config.json").write_text(json.dumps({**config, "classes": ["a", "b", "c"]}))
    assert read_checkpoint(folder).classes == ["a", "b", "c"]
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    lape.load(folder)


def test_a_save_over_a_folder_is_the_old_model_or_the_new_one(tmp_path, monkeypatch):
    old, new, x = make("LaPE", 1), make("share", 2), torch.randn(2, 3, 16, 16)
    real, place, outcomes = os.replace, tmp_path / "m", []
    for moment in range(1, 5):
        lape.save(old, place)
        calls = []

        def counted(*args, calls=calls, moment=moment):
            calls.append(args)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            with contextlib.suppress(KeyboardInterrupt):
                lape.save(new, place)
        y = lape.load(place)(x)
        outcomes.append("old" if torch.equal(y, old(x)) else "new" if torch.equal(y, new(x)) else "another")
    assert outcomes == ["old", "old", "new", "new"]
    lape.save(old, place)
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    (tmp_path / ".a.json.x.tmp").write_text("left")
    with (tmp_path / ".a.json.y.tmp").open("w") as mine:
        assert atomic.hold(mine.fileno())
        atomic.write_atomically(tmp_path / "a.json", lambda file: file.write(b"1"))
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.y.tmp", "a.json"]
    (tmp_path / ".export.dead").mkdir()
    with atomic.unfinished(tmp_path, ".export.") as place:
        assert [path.name for path in tmp_path.glob(".export.*")] == [place.name]
    assert not list(tmp_path.glob(".export.*"))


# --- outputs and names ------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), (9, 8, 7)).save(tmp_path / f"{name}.png")
    return tmp_path


def run(*tokens) -> int:
    return cli.run(cli.app, [str(token) for token in tokens])


@pytest.mark.parametrize("output", ["m", "m/a.png", "link"])
@pytest.mark.parametrize("source", ["m", "m/a.png"])
def test_neither_a_file_nor_the_folder_around_it_is_replaced(tmp_path, output, source):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.png").write_bytes(b"a")
    (tmp_path / "m" / "b.png").write_bytes(b"b")
    (tmp_path / "link").symlink_to("m")
    with pytest.raises(LapeError, match="would replace what is read"):
        atomic.keep_inputs([tmp_path / output], [tmp_path / source])
    atomic.keep_inputs([tmp_path / "m" / "b.png"], [tmp_path / "m" / "a.png"])


def test_outputs_do_not_replace_inputs(folder, images, capsys):
    data = images / "data"
    for place in ("train/x", "train/y", "val/x", "val/y"):
        (data / place).mkdir(parents=True)
        shutil.copy(images / "a.png", data / place)
    link = images / "link.json"
    link.symlink_to(folder / "config.json")
    image, config = images / "a.png", folder / "config.json"
    copy = shutil.copytree(folder, images / "folder")
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    for tokens in (
        ("predict", image, "--checkpoint", folder, "--json", config),
        ("predict", image, "--checkpoint", folder, "--json", link),
        ("predict", image, "--checkpoint", folder, "--csv", image),
        ("visualize", folder, "--html", folder / "model.safetensors"),
        ("visualize", folder, "--html", image, "--image", image),
        ("check-data", data, "--json", data / "val" / "x" / "a.png"),
        ("export", copy, "--output-dir", images, "--formats", "folder"),
        ("probe", folder, "--images", image, image, "--json", image),
        ("probe", folder, "--images", image, image, "--json", config),
        ("eval", folder, "--sizes", "16", "--json", config),
    ):
        assert run(*tokens) == 2, tokens
        assert "would replace" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before


@pytest.fixture
def many(folder, images, monkeypatch):
    """Command lines of all commands that write, with OUT for where; work is a failure."""
    from lape.study import benchmark, probing, sweep

    for owner, name in ((benchmark, "benchmark"), (probing, "probe"), (sweep, "evaluate_at")):
        monkeypatch.setattr(owner, name, lambda *_args, **_kwargs: pytest.fail("it worked before it looked"))
    data = images / "data"
    for place in ("train/x", "train/y", "val/x", "val/y"):
        (data / place).mkdir(parents=True)
        shutil.copy(images / "a.png", data / place)
    image = images / "a.png"
    return [
        ["predict", image, "--checkpoint", folder, "--json", "OUT"],
        ["predict", image, "--checkpoint", folder, "--csv", "OUT"],
        ["check-data", data, "--workers", "1", "--json", "OUT"],
        ["hosts", "--json", "OUT"],
        ["bench", "--json", "OUT"],
        ["visualize", folder, "--html", "OUT"],
        ["eval", folder, "--sizes", "16", "--json", "OUT"],
        ["eval", folder, "--sizes", "16", "--plot", "OUT"],
        ["probe", folder, "--images", image, "--json", "OUT"],
        ["train", "--device", "cpu", "--output-dir", "OUT"],
        ["compare", "--device", "cpu", "--output-dir", "OUT"],
        ["demo", "--output-dir", "OUT"],
        ["export", folder, "--output-dir", "OUT"],
        ["visualize", folder, "--save-dir", "OUT"],
    ]


@pytest.mark.slow
def test_no_command_waits_for_a_reader_or_replaces_a_pipe_or_writes_what_cannot_be(many, tmp_path, capsys):
    """A pipe that nobody reads, a folder where a file goes, a name that is too long, a folder that is not there."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    long, missing, below = tmp_path / ("x" * 250), tmp_path / "no" / "where", tmp_path / "file" / "x"
    for tokens in many:
        folder = tokens[-2] in ("--output-dir", "--save-dir")
        bad = (tmp_path / "pipe", below) if folder else (tmp_path / "pipe", tmp_path / "folder", long, missing, below)
        for path in bad:
            assert run(*tokens[:-1], path) == 2, (tokens, path)
            captured = capsys.readouterr()
            assert captured.err.count("\n") == 1, captured.err
            assert not any(tmp_path.glob(".*")), (tokens, path)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pipe_that_is_read_and_an_open_file_are_written(folder, images):
    """As `>(jq .)` and /dev/stdout are; what stands for an open file is not replaced."""
    os.mkfifo(images / "pipe")
    reader = os.open(images / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert run("predict", images / "a.png", "--checkpoint", folder, "--json", images / "pipe") == 0
    os.set_blocking(reader, True)
    assert len(json.loads(os.read(reader, 2**16))) == 3
    os.close(reader)
    with (images / "open.json").open("w+") as file:
        (images / "link").symlink_to(f"/dev/fd/{file.fileno()}")
        assert run("predict", images / "a.png", "--checkpoint", folder, "--json", images / "link") == 0
        assert len(json.loads(file.read())) == 3
        assert atomic.is_stream("/dev/stdout")
        with pytest.raises(LapeError, match="an open file"):
            atomic.write_atomically(images / "link", lambda file: file.write(b"x"))
    assert (images / "link").is_symlink()


def test_images_that_cannot_be_opened_are_named_and_the_others_done(folder, images, capsys, monkeypatch):
    """A link to nothing, links in a circle, a pipe, and one that goes while the others are read."""
    import lape.train.evaluate

    (images / "dangling.png").symlink_to(images / "gone.png")
    (images / "circle.png").symlink_to(images / "circle.png")
    os.mkfifo(images / "pipe.png")
    shutil.copy(images / "a.png", images / "goes.png")
    load = lape.train.evaluate.load_image

    def goes(path, *args):
        if path.endswith("goes.png"):
            os.unlink(path)
        return load(path, *args)

    monkeypatch.setattr(lape.train.evaluate, "load_image", goes)
    bad = [images / f"{name}.png" for name in ("dangling", "circle", "pipe", "goes")]
    paths = [images / "a.png", *bad, images / "b.png"]
    assert run("predict", *paths, "--checkpoint", folder, "--json", images / "p.json", "--top-k", 1) == 2
    shown_errors = capsys.readouterr().err
    assert "4 of 6 images are left out" in shown_errors
    assert all(str(path) in shown_errors for path in bad)
    assert [row["image"] for row in json.loads((images / "p.json").read_text())] == [str(paths[0]), str(paths[-1])]


def test_one_bad_image_costs_no_result_and_names_are_escaped(images, tmp_path, capsys):
    evil = "=cmd|'\x1b[31m\nx"
    folder = lape.save(make(), tmp_path / "n", classes=[evil, "@b", "c"])
    (images / "torn.png").write_bytes((images / "a.png").read_bytes()[:60])
    (images / "text.png").write_text("no image")
    odd = os.fsdecode(os.fsencode(str(images)) + b"/\xff\x1b.png")
    shutil.copy(images / "b.png", odd)
    names = [images / "a.png", images / "torn.png", odd, images / "text.png", images / "a.png"]
    outputs = images / "p.json", images / "p.csv"
    code = run("predict", *names, "--checkpoint", folder, "--json", outputs[0], "--csv", outputs[1], "--top-k", 3)
    text = capsys.readouterr()
    assert code == 2
    assert "2 of 5 images are left out" in text.err
    assert "torn.png" in text.err
    assert "text.png" in text.err
    rows = json.loads(outputs[0].read_text(encoding="utf-8"))
    assert [row["image"] for row in rows[::3]] == [str(images / "a.png"), odd, str(images / "a.png")]
    assert {row["class"] for row in rows} == {evil, "@b", "c"}
    with outputs[1].open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert not any(row["class"].startswith(("=", "@")) for row in table)
    raw = text.out + text.err + outputs[1].read_text(encoding="utf-8") + outputs[0].read_text(encoding="utf-8")
    assert all(c.isprintable() or c == "\n" for c in raw)
    assert not list(images.glob(".*"))


def test_results_are_there_as_they_come(images, monkeypatch):
    import lape.train.evaluate
    from lape.train.evaluate import Prediction

    target, seen = images / "p.json", []
    target.write_text("earlier")

    def slowly(paths, _options, _problems):
        for path in paths:
            seen.append(target.read_text())
            yield Prediction(path, ["x"], [1.0])

    monkeypatch.setattr(lape.train.evaluate, "predictions", slowly)
    assert (
        run("predict", images / "a.png", images / "b.png", images / "a.png", "--checkpoint", "c", "--json", target) == 0
    )
    assert seen[0] == "earlier"
    assert [len(json.loads(text)) for text in (*seen[1:], target.read_text())] == [1, 2, 3]


def test_closed_streams_and_a_folder_that_is_gone_are_no_traceback(folder, images, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert run("predict", images / "a.png", "--checkpoint", folder, "--json", images / "p.json") == 0
        assert run("predict", images / "none.png", "--checkpoint", folder) == 2
    assert len(json.loads((images / "p.json").read_text())) == 3
    gone = images / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run("predict", images / "a.png", "--checkpoint", folder, "--json", "p.json") == 2
    assert capsys.readouterr().err == "error: the working folder is gone: change to one that is there\n"


ODD = ("[" * 10**5, "[1]", "3", "{", '{"run": []}', '{"made_by": NaN}', "\xff")


@pytest.mark.parametrize("text", [*ODD, "PIPE"], ids=range(len(ODD) + 1))
def test_odd_json_in_the_folder_of_a_comparison_or_a_run_is_one_line_or_replaced(tmp_path, capsys, text):
    from lape.recipe import Recipe
    from lape.study.compare import DEMO_FILES, cell_folder, claim_demo_folder
    from lape.train.distributed import World
    from lape.train.logs import RUN, record_run

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if text == "PIPE" else path.write_bytes(text.encode("latin-1"))

    put(tmp_path / "demo" / DEMO_FILES[0])
    with pytest.raises(LapeError):
        claim_demo_folder(tmp_path / "demo")
    options = ["--joins", "basic", "--seeds", "0", "--epochs", "1", "--device", "cpu"]
    recipe = Recipe.from_yaml("digits", epochs=1, join_type="basic", seed=0)
    put(cell_folder(tmp_path / "c", recipe) / "result.json")
    assert run("compare", "--pes", recipe.pe, *options, "--output-dir", tmp_path / "c") == 2
    assert capsys.readouterr().err.count("\n") == 1
    put(tmp_path / "run" / RUN)
    world = World(0, 1, torch.device("cpu"))
    if text == "PIPE":
        with pytest.raises(LapeError, match="a pipe or a device"):
            record_run(Recipe(output_dir=str(tmp_path / "run")), world, (0, 0))
    else:
        assert record_run(Recipe(output_dir=str(tmp_path / "run")), world, (0, 0))
        assert len(json.loads((tmp_path / "run" / RUN).read_text())["starts"]) == 1


def test_the_lock_of_a_run_empties_nothing(tmp_path):
    from contextlib import ExitStack

    from lape.train.state import _hold

    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with ExitStack() as at_end, pytest.raises(LapeError, match=r"\.lock cannot be opened"):
        _hold(tmp_path, at_end)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.slow
def test_what_is_shown_steers_no_terminal():
    assert printable("a\x1b[31m\n\x9b\u202e\udcffé") == "a\\x1b[31m\\n\\x9b\\u202e\\udcffé"
    tokens = ["predict", os.fsdecode(b"\xff\x1b[0m\n.png"), "--checkpoint", "none\x1b.pth"]
    done = Process(python, "from lape.cli.app import main; main()", *tokens)
    _, errors = done.communicate()
    assert done.returncode == 2
    assert "\x1b" not in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_nothing_leaves_the_machine(tmp_path):
    """Without a network, and with an empty home folder, an export is what it is with one, and leaves nothing there."""
    pytest.importorskip("onnxruntime")
    home = tmp_path / "home"
    home.mkdir()
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace can be made here")
    digits = lape.save(
        lape.create_model("vit_tiny_patch16_224", **{**SIZES, "img_size": 8, "in_chans": 1}), tmp_path / "d"
    )
    code = """
import ctypes
new_user, new_network = 0x10000000, 0x40000000
assert ctypes.CDLL(None).unshare(new_user | new_network) == 0
import socket
with socket.socket() as probe:
    assert probe.connect_ex(("192.0.2.1", 80)), "there is a network"
from lape.cli.app import main
main()
"""
    tokens = ["export", str(digits), "--output-dir", str(tmp_path / "out")]
    done = Process(python, code, *tokens, HOME=str(home), XDG_CACHE_HOME=str(home))
    _, errors = done.communicate()
    assert done.returncode == 0, errors[-2000:]
    assert not [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in str(path)]


def test_a_model_is_held_to_twice_the_values_of_its_file(tmp_path, monkeypatch):
    """And 2^26 more; for images of four times the pixels, to four times that."""
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 1}
    model = lape.create_model("vit_tiny_patch16_224", **sizes)
    folder = lape.save(model, tmp_path / "model")
    values, limits, bounded = sum(t.numel() for t in lape.to_reference_state_dict(model).values()), [], restore.bounded

    def recorded(path, most, modules):
        limits.append(most)
        return bounded(path, most, modules)

    monkeypatch.setattr(restore, "bounded", recorded)
    lape.load(folder)
    lape.load(folder, input_size=64)
    assert limits == [2 * values + 2**26] * 2 + [4 * (2 * values + 2**26)] * 2
