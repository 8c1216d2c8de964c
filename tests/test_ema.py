"""One process: the rule, the numbers, names through wrappers, and what is refused."""

from __future__ import annotations

import ast
import copy
import dataclasses
import doctest
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hostile import sealed
from oracle import NaiveAverage
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from zoo import Nasty, set_live

import dist_ema.ema
from dist_ema import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    DistEMAError,
    ModelChangedError,
    ShardedEMA,
    UnsupportedModelError,
    after,
)
from dist_ema.averaging.tensor_blocks import SCRATCH_NUMEL

HALF = ConstantSchedule(momentum=0.5)


def test_first_call_copies_and_the_next_ones_lerp() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = ShardedEMA(model, HALF)
    for value in (8.0, 4.0, 0.0):
        model.weight.data.fill_(value)
        ema.update()
    assert ema.full_state_dict()["weight"].item() == 3.0
    assert ema.num_updates == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_large_tensors_of_any_dtype_and_strides_equal_the_naive_average(dtype, layout) -> None:
    torch.manual_seed(0)
    shape = (3, SCRATCH_NUMEL // 2 + 17)
    model = nn.Module()
    model.w = nn.Parameter(
        torch.empty(shape[::-1]).t().to(dtype) if layout == "transposed" else torch.empty(shape, dtype=dtype)
    )
    model.b = nn.Parameter(torch.empty(5, dtype=dtype))
    ema, naive = ShardedEMA(model, HALF), NaiveAverage(HALF.momentum)
    for step in range(3):
        set_live(model, step)
        ema.update()
        naive.update(dict(model.named_parameters()))
    state = ema.full_state_dict()
    assert all(torch.equal(state[name], value) for name, value in naive.values.items())


def test_a_float32_average_of_bfloat16_weights_moves_and_stays_accurate() -> None:
    """A bfloat16 average at this decay would not move at all."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False).to(torch.bfloat16)
    schedule = ConstantSchedule(decay=0.9999)
    ema, naive = ShardedEMA(model, schedule), NaiveAverage(schedule.momentum, dtype=torch.float64)
    start = model.weight.detach().double().clone()
    drift = torch.randn(16, 16) * 2e-3
    exact = model.weight.detach().float().clone()
    for _ in range(2000):
        exact += drift
        with torch.no_grad():
            model.weight.copy_(exact)
        ema.update()
        naive.update({"weight": model.weight})
    average, truth = ema.full_state_dict()["weight"].double(), naive.values["weight"]
    relative_error = (average - truth).norm() / truth.norm()
    assert relative_error < 2e-6
    assert (truth - start).norm() > 1e4 * (average - truth).norm(), "the average moved, and by the right way"


def test_interval_correction_forgets_as_much_as_the_skipped_updates_would() -> None:
    model = nn.Linear(1, 1, bias=False)
    plain = ShardedEMA(model, ConstantSchedule(momentum=0.01))
    corrected = ShardedEMA(model, ConstantSchedule(momentum=0.01), interval=5, interval_correction=True)
    model.weight.data.fill_(0.0)
    plain.update(), corrected.update()
    model.weight.data.fill_(1.0)
    for _ in range(5):
        plain.update(), corrected.update()
    expected = 1 - 0.99**5
    assert plain.full_state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert corrected.full_state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_a_device_of_its_own_gives_the_same_bits() -> None:
    model = Nasty()
    near, far = ShardedEMA(model, HALF), ShardedEMA(model, HALF, device="cpu")
    for step in range(3):
        set_live(model, step)
        near.update(), far.update()
    ours, theirs = near.full_state_dict(), far.full_state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class _OwnNames(nn.Module):
    """Attributes that look like the prefixes of wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.inner = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.module(x))


def wrap_compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def wrap_checkpointed(model: nn.Module) -> nn.Module:
    model.module[0] = checkpoint_wrapper(model.module[0])
    return model


