"""Averages that nobody tracked, made from snapshots of those that were."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hostile import sealed
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import build, set_live

from dist_ema import (
    AnnealedSchedule,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    EqualSchedule,
    HalfLifeSchedule,
    InverseGammaSchedule,
    PowerSchedule,
    RampSchedule,
    ShardedEMA,
    after,
    consolidate_checkpoint,
    every,
    scaled_batch,
    synthesize,
)
from dist_ema.cli import main
from dist_ema.disk.formats.headers import read_header
from dist_ema.disk.manifest import read_manifest
from dist_ema.offline.posthoc import Profile, fit, inner_products, masses
from dist_ema.schedules.base import momentum_of_update
from dist_ema.schedules.records import schedule_from_text, schedule_text, schedule_to_json

KINDS = [
    AnnealedSchedule(0.01, gamma=50),
    ConstantSchedule(half_life_steps=100),
    CosineSchedule(0.1, total_steps=300),  # its momentum falls to 0
    EqualSchedule(every_steps=7),
    HalfLifeSchedule(fraction=0.1, max_half_life_steps=40),
    InverseGammaSchedule(inv_gamma=2.0, power=0.7, update_after_step=4),
    PowerSchedule(sigma_rel=0.1),
    RampSchedule(max_decay=0.99),
    after(100, every(10, EqualSchedule())),  # resets until 100
    scaled_batch(4.0, PowerSchedule(sigma_rel=0.25)),
]
SHORT, LONG = PowerSchedule(sigma_rel=0.05), PowerSchedule(sigma_rel=0.10)
WANTED = PowerSchedule(sigma_rel=0.15)


def naive(profile: Profile, length: int) -> torch.Tensor:
    """Every observation's weight, as each update changes it."""
    weights = torch.zeros(length, dtype=torch.float64)
    for step in range(profile.num_updates):
        momentum = 0.0
        if step == 0:
            momentum = 1.0
        elif step % profile.interval == 0:
            momentum = momentum_of_update(
                profile.schedule, step, interval=profile.interval, interval_correction=profile.interval_correction
            )
        weights *= 1.0 - momentum
        weights[step] = momentum
    return weights


@pytest.mark.parametrize("stretch", [2**16, 7])
@pytest.mark.parametrize(("interval", "correction"), [(1, False), (3, False), (4, True)])
def test_inner_products_and_masses_are_those_of_the_updates_that_took_place(
    monkeypatch, interval, correction, stretch
) -> None:
    monkeypatch.setattr("dist_ema.offline.posthoc._STRETCH", stretch)
    profiles = [Profile(kind, t, interval, correction) for kind in KINDS for t in (1, 2, 99, 101, 240)]
    dense = torch.stack([naive(profile, 240) for profile in profiles])
    torch.testing.assert_close(inner_products(profiles), dense @ dense.T, rtol=1e-10, atol=1e-18)
    edges = [0, 1, 50, 100, 101, 250]
    expected = torch.stack([dense[:, start:stop].sum(1) for start, stop in itertools.pairwise(edges)], dim=1)
    torch.testing.assert_close(masses(profiles, edges), expected, rtol=1e-10, atol=1e-18)
    torch.testing.assert_close(masses(profiles, edges).sum(1), torch.ones(len(profiles), dtype=torch.float64))


def test_power_functions_tend_to_the_closed_form_of_the_paper() -> None:
    """EDM2, eq. 151, which has continuous time: the difference falls with the number of updates."""
    gammas = (SHORT.gamma, LONG.gamma)
    for unit, tolerance in ((100, 0.05), (10_000, 0.0005)):
        pairs = [(gamma, t * unit) for gamma in gammas for t in (3, 8, 10)]
        found = inner_products([Profile(PowerSchedule(gamma=gamma), t) for gamma, t in pairs])
        for row, (g_a, t_a) in zip(found.tolist(), pairs, strict=True):
            for value, (g_b, t_b) in zip(row, pairs, strict=True):
                ratio = (t_a / t_b) ** (g_b if t_a < t_b else -g_a)
                expected = (g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * max(t_a, t_b))
                assert value == pytest.approx(expected, rel=tolerance)


def test_a_million_updates_and_a_hundred_snapshots_take_seconds() -> None:
    profiles = [Profile(kind, 10_000 * index) for kind in (SHORT, LONG) for index in range(1, 101)]
    began = time.perf_counter()
    found = fit(profiles, Profile(WANTED, 1_000_000), [2.0**-24] * len(profiles))
    assert time.perf_counter() - began < 60, "usually two"
    assert found.error < 1e-3 and found.amplification < 3 and sum(found.weights) == pytest.approx(1.0)


