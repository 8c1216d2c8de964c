"""The command line on whatever folder a user has: a run, snapshots, an export, another library's model, a file."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny import HALF, averaged_once
from torch import nn

from dist_ema import CheckpointNotFoundError, ConstantSchedule, ShardedEMA
from dist_ema.cli import main


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints, each with an average in it, live weights beside it, and a folder of snapshots."""
    ema = ShardedEMA(nn.Linear(3, 2), {"a": HALF, "b": ConstantSchedule(decay=0.9)})
    for step in (1, 3, 20):  # by name the last would come second
        while ema.num_updates < step:
            ema.update()
        ema.save(tmp_path / "run" / f"checkpoint-{step}" / "ema")
        save_file({"weight": torch.zeros(1)}, tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        ema.snapshot(tmp_path / "snapshots")
    save_file({"weight": torch.zeros(1)}, tmp_path / "run" / "model.safetensors")
    return tmp_path / "run"


def answer(capsys, *arguments: object, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert (captured.err == "") == (code == 0) and "Traceback" not in captured.err
    return captured.out or captured.err


def test_the_folder_of_a_run_is_a_table_in_the_order_of_the_updates(run, capsys) -> None:
    lines = answer(capsys, "inspect", run).splitlines()
    assert lines[0] == f"{run}: 3 saved averages" and lines[1].split() == [
        "name",
        "updates",
        "tracks",
        "bytes",
        "saved",
    ]
    assert [line.split()[:4] for line in lines[2:]] == [
        [f"checkpoint-{step}/ema", str(step), "a", "b"] for step in (1, 3, 20)
    ]
    facts = json.loads(answer(capsys, "inspect", run, "--json"))
    assert [row["num_updates"] for row in facts["averages"]] == [1, 3, 20]
    row = facts["averages"][0]
    assert row["tracks"] == ["a", "b"] and row["name"] == "checkpoint-1/ema" and row["saved_at"].startswith("20")
    files = (run / "checkpoint-1" / "ema").rglob("*.safetensors")
    assert row["file_bytes"] == sum(path.stat().st_size for path in files)
    alone = json.loads(answer(capsys, "inspect", run / "checkpoint-1" / "ema", "--json"))
    assert alone["file_bytes"] == row["file_bytes"], "one key, two numbers"


def test_the_folder_of_a_run_is_not_said_to_hold_no_average(run, capsys, tmp_path) -> None:
    (run / "model.safetensors").unlink()  # of these weights verify tells
    commands = (["verify", run], ["consolidate", run, tmp_path / "export"], ["plot", run, "--out", tmp_path / "p.svg"])
    for command in commands:
        text = answer(capsys, *command, code=1)
        assert "hold 3 (checkpoint-1/ema, checkpoint-20/ema, checkpoint-3/ema). Give the folder of one" in text
    with pytest.raises(CheckpointNotFoundError, match="checkpoint-20/ema"):
        ShardedEMA(nn.Linear(3, 2), HALF).load(run)


def test_a_table_reads_manifests_alone(run, capsys) -> None:
    for path in run.rglob("*.safetensors"):
        path.unlink()
    assert "checkpoint-20/ema" in answer(capsys, "inspect", run)


def test_synthesize_and_inspect_take_the_same_folders(run, capsys, tmp_path) -> None:
    for number, folder in enumerate(
        (tmp_path / "snapshots", run, run / "checkpoint-20", run / "checkpoint-20" / "ema")
    ):
        facts = json.loads(answer(capsys, "inspect", folder, "--json"))
        listed = [row["folder"] for row in facts["averages"]] if "averages" in facts else [facts["folder"]]
        out = tmp_path / f"out{number}"
        made = json.loads(answer(capsys, "synthesize", folder, out, "--schedule", "EqualSchedule()", "--json"))
        assert sorted({part["folder"] for part in made["weights"]}) == sorted(listed)


def test_one_damaged_average_does_not_hide_the_others_and_the_answer_is_bad(run, capsys) -> None:
    (run / "checkpoint-3" / "ema" / "manifest.json").write_text("{")
    assert main(["inspect", str(run)]) == 1
    captured = capsys.readouterr()
    assert "checkpoint-20/ema" in captured.out and "damaged" in captured.out
    assert captured.err.startswith("dist-ema: 1 of 3 cannot be read: ") and "checkpoint-3" in captured.err
    for path in run.rglob("manifest.json"):
        path.write_text("{")
    assert "none of them readable" in answer(capsys, "inspect", run, code=1)


def test_an_average_that_a_rotation_removes_meanwhile_is_left_out(run, capsys, monkeypatch) -> None:
    from dist_ema.disk import listing

    def read(folder):
        if "checkpoint-1/" in str(folder):
            shutil.rmtree(folder)
        return read_manifest(folder)

    read_manifest = listing.read_manifest
    monkeypatch.setattr(listing, "read_manifest", read)
    assert ": 2 saved averages" in answer(capsys, "inspect", run)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "adapter_model"])
