from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from hostile import sealed
from safetensors.torch import load_file, save_file
from tiny import averaged_once
from torch import nn

from dist_ema import Bema, ConstantSchedule, CosineSchedule, ShardedEMA
from dist_ema.cli import main
from dist_ema.offline.plots import mean_ages


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
    """Damaged folders: tests/disk/test_hostile.py."""
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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(saved / "ema" / "b" / "model.safetensors")
    assert {name: value.dtype for name, value in written.items()} == dict.fromkeys(expected, torch.bfloat16)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in written.items())


def test_consolidate_corrects_the_lag_of_a_saved_average_as_the_run_does(tmp_path, capsys) -> None:
    """With the constants of the saved schedule, and of the track that keeps the start or of a folder."""
    net = nn.Linear(3, 2)
    bema = Bema(eta=0.5, kappa=0.7, rho=3.0, gamma=2.0, update_after_step=1)
    ema = ShardedEMA(net, bema.schedules)
    for step in range(5):
        with torch.no_grad():
            net.weight.add_(step)
        if step == 1:
            save_file(net.state_dict(), tmp_path / "start.safetensors")
        ema.update()
    save_file(net.state_dict(), tmp_path / "live.safetensors")
    ema.save(tmp_path / "ckpt" / "ema")
    ema.consolidate(tmp_path / "in the run", track="ema", correct=bema)
    expected = load_file(tmp_path / "in the run" / "model.safetensors")
    run = ["consolidate", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--track", "ema"]
    with_live = [*run, "--bema", "--live", str(tmp_path / "live.safetensors"), "--eta", "0.5"]
    for start in ([], ["--start", str(tmp_path / "start.safetensors")]):
        assert main([*with_live, *start]) == 0
        told = capsys.readouterr().out
        assert f"plus {11**-0.5:.9g} (live - start)" in told and "rho 3, gamma 2, update_after_step 1" in told
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.allclose(written[name], value, rtol=1e-6, atol=0) for name, value in expected.items())
    assert main([*with_live, "--rho", "10", "--dtype", "bfloat16"]) == 0
    assert f"plus {18**-0.5:.9g} (live - start)" in capsys.readouterr().out
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    assert main([*run, "--bema", "--live", str(tmp_path / "dcp")]) == 1
    assert "dist-ema merge FOLDER" in capsys.readouterr().err
    for wrong in (["--bema"], ["--live", "x"], ["--eta", "0.2"], ["--start", "x"]):
        with pytest.raises(SystemExit) as caught:
            main([*run, *wrong])
        assert caught.value.code == 2 and "--bema needs --live" in capsys.readouterr().err


def test_diff_tells_the_distance_of_two_sets_of_weights(saved, tmp_path, capsys) -> None:
    ema = ShardedEMA(nn.Linear(3, 2), ConstantSchedule(decay=0.9))
    ema.start_from(saved / "ema" / "a")
    ema.save(tmp_path / "same")
    assert main(["diff", str(saved), str(tmp_path / "same"), "--track", "a", "--track-b", "ema"]) == 0
    assert "0.000e+00  all 2 tensors" in capsys.readouterr().out
    values = load_file(saved / "ema" / "a" / "model.safetensors")
    save_file({name: (value * 2).double() for name, value in values.items()}, tmp_path / "twice.safetensors")
    assert main(["diff", str(saved / "ema" / "a"), str(tmp_path / "twice.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["relative"] == pytest.approx(0.5) and facts["tensors"] == pytest.approx({"weight": 0.5, "bias": 0.5})
    save_file({"weight": torch.ones(3, 2), "other": torch.ones(1)}, tmp_path / "other.safetensors")
    assert main(["diff", str(saved / "ema" / "a"), str(tmp_path / "other.safetensors")]) == 1
    told = capsys.readouterr()
    assert "all 0 tensors" in told.out and "3 tensors cannot be compared" in told.err


def test_a_long_schedule_in_a_picture_leaves_the_curves_their_room(tmp_path) -> None:
    """Its text stood within the axes, was cut at the edge of the picture, and took a third of their width."""
    inner = "CosineSchedule(0.004, total_steps=8_000)"
    long = f"chain((0, LinearSchedule(0.01, 0.004, total_steps=2_000)), (2_000, {inner}))"
    picture = tmp_path / "long.svg"
    assert main(["plot", "--schedule", long, "--schedule", inner, "--steps", "100", "--out", str(picture)]) == 0
    text = picture.read_text()
    width = float(re.search(r'width="([\d.]+)pt"', text)[1])
    left, right = (
        float(number) for number in re.search(r'"axes_1".*?d="M ([\d.]+) \S+ \nL ([\d.]+)', text, re.S).groups()
    )
    assert right - left > 0.8 * width
    assert text.count(">CosineSchedule(") == 1, "a legend names a schedule once"


def test_plot_draws_the_schedules(saved, tmp_path, capsys) -> None:
    for name in ("picture.svg", "picture.png"):
        assert main(["plot", str(saved), "--out", str(tmp_path / name)]) == 0
        assert "2 schedules over 10 updates, now at 1" in capsys.readouterr().out
        assert (tmp_path / name).stat().st_size > 5000
    assert main(["plot", str(saved), "--out", str(tmp_path / "picture.xyz")]) == 1
    assert main(["plot", str(saved), "--steps", "1"]) == 1


def test_the_mean_age_of_a_constant_average_is_the_textbook_one() -> None:
    momenta, ages = mean_ages(ConstantSchedule(momentum=0.01), 3000)
    assert ages[0] == 0 and ages[1] == pytest.approx(0.99) and ages[-1] == pytest.approx(0.99 / 0.01)
    assert momenta[1] == 0.01


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
        (["--help"], ["inspect", "verify", "diff", "plot", "consolidate", "synthesize", "merge", "--version"]),
        (["diff", "--help"], ["A", "B", "--track", "--top", "--json", "example:"]),
        (["plot", "--help"], ["SRC", "--out", "--force", "--steps", "--schedule", "--sigma-rel", "example:"]),
        (["synthesize", "--help"], ["SNAPSHOTS", "OUT", "--sigma-rel", "--schedule", "--num-updates", "--dtype"]),
        (
            ["merge", "--help"],
            ["OUT", "SRC", "--decay", "--weights", "--equal", "--base", "--scale", "--track", "--dtype"],
        ),
        (["synthesize", "--help"], ["--max-shard-size", "--json", "example:"]),
        (["verify", "--help"], ["SRC", "example:"]),
        (["consolidate", "--help"], ["SRC", "DST", "--track", "--dtype", "--max-shard-size", "example:"]),
        (
            ["consolidate", "--help"],
            ["--bema", "--live", "--start", "--eta", "--rho", "--gamma", "--update-after-step"],
        ),
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


def test_the_command_line_writes_what_its_stream_can_encode(tmp_path) -> None:
    averaged_once().save(tmp_path / "größe" / "ema")
    command = [sys.executable, "-m", "dist_ema.cli", "inspect", str(tmp_path / "größe")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "gr\\xf6" in done.stdout and done.stderr == ""
    for redirection, complaint in ((">&-", "no standard output"), (">/dev/full", "No space left")):
        line = f"{sys.executable} -m dist_ema.cli inspect '{tmp_path / 'größe'}' {redirection}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 1 and complaint in done.stderr and "Traceback" not in done.stderr