@pytest.mark.parametrize(
    "wrap", [lambda m: m, wrap_compiled, wrap_checkpointed, lambda m: wrap_compiled(wrap_checkpointed(m))]
)
def test_names_are_those_of_the_unwrapped_model(wrap) -> None:
    expected = set(_OwnNames().state_dict())
    model = wrap(_OwnNames())
    ema = ShardedEMA(model, HALF)
    model(torch.ones(1, 2))
    ema.update()
    assert {shard.fqn for shard in ema.shards} == expected == set(ema.full_state_dict())


def test_tied_weights_are_averaged_once_and_frozen_ones_too() -> None:
    model = Nasty()
    ema, naive = ShardedEMA(model, ConstantSchedule(momentum=0.1)), NaiveAverage(lambda step: 0.1)
    for step in range(2):
        naive.update(set_live(model, step))
        ema.update()
    state = ema.full_state_dict()
    assert torch.equal(state["head.weight"], naive.values["embed.weight"])
    assert torch.equal(state["frozen.weight"], naive.values["frozen.weight"])
    assert "scratch" not in state, "non-persistent buffers are not saved"
    model.load_state_dict(state)


def test_a_tied_weight_is_excluded_by_any_of_its_names() -> None:
    for pattern in ("head.*", "embed.*"):
        ema = ShardedEMA(Nasty(), HALF, exclude=pattern)
        assert "embed.weight" not in {shard.fqn for shard in ema.shards}


@pytest.mark.parametrize("change", ["to", "assign"])
def test_replaced_storage_is_followed(change) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, HALF)
    ema.update()
    before = ema.full_state_dict()["weight"].clone()
    if change == "to":
        model.to(torch.bfloat16)
    else:
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], torch.lerp(before, torch.full((2, 2), 3.0), 0.5))


def test_autograd_is_untouched_by_update_and_swap() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, HALF)
    ema.update()
    with ema.average_parameters():
        assert model.weight.requires_grad and model.weight.is_leaf
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    ema.update()


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(3).to_sparse())


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        self.v = nn.Parameter(torch.zeros(2))


class _Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ShardedEMA(_Integers(), HALF), "no floating-point parameter"),
        (lambda: ShardedEMA(nn.Identity(), HALF), "no floating-point parameter"),
        (lambda: ShardedEMA(nn.Linear(2, 2, device="meta"), HALF), "meta device"),
        (lambda: ShardedEMA(_Sparse(), HALF), "layout"),
        (lambda: ShardedEMA(nn.LazyLinear(2), HALF), "not initialised"),
        (lambda: ShardedEMA(_Complex(), HALF), "exclude='w'"),
        (lambda: ShardedEMA("model", HALF), r"expected a torch\.nn\.Module"),
    ],
)
def test_models_that_cannot_be_averaged_are_refused(make, told) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        make()


def test_a_complex_parameter_can_be_excluded_and_is_saved_live(tmp_path) -> None:
    ema = ShardedEMA(_Complex(), HALF, exclude="w")
    ema.update()
    ema.save(tmp_path / "ema")
    assert ema.full_state_dict()["w"].dtype == torch.complex64


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"interval": 0}, "interval is 0"),
        ({"interval": 2.0}, "interval is 2.0"),
        ({"interval_correction": 1}, "interval_correction"),
        ({"update_buffers": "yes"}, "update_buffers"),
        ({"dtype": torch.int64}, "dtype"),
        ({"dtype": "float32"}, "dtype"),
        ({"include": "nothing.*"}, "matches none"),
        ({"exclude": [3]}, "glob"),
        ({"exclude": 3}, "glob"),
        ({"device": "nowhere"}, "device"),
    ],
)
def test_options_out_of_range_are_refused(options, told) -> None:
    with pytest.raises(ConfigError, match=told):
        ShardedEMA(nn.Linear(2, 2), HALF, **options)


@pytest.mark.parametrize(
    "schedule", [0.999, None, {}, {"": HALF}, {"../x": HALF}, {"a": 0.5}, CosineSchedule, {"a/b": HALF}]
)
def test_what_is_no_schedule_is_refused(schedule) -> None:
    with pytest.raises(ConfigError):
        ShardedEMA(nn.Linear(2, 2), schedule)


