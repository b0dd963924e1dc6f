"""`benchmarks/on_gpu.py` with tiny sizes on the CPU: on a GPU nothing but the device may be new."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARMS = {"basic", "basic, table at std 1", "LaPE"}


def finite(text: str) -> float:
    raise AssertionError(f"{text} is no result")


@pytest.mark.slow
def test_every_part_writes_its_numbers(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), "--out", str(tmp_path), "--commit", "abc"]
    tables = "inference, batch 4, bf16|training, batch 1, fp32"
    command += ["--scale-down", "--device", "cpu", "--minutes", "4", "--only", tables]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.stem: json.loads(path.read_text(), parse_constant=finite) for path in tmp_path.glob("*.json")}
    assert set(found) == {"summary", "tests", "ratios", "throughput", "data", "steps", "training"}, done.stdout[-3000:]
    parts = {name: content["results"] for name, content in found.items() if name != "summary"}
    for name, content in found.items():
        assert content["commit"] == "abc"
        assert content["versions"]["torch"]
        assert content["hardware"]["cores"]
        assert name == "summary" or content["settings"]["device"] == "cpu"

    assert parts["tests"]["status"] == "done"
    assert sum(parts["tests"]["counts"].values()) == len(parts["tests"]["cases"]) > 30
    assert parts["tests"]["counts"]["error"] == parts["tests"]["counts"]["failure"] == 0

    assert len(parts["ratios"]) == 2
    for name, table in parts["ratios"].items():
        assert table["status"] == "done", table
        assert set(table["ways"]) == {"eager", "compiled"}
        for rows in table["ways"].values():
            assert set(rows) == {"timm", "LaPE", "written out"} | ({"LaPE folded"} if "inference" in name else set())
            for row in rows.values():
                assert row["seconds"]["min"] > 0
                assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
                assert row["to_timm"]["rounds"] == len(row["each"]) >= 3
            assert rows["timm"]["to_timm"]["median"] == 1

    (table,) = parts["throughput"].values()
    assert table["status"] == "done", table
    assert table["matmul_flops_per_second"]["best"] > 0
    assert len(table["rows"]) == 6
    for row in table["rows"]:
        for join in ("basic", "LaPE"):
            assert row[join]["images_per_second"] > 0
            assert row[join]["share_of_matmul_rate"] > 0

    assert parts["data"]["status"] == "done", parts["data"]
    for row in parts["data"]["rows"].values():
        assert row["pil"]["images_per_second"] > 0
        assert row["device"]["images_per_second"] > 0

    assert parts["steps"]["status"] == "done", parts["steps"]
    assert {len(each) for each in parts["steps"]["images_per_second"].values()} == {3}
    assert parts["steps"]["as_it_is_to_waiting"]["median"] > 0

    assert {row["arm"] for row in parts["training"]} == ARMS
    for row in parts["training"]:
        assert row["status"] == "done", row
        assert row["epochs_done"] == 1
        assert 0 <= row["accuracy"] <= 100
    compared = found["training"]["compared"]
    assert set(compared) == ARMS
    assert compared["basic"]["difference_to_basic"]["mean"] == 0
