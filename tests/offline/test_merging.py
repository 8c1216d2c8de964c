"""Offline merges: sources of many forms become one model folder, or nothing is written."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from dist_ema import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    ConstantSchedule,
    EqualSchedule,
    ShardedEMA,
    merge,
)
from dist_ema.cli import main
from dist_ema.offline.merging.dcp import DcpCheckpoint
from dist_ema.schedules.coefficients import merge_coefficients

HALF = ConstantSchedule(momentum=0.5)


class Net(nn.Module):
    """A tied weight, a 0-dim parameter, an empty one, and a counter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(300, 1000)
        self.head = nn.Linear(1000, 300, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("seen", torch.tensor(seed))


def nets(count: int) -> list[Net]:
    return [Net(seed) for seed in range(count)]


def plain(model: nn.Module, folder: Path, kind: torch.dtype = torch.float32, **config: object) -> Path:
    folder.mkdir(parents=True)
    state = {name: value.to(kind) if value.is_floating_point() else value for name, value in tensors(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """As transformers saves them: a tied name once."""
    return {name: value.contiguous() for name, value in model.state_dict().items() if name != "head.weight"}


def of_fsdp(model: nn.Module, folder: Path) -> Path:
    """As accelerate saves a model under FSDP: the names below "model", tied ones twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": {"state": torch.zeros(3)}}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    return folder


def averaged(model: nn.Module, folder: Path) -> Path:
    ema = ShardedEMA(model, {"a": HALF, "b": EqualSchedule()})
    ema.update()
    ema.save(folder)
    return folder


def expected(models: list[Net], coefficients: list[float]) -> dict[str, torch.Tensor]:
    total = {}
    for name, value in tensors(models[-1]).items():
        summed = torch.zeros_like(value, dtype=torch.float64)
        for model, weight in zip(models, coefficients, strict=True):
            summed.add_(tensors(model)[name].double(), alpha=weight)
        total[name] = summed.float() if value.is_floating_point() else value
    return total


def assert_same(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        assert merged[name].dtype == value.dtype
        assert torch.equal(merged[name], value), name


def test_any_mixture_of_forms_is_the_closed_form_to_the_bit(tmp_path, capsys) -> None:
    """A DCP checkpoint and an average have the tied weight under other names than a plain folder."""
    models = nets(4)
    with torch.no_grad():
        for parameter in models[2].parameters():
            parameter.copy_(parameter.bfloat16())
    sources = [
        of_fsdp(models[0], tmp_path / "dcp"),
        averaged(models[1], tmp_path / "ckpt" / "ema").parent,
        plain(models[2], tmp_path / "half", torch.bfloat16),
        plain(models[3], tmp_path / "plain", model_type="tiny", dtype="float32"),
    ]
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [2, 1, 3, 0]):
        made = merge(tmp_path / "out", [sources[at] for at in order], decay="1-sqrt", track="b")
        coefficients = [source.coefficient for source in made.sources]
        assert coefficients == list(merge_coefficients("1-sqrt", 4))
        wanted = expected([models[at] for at in order], coefficients)
        assert_same(made.folder, wanted)
    (single,) = merge(tmp_path / "one", [sources[0] / "pytorch_model_fsdp_0" / ".metadata"]).sources
    assert single.coefficient == 1.0
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(one[name], value) for name, value in models[0].state_dict().items())
    arguments = ["merge", tmp_path / "out", *sources, "--weights", 1, 2, 3, 4, "--track", "a", "--json"]
    assert main(list(map(str, arguments))) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [source["coefficient"] for source in facts["sources"]] == [0.1, 0.2, 0.3, 0.4]
    assert [source["track"] for source in facts["sources"]] == [None, "a", None, None]
    assert_same(tmp_path / "out", expected(models, [0.1, 0.2, 0.3, 0.4]))


def test_the_folder_looks_like_the_first_one_and_says_what_it_is_made_of(tmp_path, capsys) -> None:
    first = plain(Net(0), tmp_path / "a", torch.bfloat16, model_type="tiny", dtype="bfloat16")
    (first / "tokenizer.json").write_text("{}")
    (first / "trainer_state.json").write_text("{}")
    (first / "README.md").write_text("of the first")
    second = plain(Net(1), tmp_path / "b")
    assert main(["merge", str(tmp_path / "out"), str(first), str(second), "--decay", "linear"]) == 0
    assert "0.500000000  " in capsys.readouterr().out
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert set(os.listdir(tmp_path / "out")) == names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32", "the widest of both"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "/a | 0.5 |" in card
    assert "/b | 0.5 |" in card
    merge(tmp_path / "out", [second], dtype=torch.bfloat16)
    assert set(os.listdir(tmp_path / "out")) == {"README.md", "model.safetensors"}, "the former files are gone"
    assert "/a |" not in (tmp_path / "out" / "README.md").read_text(), "the card is renewed"


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights"])
def test_files_keep_the_names_that_their_library_looks_for(stem, tmp_path) -> None:
    for index in range(2):
        folder = tmp_path / str(index)
        folder.mkdir()
        save_file({"w": torch.full((3,), float(index))}, folder / f"{stem}.safetensors", metadata={"of": "library"})
        (folder / "adapter_config.json").write_text("{}")
    merge(tmp_path / "out", [tmp_path / "0", tmp_path / "1"])
    assert load_file(tmp_path / "out" / f"{stem}.safetensors")["w"].tolist() == [0.5] * 3
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    header = (tmp_path / "out" / f"{stem}.safetensors").read_bytes()[8:200]
    assert b'"of":"library"' in header


def test_a_task_vector_is_scaled_from_its_base(tmp_path) -> None:
    models = nets(3)
    folders = [plain(model, tmp_path / str(index)) for index, model in enumerate(models)]
    merge(tmp_path / "out", folders[:2], weights=[1, 3], base=folders[2], scale=0.4)
    # The counter is the last source's, not the base's.
    wanted = expected([models[2], *models[:2]], [0.6, 0.1, 0.3])
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)
    assert got["seen"] == 1
    assert "base: 2, scale 0.4" in (tmp_path / "out" / "README.md").read_text()


def test_what_an_average_holds_as_it_was_live_comes_from_the_last_source(tmp_path) -> None:
    sources = []
    for value in (1.0, 3.0):
        model = nn.BatchNorm1d(2)
        with torch.no_grad():
            for tensor in (model.weight, model.running_mean):
                tensor.fill_(value)
        ema = ShardedEMA(model, HALF, update_buffers=False)
        ema.update()
        ema.save(tmp_path / str(value))
        sources.append(tmp_path / str(value))
    merge(tmp_path / "out", sources)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["weight"].tolist() == [2.0, 2.0]
    assert merged["running_mean"].tolist() == [3.0, 3.0]


def test_weights_are_divided_by_their_sum_and_negative_ones_are_told(tmp_path, capsys) -> None:
    folders = [str(plain(model, tmp_path / str(index))) for index, model in enumerate(nets(2))]
    with pytest.warns(UserWarning, match="negative"):
        made = merge(tmp_path / "out", folders, weights=[-1, 3])
    assert [source.coefficient for source in made.sources] == [-0.5, 1.5]
    assert main(["merge", str(tmp_path / "out"), *folders, "--weights", "-1", "3"]) == 0
    assert "warning: the weights [-1.0, 3.0] have negative ones" in capsys.readouterr().out


def test_wrong_arguments_are_told_before_anything_is_read(tmp_path) -> None:
    missing = [tmp_path / "no", tmp_path / "nothing"]
    for options, text in (
        ({"weights": [1]}, "1 numbers"),
        ({"weights": [1, -1]}, "sum to 0"),
        ({"weights": 3}, "list of numbers"),
        ({"weights": [1e308, 1e308]}, "overflows"),
        ({"weights": [1, float("nan")]}, r"weights\[1\]"),
        ({"weights": [1, 1], "decay": "linear"}, "both given"),
        ({"decay": "sqrt"}, "1-sqrt"),
        ({"scale": 2.0}, "no base"),
        ({"dtype": torch.int64}, "dtype"),
    ):
        with pytest.raises(ConfigError, match=text):
            merge(tmp_path / "out", missing, **options)
    for sources in ([], "folder"):
        with pytest.raises(ConfigError, match="sources"):
            merge(tmp_path / "out", sources)
    with pytest.raises(CheckpointNotFoundError, match="expected weights to merge"):
        merge(tmp_path / "out", missing)


def test_nothing_is_written_where_the_sources_do_not_fit(tmp_path) -> None:
    def folder(name: str, **values: torch.Tensor) -> Path:
        (tmp_path / name).mkdir()
        save_file(values, tmp_path / name / "model.safetensors")
        return tmp_path / name

    one, two = torch.ones(3), torch.zeros(3)
    good = folder("good", w=one, v=two)
    tied = folder("tied", w=one, tie=one.clone(), v=two)
    for bad, text in (
        (folder("lacks", w=one), "lacks 1 tensors of .*good.*'v'"),
        (folder("more", w=one, v=two, x=torch.full((3,), 7.0)), "good lacks 1 tensors of .*more.*'x'"),
        (folder("other", w=one, u=torch.full((3,), 7.0)), "'v'.*and has 'u' instead"),
        (folder("shape", w=torch.ones(1, 3), v=two), r"'w' is \[1, 3\] in .*shape, \[3\] in .*good"),
        (folder("apart", w=one, tie=two + 5, v=two), "different values"),
    ):
        sources = [good, bad] if bad.name != "apart" else [good, tied, bad]
        with pytest.raises(CheckpointMismatchError, match=text):
            merge(tmp_path / "out", sources)
    with pytest.raises(ConfigError, match="which has tracks"):
        merge(tmp_path / "out", [good], track="fast")
    for out in (good, tmp_path):
        with pytest.raises(ConfigError, match="lies there"):
            merge(out, [good])
    link = tmp_path / "link"
    link.symlink_to(good)
    with pytest.raises(ConfigError, match="lies there"):
        merge(link, [good])
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "out", [good, tied])
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"w", "v"}


def test_damage_is_told_and_a_former_merge_is_kept(tmp_path) -> None:
    models = nets(2)
    good = plain(models[0], tmp_path / "good")
    average = averaged(models[1], tmp_path / "average")
    dcp_folder = of_fsdp(models[1], tmp_path / "dcp") / "pytorch_model_fsdp_0"
    merge(tmp_path / "out", [good])
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with open(average / "a" / "model.safetensors", "r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x01\x02\x03")
    with pytest.raises(CheckpointCorruptError, match="not those that were saved"):
        merge(tmp_path / "out", [good, average], track="a")
    for path in dcp_folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointCorruptError, match="cannot be read"):
        merge(tmp_path / "out", [good, dcp_folder])
    for path in dcp_folder.glob("*.distcp"):
        path.unlink()
    with pytest.raises(CheckpointCorruptError, match="cannot be read"):
        merge(tmp_path / "out", [good, dcp_folder])

    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", [good], progress=interrupt)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [name for name in os.listdir(tmp_path) if name.startswith(".out")] == []


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["HOSTILE_MARK"],)


def test_a_record_of_dcp_runs_no_code(tmp_path, monkeypatch) -> None:
    """Torch's own reader unpickles it as it is."""
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "mark"))
    folder = of_fsdp(Net(), tmp_path / "dcp") / "pytorch_model_fsdp_0"
    for content in (pickle.dumps(Hostile()), b"no pickle", b""):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointCorruptError, match=r"\.metadata is not a readable record"):
            merge(tmp_path / "out", [folder])
    assert not (tmp_path / "mark").exists()


