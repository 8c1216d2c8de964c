"""The benchmarks run and tell sane numbers. Whether the numbers are good is for a quiet machine, not for a test."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

BENCH = Path(__file__).parents[2] / "launch" / "bench"


def run_benchmark(name: str, *arguments: object) -> None:
    """Call its main in this process; by its path, for `ranks` is also a module of the tests."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCH))
    try:
        spec.loader.exec_module(module)
        module.main([str(each) for each in arguments])
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def numbers(value: object) -> list[float]:
    """All of them, at any depth."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def assert_sane(path: Path, benchmark: str, tables: int) -> list[dict]:
    told = json.loads(path.read_text())
    assert told["benchmark"] == benchmark and len(told["tables"]) == tables
    assert {"cpu", "cores", "threads", "torch", "date"} <= told["machine"].keys()
    assert str(path) not in path.read_text()
    rows = [row for table in told["tables"] for row in table["rows"]]
    assert rows
    for row in rows:
        assert all(math.isfinite(number) for number in numbers(row)), row
    return rows


SMALL = ("--models", "small", "--rounds", 2)
ALONE = {
    "update": (2, SMALL),
    "peers": (2, SMALL),
    "tracks": (1, SMALL),
    "variants": (3, SMALL),
    "busy": (1, (*SMALL, "--busy", 1)),
    "step": (1, ("--rounds", 1, "--repeats", 1, "--width", 16, "--heads", 2, "--context", 8, "--batch-size", 2)),
    "accuracy": (2, ("--updates", 20, "--elements", 8)),
    "export": (1, ("--rounds", 1, "--elements", 8000)),
    "merge": (1, ("--rounds", 1, "--elements", 8000)),
    "start_up": (2, ("--rounds", 1)),
    "growth": (
        5,
        ("--rounds", 1, "--tensors", 10, 100, "--mib", 1, 2, "--tracks", 1, 2, "--ranks", 1, 2),
    ),
    "against": (
        1,
        (
            "--base",
            "HEAD",
            "--rounds",
            2,
            "--launches",
            1,
            "--models",
            "small",
            "--file-model",
            "small",
            "--calls",
            "update",
            "--dtypes",
            "float32",
            "--layouts",
            "fsdp2",
        ),
    ),
}
ON_RANKS = {
    "ranks": (2, ("--model", "small", "--rounds", 1)),
    "checkpoint": (1, ("--model", "small", "--rounds", 1, "--layout", "columns")),
    "export": (1, ("--model", "small", "--rounds", 1)),
    "whole_tensors": (2, ("--model", "small", "--rounds", 1)),
}


def test_setup_script_parses() -> None:
    assert subprocess.run(["bash", "-n", BENCH / "setup.sh"]).returncode == 0


def test_every_benchmark_is_run_here() -> None:
    told = {path.stem for path in BENCH.glob("*.py") if "def main(" in path.read_text()}
    assert told == ALONE.keys() | ON_RANKS.keys()


@pytest.mark.parametrize("name", ALONE)
def test_benchmark_of_one_process_writes_its_numbers(tmp_path, capsys, name) -> None:
    tables, options = ALONE[name]
    run_benchmark(name, *options, "--json", tmp_path / "told.json")
    assert_sane(tmp_path / "told.json", name, tables)
    assert "|---|" in capsys.readouterr().out


@pytest.mark.parametrize("name", ON_RANKS)
def test_benchmark_of_two_ranks_writes_its_numbers(tmp_path, world, name) -> None:
    tables, options = ON_RANKS[name]
    world(2).run(run_benchmark, name, *options, "--json", tmp_path / "told.json")
    assert_sane(tmp_path / "told.json", name, tables)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of libraries that are installed too
def test_accuracy_sees_that_mul_and_add_drift_and_lerp_does_not(tmp_path) -> None:
    path = tmp_path / "told.json"
    run_benchmark("accuracy", "--updates", 500, "--elements", 64, "--decays", 0.9999, "--json", path)
    rows = {row["average"]: row["error / average"] for row in assert_sane(path, "accuracy", 1)}
    shown = ("ShardedEMA", "a.lerp_(live, 1 - decay)", "a.mul_(decay).add_(live, alpha=1 - decay)")
    errors = {name: float(rows[name]) for name in shown}  # a library may have an error's text in place of a number
    assert errors["ShardedEMA"] == errors["a.lerp_(live, 1 - decay)"]
    assert errors["a.mul_(decay).add_(live, alpha=1 - decay)"] > 3 * errors["ShardedEMA"]


def test_a_library_that_cannot_keep_float32_is_told_and_not_measured(tmp_path) -> None:
    path = tmp_path / "told.json"
    run_benchmark("peers", *SMALL, "--dtypes", "bfloat16", "--json", path)
    (row,) = (row for row in assert_sane(path, "peers", 1) if "AveragedModel" in row["average"])
    assert row["ms"].startswith("RuntimeError")
