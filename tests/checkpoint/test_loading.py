"""What a load may overlook, and what it starts from: explicit escapes, foreign folders, older formats."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import averaged_once
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from twins import assert_same_bits
from zoo import build, set_live

from dist_ema import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    ConstantSchedule,
    ShardedEMA,
    consolidate_checkpoint,
)
from dist_ema.disk.folders import commit
from dist_ema.disk.formats import model_files as files

HALF = ConstantSchedule(momentum=0.5)


class Headed(nn.Module):
    def __init__(self, classes: int, **more: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, classes)
        for name, size in more.items():
            setattr(self, name, nn.Linear(4, size))


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def saved(folder: Path, model: nn.Module) -> None:
    ema = ShardedEMA(model, HALF)
    fill(model, 4.0)
    ema.update()
    ema.update()
    ema.save(folder)


def test_a_new_head_starts_from_the_live_weights_and_a_dropped_one_is_ignored(tmp_path) -> None:
    saved(tmp_path / "ema", Headed(3, old=2))
    model = Headed(5, extra=2)
    ema = ShardedEMA(model, HALF)
    fill(model, 1.0)
    ema.update()
    with pytest.raises(CheckpointMismatchError, match=r"load\(path, new='extra\.\*', dropped='old\.\*'\)"):
        ema.load(tmp_path / "ema")
    with pytest.raises(CheckpointMismatchError, match=r"head\.weight as float32\[3, 4\].*new='head"):
        ema.load(tmp_path / "ema", new="extra.*", dropped="old.*")
    assert ema.num_updates == 1 and ema.full_state_dict()["body.weight"][0, 0] == 1.0
    ema.load(tmp_path / "ema", new=["extra.*", "head.*"], dropped="old.*")
    assert ema.num_updates == 2
    fill(model, 2.0)
    state = ema.full_state_dict()
    assert state["body.weight"].unique().item() == 4.0
    assert state["head.weight"].unique().item() == state["extra.bias"].unique().item() == 2.0, "live until then"
    fill(model, 8.0)
    ema.update()
    fill(model, 100.0)
    state = ema.full_state_dict()
    assert state["body.weight"].unique().item() == 6.0
    assert state["head.weight"].unique().item() == 8.0, "the first update after the load copies"
    ema.update()
    assert ema.full_state_dict()["head.bias"].unique().item() == 54.0, "and then it averages"


def test_averages_start_from_somebody_elses_weights(tmp_path) -> None:
    model = Headed(3)
    values = {name: torch.full_like(value, 3.0).bfloat16() for name, value in model.state_dict().items()}
    save_file(values, tmp_path / "model.safetensors")
    ema = ShardedEMA(model, {"fast": HALF, "slow": ConstantSchedule(momentum=0.25)})
    ema.start_from(tmp_path, num_updates=10)
    assert ema.num_updates == 10
    fill(model, 7.0)
    ema.update()
    assert ema.full_state_dict("fast")["head.weight"].unique().item() == 5.0
    assert ema.full_state_dict("slow")["head.weight"].unique().item() == 4.0
    values["body.bias"] += 1.0
    (tmp_path / "folder.safetensors").mkdir()  # what it is decides, not what it is called
    save_file(values, tmp_path / "folder.safetensors" / "model.safetensors")
    save_file(values, tmp_path / "weights")
    for source in ("folder.safetensors", "weights"):
        ema.start_from(tmp_path / source)
        assert ema.full_state_dict("fast")["body.bias"].unique().item() == 4.0
    ema.start_from(tmp_path)
    assert ema.num_updates == 1 and ema.full_state_dict("fast")["body.bias"].unique().item() == 3.0
    with pytest.raises(ConfigError, match="num_updates"):
        ema.start_from(tmp_path, num_updates=0)
    other = ShardedEMA(Headed(4), HALF)
    with pytest.raises(CheckpointMismatchError, match=r"head\.weight \[4, 4\] \(found \[3, 4\]\)"):
        other.start_from(tmp_path)
    with pytest.raises(CheckpointCorruptError, match="missing"):
        other.start_from(tmp_path / "none")


def test_somebody_elses_tied_weights_may_have_any_of_their_names_and_several_files(tmp_path) -> None:
    model = nn.Module()
    model.embed, model.head = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
    model.head.weight = model.embed.weight
    save_file({"head.weight": torch.full((3, 2), 9.0)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"head.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ema = ShardedEMA(model, HALF)
    ema.start_from(tmp_path)
    assert ema.full_state_dict()["embed.weight"].unique().item() == 9.0


def start_on_ranks(folder: str) -> None:
    model = build("fsdp2")
    ema = ShardedEMA(model, HALF)
    ema.start_from(folder, new="*", dropped="*")
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        stored = load_file(os.path.join(folder, "model.safetensors"))
        assert all(torch.equal(state[name], value.float()) for name, value in stored.items())


def test_each_rank_reads_its_own_slice_of_somebody_elses_weights(world, tmp_path) -> None:
    torch.manual_seed(0)
    shapes = {name: value.shape for name, value in build("plain").named_parameters()}
    values = {name: torch.randn(shapes[name]).half() for name in ("embed.weight", "hidden.weight")}
    save_file(values, tmp_path / "model.safetensors")
    world(3).run(start_on_ranks, str(tmp_path))


def test_format_version_1_stays_readable(tmp_path) -> None:
    saved(tmp_path / "ema", Headed(3))
    path = tmp_path / "ema" / "manifest.json"
    record = json.loads(path.read_text())
    for field in ("files", "checksums", "checksum"):
        record.pop(field)
    path.write_text(json.dumps({**record, "format_version": 1}))
    ema = ShardedEMA(Headed(3), HALF)
    ema.load(tmp_path / "ema")
    assert ema.num_updates == 2 and ema.full_state_dict()["body.weight"].unique().item() == 4.0
    consolidate_checkpoint(tmp_path / "ema", tmp_path / "out")
    ema.save(tmp_path / "ema")
    assert json.loads(path.read_text())["format_version"] == 2


def test_verification_can_be_left_out(tmp_path) -> None:
    saved(tmp_path / "ema", Headed(3))
    path = tmp_path / "ema" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ema = ShardedEMA(Headed(3), HALF)
    with pytest.raises(CheckpointCorruptError, match=r"1 tensors are not those that were saved \(head.bias\)"):
        ema.load(tmp_path / "ema")
    assert ema.num_updates == 0
    ema.load(tmp_path / "ema", verify=False)
    assert ema.num_updates == 2


def test_loading_an_average_by_the_checkpoint_that_holds_it_after_a_commit_that_was_cut_off(tmp_path) -> None:
    saved(tmp_path / "ema", Headed(3))
    (tmp_path / "ema").rename(tmp_path / ".ema.old")
    for path in (tmp_path, tmp_path / "ema"):
        ema = ShardedEMA(Headed(3), HALF)
        ema.load(path)
        assert ema.num_updates == 2


def background(folder: str) -> None:
    model = build("fsdp2")
    ema = ShardedEMA(model, HALF)
    for step in range(3):
        set_live(model, step)
        ema.update()
        ema.save(os.path.join(folder, "now"))
        ema.save(os.path.join(folder, "behind"), background=True)
        set_live(model, step + 10)  # training goes on at once, and must not show
        ema.update()
        ema.wait()
        ema.wait()
        again = ShardedEMA(build("fsdp2", seed=1), HALF)
        again.load(os.path.join(folder, "now"))
        expected = again.full_state_dict()
        again.load(os.path.join(folder, "behind"))
        loaded = again.full_state_dict()
        if dist.get_rank() == 0:
            assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
        assert again.num_updates == 2 * step + 1


def test_a_save_in_the_background_has_the_values_of_the_call(world, tmp_path) -> None:
    world(2).run(background, str(tmp_path))
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("now", "behind")]
    assert contents[0] == contents[1]


def background_fails(folder: str) -> list[str]:
    model = build("ddp")
    ema = ShardedEMA(model, HALF)
    ema.update()
    real, messages = files.os.fsync, []

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    calls = [ema.wait, lambda: ema.save(folder), lambda: ema.load(folder), lambda: ema.consolidate(folder + "-export")]
    for call in calls:
        if dist.get_rank() == 0:
            files.os.fsync = fail
        ema.save(folder, background=True)
        ema._saves.background._save.join()
        files.os.fsync = real
        ema.update()  # training does not notice
        with pytest.raises(CheckpointError) as caught:
            call()
        messages.append(str(caught.value))
    ema.save(folder, background=True)
    ema.load(folder)  # joins it
    assert ema.num_updates == 5
    return messages


def test_the_failure_of_a_save_in_the_background_reaches_the_next_call_on_all_ranks(world, tmp_path) -> None:
    first, second = world(2).run(background_fails, str(tmp_path / "ema"))
    assert first == second and all("rank 0" in message and "No space left" in message for message in first)
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


EXITS = """
import sys, time, torch
from dist_ema import (ConstantSchedule, ShardedEMA,)
from dist_ema.disk.formats import model_files as files
ema = ShardedEMA(torch.nn.Linear(2, 2), ConstantSchedule(momentum=0.5))
real = files.os.fsync
def slow(descriptor):
    time.sleep(0.2)
    if sys.argv[2] == "fail":
        raise OSError(28, "No space left on device")
    real(descriptor)