def test_the_private_names_in_a_record_of_dcp_are_these(tmp_path) -> None:
    """`torch.serialization._get_layout`: without it no record could be read."""
    layout = torch.serialization._get_layout
    assert layout("torch.strided") is torch.strided
    folder = of_fsdp(Net(), tmp_path / "dcp") / "pytorch_model_fsdp_0"
    assert b"_get_layout" in (folder / ".metadata").read_bytes()
    merge(tmp_path / "out", [folder])


def test_a_hole_between_the_pieces_of_dcp_is_told(tmp_path) -> None:
    folder = of_fsdp(Net(), tmp_path / "dcp") / "pytorch_model_fsdp_0"
    checkpoint = DcpCheckpoint(folder)
    checkpoint.tensors["model.embed.weight"].chunks.clear()
    with pytest.raises(CheckpointCorruptError, match="leave holes"):
        checkpoint.read("model.embed.weight", 0, memoryview(bytearray(16)))


def test_pieces_of_dcp_are_read_from_any_element_on(tmp_path) -> None:
    model = Net()
    checkpoint = DcpCheckpoint(of_fsdp(model, tmp_path / "dcp") / "pytorch_model_fsdp_0")
    flat = model.embed.weight.detach().reshape(-1)
    for start, count in itertools.product((0, 999, 1000, 1001), (1, 1000, 2500)):
        buffer = memoryview(bytearray(4 * count))
        checkpoint.read("model.embed.weight", start, buffer)
        assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32), flat[start : start + count])


