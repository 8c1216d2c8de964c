from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from torch import nn

from dist_ema import ConstantSchedule, CosineSchedule, ShardedEMA
from dist_ema.cli import main


@pytest.fixture
def saved(tmp_path):
    ema = ShardedEMA(nn.Linear(3, 2), {"a": CosineSchedule(0.1, total_steps=10), "b": ConstantSchedule(decay=0.9)})
    ema.update()
    ema.save(tmp_path / "ckpt" / "ema")
    return tmp_path / "ckpt"


def test_inspect_tells_a_saved_average(saved, capsys) -> None:
    assert main(["inspect", str(saved / "ema")]) == 0
    told = capsys.readouterr().out
    assert "1 updates" in told and "track a: CosineSchedule(momentum=0.1" in told and "8 elements" in told


def test_inspect_finds_the_average_within_an_accelerate_checkpoint_and_prints_json(saved, capsys) -> None:
    assert main(["inspect", str(saved), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_updates"] == 1 and facts["num_averaged_elements"] == 8
    assert facts["tracks"]["b"]["momentum"] == pytest.approx(0.1)
    assert facts["written_by"]["torch"] == torch.__version__


DAMAGE = {
    "not json": "{]",
    "another file": "{}",
    "a list": "[]",
    "too deep": "[" * 100_000,
    "future": {"format_version": 2},
    "true version": {"format_version": True},
    "no tracks": {"tracks": {}},
    "escaping track": {"tracks": {"../../etc": {"type": "CosineSchedule"}}},
    "track without a type": {"tracks": {"a": {"momentum": 1}}},
    "type is a list": {"tracks": {"a": {"type": []}}},
    "negative counter": {"num_updates": -1},
    "counter is text": {"num_updates": "many"},
    "shape is text": {"tensors": {"w": {"shape": "33", "dtype": "float32", "averaged": True}}},
    "shape is nested": {"tensors": {"w": {"shape": [[3]], "dtype": "float32", "averaged": True}}},
    "shape is negative": {"tensors": {"w": {"shape": [-3], "dtype": "float32", "averaged": True}}},
    "shape is huge": {"tensors": {"w": {"shape": [2**40, 2**40], "dtype": "float32", "averaged": True}}},
    "dtype is a number": {"tensors": {"w": {"shape": [3], "dtype": 3, "averaged": True}}},
    "no tensors": {"tensors": []},
}


@pytest.mark.parametrize("case", ["missing", "empty", "several", "long name", "folder as manifest", "pipe", *DAMAGE])
def test_bad_answers_exit_with_1_and_no_traceback(saved, tmp_path, capsys, case) -> None:
    source = tmp_path / ("x" * 5000 if case == "long name" else "other")
    if case not in ("missing", "long name"):
        source.mkdir()
    if case == "several":
        for name in ("x", "y"):
            (source / name).mkdir()
            (source / name / "manifest.json").write_text("{}")
    if case == "folder as manifest":
        (source / "manifest.json").mkdir()
    if case == "pipe":
        os.mkfifo(source / "manifest.json")
    if case in DAMAGE:
        change = DAMAGE[case]
        good = json.loads((saved / "ema" / "manifest.json").read_text())
        (source / "manifest.json").write_text(change if isinstance(change, str) else json.dumps({**good, **change}))
    assert main(["inspect", str(source)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dist-ema: ") and "Traceback" not in captured.err


def test_names_cannot_command_the_terminal_and_odd_numbers_are_told(saved, capsys) -> None:
    path = saved / "ema" / "manifest.json"
    record = json.loads(path.read_text())
    record["tracks"] = {
        "a": {"type": "\x1b[2Jx", "momentum": 10**400},
        "b": {"type": "CosineSchedule", "total_steps": 1e9},
    }
    path.write_text(json.dumps(record))
    assert main(["inspect", str(saved)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "next momentum unknown" in told


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["explode"], ["inspect", "x", "--yaml"]])
def test_wrong_usage_exits_with_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_commands_and_options_of_the_command_line(capsys) -> None:
    for arguments, names in (
        (["--help"], ["inspect", "--version"]),
        (["inspect", "--help"], ["SRC", "--json", "example:"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        told = capsys.readouterr().out
        assert caught.value.code == 0 and all(name in told for name in names)


def test_the_installed_command_works_in_a_pipe_that_closes_early(saved) -> None:
    command = f"{shlex.quote(sys.executable)} -m dist_ema.cli inspect {shlex.quote(str(saved))} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{" and done.stderr == ""