files.os.fsync = slow
ema.update()
ema.save(sys.argv[1], background=True)
"""


@pytest.mark.parametrize("end", ["well", "fail"])
def test_the_end_of_the_process_joins_a_save_in_the_background(tmp_path, end) -> None:
    command = [sys.executable, "-c", EXITS, str(tmp_path / "ema"), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "ema" / "manifest.json").exists() == (end == "well")
    assert ("No space left on device" in done.stderr) == (end == "fail")
    assert len(list(tmp_path.iterdir())) == (end == "well")


def test_everything_is_durable_before_it_is_renamed_into_place(tmp_path, monkeypatch) -> None:
    """The order of fsyncs and renames, so that losing power at any moment leaves the old or the new one."""
    saved(tmp_path / "ckpt" / "ema", Headed(3))
    log: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        log.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> Path:
        log.append(("rename", f"{source.name} -> {Path(target).name}"))
        return real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    ema = ShardedEMA(Headed(3), {"a": HALF, "b": HALF})
    (tmp_path / "ckpt" / "ema" / "notes.txt").write_text("carried over")
    monkeypatch.setattr(commit.os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError()))  # copies, then
    ema.save(tmp_path / "ckpt" / "ema", max_shard_size=70)
    renames = [position for position, (kind, _) in enumerate(log) if kind == "rename"]
    (aside, name) = (log[position][1] for position in renames)
    staging = str(tmp_path / "ckpt" / name.removesuffix(" -> ema"))
    assert aside == "ema -> .ema.old" and re.fullmatch(r".*/\.ema\.staging-[0-9a-f]+", staging)
    written = [path for path in (tmp_path / "ckpt" / "ema").rglob("*")]
    assert len(written) > 8
    durable = {path for _, path in log[: renames[0]]}
    for path in written:
        assert staging + "/" + str(path.relative_to(tmp_path / "ckpt" / "ema")) in durable, path
    assert staging in durable, "the folder's own entries"
    files_of_staging = [i for i in range(renames[0]) if Path(log[i][1]).suffix]
    assert ("fsync", staging) in log[max(files_of_staging) : renames[0]], "after the last of them was made"
    manifest = max(i for i, (_, path) in enumerate(log) if path.endswith("manifest.json"))
    tensors = [i for i, (_, path) in enumerate(log) if path.endswith(".safetensors")]
    assert manifest > max(tensors), "the manifest is written last"
    assert ("fsync", str(tmp_path / "ckpt")) in log[renames[1] :], "the renames themselves"


CONSOLIDATES = """
import sys, torch
from pathlib import Path
from dist_ema import ConstantSchedule, ShardedEMA, consolidate_checkpoint
def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) // 1024
folder = Path(sys.argv[1])
if sys.argv[2] == "save":
    model = torch.nn.ParameterList([torch.zeros(1024, 1024) for _ in range(48)] + [torch.zeros(8192, 8192)])
    ShardedEMA(model, ConstantSchedule(decay=0.9)).save(folder / "ema")