class _Broken:
    def momentum(self, step: int) -> float:
        return math.nan if step == 1 else 2.0


def test_a_schedule_of_ones_own_that_gives_nonsense_is_refused_before_anything_changes() -> None:
    with pytest.warns(UserWarning, match=r"only your code can rebuild the schedule .*_Broken"):
        ema = ShardedEMA(nn.Linear(2, 2), _Broken())
    ema.update()
    before = ema.full_state_dict()
    with pytest.raises(ConfigError, match="gave momentum nan at update 1"):
        ema.update()
    assert all(torch.equal(value, before[name]) for name, value in ema.full_state_dict().items())
    assert ema.num_updates == 1


def test_a_schedule_of_ones_own_is_saved_by_its_repr_and_warned_about(tmp_path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Own:
        share: float

        def momentum(self, step: int) -> float:
            return self.share

    def averaging(schedule: object) -> ShardedEMA:
        with pytest.warns(UserWarning, match=r"Own.*share=") as caught:
            ema = ShardedEMA(nn.Linear(2, 2), schedule)
        assert caught[0].filename == __file__
        return ema

    ema = averaging(Own(0.5))
    ema.save(tmp_path / "average")
    assert "share=0.5" in json.loads((tmp_path / "average" / "manifest.json").read_text())["tracks"]["ema"]["repr"]
    ema.load(tmp_path / "average")
    other = averaging(Own(0.25))
    with pytest.warns(UserWarning, match=r"saved with .*share=0.5.*goes on with .*share=0.25") as caught:
        other.load(tmp_path / "average")
    assert caught[0].filename == __file__
    averaging(after(3, Own(0.5)))


def test_a_low_precision_average_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="stand still") as caught:
        ShardedEMA(nn.Linear(2, 2), HALF, dtype=torch.bfloat16)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("call", ["save", "load", "consolidate"])
def test_a_path_that_is_none_is_refused(call) -> None:
    with pytest.raises(DistEMAError, match="path is None"):
        getattr(ShardedEMA(nn.Linear(2, 2), HALF), call)(None)


def test_export_refuses_an_integer_dtype_and_an_unknown_track(tmp_path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), HALF)
    with pytest.raises(ConfigError, match="floating-point"):
        ema.consolidate(tmp_path / "out", dtype=torch.int8)
    with pytest.raises(ConfigError, match="track is 'x'"):
        ema.consolidate(tmp_path / "out", track="x")
    with pytest.raises(ConfigError, match="max_shard_size"):
        ema.consolidate(tmp_path / "out", max_shard_size="big")
    assert not list(tmp_path.iterdir())


def test_docstring_examples_run() -> None:
    assert doctest.testmod(dist_ema.ema).failed == 0


def bias_of_another_shape(model: nn.Module) -> None:
    model.bias = nn.Parameter(torch.ones(1))


def grown_buffer(model: nn.Module) -> None:
    model.ids = torch.arange(5)


def removed_parameter(model: nn.Module) -> None:
    model.register_parameter("bias", None)


def added_module(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model)


def replaced_module(model: nn.Module) -> None:
    model.inner = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "change", [bias_of_another_shape, grown_buffer, removed_parameter, added_module, parametrized, replaced_module]
)
def test_a_model_whose_structure_changed_is_refused_and_nothing_is_written(tmp_path, change) -> None:
    """Silently: a shape that broadcasts, a longer buffer that overwrites its neighbour in the file, a stale module."""
    model = nn.Linear(4, 3)
    model.inner = nn.Linear(2, 2)
    model.register_buffer("ids", torch.arange(2))
    ema = ShardedEMA(model, HALF)
    ema.update()
    change(model)
    with pytest.raises(ModelChangedError):
        ema.update()
        ema.save(tmp_path / "ema")
    with pytest.raises(ModelChangedError), ema.average_parameters():
        pass
    assert not list(tmp_path.iterdir())


