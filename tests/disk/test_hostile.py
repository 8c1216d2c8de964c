"""Whatever a checkpoint says, nothing is executed, nothing is written, nothing in memory changes."""

from __future__ import annotations

import inspect
import json
import math
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hostile import ONE_FILE, SEVERAL_FILES, sealed
from tiny import averaged_once
from torch import nn

from dist_ema import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    ConfigError,
    ConstantSchedule,
    DistEMAError,
    EqualSchedule,
    ShardedEMA,
    consolidate_checkpoint,
    synthesize,
)
from dist_ema.cli import main
from dist_ema.schedules.base import momentum_of_update
from dist_ema.schedules.records import (
    SCHEDULES,
    check_record,
    schedule_from_json,
    schedule_text,
    schedule_to_json,
)

EQUAL = EqualSchedule()
CASES = {**ONE_FILE, **SEVERAL_FILES}


def averaging(seed: int) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(seed)
    # 16 elements, so that the last 64 bytes of the file are the weight: it comes after the bias.
    model = nn.Module()
    model.bias, model.weight = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, 4))
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    for step in range(2):
        with torch.no_grad():
            model.weight.add_(step)  # live and averaged differ
        ema.update()
    return model, ema


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[bool, Path]:
    """Whether in several files -> folder."""
    folder = tmp_path_factory.mktemp("sound")
    _, ema = averaging(0)
    ema.save(folder / "one")
    ema.save(folder / "several", max_shard_size=70)
    return {False: folder / "one", True: folder / "several"}


@pytest.mark.parametrize("case", CASES)
def test_damaged_and_hostile_checkpoints_are_refused_everywhere(sound, tmp_path, capsys, case) -> None:
    damage, error = CASES[case]
    folder = tmp_path / "ckpt" / "ema"
    shutil.copytree(sound[case in SEVERAL_FILES], folder)
    damage(folder)
    content = contents(tmp_path)

    model, ema = averaging(1)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in ema.full_state_dict().items()}
    with pytest.raises(DistEMAError) as caught:
        ema.load(folder)
    assert type(caught.value) is error, caught.value
    assert ema.num_updates == 2 and all(torch.equal(before[k], v) for k, v in ema.full_state_dict().items())
    assert all(torch.equal(live[name], value) for name, value in model.state_dict().items())

    with pytest.raises(DistEMAError) as caught:
        consolidate_checkpoint(folder, tmp_path / "out")
    assert type(caught.value) is error, caught.value

    with pytest.raises(DistEMAError) as caught:
        synthesize(folder, tmp_path / "out", EQUAL)
    assert isinstance(caught.value, error if case != "no manifest" else ConfigError), caught.value

    commands = [
        ["consolidate", str(folder), str(tmp_path / "out")],
        ["synthesize", "--schedule", "EqualSchedule()", str(folder), str(tmp_path / "out")],
    ]
    if case != "no manifest":  # then it is a plain model, of which verify says that it has no checksums
        commands += [["diff", str(folder), str(sound[False])], ["verify", str(folder)]]
    if "schedule" in case or "manifest" in case:  # these look at nothing else
        commands += [
            *([["inspect", str(folder)]] if case != "no manifest" else []),
            ["plot", str(folder), "--out", str(tmp_path / "out.svg")],
        ]
    for command in commands:
        assert main(command) == 1
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("dist-ema: ") and "Traceback" not in told.err
    assert contents(tmp_path) == content, "nothing was written, nothing executed"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): beginning(path) if path.is_file() else b"" for path in folder.rglob("*")}


def beginning(path: Path) -> bytes:
    """All of a file, unless it is of those that are too large to be read."""
    with open(path, "rb") as file:
        return file.read(2**20)


def test_the_corpus_starts_from_sound_averages(sound, tmp_path, capsys) -> None:
    for several, folder in sound.items():
        _, ema = averaging(1)
        ema.load(folder)
        consolidate_checkpoint(folder, tmp_path / str(several))
        assert main(["verify", str(folder)]) == 0
        assert "sound, 2 tensors, 76 bytes" in capsys.readouterr().out
    assert len(CASES) >= 25


def test_an_average_of_another_model_is_refused(sound) -> None:
    model = nn.Linear(3, 4)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    with pytest.raises(CheckpointMismatchError, match=r"weight as float32\[4, 4\].*expected float32\[4, 3\]"):
        ema.load(sound[False])


def test_every_flipped_bit_is_refused(sound, tmp_path) -> None:
    """One bit of each byte of each file: nothing in a checkpoint is unguarded."""
    _, ema = averaging(1)
    folder = tmp_path / "ema"
    shutil.copytree(sound[True], folder)
    accepted = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            try:
                ema.load(folder)
                accepted.append(
                    (path.name, position, content[position : position + 1], bytes(damaged[position : position + 1]))
                )
            except DistEMAError:
                pass
        path.write_bytes(content)
    assert accepted == []