@pytest.mark.parametrize("several", [False, True])
def test_an_export_and_a_model_folder_of_any_library_are_inspected_and_verified(
    tmp_path, capsys, stem, several
) -> None:
    averaged_once(nn.Linear(3, 2)).consolidate(tmp_path / "export", max_shard_size=24 if several else "5GB")
    kind = "an export, without a manifest"
    if stem != "model":
        kind = "a model folder"
        for path in (tmp_path / "export").iterdir():
            text = path.read_bytes().replace(b'"written_by":"dist_ema"', b'"written_by":"somebody"')
            path.write_bytes(text.replace(b"model-0", f"{stem}-0".encode()) if path.suffix == ".json" else text)
            path.rename(path.with_name(path.name.replace("model", stem, 1)))
    facts = json.loads(answer(capsys, "inspect", tmp_path / "export", "--json"))
    assert facts["kind"] == kind and facts["num_tensors"] == 2 and facts["num_elements"] == 8
    assert facts["dtypes"] == {"F32": 2} and len(facts["files"]) == 1 + several
    assert "2 tensors (2 F32), 8 elements" in answer(capsys, "inspect", tmp_path / "export")
    text = answer(capsys, "verify", tmp_path / "export")
    assert kind in text and text.endswith("There are no checksums: no value was checked\n")
    assert ("and the index" in text) == several
    file = next((tmp_path / "export").glob("*.safetensors"))
    assert ("1 file," in answer(capsys, "verify", file) and "8 elements" in answer(capsys, "inspect", file)) or several
    file.write_bytes(file.read_bytes()[:-1])
    for command in ("inspect", "verify"):
        assert "is damaged" in answer(capsys, command, tmp_path / "export", code=1)
    file.unlink()
    answer(capsys, "verify", tmp_path / "export", code=1)


def test_the_average_of_a_checkpoint_is_meant_and_not_its_live_weights(run, capsys) -> None:
    assert "20 updates" in answer(capsys, "inspect", run / "checkpoint-20")
    assert "sound, 4 tensors" in answer(capsys, "verify", run / "checkpoint-20")
    assert "weights without a manifest" in answer(capsys, "inspect", run / "checkpoint-20" / "model.safetensors")


def test_a_picture_in_a_folder_that_is_not_there_is_refused_before_it_is_drawn(run, capsys, tmp_path) -> None:
    text = answer(capsys, "plot", run / "checkpoint-20", "--out", tmp_path / "none" / "p.svg", code=1)
    assert f"{tmp_path / 'none'} is no folder" in text and "make it first" in text


def test_no_picture_is_replaced_unasked_and_none_is_written_elsewhere(run, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    average, before = run / "checkpoint-20", b"a picture of another run"
    (tmp_path / "old.svg").write_bytes(before)
    for arguments in ([average], [tmp_path / "snapshots", "--sigma-rel", "0.1"]):
        assert "--force" in answer(capsys, "plot", *arguments, "--out", "old.svg", code=1)
        assert (tmp_path / "old.svg").read_bytes() == before
    assert "is a folder" in answer(capsys, "plot", average, "--force", "--out", run, code=1)
    answer(capsys, "plot", average, "--force", "--out", "old.svg")
    assert (tmp_path / "old.svg").read_bytes().startswith(b"<?xml")
    names = {path.name for path in tmp_path.iterdir()}
    answer(capsys, "plot", average, "--out", "picture")  # matplotlib would write picture.png
    assert {path.name for path in tmp_path.iterdir()} - names == {"picture"}
    answer(capsys, "plot", average)
    assert (tmp_path / "schedule.png").exists() and "--force" in answer(capsys, "plot", average, code=1)
    answer(capsys, "plot", average, "--out", "no/such/folder.png", code=1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_diff_has_a_progress_bar_on_a_terminal_alone(run, capsys, monkeypatch) -> None:
    average = str(run / "checkpoint-20" / "ema" / "a")
    assert answer(capsys, "diff", average, average).startswith("a: ")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["diff", average, average]) == 0
    assert "64.0/64.0" in terminal.getvalue() or "64.0" in terminal.getvalue()


def test_a_number_that_json_has_not_leaves_the_answer_readable(run, tmp_path, capsys) -> None:
    save_file({"weight": torch.full((2,), float("nan"))}, tmp_path / "a.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "b.safetensors")
    facts = json.loads(answer(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json"))
    assert facts["relative"] is None and facts["tensors"] == {"weight": None}


def test_a_name_with_a_line_break_makes_no_row_of_its_own(run, capsys) -> None:
    forged = "a\n  checkpoint-9/ema  9,999"
    shutil.copytree(run / "checkpoint-1" / "ema", run / forged)
    assert len(answer(capsys, "inspect", run).splitlines()) == 2 + 4
    assert forged in {row["name"] for row in json.loads(answer(capsys, "inspect", run, "--json"))["averages"]}
