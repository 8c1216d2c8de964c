from __future__ import annotations

import json
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


@pytest.mark.parametrize("case", ["missing", "empty", "several", "not json"])
def test_bad_answers_exit_with_1_and_no_traceback(saved, tmp_path, capsys, case) -> None:
    source = tmp_path / "other"
    if case != "missing":
        source.mkdir()
    if case == "several":
        for name in ("x", "y"):
            (source / name).mkdir()
            (source / name / "manifest.json").write_text("{}")
    if case == "not json":
        (source / "manifest.json").write_text("{]")
    assert main(["inspect", str(source)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dist-ema: ") and "Traceback" not in captured.err


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