def test_profiles_that_are_nearly_alike_keep_their_weights_moderate() -> None:
    profiles = [Profile(ConstantSchedule(decay=0.999), t) for t in range(5001, 5200)]
    found = fit(profiles, Profile(ConstantSchedule(decay=0.998), 5100), [2.0**-8] * len(profiles))
    assert found.amplification < 100 and sum(found.weights) == pytest.approx(1.0)


def test_equal_profiles_count_once_the_target_itself_is_taken_and_a_hopeless_one_is_refused() -> None:
    profiles = [Profile(LONG, 100), Profile(LONG, 200), Profile(LONG, 200), Profile(SHORT, 200)]
    assert fit(profiles, Profile(LONG, 200), [0.1, 0.1, 0.0, 0.1]).weights == (0.0, 0.0, 1.0, 0.0)
    found = fit(profiles, Profile(PowerSchedule(sigma_rel=0.08), 200), [0.1, 0.0, 0.1, 0.1])
    assert found.weights[2] == 0.0 and found.weights[1] != 0.0
    assert fit(profiles, Profile(LONG, 100), [0.0] * 4).error == 0.0
    first = [Profile(kind, 1) for kind in KINDS]  # all the same: the copy of update 0
    assert fit(first, Profile(WANTED, 1), [0.0] * len(first)).error < 1e-6
    with pytest.raises(ConfigError, match="has anything of"):
        fit(first, Profile(after(5, EqualSchedule()), 5), [0.0] * len(first))


class Small(nn.Module):
    """Two averaged tensors, one larger than a piece, and buffers."""

    def __init__(self, width: int = 30) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(width, 40), nn.BatchNorm1d(40)
        self.tied = nn.Linear(width, 40)
        self.tied.weight = self.inner.weight