def test_single_elements_with_odd_strides_conj_views_and_expanded_buffers_are_saved(tmp_path) -> None:
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(torch.arange(6.0).view(3, 2)[:1, :1].t()[:, :1])
    model.register_buffer("one", torch.tensor(2.0).expand(1))
    model.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
    ema = ShardedEMA(model, HALF, exclude="odd")
    ema.update()
    ema.save(tmp_path / "ema")
    loaded = load_file(tmp_path / "ema" / "model.safetensors")
    assert loaded["one"].item() == 2.0 and loaded["conjugate"].item() == 1 - 2j and loaded["odd"].item() == 0.0


def test_an_expanded_parameter_and_an_unstorable_buffer_are_refused_at_construction() -> None:
    model = nn.Linear(2, 2)
    model.w = nn.Parameter(torch.ones(1).expand(4))
    with pytest.raises(UnsupportedModelError, match="expanded"):
        ShardedEMA(model, HALF)
    model = nn.Linear(2, 2)
    model.register_buffer("wide", torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(UnsupportedModelError, match="complex128"):
        ShardedEMA(model, HALF)


def test_a_momentum_of_zero_keeps_the_average_whatever_the_live_values_are() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, CosineSchedule(0.5, total_steps=1))
    ema.update()
    before = ema.full_state_dict()["weight"].clone()
    model.weight.data.fill_(float("inf"))
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], before)


def test_a_buffer_registered_twice_keeps_its_persistent_name_only() -> None:
    model = nn.Linear(2, 2)
    shared = torch.ones(3)
    model.register_buffer("a", shared, persistent=False)
    model.register_buffer("b", shared)
    assert set(ShardedEMA(model, HALF).full_state_dict()) == set(model.state_dict())


def test_saving_never_replaces_somebody_elses_folder(tmp_path, monkeypatch) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), HALF)
    for step in ("step-1", "step-2"):
        ema.save(tmp_path / "runs" / step)
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for call in (ema.save, ema.consolidate):
        for folder in (tmp_path / "runs", tmp_path / "model", ".", "..", "", tmp_path / "model" / "config.json"):
            with pytest.raises(DistEMAError):
                call(folder)
    with pytest.raises(CheckpointError, match="saved average"):
        ema.consolidate(tmp_path / "runs" / "step-1")
    ema.consolidate(tmp_path / "export")
    ema.consolidate(tmp_path / "export")
    with pytest.raises(CheckpointError, match="no saved average"):
        ema.save(tmp_path / "export")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"step-1", "step-2"}
    assert (tmp_path / "here").exists() and (tmp_path / "model" / "config.json").exists()


def test_a_link_to_a_folder_is_written_through(tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    ema = ShardedEMA(nn.Linear(2, 2), HALF)
    for _ in range(2):
        ema.save(tmp_path / "link")
    ema.load(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "manifest.json").exists()


def test_load_finds_the_average_in_a_checkpoint_and_reads_its_own_files_only(tmp_path) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, HALF)
    ema.update()
    ema.save(tmp_path / "ckpt" / "ema")
    expected = {name: value.clone() for name, value in ema.full_state_dict().items()}
    save_file({name: value + 1 for name, value in expected.items()}, tmp_path / "ckpt" / "ema" / "adapter.safetensors")
    model.weight.data.fill_(9.0)
    ema.update()
    ema.load(tmp_path / "ckpt")
    assert all(torch.equal(value, expected[name]) for name, value in ema.full_state_dict().items())


def test_a_file_of_another_dtype_than_its_manifest_says_is_refused(tmp_path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), HALF)
    ema.save(tmp_path / "ema")
    path = tmp_path / "ema" / "model.safetensors"
    save_file({name: value.to(torch.int32) for name, value in load_file(path).items()}, path)
    record = json.loads((tmp_path / "ema" / "manifest.json").read_text())
    record["files"]["model.safetensors"]["size_bytes"] = path.stat().st_size
    (tmp_path / "ema" / "manifest.json").write_text(sealed(record))
    with pytest.raises(CheckpointCorruptError, match="int32"):
        ema.load(tmp_path / "ema")


