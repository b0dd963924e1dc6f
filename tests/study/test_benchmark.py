"""`lape bench`: what is measured is measured truly, and a mistake is one line."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import TINY

import lape
from lape.cli import app as cli
from lape.study.benchmark import benchmark, macs, peak_memory, relative_times, time_rounds, variant_lines
from lape.study.options import BenchOptions
from lape.train import machine

WORDS = [f"{key}={value}" for key, value in TINY.items() if key != "img_size"]
COMMAND = ["bench", "--model", "vit_tiny_patch16_224", "--image-size", "16", "--batch-size", "2", "--rounds", "3"]
COMMAND += ["--device", "cpu", "--model-kwargs", *WORDS]


def run(*extra: str) -> int:
    return cli.run(cli.app, [*COMMAND, *extra])


def test_versions_are_of_the_code_that_runs(monkeypatch):
    monkeypatch.setattr(machine.metadata, "version", lambda name: "0.0")  # an older one is installed
    versions = machine.versions()
    assert (versions["lape"], versions["timm"]) == (lape.__version__, "0.0")


@pytest.mark.slow
def test_a_table_and_a_file_with_all_variants(tmp_path, capsys):
    path = tmp_path / "found.json"
    peers = ["timm", "torchvision", "transformers"]
    assert run("--fold", "--joins", "basic", "lape", "--peers", *peers, "--json", str(path)) == 0
    found = json.loads(path.read_text())
    variants = found["variants"]
    assert list(variants) == ["basic", "LaPE", "LaPE folded", *peers]
    assert found["hardware"]["cores"] >= 1
    assert set(found["versions"]) >= {"torch", "timm", "torchvision", "transformers"}
    shown = capsys.readouterr().out
    for name, numbers in variants.items():
        assert f"\n{name}" in shown
        assert numbers["macs"] == variants["basic"]["macs"]  # a LayerNorm is no matrix product
        for part in ("inference", "latency", "training"):
            if part == "training" and name == "LaPE folded":
                assert part not in numbers
                continue
            assert len(numbers[part]["seconds_each_round"]) == 3
            assert min(numbers[part]["seconds_each_round"]) > 0
            assert numbers[part]["peak_bytes"] > 4 * numbers["parameters"]
    width, layers = TINY["embed_dim"], TINY["depth"]
    assert variants["LaPE"]["parameters"] == variants["basic"]["parameters"] + 2 * width * layers
    # the same ViT everywhere: same size, same work
    assert {variants[peer]["parameters"] for peer in peers} == {variants["basic"]["parameters"]}
    assert {variants[peer]["inference"]["peak_bytes"] for peer in ("basic", "timm")} == {
        variants["basic"]["inference"]["peak_bytes"]
    }


def test_only_training_only_inference_and_stdout(capsys):
    assert run("--no-inference", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(numbers) for numbers in found["variants"].values()] == [{"parameters", "macs", "training"}] * 2
    assert run("--no-train", "--amp", "bf16") == 0
    shown = capsys.readouterr().out
    assert "bf16 autocast" in shown
    assert "training" not in shown


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch):
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else present(name))
    said: list[str] = []
    kwargs = {key: value for key, value in TINY.items() if key != "img_size"}
    options = BenchOptions(
        model="vit_tiny_patch16_224",
        joins=("basic",),
        model_kwargs=kwargs,
        image_size=16,
        batch_size=1,
        rounds=3,
        train=False,
        device="cpu",
        peers=("torchvision", "timm"),
    )
    found = benchmark(options, say=said.append)
    assert list(found["variants"]) == ["basic", "timm"]
    assert sum("torchvision is not installed" in line for line in said) == 1
    assert variant_lines(found)[1].startswith("basic")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--rounds", "2"], ["--rounds 2", "3 or more"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--image-size", "17"], ["17", "16"]),
        (["--image-size", "0"], ["--image-size 0"]),
        (["--joins", "LaPEE"], ["LaPEE", "LaPE-sharing"]),
        (["--peers", "timmm"], ["timmm", "transformers"]),
        (["--amp", "half"], ["half", "bf16"]),
        (["--amp", "fp16"], ["fp16", "bf16"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--no-train", "--no-inference"], ["nothing to measure"]),
        (["--json", "absent/x.json"], ["absent/x.json"]),
        (["--model", "vit_tinny"], ["vit_tinny"]),
        (["--model-kwargs", "depht=2"], ["depht", "depth"]),
        (["--threads", "-1"], ["--threads"]),
        (["--model", "deit_tiny_distilled_patch16_224", "--peers", "transformers"], ["--peers timm"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line(extra: list[str], parts: list[str], capsys):
    assert run(*extra) == cli.USER_ERROR
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert all(part in shown.err for part in parts), shown.err


def test_macs_are_those_of_the_formula():
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", **TINY)
    n, d, layers, patch = 16 + 1, TINY["embed_dim"], TINY["depth"], 4 * 4 * 3
    block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d
    assert macs(model.eval(), torch.randn(1, 3, 16, 16)) == 16 * patch * d + layers * block + d * TINY["num_classes"]


def test_peak_memory_counts_every_byte():
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1) * 2  # two results of x's size live together

    x = torch.zeros(1000)
    model = Doubles()
    model.register_buffer("kept", torch.zeros(10))
    surplus = peak_memory(lambda: model(x), model, torch.device("cpu")) - 4 * (2 * 1000 + 10)
    assert 0 <= surplus < 64  # the numbers 1 and 2 are tensors for a moment


def test_every_round_times_each_once_in_an_order_of_its_own():
    calls: list[str] = []
    runs: dict[str, Any] = {name: lambda name=name: calls.append(name) for name in "abcd"}
    import lape.study.benchmark as module

    shortest, module.SHORTEST = module.SHORTEST, 0.0  # one call a round
    try:
        times = time_rounds(runs, 6, torch.device("cpu"))
    finally:
        module.SHORTEST = shortest
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abcd", 6)
    timed = calls[-24:]
    rounds = [tuple(timed[i : i + 4]) for i in range(0, 24, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 2


def test_ratios_are_taken_within_a_round():
    found = relative_times([2.0, 20.0, 200.0, 2.2], [1.0, 10.0, 100.0, 1.0])  # the machine grew slower, for both alike
    assert found["ratio"] == 2.0
    low, high = found["ratio_interval"]
    assert 2.0 <= low <= high <= 2.2


# --- the scripts in benchmarks/ ---------------------------------------------------------------------------------------

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # scripts import each other
        patch.syspath_prepend(SCRIPTS)
        spec.loader.exec_module(module)
    return module


def test_the_written_out_baseline_is_the_converted_model_in_outputs_and_gradients():
    original_style = script("original_style")
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", **TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    baseline, x = original_style.written_out(model), torch.randn(2, 3, 16, 16)
    assert original_style.largest_difference(model, baseline, x) < original_style.TOLERANCE
    for one in (model, baseline):
        one(x).square().sum().backward()
    torch.testing.assert_close(baseline.pos_embed.grad, model.pos_embed.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        baseline.blocks[1].pe_norm.weight.grad, model.lape.norms["1"].weight.grad, rtol=1e-3, atol=1e-4
    )
    with torch.no_grad():
        baseline.blocks[0].pe_norm.weight.mul_(2)  # the check can fail
    assert original_style.largest_difference(model, baseline, x) > original_style.TOLERANCE


@pytest.mark.slow
def test_tables_are_written_from_the_files_that_the_scripts_write(tmp_path, monkeypatch, capsys):
    import sys

    tiny = ["--model", "vit_tiny_patch16_224", "--model-kwargs", json.dumps(TINY), "--batch-size", "2"]
    tiny += ["--rounds", "3", "--device", "cpu"]
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name, arguments in {
        "original_style": [*tiny, "--product", "32", "--eager"],
        "joins": [*tiny, "--only", "eager"],
        "chain_cost": ["--tiny", "--rounds", "3", "--device", "cpu"],
    }.items():
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(results / f"{name}_cpu.json")])
        assert not script(name).main()
    assert run("--json", str(results / "bench_cpu.json")) == 0
    tables = script("tables")
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert "| LaPE | " in tables.variants()
    assert "| lape, bf16 autocast | " in tables.original_style()
    assert "| eager | training, batch 2 | " in tables.joins()
    assert "| peak memory of training | " in tables.joins()
    assert "\n| 4 | 64 | 32 | 4 | " in tables.chain_cost()