VALUES = [0, 1, 2, -1, 7, 0.5, -0.0, 1.0, 1e-300, 1e300, 1e18, 2**53, 2**62, 10**300, 10**400, math.inf, math.nan]
VALUES += [
    [0],
    [0, 5],
    "linear",
    "cosine",
    True,
    None,
    "",
    "0.5",
    "ConstantSchedule",
    [],
    [1],
    {},
    {"type": "ConstantSchedule"},
]
FITTING = {name: [*inspect.signature(each.kind).parameters] for name, each in SCHEDULES.items()}
NAMES = sorted({name for names in FITTING.values() for name in names} | {"repr", "type"})


def test_whatever_a_schedule_says_it_works_or_is_refused() -> None:
    """20,000 records of random types, arguments and values; what is accepted can be drawn, told and used anywhere."""
    rng = random.Random(0)
    accepted = set()

    def record(depth: int) -> dict[str, object]:
        kind = rng.choice([*SCHEDULES, "their.Schedule"])
        fitting = FITTING.get(kind, NAMES)
        chosen = rng.sample(fitting if rng.random() < 0.9 else NAMES, rng.randint(0, min(3, len(fitting))))
        made: dict[str, object] = {"type": kind, **{name: rng.choice(VALUES) for name in chosen}}
        field = SCHEDULES[kind].inner_field if kind in SCHEDULES else None
        if field is not None and rng.random() < 0.9:
            inner = [record(depth + 1) if depth < 3 else {"type": "EqualSchedule"} for _ in range(rng.randint(1, 2))]
            made[field] = inner[0] if field == "schedule" else inner
        return made

    for _ in range(20_000):
        saved = record(0)
        assert isinstance(schedule_text(saved), str)
        try:
            check_record(saved)
            schedule = schedule_from_json(saved)
        except ConfigError:
            continue
        accepted.add(saved["type"])
        again = schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule))))
        assert again == schedule and isinstance(schedule_text(schedule_to_json(schedule)), str) and repr(schedule)
        for step in (0, 1, 2, 10, 10**9, 2**62):
            for interval in (1, 2**62):
                rhythm = {"interval": interval, "interval_correction": interval > 1}
                momentum_of_update(schedule, step, batch_size=3.0, **rhythm)
    assert accepted == set(SCHEDULES)


def places(value: object) -> list[tuple[object, ...]]:
    """Every place in a JSON value, as the keys that lead to it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key, each in inner for rest in places(each))]


def put(value: object, place: tuple[object, ...], new: object) -> object:
    if not place:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[place[0]] = put(copied[place[0]], place[1:], new)
    return copied


def test_a_manifest_with_any_value_at_any_place_is_used_or_refused(sound, tmp_path, capsys) -> None:
    """Four random values at every place of the record, sealed; a reader does its work or says why not."""
    rng = random.Random(0)
    folder = tmp_path / "ema"
    shutil.copytree(sound[True], folder)
    content = json.loads((folder / "manifest.json").read_text())
    refused = used = 0
    for place in places({key: value for key, value in content.items() if key != "checksum"}):
        for new in rng.sample(VALUES, 4):
            record = put(content, place, new)
            (folder / "manifest.json").write_text(sealed(record) if isinstance(record, dict) else json.dumps(record))
            _, ema = averaging(1)
            for call in (
                lambda ema=ema: ema.load(folder),
                lambda: consolidate_checkpoint(folder, tmp_path / "out"),
                lambda: synthesize(folder, tmp_path / "made", EQUAL),
            ):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        call()
                    used += 1
                except DistEMAError:
                    refused += 1
            assert main(["inspect", str(folder)]) in (0, 1)
            assert "Traceback" not in capsys.readouterr().err
    assert refused > used > 0


def load_deep(folder: str) -> str:
    with pytest.raises(CheckpointCorruptError) as caught:
        averaged_once().load(folder)
    return str(caught.value)


@pytest.mark.parametrize("depth", [40, 900, 100_000])
def test_a_deeply_nested_manifest_is_refused_on_every_rank(world, tmp_path, capsys, depth) -> None:
    averaged_once().save(tmp_path / "ema")
    path = tmp_path / "ema" / "manifest.json"
    record = json.loads(path.read_text())
    record["written_by"] = {}
    text = sealed(record) if depth > 1000 else None
    if text is None:
        for _ in range(depth):
            record["written_by"] = {"x": record["written_by"]}
        text = sealed(record)
    else:
        text = text.replace('"written_by": {}', '"written_by": ' + '{"x":' * depth + "1" + "}" * depth)
    path.write_text(text)
    first, second = world(2).run(load_deep, str(tmp_path / "ema"))
    assert first == second
    assert main(["inspect", str(tmp_path / "ema")]) == 1
    assert "Traceback" not in capsys.readouterr().err