def test_an_average_built_in_inference_mode_can_be_updated_outside() -> None:
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        ema = ShardedEMA(model, HALF)
    ema.update()
    ema.update()


def test_a_fused_optimizers_skipped_steps_are_neither_averaged_nor_counted() -> None:
    """accelerate#4242: the step hook of a fused optimizer fires on an overflow too."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    schedule = CosineSchedule(0.5, 0.1, total_steps=6)
    ema, naive = ShardedEMA(model, schedule), NaiveAverage(schedule.momentum)
    optimizer.register_step_post_hook(lambda stepped, *ignored: ema.update(found_inf=stepped.found_inf))
    for overflow in (True, False, True, False, False, True, False):
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(1, 3)).sum() * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) == overflow
        if not overflow:
            naive.update(dict(model.named_parameters()))
    assert ema.num_updates == naive.num_updates == 4
    state = ema.full_state_dict()
    assert all(torch.equal(state[name], value) for name, value in naive.values.items())


def renaming_hook(model: nn.Module) -> None:
    model.register_state_dict_post_hook(
        lambda module, state, prefix, local: state.update({prefix + "kernel": state.pop(prefix + "weight")})
    )


def adding_hook(model: nn.Module) -> None:
    model.register_state_dict_post_hook(
        lambda module, state, prefix, local: state.update({prefix + "absmax": torch.ones(1)})
    )


@pytest.mark.parametrize(("hook", "told"), [(renaming_hook, "kernel"), (adding_hook, "absmax")])
def test_names_that_the_state_dict_does_not_explain_are_refused(hook, told) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    hook(model[0])
    with pytest.raises(UnsupportedModelError, match=told):
        ShardedEMA(model, HALF)


def test_tensors_that_a_state_dict_hook_adds_can_be_excluded() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    adding_hook(model[0])
    ema = ShardedEMA(model, HALF, exclude="*.absmax")
    ema.update()
    assert "0.absmax" not in ema.full_state_dict()


def test_spectral_norm_buffers_can_be_excluded_from_buffer_averaging() -> None:
    """Averaged u and v vectors made validation explode (miles-credit#394)."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    ema = ShardedEMA(model, HALF, update_buffers=True, exclude="*.parametrizations.weight.0._*")
    for _ in range(3):
        model(torch.randn(4, 3))
        ema.update()
    state = ema.full_state_dict()
    live = model.state_dict()
    assert torch.equal(state["0.parametrizations.weight.0._u"], live["0.parametrizations.weight.0._u"])
    assert not torch.equal(state["1.running_mean"], live["1.running_mean"])


def test_nothing_in_the_package_unpickles_files() -> None:
    """Two modules read pickles: one by torch's unpickler of weights alone, one by an unpickler of a few records."""
    package = Path(dist_ema.ema.__file__).parent
    sources = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    reading = [name for name, source in sources.items() if "import pickle" in source or "torch.load" in source]
    assert sorted(reading) == ["disk/formats/pickles.py", "offline/merging/dcp.py"]
    loads = [
        ast.unparse(node)
        for name in reading
        for node in ast.walk(ast.parse(sources[name]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert len(loads) == 1 and "weights_only=True" in loads[0]
    assert "class _Unpickler(pickle.Unpickler)" in sources["offline/merging/dcp.py"], "it refuses all but its records"


def test_a_missing_file_of_several_is_noticed(tmp_path) -> None:
    """The full size of a set must not be inferred from the pieces found."""
    ema = ShardedEMA(nn.Linear(20, 20), HALF)
    ema.save(tmp_path / "ema", max_shard_size=200)
    sorted((tmp_path / "ema").glob("*.safetensors"))[-1].unlink()
    with pytest.raises(CheckpointCorruptError, match="missing"):
        ema.load(tmp_path / "ema")


def test_files_that_somebody_added_to_a_saved_average_are_carried_over(tmp_path) -> None:
    schedules = {"a": HALF, "b": ConstantSchedule(momentum=0.1)}
    for name, schedule in (("one", HALF), ("several", schedules)):
        ema = ShardedEMA(nn.Linear(20, 20), schedule)
        folder = tmp_path / name
        ema.save(folder, max_shard_size=200)
        inside = folder if name == "one" else folder / "a"
        (inside / "config.json").write_text("{}")
        (folder / "notes").mkdir()
        (folder / "notes" / "day1.txt").write_text("good")
        ema.save(folder)
        assert (inside / "config.json").read_text() == "{}" and (folder / "notes" / "day1.txt").read_text() == "good"
        assert not list(folder.rglob("model-*")), "files of the former save are not"
        ema.load(folder)
    ema = ShardedEMA(nn.Linear(2, 2), HALF)
    for _ in range(2):
        ema.consolidate(tmp_path / "export")
        (tmp_path / "export" / "tokenizer.json").write_text("{}")
    assert (tmp_path / "export" / "tokenizer.json").exists()


def test_memory_replaced_between_updates_is_followed_in_every_way() -> None:
    """The lists of an update are prepared once; each of these must prepare them anew."""
    model = nn.Linear(3, 3)
    ema, naive = ShardedEMA(model, HALF), NaiveAverage(HALF.momentum)
    replaced = [
        lambda: None,
        lambda: setattr(model.weight, "data", model.weight.data.clone()),
        lambda: setattr(model.weight, "data", model.weight.data.t()),  # the same address, other strides
        lambda: model.to(torch.bfloat16),
        lambda: model.to(torch.float32),
        lambda: setattr(model, "weight", nn.Parameter(torch.ones(3, 3))),
        lambda: model.weight.data.set_(torch.full((3, 3), 7.0)),
    ]
    for step, replace in enumerate([lambda: None, *replaced]):
        set_live(model, step)
        replace()
        ema.update()
        naive.update(dict(model.named_parameters()))
    state = ema.full_state_dict()
    assert all(torch.equal(state[name], value) for name, value in naive.values.items())


def test_a_load_over_averages_in_use_gives_each_track_its_own_values(tmp_path) -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, {"fast": ConstantSchedule(momentum=0.5), "slow": ConstantSchedule(momentum=0.1)})
    for value in (0.0, 1.0):
        nn.init.constant_(model.weight, value)
        ema.update()
    ema.save(tmp_path / "average")
    ema.update()
    ema.load(tmp_path / "average")
    for track, expected in (("fast", 0.5), ("slow", 0.1)):
        assert torch.equal(ema.full_state_dict(track)["weight"], torch.full((2, 3), expected))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("to", "device="),
        ("cuda", "device="),
        ("step", "update"),
        ("update_parameters", "update"),
        ("parameters", "average_parameters"),
        ("shadow_params", "full_state_dict"),
        ("save_pretrained", "consolidate"),
        ("optimization_step", "num_updates"),
        ("x", None),
    ],
)
def test_what_people_reach_for_by_habit_is_told_where_it_is(name, told) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), ConstantSchedule(decay=0.9))
    assert not hasattr(ema, name)
    with pytest.raises(AttributeError, match=name) as caught:
        getattr(ema, name)
    assert ("use " in str(caught.value)) == (told is not None) and (told is None or told in str(caught.value))


def test_a_forward_of_an_average_is_refused_with_the_way_to_go() -> None:
    ema = ShardedEMA(nn.Linear(2, 2), ConstantSchedule(decay=0.9))
    with pytest.raises(ConfigError, match=r"with average_parameters\(\).*into="):
        ema(torch.ones(2))


def test_a_pickle_is_refused_with_the_way_to_go_and_copies_are_not(tmp_path) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, ConstantSchedule(decay=0.9))
    ema.update()
    for call in (lambda: pickle.dumps(ema), lambda: torch.save(ema, tmp_path / "ema.pt")):
        with pytest.raises(ConfigError, match=r"save\(path\).*state_dict\(\)"):
            call()
    twin = copy.deepcopy(ema)
    twin.update()
    assert (ema.num_updates, twin.num_updates) == (1, 2)
