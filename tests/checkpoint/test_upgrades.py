"""Folders that an earlier version wrote (tests/fixtures/make_upgrades.py) are read, used and replaced by this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerated import accelerator_of
from safetensors.torch import load_file
from upgrades import COSINE, FOLDER, NUM_UPDATES, RUNS, TRACKS, Run, move, net

from dist_ema import CheckpointNotFoundError, ShardedEMA, attach, consolidate_checkpoint, synthesize
from dist_ema.cli import main

# What rounding has taken is not saved: a run that goes on with compensated=True begins to collect it anew.
FORGETS = {"compensated"}


@pytest.fixture
def written(tmp_path) -> Path:
    """A copy of all folders, which may be written to."""
    shutil.copytree(FOLDER, tmp_path / "written")
    return tmp_path / "written"


def assert_holds(name: str, ema: ShardedEMA) -> None:
    """The averages are those that the former version had, to the last bit."""
    for track in ema.tracks:
        assert_same(ema.full_state_dict(track=track), load_file(FOLDER / "expected" / f"{name}.{track}.safetensors"))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for fqn, value in expected.items():
        assert found[fqn].dtype == value.dtype and found[fqn].shape == value.shape, fqn
        same = torch.equal(found[fqn].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        assert same, (fqn, found[fqn], value)


def resumed(run: Run) -> tuple[torch.nn.Module, ShardedEMA]:
    """A run built anew, at other weights, whose live tensors are then where the saved one stopped."""
    model, ema = run.start()
    run.advance(model, ema, 10, 12)
    move(model, NUM_UPDATES - 1)
    return model, ema


@pytest.mark.parametrize("name", RUNS)
def test_an_average_of_an_earlier_version_is_resumed_bit_for_bit(written, name) -> None:
    run = RUNS[name]
    model, ema = resumed(run)
    ema.load(written / name)
    assert ema.num_updates == NUM_UPDATES
    assert_holds(name, ema)
    run.advance(model, ema, NUM_UPDATES, NUM_UPDATES + 1)
    if name not in FORGETS:
        assert_holds(f"{name}.next", ema)

    ema.save(written / name, **run.save)
    model, again = resumed(run)
    again.load(written / name)
    assert again.num_updates == NUM_UPDATES + 1
    move(model, NUM_UPDATES)
    for track in ema.tracks:
        assert_same(again.full_state_dict(track=track), ema.full_state_dict(track=track))


@pytest.mark.parametrize("name", RUNS)
def test_the_tools_read_an_average_of_an_earlier_version(written, tmp_path, capsys, name) -> None:
    run, folder = RUNS[name], written / name
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_updates"] == NUM_UPDATES
    assert main(["inspect", str(folder)]) == main(["verify", str(folder)]) == 0
    assert main(["plot", str(folder), "--out", str(tmp_path / "p.svg")]) == (name == "own_schedule")
    for track in facts["tracks"]:
        export = tmp_path / f"export-{track}"
        consolidate_checkpoint(folder, export, track=track)
        assert (export / "config.json").exists() == (name == "transformers")
        capsys.readouterr()
        assert main(["diff", str(folder), str(export), "--track", track, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["relative"] == 0.0
        _, ema = resumed(run)
        ema.start_from(export, num_updates=NUM_UPDATES)
        expected = load_file(FOLDER / "expected" / f"{name}.{track}.safetensors")
        for each in ema.tracks:
            assert_same(ema.full_state_dict(track=each), expected)


@pytest.mark.parametrize("name", ["snapshots", "snapshots_bfloat16"])
def test_snapshots_of_an_earlier_version_make_the_averages_they_hold(written, tmp_path, name) -> None:
    for count in (6, 9):
        for track, schedule in TRACKS.items():
            made = synthesize(written / name, tmp_path / "out", schedule, num_updates=count)
            assert made.profile_error == 0.0
            expected = load_file(FOLDER / name / f"updates-{count:09}" / track / "model.safetensors")
            assert_same(load_file(tmp_path / "out" / "model.safetensors"), {k: v.float() for k, v in expected.items()})
    if name == "snapshots":
        _, ema = Run(net, TRACKS).start()
        ema.load(written / name / "updates-000000009")
        assert ema.num_updates == 9
        ema.snapshot(written / name)  # over the one of as many updates


def test_a_checkpoint_of_accelerate_of_an_earlier_version_is_resumed(written, tmp_path, capsys) -> None:
    with accelerator_of("one process") as accelerator:
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.125))
        ema = attach(accelerator, model, optimizer, COSINE)
        accelerator.load_state(written / "accelerate")
        assert ema.num_updates == NUM_UPDATES
        assert_holds("accelerate", ema)
        live = load_file(FOLDER / "expected" / "accelerate.live.safetensors")
        assert_same(dict(accelerator.unwrap_model(model).state_dict()), live)
        accelerator.save_state(written / "accelerate")
        assert main(["verify", str(written / "accelerate")]) == 0
    _, begun = resumed(Run(net, COSINE))
    begun.start_from(written / "accelerate")
    assert_holds("accelerate", begun)
    consolidate_checkpoint(written / "accelerate", tmp_path / "out")
    capsys.readouterr()
    assert main(["diff", str(written / "accelerate"), str(tmp_path / "out")]) == 0
    assert "0.000e+00  all 4 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["export", "export_bfloat16"])
def test_exports_of_an_earlier_version_are_used_and_replaced(written, name) -> None:
    run = RUNS["one_track"]
    model, ema = resumed(run)
    with pytest.raises(CheckpointNotFoundError, match="holds no saved average"):
        ema.load(written / name)
    ema.start_from(written / name, num_updates=NUM_UPDATES)
    if name == "export":
        assert_holds("one_track", ema)
        run.advance(model, ema, NUM_UPDATES, NUM_UPDATES + 1)
        assert_holds("one_track.next", ema)
    ema.consolidate(written / name)
    consolidate_checkpoint(written / "one_track", written / name)
    assert (written / name / "model.safetensors").exists() and not list((written / name).glob("*index*"))


@pytest.mark.parametrize("case", ["while_writing", "between_renames", "after_renames"])
def test_what_a_kill_left_behind_in_an_earlier_version_is_recovered(written, capsys, case) -> None:
    folder, run = written / "killed" / case, RUNS["sharded_files"]
    for source in (folder / "ema", folder):
        _, ema = resumed(run)
        ema.load(source)
        assert_holds("sharded_files", ema)
        assert main(["verify", str(source)]) == 0
    ema.save(folder / "ema", **run.save)
    assert [path.name for path in folder.iterdir()] == ["ema"], "and the next save clears it"
    _, again = resumed(run)
    again.load(folder / "ema")
    assert_holds("sharded_files", again)