def test_a_source_that_is_saved_anew_meanwhile_is_read_again(tmp_path) -> None:
    old, new = Net(0), Net(1)
    source = of_fsdp(old, tmp_path / "dcp")
    waiting = [of_fsdp(new, tmp_path / "new")]

    def replace(num_bytes: int) -> None:
        if waiting:
            shutil.rmtree(source)
            waiting.pop().rename(source)

    merge(tmp_path / "out", [source], progress=replace)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in new.state_dict().items())


SCRIPT = """
import sys
from pathlib import Path
from dist_ema import merge

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024

merge(sys.argv[1] + "/first", [sys.argv[1] + "/small"])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
merge(sys.argv[1] + "/out", sys.argv[2:], decay="1-sqrt")
print(status("VmHWM") - before)
"""


def test_memory_is_bounded_whatever_is_merged(tmp_path) -> None:
    """Four folders of 32 MiB, one tensor each: not one is in memory; the limit for folders of any size is 128 MiB."""
    plain(Net(), tmp_path / "small")
    for index in range(4):
        (tmp_path / str(index)).mkdir()
        save_file({"w": torch.full((2**23,), float(index))}, tmp_path / str(index) / "model.safetensors")
    sources = [str(tmp_path / str(index)) for index in range(4)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), *sources],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert float(done.stdout) < 16
    shutil.rmtree(tmp_path)
    os.mkdir(tmp_path)


def saved(folder: Path, **values: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    return folder


def test_a_mask_of_infinities_stays_one_under_negative_factors(tmp_path) -> None:
    low, high = (
        saved(tmp_path / str(value), w=torch.tensor([-torch.inf, torch.inf, value]), z=torch.tensor([1j * value]))
        for value in (1.0, 3.0)
    )
    merge(tmp_path / "out", [high], base=low, scale=2.0)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["w"].tolist() == [-torch.inf, torch.inf, 5.0] and merged["z"].tolist() == [5j]
    with pytest.warns(UserWarning, match="negative"):
        merge(tmp_path / "out", [low, high], weights=[2, -1])
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [-torch.inf, torch.inf, -1.0]


def test_integers_under_the_name_of_floats_are_refused_and_not_taken_for_the_result(tmp_path) -> None:
    floats, integers = saved(tmp_path / "f", w=torch.ones(3)), saved(tmp_path / "i", w=torch.full((3,), 3))
    for sources in ([floats, integers], [integers, floats]):
        with pytest.raises(CheckpointMismatchError, match=r"'w' is torch\.\w+ in .*, and torch\.\w+ in .*alike"):
            merge(tmp_path / "out", sources)
    assert not (tmp_path / "out").exists()