def walk(model: nn.Module, step: int) -> None:
    """What training does to weights, roughly: each step goes somewhere, and little by little."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        model.norm.running_mean.fill_(step)


def run(folder: Path, dtype: torch.dtype | None = None, steps: int = 300, count: int = 15, **more) -> ShardedEMA:
    """Train, write snapshots, and return the wanted averages, tracked all along in float64."""
    torch.manual_seed(0)
    model = Small()
    ema = ShardedEMA(model, more.pop("schedule", {"short": SHORT, "long": LONG}), **more)
    wanted = {f"s{sigma:03d}": PowerSchedule(sigma_rel=sigma / 1000) for sigma in (75, 150, 200)}
    truth = ShardedEMA(model, wanted, **{**more, "dtype": torch.float64})
    for step in range(1, steps + 1):
        walk(model, step)
        ema.update()
        truth.update()
        if step % (steps // count) == 0:
            ema.snapshot(folder, dtype=dtype)
    return truth


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> Path:
    """Few, of a short run; a test that changes them copies them first."""
    folder = tmp_path_factory.mktemp("run") / "snapshots"
    run(folder, steps=40, count=8)
    return folder


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    names = [name for name in theirs if "running" not in name and "batches" not in name and name in ours]
    squared = sum((ours[name].double() - theirs[name].double()).square().sum() for name in names)
    return math.sqrt(squared / sum(theirs[name].double().square().sum() for name in names))


@pytest.mark.parametrize("more", [{}, {"interval": 3, "interval_correction": True}], ids=["each", "every third"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_synthesized_averages_are_within_2_percent_of_tracked_ones(tmp_path, monkeypatch, dtype, more) -> None:
    monkeypatch.setattr("dist_ema.offline.summing._CHUNK_NUMEL", 500)
    truth = run(tmp_path / "snapshots", dtype, **more)
    for sigma in (75, 150, 200):
        made = synthesize(tmp_path / "snapshots", tmp_path / "out", PowerSchedule(sigma_rel=sigma / 1000))
        written = load_file(tmp_path / "out" / "model.safetensors")
        error = distance(written, truth.full_state_dict(f"s{sigma:03d}"))
        print(f"sigma_rel {sigma / 1000}: relative error {error:.3%}, profile error {made.profile_error:.3%}")
        assert error < 0.02 and made.num_updates == 300 and len(made.weights) == 30
        assert sum(each.weight for each in made.weights) == pytest.approx(1.0) and made.amplification < 4
        assert written["inner.weight"].dtype == torch.float32 and "tied.weight" not in written
        assert written["norm.running_mean"].unique().item() in (300, 299, 301), "live, from the latest"
        assert written["norm.num_batches_tracked"].dtype == torch.int64


def test_an_average_that_was_tracked_is_taken_as_it_is(snapshots, tmp_path) -> None:
    made = synthesize(snapshots, tmp_path / "out", LONG, num_updates=30)
    assert made.profile_error == 0.0 and [each.num_updates for each in made.weights if each.weight] == [30]
    assert max(each.num_updates for each in made.weights) == 30
    consolidate_checkpoint(snapshots / "updates-000000030", tmp_path / "same", track="long")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "same")]
    assert files[0] == files[1]


def test_dtype_and_shard_size_are_those_of_an_export(snapshots, tmp_path) -> None:
    read = []
    synthesize(
        snapshots,
        tmp_path / "out",
        WANTED,
        dtype=torch.bfloat16,
        max_shard_size=2000,
        progress=read.append,
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} <= {torch.bfloat16, torch.int64}
    files = [path for path in snapshots.rglob("*.safetensors")]
    assert 0 < sum(read) < sum(path.stat().st_size for path in files)
    run(tmp_path / "wide", steps=4, count=2, dtype=torch.float64)
    synthesize(tmp_path / "wide", tmp_path / "out64", ConstantSchedule(decay=0.5))
    assert load_file(tmp_path / "out64" / "model.safetensors")["inner.bias"].dtype == torch.float64


def test_snapshots_within_checkpoints_of_several_dtypes_are_found(snapshots, tmp_path) -> None:
    for path in snapshots.iterdir():
        shutil.copytree(path, tmp_path / "run" / f"checkpoint-{path.name}" / "ema")
    run(tmp_path / "half", torch.bfloat16, steps=40, count=4)
    shutil.copytree(tmp_path / "half" / "updates-000000030", tmp_path / "run" / "a" / "again")
    (tmp_path / "run" / "a" / "notes.txt").write_text("somebody's")
    first = synthesize(snapshots, tmp_path / "out", WANTED)
    again = synthesize(tmp_path / "run", tmp_path / "again", WANTED)
    assert again.profile_error == first.profile_error and len(again.weights) == len(first.weights) + 2
    assert [each.weight for each in again.weights if "again" in str(each.folder)] == [0.0, 0.0], "rounded, and twice"
    names = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert names[0] == names[1]
    alone = synthesize(snapshots / "updates-000000040", tmp_path / "alone", LONG)
    assert alone.weights[1].weight == 1.0


def test_what_snapshots_cannot_express_is_warned_about(snapshots, tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"cannot express ConstantSchedule.*More snapshots help") as caught:
        made = synthesize(snapshots, tmp_path / "out", ConstantSchedule(decay=0.5), num_updates=36)
    assert made.profile_error > 0.1 and caught[0].filename == __file__


def flip(path: Path, fqn: str) -> None:
    """Change the last byte of a tensor."""
    stored = read_header(path).tensors[fqn]
    content = bytearray(path.read_bytes())
    content[stored.start + stored.nbytes - 1] ^= 1
    path.write_bytes(content)


def damage(folder: Path) -> None:
    flip(folder / "updates-000000010" / "short" / "model.safetensors", "inner.weight")


def damage_live(folder: Path) -> None:
    flip(folder / "updates-000000040" / "long" / "model.safetensors", "norm.running_mean")


def remove_file(folder: Path) -> None:
    (folder / "updates-000000020" / "long" / "model.safetensors").unlink()


def cut_manifest(folder: Path) -> None:
    path = folder / "updates-000000020" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])


def other_model(folder: Path) -> None:
    ema = ShardedEMA(Small(width=31), {"short": SHORT, "long": LONG})
    ema.update()
    ema.save(folder / "other")


def untied(folder: Path) -> None:
    model = Small()
    model.tied.weight = nn.Parameter(model.tied.weight.detach().clone())
    ema = ShardedEMA(model, {"short": SHORT, "long": LONG})
    ema.update()
    ema.save(folder / "other")


def other_schedule(folder: Path) -> None:
    run(folder, schedule={"short": LONG, "long": LONG}, steps=5, count=1)


def other_tracks(folder: Path) -> None:
    run(folder, schedule={"a": SHORT, "b": LONG}, steps=5, count=1)


def other_interval(folder: Path) -> None:
    run(folder, steps=5, count=1, interval=2)


def fewer_averaged(folder: Path) -> None:
    run(folder, steps=5, count=1, update_buffers=True)


class Own:
    def momentum(self, step: int) -> float:
        return 0.5


def own_schedule(folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="Own"):
        run(folder, schedule=Own(), steps=5, count=1)


def odd_interval(folder: Path) -> None:
    for path in folder.glob("*/manifest.json"):
        record = json.loads(path.read_text())
        record["options"]["interval"] = 0
        path.write_text(sealed(record))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True)


def only_before_the_first_update(folder: Path) -> None:
    shutil.rmtree(folder)
    ShardedEMA(Small(), LONG).snapshot(folder)


HOSTILE = [
    (damage, CheckpointCorruptError, r"000010/short/model.safetensors is damaged: .*not .* saved \(inner.weight\)"),
    (damage_live, CheckpointCorruptError, r"000040/long/model.safetensors is damaged: .*\(norm.running_mean\)"),
    (remove_file, CheckpointCorruptError, "updates-000000020/long/model.safetensors is missing"),
    (cut_manifest, CheckpointCorruptError, "updates-000000020/manifest.json"),
    (other_model, CheckpointMismatchError, r"other cannot be summed with .*000040: 'inner.weight' is \[40, 31\] there"),
    (untied, CheckpointMismatchError, "other cannot be summed.*only one of them has 'tied.weight'"),
    (other_schedule, CheckpointMismatchError, r"000005 cannot .* 'short' is PowerSchedule\(sigma_rel=0.1\) there"),
    (other_tracks, CheckpointMismatchError, "it has the tracks a, b, the other short, long"),
    (other_interval, CheckpointMismatchError, "it was averaged with interval=2, the other with interval=1"),
    (fewer_averaged, CheckpointMismatchError, "'norm.running_mean' is averaged in only one of them"),
    (own_schedule, CheckpointMismatchError, r"'ema', averaged by .*Own\(.*only its author can rebuild"),
    (odd_interval, CheckpointCorruptError, "was saved with interval=0"),
    (empty, ConfigError, "hold 0 saved averages, none of them with 1 to 1 updates"),
    (only_before_the_first_update, ConfigError, "hold 1 saved averages, none of them with 1 to 1 updates"),
    (shutil.rmtree, CheckpointNotFoundError, "there is no folder"),
]


@pytest.mark.filterwarnings("ignore:.* snapshots with more updates than this run")  # the harm
@pytest.mark.parametrize(("harm", "error", "told"), HOSTILE, ids=[case[0].__name__ for case in HOSTILE])
def test_what_cannot_be_summed_is_refused_and_nothing_is_written(snapshots, tmp_path, harm, error, told) -> None:
    shutil.copytree(snapshots, tmp_path / "snapshots")
    harm(tmp_path / "snapshots")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=told):
        synthesize(tmp_path / "snapshots", tmp_path / "out", WANTED)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_updates": 41}, "num_updates is 41, but the latest of 8 saved averages"),
        ({"num_updates": 4}, "none of them with 1 to 4 updates"),
        ({"num_updates": 0}, "num_updates is 0"),
        ({"num_updates": 20.0}, "num_updates is 20.0"),
        ({"schedule": 0.15}, "0.15, expected an object with momentum"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"max_shard_size": "x"}, "max_shard_size"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(snapshots, tmp_path, arguments, told) -> None:
    with pytest.raises(ConfigError, match=told):
        synthesize(snapshots, tmp_path / "out", **{"schedule": WANTED, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_folder_is_not_replaced(snapshots, tmp_path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    save_file({"w": torch.zeros(1)}, target / "model.safetensors")
    for folder in (target, snapshots, snapshots / "updates-000000040"):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(CheckpointError, match="give the name of a new or empty folder"):
            synthesize(snapshots, folder, WANTED)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        synthesize(snapshots, tmp_path / "file" / "out", WANTED)
    synthesize(snapshots, tmp_path / "again", WANTED)
    (tmp_path / "again" / "tokenizer.json").write_text("{}")
    synthesize(snapshots, tmp_path / "again", WANTED)
    assert (tmp_path / "again" / "tokenizer.json").exists()


MEASURES = """
import os, resource, sys, torch
from pathlib import Path
from dist_ema import PowerSchedule, ShardedEMA, synthesize
def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) // 1024
folder, numel, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if sys.argv[4] == "save":
    model = torch.nn.ParameterList([torch.zeros(numel), torch.zeros(3)])
    ema = ShardedEMA(model, {"a": PowerSchedule(sigma_rel=0.05), "b": PowerSchedule(sigma_rel=0.1)})
    for step in range(count):
        ema.update()
        ema.snapshot(folder / "snapshots", dtype=torch.bfloat16)
