from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from hostile import sealed
from safetensors.torch import load_file
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


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["consolidate", "out"]])
@pytest.mark.parametrize("case", ["missing", "empty", "several", "long name"])
def test_bad_answers_exit_with_1_and_no_traceback(tmp_path, monkeypatch, capsys, case, command) -> None:
    """Damaged folders: tests/test_hostile.py."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / ("x" * 5000 if case == "long name" else "other")
    if case not in ("missing", "long name"):
        source.mkdir()
    if case == "several":
        for name in ("x", "y"):
            (source / name).mkdir()
            (source / name / "manifest.json").write_text("{}")
    assert main([command[0], str(source), *command[1:]]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dist-ema: ") and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_names_cannot_command_the_terminal_and_odd_numbers_are_told(saved, capsys) -> None:
    path = saved / "ema" / "manifest.json"
    record = json.loads(path.read_text())
    record["tracks"] = {
        "a": {"type": "\x1b[2Jx", "momentum": 10**400},
        "b": {"type": "CosineSchedule", "total_steps": 1e9},
    }
    record["checksums"] = {name: record["checksums"]["a"] for name in record["tracks"]}
    path.write_text(sealed(record))
    assert main(["inspect", str(saved)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "next momentum unknown" in told


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["explode"], ["inspect", "x", "--yaml"]])
def test_wrong_usage_exits_with_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_verify_tells_a_sound_average_and_names_damaged_tensors(saved, capsys) -> None:
    assert main(["verify", str(saved)]) == 0
    assert "sound, 4 tensors, 64 bytes" in capsys.readouterr().out
    path = saved / "ema" / "b" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert main(["verify", str(saved)]) == 1
    told = capsys.readouterr()
    assert "1 tensors are not those that were saved (b: bias)" in told.err and told.out == ""


def test_consolidate_writes_a_plain_model_folder(saved, tmp_path, capsys) -> None:
    assert main(["consolidate", str(saved), str(tmp_path / "out")]) == 1, "there are two tracks"
    assert "name one of these" in capsys.readouterr().err
    command = ["consolidate", str(saved), str(tmp_path / "out"), "--track", "b", "--dtype", "bfloat16"]
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(saved / "ema" / "b" / "model.safetensors")
    assert {name: value.dtype for name, value in written.items()} == dict.fromkeys(expected, torch.bfloat16)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in written.items())


def test_an_interrupted_consolidate_leaves_nothing(saved, tmp_path, capsys, monkeypatch) -> None:
    def interrupt(self, count) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    before = sorted(tmp_path.rglob("*"))
    assert main(["consolidate", str(saved), str(tmp_path / "out"), "--track", "a"]) == 130
    assert sorted(tmp_path.rglob("*")) == before
    assert "interrupted" in capsys.readouterr().err


def test_commands_and_options_of_the_command_line(capsys) -> None:
    for arguments, names in (
        (["--help"], ["inspect", "verify", "consolidate", "--version"]),
        (["verify", "--help"], ["SRC", "example:"]),
        (["consolidate", "--help"], ["SRC", "DST", "--track", "--dtype", "--max-shard-size", "example:"]),
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