else:
    torch.zeros(4).bfloat16()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    consolidate_checkpoint(folder / "ema", folder / "out", dtype=torch.bfloat16)
    print(status("VmHWM") - before)
"""


def test_consolidating_offline_takes_bounded_memory(tmp_path) -> None:
    """448 MiB, of which one tensor has 256."""
    for step in ("save", "consolidate"):
        command = [sys.executable, "-c", CONSOLIDATES, str(tmp_path), step]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 64, f"{done.stdout.strip()} MiB over the interpreter"


def test_an_interrupt_before_the_thread_of_a_save_has_begun_does_not_spoil_later_saves(tmp_path, monkeypatch) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), HALF)
    ema.update()

    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ema.save(tmp_path / "ema", background=True)
    ema.save(tmp_path / "ema", background=True)
    ema.wait()
    ShardedEMA(nn.Linear(2, 2), HALF).load(tmp_path / "ema")


def experts(dtype: torch.dtype) -> nn.Module:
    """Long stretches at distances: experts, sharded within each."""
    model = nn.Module()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    whole = torch.randn(3, 2, 3_000_000).to(dtype)
    model.register_parameter("w", nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)])))
    return model


def load_experts(folder: str) -> None:
    ema = averaged_once(experts(torch.bfloat16))
    ema.save(os.path.join(folder, "ema"))
    ema.consolidate(os.path.join(folder, "half"), dtype=torch.bfloat16)
    expected = ema.full_state_dict()
    for ready in (False, True):
        again = ShardedEMA(experts(torch.bfloat16), HALF)
        if ready:
            again.update()
        again.load(os.path.join(folder, "ema"))
        state = again.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(state, expected)
    again.start_from(os.path.join(folder, "half"))
    state = again.full_state_dict()
    if dist.get_rank() == 0:
        assert torch.equal(state["w"], expected["w"].bfloat16().float())


def test_stretches_longer_than_a_chunk_are_read_into_other_dtypes(world, tmp_path) -> None:
    world(2).run(load_experts, str(tmp_path))


def test_many_files_need_few_descriptors(tmp_path) -> None:
    import resource

    model = nn.ParameterList([torch.ones(4) for _ in range(300)])
    averaged_once(model).save(tmp_path / "ema", max_shard_size=16)
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, former[1]))
    try:
        averaged_once(nn.ParameterList([torch.ones(4) for _ in range(300)])).load(tmp_path / "ema")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)