else:
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    torch.linalg.cholesky(torch.eye(3, dtype=torch.float64) + torch.zeros(3, 3).bfloat16().double())
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    synthesize(folder / "snapshots", folder / "out", PowerSchedule(sigma_rel=0.15))
    print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(("numel", "count"), [(2**25, 3), (1000, 400)], ids=["large", "many"])
def test_memory_and_open_files_are_bounded(tmp_path, numel, count) -> None:
    """A tensor of 128 MiB in float32; 800 averages where a process may open 40 files."""
    for step in ("save", "synthesize"):
        command = [sys.executable, "-c", MEASURES, str(tmp_path), str(numel), str(count), step]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
    print(f"{done.stdout.strip()} MiB over the interpreter")
    assert int(done.stdout) < 64


def snapshots_on_ranks(layout: str, folder: str) -> None:
    model = build(layout)
    ema = ShardedEMA(model, {"short": SHORT, "long": LONG})
    for step in range(6):
        set_live(model, step)
        ema.update()
        if step % 2:
            ema.snapshot(os.path.join(folder, "snapshots"), dtype=torch.bfloat16, background=layout == "ddp")
    ema.wait()
    if dist.get_rank() == 0:
        synthesize(os.path.join(folder, "snapshots"), os.path.join(folder, "out"), PowerSchedule(sigma_rel=0.07))


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_snapshots_and_what_is_made_of_them_have_the_same_bytes_on_any_number_of_ranks(world, tmp_path, layout) -> None:
    contents = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        world(size).run(snapshots_on_ranks, layout, str(folder))
        files = sorted(path for path in folder.rglob("*.safetensors"))
        contents.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
        assert len(files) == 7
        manifest = read_manifest(folder / "snapshots" / "updates-000000006")
        assert manifest.options["dtype"] == "bfloat16" and manifest.num_updates == 6
    assert contents[0] == contents[1]


