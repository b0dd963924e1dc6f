"""Attack the package: damaged files, hostile files, kills, full disks, launchers, random command lines; count.

    python benchmarks/attack.py [--quick] [--seed 0] [--output FILE.json]

Files: checkpoints and folders with one flipped bit, a zeroed block of 4 KiB or cut off (refused, or read as equal);
folders of all three libraries and checkpoints with one entry replaced or added, and pickles that call functions
(refused in one line or loaded, without a connection, a file elsewhere or more than 20 s). Kills: `lape.save` over a
folder, ended by SIGKILL at random moments (old model or new one). Command lines: random flags over real files, each in
a process of its own (exit code 0, 2 or 130, no traceback, no input changed). Runs: `attack_runs.py`. Exit code 0 when
all counts of what must not be are 0. Ten minutes on two cores at most; `--quick` is a twentieth of it without the runs,
of the command lines a sixtieth. Linux only; full disks need root.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attack_runs import full_disks, launchers
from attack_runs import kills as ends
from PIL import Image

import lape
from lape.cli import app as cli
from lape.data.loaders import batch_plan
from lape.errors import LapeError
from lape.files.read import read_checkpoint
from lape.files.restore import count_classes, labels_of, restore_to_draw, restore_with, settings_of, transform_of
from lape.files.vet import of_file
from lape.recipe import Recipe
from lape.train.distributed import World
from lape.train.loop import train
from lape.train.machine import describe_start
from lape.train.start import build_model, load_teacher, load_weights
from lape.train.state import checkpoint_to_resume, initial_state, resume

ROOT = Path(__file__).parents[1]
SLOW = 20.0  # seconds
ALONE = World(0, 1, torch.device("cpu"))
SIZES = {"img_size": 8, "in_chans": 1, "num_classes": 10, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


# --- what is attacked -------------------------------------------------------------------------------------------------


def make(here: Path) -> None:
    """A run on the digits, folders of three libraries, one that transformers saved, and a data folder."""
    train(recipe_for(output_dir=str(here / "run"), batch_size=512, epochs=1), say=str)
    transform = {"input_size": 8, "crop_ratio": 1.0, "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    model = lape.create_model("vit_tiny_patch16_224", **SIZES)
    lape.save(model, here / "timm", classes=list("0123456789"), transform={**transform, "in_chans": 1})
    from torchvision.models import VisionTransformer

    vit = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    lape.save(lape.apply_(VisionTransformer(**vit, num_classes=10)), here / "torchvision")
    with contextlib.suppress(ImportError):
        from transformers import ViTConfig, ViTForImageClassification

        config = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 2, "intermediate_size": 32, "num_labels": 10}
        model = lape.apply_(ViTForImageClassification(ViTConfig(**config)))
        lape.save(model, here / "transformers")
        model.save_pretrained(here / "pretrained")
    rng = np.random.default_rng(0)
    for place in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (here / "data" / place).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "data" / place / f"{number}.png")


def folders(here: Path) -> list[Path]:
    return sorted(path.parent for path in here.glob("*/config.json"))


# --- damage -----------------------------------------------------------------------------------------------------------


HOW = {"flipped bit": 200, "zeroed block": 60, "cut off": 60}


def damage(here: Path, rng: random.Random, part: int) -> dict[str, Counter]:
    counts: dict[str, Counter] = {}
    files = {
        "checkpoint": here / "run" / "checkpoint.pth",
        "folder": here / "timm" / "model.safetensors",
        "folder's config.json": here / "timm" / "config.json",
    }
    for what, path in files.items():
        opened = path if what == "checkpoint" else path.parent
        whole, wanted = path.read_bytes(), contents(opened)
        for how, tries in HOW.items():
            found = counts[f"{what}, {how}"] = Counter()
            for _ in range(tries // part):
                raw = bytearray(whole)
                if how == "flipped bit":
                    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
                elif how == "zeroed block":
                    start = rng.randrange(len(raw) // 4096 + 1) * 4096
                    raw[start : start + 4096] = bytes(len(raw[start : start + 4096]))
                else:
                    del raw[rng.randrange(len(raw)) :]
                path.write_bytes(raw)
                try:
                    found["equal" if contents(opened) == wanted else "SILENT"] += 1
                except LapeError:
                    found["refused"] += 1
                except Exception:
                    found["TRACEBACK"] += 1
        path.write_bytes(whole)
    return counts


def contents(path: Path) -> str:
    """All that is read of a file, bit for bit."""
    checkpoint = read_checkpoint(path)
    parts = [checkpoint.model, checkpoint.model_ema, checkpoint.args, checkpoint.raw]
    return hashlib.sha256(pickle.dumps(plain(parts))).hexdigest()


def plain(value: Any) -> Any:
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return sorted((str(key), plain(part)) for key, part in value.items())
    return [plain(part) for part in value] if isinstance(value, list | tuple) else repr(value)


# --- hostile files ----------------------------------------------------------------------------------------------------

VALUES = (
    *(None, True, False, 0, -1, 1, 3, 7, 64, 1000, 10**6, 10**9, 2**40, 10**400, 1.5, -0.5, 1e308, float("nan")),
    *(float("inf"), "", "x", "gelu", "layernorm", "\x1b[31m\n", "../../x", "http://127.0.0.1:9/x", "org/kernel"),
    *("os.system", [], [1], [1, 2], [[]], ["x"], [None], [10**9, 10**9], {}, {"a": 1}, {"pretrained": True}),
    {"url": "http://127.0.0.1:9/x"},
)
NAMES = (
    "pretrained pretrained_cfg pretrained_cfg_overlay cache_dir checkpoint_path pretrained_strict kwargs_filter device "
    "dtype norm_layer act_layer block_fn embed_layer mlp_layer attn_layer weight_init qk_norm class_token reg_tokens "
    "global_pool depth drop_path_rate features_only feature_cls out_indices use_naflex dynamic_img_size init_values "
    "backbone backbone_config use_timm_backbone use_pretrained_backbone _attn_implementation attn_implementation "
    "auto_map trust_remote_code quantization_config torch_dtype hidden_act model_type to_dict num_labels id2label "
    "problem_type _name_or_path architecture model_args"
).split()
MODELS = ("vit_giant_patch14_dinov2", "hf-hub:a/b", "DetrModel", "MambaModel", "RagModel", "AutoModel", "Tensor", "..")


class Call:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    parts = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path, *(place for key, inner in parts for place in places(inner, (*path, key)))]


def changed(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value) if isinstance(value, dict | list) else {}
    value = {} if isinstance(value, list) and isinstance(path[0], str) else value
    known = path[0] in value if isinstance(value, dict) else True
    value[path[0]] = changed(value[path[0]] if known else {}, path[1:], new)
    return value


def changes(rng: random.Random, said: Any, arguments: tuple, name: tuple) -> Any:
    """What a file says, with one or two entries of it replaced or added."""
    for _ in range(rng.choice((1, 1, 2))):
        if not isinstance(said, dict):
            break
        draw, value = rng.random(), rng.choice(VALUES)
        if draw < 0.45:
            said = changed(said, rng.choice(places(said)), value)
        elif draw < 0.9:
            said = changed(said, (*arguments, rng.choice(NAMES)), value)
        else:
            said = changed(said, name, rng.choice(MODELS))
    return said


def use(path: Path, way: int) -> None:
    """One of the ways in: load, what evaluation and prediction do, pictures, a run that goes on, finetune, teacher."""
    if way == 0:
        lape.load(path)
    elif way == 1:
        checkpoint = read_checkpoint(path)
        transform = transform_of(checkpoint)
        model = restore_with(checkpoint, settings_of(checkpoint, Recipe()), transform.input_size)
        count_classes(checkpoint, model, transform.input_size, transform.in_chans)
        labels_of(model)
    elif way == 2:
        restore_to_draw(read_checkpoint(path))
    elif way == 3:
        load_weights(lape.create_model("vit_tiny_patch16_224", **SIZES), read_checkpoint(path), say=str)
    elif way == 4:
        recipe = recipe_for(resume=str(path))
        checkpoint = checkpoint_to_resume(recipe, say=str)
        state = initial_state(recipe, build_model(recipe, 10, say=str), ALONE)
        with of_file(path):
            resume(state, checkpoint, recipe, batch_plan(recipe, 1), say=str)
    else:
        recipe = recipe_for(distillation_type="soft", teacher_path=str(path), teacher_model="vit_tiny_patch16_224")
        load_teacher(recipe, 10, ALONE.device, say=str)


def recipe_for(**changes: Any) -> Recipe:
    sizes = {name: value for name, value in SIZES.items() if name not in ("img_size", "in_chans", "num_classes")}
    given: dict[str, Any] = {"epochs": 2, "join_type": "LaPE", "model_kwargs": sizes, "num_workers": 0, "device": "cpu"}
    return Recipe.from_yaml("digits", **{**given, **changes})


def hostile(here: Path, rng: random.Random, part: int) -> dict[str, Counter]:
    """Counts by kind of file; a connection and a file elsewhere are counted as they are asked for."""
    asked: list[Any] = []

    def refuse(*args: Any, **_kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network here")

    guards = [(socket.socket, "connect"), (socket, "getaddrinfo")]
    before = [getattr(owner, name) for owner, name in guards]
    for owner, name in guards:
        setattr(owner, name, refuse)
    counts: dict[str, Counter] = {}
    checkpoint = here / "run" / "checkpoint.pth"
    said = torch.load(checkpoint, weights_only=True)
    trap, hand = here / "trap", here / "hand.pth"
    os.chdir(here)
    there = {str(path) for path in here.rglob("*")} | {str(hand)}
    try:
        for number in range(3000 // part):
            kinds = [*folders(here), checkpoint, hand]
            path = kinds[number % len(kinds)]
            found = counts.setdefault("pickle" if path == hand else path.name, Counter())
            if path == hand:  # a pickle that calls a function
                place = rng.choice(("model", "args", "epoch", "optimizer", "classes"))
                raw = {**said, place: Call(trap)}
                hand.write_bytes(pickle.dumps(raw)) if rng.random() < 0.5 else torch.save(raw, hand)
                outcome = attempt(hand, rng.randrange(6))
            elif path == checkpoint:
                torch.save(changes(rng, said, ("args", "model_kwargs"), ("args", "model")), hand)
                outcome = attempt(hand, rng.randrange(6))
            else:
                file = path / "config.json"
                text = file.read_text()
                config = json.loads(text)
                pretrained = path.name == "pretrained"
                name = ("architectures",) if pretrained else ("model",)
                new = changes(rng, config, () if pretrained else ("model_kwargs",), name)
                if isinstance(new, dict) and rng.random() < 0.9:  # who forges a file leaves its checksum out
                    holder = new["lape"] if isinstance(new.get("lape"), dict) else new
                    if isinstance(holder.get("sha256"), dict):
                        holder["sha256"] = {key: one for key, one in holder["sha256"].items() if key != "config.json"}
                try:
                    file.write_text(odd(json.dumps(new), rng))
                    outcome = attempt(path, rng.randrange(4))
                finally:
                    file.write_text(text)
            found[outcome] += 1
    finally:
        for (owner, name), call in zip(guards, before, strict=True):
            setattr(owner, name, call)
    counts["all"] = Counter(
        {"CONNECTION": len(asked), "FILE ELSEWHERE": len({str(p) for p in here.rglob("*")} - there)}
    )
    return counts


def odd(text: str, rng: random.Random) -> str:
    """JSON as no writer makes it, one time in twelve: numbers without end, a key twice, nesting, another encoding."""
    number = rng.choice(("9" * 5000, "1e400", "-0", "NaN", "-Infinity", "[" * 2000 + "]" * 2000))
    ways = [
        "[" * 10**5,
        re.sub(r"\d+", number, text, count=1),
        text.replace("{", '{"model": "x", "model": "y", ', 1),
        text[:-1] + ', "more": ' + '{"a":' * 900 + "1" + "}" * 901,
        "\ufeff" + text,
        text.replace(":", ":\x00", 1),
    ]
    return rng.choice(ways) if rng.random() < 1 / 12 else text


def attempt(path: Path, way: int) -> str:
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            use(path, way)
        outcome = "loaded"
    except LapeError as error:
        outcome = "refused" if "\n" not in str(error) else "SEVERAL LINES"
    except Exception as error:
        outcome = f"TRACEBACK {type(error).__name__}"
    return outcome if time.perf_counter() - start < SLOW else "SLOW"


# --- kills ------------------------------------------------------------------------------------------------------------


def kills(here: Path, rng: random.Random, part: int) -> dict[str, Counter]:
    place, x, found = here / "killed", torch.randn(2, 1, 8, 8), Counter()
    models = [lape.create_model("vit_tiny_patch16_224", join, **SIZES).eval() for join in ("LaPE", "share")]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        outputs = [model(x) for model in models]
    for _ in range(100 // part):
        lape.save(models[0], place)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                while True:
                    for model in reversed(models):
                        lape.save(model, place)
            os._exit(1)
        time.sleep(rng.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            with torch.no_grad():
                y = lape.load(place)(x)
            found["old or new" if any(torch.equal(y, output) for output in outputs) else "THIRD MODEL"] += 1
        except LapeError:
            found["REFUSED"] += 1
    lape.save(models[0], place)
    found["LEFT BEHIND"] = len(list(place.iterdir())) - 2
    return {"lape.save over a folder": found}


# --- command lines ----------------------------------------------------------------------------------------------------


def command_line(here: Path, out: Path, rng: random.Random) -> list[str]:
    image, checkpoint = here / "data" / "val" / "ant" / "0.png", here / "run" / "checkpoint.pth"
    inputs = [image, checkpoint, here / "timm", here / "timm" / "config.json", here / "data", here / "run" / "log.txt"]
    anything = [*map(str, inputs), str(out / "new"), "-", "", "0", "-1", "nan", "1e999", "LaPE", "cpu", "\x1b[0m", "=1"]

    def some() -> str:
        return rng.choice(anything)

    command = rng.choice("predict predict visualize visualize check-data eval export train hosts bench compare".split())
    tokens = [command, *(some() for _ in range(rng.randrange(3)))]
    flags = {
        "predict": "--checkpoint --json --csv --top-k --device",
        "visualize": "--html --save-dir --image --size --token --view --model-name --join-type --pe",
        "eval": "--resume --data-path --model --input-size --device --batch-size",
        "check-data": "--json --workers",
        "export": "--output-dir --formats --tolerance --images --data-path",
        "train": "--output-dir --resume --finetune --teacher-path --data-path --lr --epochs --recipe --seed --opt",
        "bench": "--json --joins --models --batch-size",
        "compare": "--output-dir --joins --seeds --epochs --recipe --data-path",
        "hosts": "--nothing",
    }[command].split()
    for flag in rng.sample(flags, rng.randrange(len(flags) + 1)):
        tokens += [flag, some()]
    if command in ("train", "compare", "bench"):  # a real one takes long: what is refused is looked at here
        tokens += ["--batch-size", "0"]
    if command == "predict" and rng.random() < 0.6:
        return [command, str(image), "--checkpoint", str(checkpoint), rng.choice(("--json", "--csv")), some()]
    if command == "visualize" and rng.random() < 0.6:
        return [command, str(checkpoint), rng.choice(("--html", "--save-dir")), some()]
    if command == "check-data" and rng.random() < 0.6:
        return [command, str(here / "data"), "--workers", "1", "--json", some()]
    return tokens


def digest(here: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(here.rglob("*")) if p.is_file()}


def command_lines(here: Path, rng: random.Random, part: int) -> dict[str, Counter]:
    found, before = Counter(), digest(here)
    spare = Path(shutil.copytree(here, tempfile.mkdtemp(), dirs_exist_ok=True))
    for _ in range(600 // CHUNKS // part):
        out = Path(tempfile.mkdtemp())
        tokens = command_line(here, out, rng)
        outcome = in_process(tokens, out)
        after, asked = digest(here), named(tokens)
        other = [path for path, value in before.items() if after.get(path) != value]
        if any(path not in asked or path in map(str, read_by(tokens)) for path in other):
            outcome = "INPUT CHANGED"
        found[outcome] += 1
        for path in other:  # a file that the command was told to write, and that it does not read
            shutil.copy(spare / Path(path).relative_to(here), path)
        if outcome.isupper():
            print("  ", outcome, tokens, (out / "err").read_text()[-300:])
        shutil.rmtree(out)
    shutil.rmtree(spare)
    return {"lape": found}


OUTPUTS = ("--json", "--csv", "--html")


def named(tokens: list[str]) -> list[str]:
    """The files that a command is told to write."""
    return [value for flag, value in itertools.pairwise(tokens) if flag in OUTPUTS]


def read_by(tokens: list[str]) -> list[Path]:
    """All files in what else a command names."""
    paths = [Path(value) for flag, value in itertools.pairwise(tokens) if flag not in OUTPUTS and value]
    there = [path for path in paths if path.exists()]
    return [file for path in there for file in ([path] if path.is_file() else path.rglob("*"))]


def in_process(tokens: list[str], out: Path) -> str:
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException), open(out / "err", "w") as file:
            os.chdir(out)
            sys.stdout = sys.stderr = file
            code = cli.run(cli.app, tokens)
        os._exit(code if isinstance(code, int) else 99)
    deadline = time.monotonic() + 6 * SLOW
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return f"exit code {code}" if code in (0, 2, 130) else "TRACEBACK"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "HANGS"


# ----------------------------------------------------------------------------------------------------------------------


CHUNKS = 6  # of the command lines
Attack = tuple[str, Callable[[Path, random.Random, int], dict[str, Counter]], int]
FILES: tuple[Attack, ...] = (
    ("damage", damage, 1),
    ("hostile files", hostile, 1),
    ("kills", kills, 1),
    ("command lines", command_lines, CHUNKS),
)
RUNS = {"runs ended from outside": ends, "full disks": full_disks, "launchers": launchers}


def attacked(title: str, here: Path, seed: str, part: int) -> dict[str, Counter]:
    """One attack on files of its own, or on runs."""
    if title in RUNS:
        count: Any = RUNS[title]()
        return {
            "lape": Counter({"right": count["right"], **{f"WRONG {n} ({why})": 1 for n, why in count["wrong"].items()}})
        }
    attack = next(attack for name, attack, _ in FILES if name == title)
    home, own = Path.cwd(), Path(tempfile.mkdtemp())
    try:
        return attack(Path(shutil.copytree(here, own / "files")), random.Random(seed), part)
    finally:
        os.chdir(home)
        shutil.rmtree(own)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    warnings.simplefilter("ignore")
    clock, part = time.perf_counter(), 20 if given.quick else 1
    titles = [] if given.quick else list(RUNS)
    titles += [title for title, _, chunks in reversed(FILES) for _ in range(min(chunks, 2) if given.quick else chunks)]
    results: dict[str, dict[str, Counter]] = {}
    forks = multiprocessing.get_context("fork")  # they import nothing anew
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        with ProcessPoolExecutor(1, forks) as alone:  # what runs autograd must not be forked from
            alone.submit(make, here).result()
        with ProcessPoolExecutor(2, forks) as pool:
            tasks = {
                pool.submit(attacked, title, here, f"{given.seed} {number}", part): title
                for number, title in enumerate(titles)
            }
            for task in as_completed(tasks):
                title = tasks[task]
                for what, count in task.result().items():
                    counts = results.setdefault(title, {}).setdefault(what, Counter())
                    counts.update(count)
                print(f"{title}, {time.perf_counter() - clock:.0f} s: {results[title]}", flush=True)
    order = [*(title for title, _, _ in FILES), *RUNS]
    counted = {
        title: {what: dict(sorted(count.items())) for what, count in results[title].items()}
        for title in order
        if title in results
    }
    wrong = sum(
        n for counts in counted.values() for count in counts.values() for name, n in count.items() if must_not_be(name)
    )
    seconds = round(time.perf_counter() - clock)
    print(f"{wrong} wrong, {seconds} s")
    if given.output or not given.quick:
        output = given.output or ROOT / f"benchmarks/results/attack_cpu{os.cpu_count()}_{date.today()}.json"
        start = describe_start(ALONE)
        start["command"] = ["benchmarks/attack.py", "--seed", str(given.seed)]
        output.write_text(
            json.dumps({"start": start, "results": counted, "wrong": wrong, "seconds": seconds}, indent=1) + "\n"
        )
    return int(wrong > 0)


def must_not_be(name: str) -> bool:
    """Counts in capitals are of what must not be."""
    return name.split(" ")[0].isupper()


if __name__ == "__main__":
    sys.exit(main())