def test_the_command_that_measures_it_on_the_demo_model(tmp_path) -> None:
    script = Path(__file__).parents[2] / "launch" / "studies" / "posthoc.py"
    sizes = ["--steps", "60", "--snapshots", "10", "--width", "16", "--depth", "1", "--batch-size", "1"]
    command = [sys.executable, str(script), *sizes, "--data", str(script.parents[1]), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["0.075", "0.150", "0.200"]


def test_the_command_line_synthesizes(snapshots, tmp_path, capsys) -> None:
    assert main(["synthesize", "--sigma-rel", "0.15", str(snapshots), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: PowerSchedule(sigma_rel=0.15)" in told and "after 40 updates" in told
    assert "from 8 snapshots, profile error" in told
    synthesize(snapshots, tmp_path / "same", WANTED)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "same")]
    assert files[0] == files[1]
    command = ["synthesize", "--schedule", "ConstantSchedule(half_life_steps=2)", "--num-updates", "36", "--json"]
    more = ["--dtype", "bfloat16", "--max-shard-size", "1GB", str(snapshots), str(tmp_path / "out")]
    assert main([*command, *more]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_updates"] == 36 and facts["num_snapshots"] == 7 and "cannot express" in facts["warnings"][0]
    assert facts["profile_error"] > 0.1 and len(facts["weights"]) == 14
    assert load_file(tmp_path / "out" / "model.safetensors")["inner.bias"].dtype == torch.bfloat16
    assert main([*command, *more, "--num-updates", "41"]) == 1
    assert "num_updates is 41" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["synthesize", "a", "b"],
        ["synthesize", "a", "b", "--sigma-rel", "x"],
        ["synthesize", "a", "b", "--sigma-rel", "0.1", "--schedule", "EqualSchedule()"],
        ["plot"],
        ["plot", "--sigma-rel", "0.1"],
        ["plot", "a", "--sigma-rel", "0.1", "--steps", "5"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_command_line_draws_schedules_and_profiles_in_small_pictures(snapshots, tmp_path, capsys) -> None:
    schedules = [
        "--schedule",
        "PowerSchedule(sigma_rel=0.1)",
        "--schedule",
        "every(2, CosineSchedule(total_steps=4_000))",
    ]
    for arguments, told in (
        (schedules, "2 schedules over 4,000 updates\n"),
        ([str(snapshots / "updates-000000040"), *schedules], "4 schedules over 4,000 updates, now at 40\n"),
        ([str(snapshots), "--sigma-rel", "0.15"], "over 40 updates from 16 saved averages, profile error "),
    ):
        pictures = []
        for name in ("a.svg", "b.svg"):
            assert main(["plot", *arguments, "--force", "--out", str(tmp_path / name)]) == 0
            assert told in capsys.readouterr().out
            pictures.append((tmp_path / name).read_bytes())
        assert pictures[0] == pictures[1] and b"<dc:date>" not in pictures[0] and len(pictures[0]) < 150_000
    assert main(["plot", "--sigma-rel", "0.15", str(tmp_path), "--out", str(tmp_path / "c.svg")]) == 1
    assert main(["plot", "--schedule", "exit()", "--out", str(tmp_path / "c.svg")]) == 1
    assert not (tmp_path / "c.svg").exists()


@pytest.mark.parametrize("schedule", KINDS, ids=repr)
def test_schedules_survive_text(schedule) -> None:
    assert schedule_from_text(repr(schedule)) == schedule_from_text(f" {schedule!r}\n") == schedule
    told = schedule_text(schedule_to_json(schedule))
    assert schedule_text(schedule_to_json(schedule_from_text(told))) == told, "what `dist-ema inspect` prints"


def test_text_takes_what_a_schedule_takes() -> None:
    assert schedule_from_text("after(10_000, schedule=EqualSchedule())") == after(10_000, EqualSchedule())
    assert schedule_from_text("PowerSchedule(gamma=None, sigma_rel=1e-1)") == LONG
    assert schedule_from_text("AnnealedSchedule(+0.01)") == AnnealedSchedule(0.01)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.999",
        "EqualSchedule",
        "equal()",
        "__import__('os').system('true')",
        "EqualSchedule().__class__()",
        "(lambda: EqualSchedule())()",
        "EqualSchedule()()",
        "EqualSchedule() + 1",
        "[EqualSchedule()]",
        "EqualSchedule(); EqualSchedule()",
        "EqualSchedule(1)",
        "EqualSchedule(*[])",
        "EqualSchedule(**{})",
        "PowerSchedule(gamma=1, gamma=2)",
        "PowerSchedule(gamma=-1)",
        "PowerSchedule(gamma=True)",
        "PowerSchedule(gamma='1')",
        "PowerSchedule(gamma=9**9**9)",
        "PowerSchedule(gamma=1e999)",
        "PowerSchedule(gamma=1j)",
        "PowerSchedule(gamma={[]: 1})",
        "PowerSchedule(gamma=EqualSchedule())",
        "after(5, 5)",
        "after(5)",
        "CosineSchedule(total_steps=" + "9" * 900 + ")",
        "PowerSchedule(gamma=" + "-" * 900 + "1)",
        "PowerSchedule(gamma=1" + "+1" * 400 + ")",
        "after(5, " * 30 + "EqualSchedule()" + ")" * 30,
        "(" * 900,
        "after(1," * 100,
        "EqualSchedule" + "()" * 400,
        "EqualSchedule()" + " " * 2000,
        "EqualSchedule()\0",
        "\ud800",
    ],
    ids=range(35),
)
def test_text_that_is_no_schedule_is_refused(text) -> None:
    with pytest.raises(ConfigError):
        schedule_from_text(text)


def test_snapshots_of_a_later_update_are_warned_about(tmp_path) -> None:
    """A new run into the folder of an old one: synthesize would mix them."""

    def run(updates: int) -> ShardedEMA:
        ema = ShardedEMA(nn.Linear(2, 1), PowerSchedule(sigma_rel=0.1))
        for _ in range(updates):
            ema.update()
        return ema

    first = run(4)
    first.snapshot(tmp_path)
    first.update()
    first.snapshot(tmp_path)
    second = run(3)
    with pytest.warns(UserWarning, match=r"holds 2 snapshots with more updates .*updates-000000004") as caught:
        second.snapshot(tmp_path)
    assert caught[0].filename == __file__
    second.snapshot(tmp_path)  # once is enough
