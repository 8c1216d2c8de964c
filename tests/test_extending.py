"""What docs/extending.md promises: an extension is declared in one place, and what is forgotten fails here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil
import re
import typing
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_ema
import dist_ema.schedules
from dist_ema import CheckpointCorruptError, ConfigError, ShardedEMA
from dist_ema.cli import main
from dist_ema.disk.manifest import Agreement, Manifest, read_manifest
from dist_ema.disk.manifest_fields import counter, rule, rule_of
from dist_ema.options import OptionArguments, Options
from dist_ema.schedules.records import (
    SCHEDULES,
    is_known,
    schedule_from_json,
    schedule_from_text,
    schedule_text,
    schedule_to_json,
)
from dist_ema.schedules.registry import registered

ROOT = Path(dist_ema.__file__).parent.parent
GOLDEN_MOMENTA = json.loads((ROOT / "tests" / "golden" / "schedules.json").read_text())

# Name -> the test of its formula, of a schedule that no tool lets anyone observe.
NOT_OBSERVED = {
    "HalfLifeSchedule": "test_half_life_of_a_fraction_is_that_of_torchtitan_and_the_ramp_of_edm2",
    "scaled_batch": "test_a_scaled_batch_raises_the_decay_to_its_power",
}


# A schedule


@pytest.mark.parametrize("file", [file.name for file in pkgutil.iter_modules(dist_ema.schedules.__path__)])
def test_no_schedule_is_left_unregistered(file) -> None:
    module = importlib.import_module(f"dist_ema.schedules.{file}")
    schedules = [
        each
        for name, each in inspect.getmembers(module, inspect.isclass)
        if each.__module__ == module.__name__ and hasattr(each, "momentum") and not name.startswith("_")
    ]
    kinds = {each.kind for each in SCHEDULES.values()}
    for each in schedules:
        assert each in kinds or getattr(each, "_is_protocol", False), f"{each.__name__} lacks @registered"
    here = {name for name, each in SCHEDULES.items() if each.kind.__module__ == module.__name__}
    if here:
        assert here == set(module.__all__), (
            f"what {file}.py registers, and what its __all__ tells type checkers, differ"
        )
        line = f"from {module.__name__} import *"
        assert line in (ROOT / "dist_ema" / "schedules" / "catalog.py").read_text()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_registered_schedule_survives_record_and_text(name) -> None:
    schedule = schedule_from_text(SCHEDULES[name].example)
    record = schedule_to_json(schedule)
    assert record["type"] == name and is_known(schedule)
    again = schedule_from_json(json.loads(json.dumps(record)))
    assert again == schedule == schedule_from_text(repr(schedule)) and hash(again) == hash(schedule)
    assert type(again) is SCHEDULES[name].kind and getattr(dist_ema, name) is SCHEDULES[name].call
    told = schedule_text(record)
    assert schedule_text(schedule_to_json(schedule_from_text(told))) == told
    steps = (0, 1, 2, 3, 10, 99, 100, 101, 10**9)
    assert all(0.0 <= schedule.momentum(step) <= 1.0 for step in steps)
    assert [again.momentum(step) for step in steps] == [schedule.momentum(step) for step in steps]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.anything = None


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_registered_schedule_is_on_the_page_and_compared(name) -> None:
    page = (ROOT / "docs" / "schedules.md").read_text()
    assert f"\n## {name}\n" in page or f"\n| `{name}(" in page, f"docs/schedules.md has no section or row of {name}"
    is_observed = any(f"{name}(" in case["ours"] for case in GOLDEN_MOMENTA)
    assert is_observed != (name in NOT_OBSERVED), f"tests/golden/schedules.json, or a reason in NOT_OBSERVED: {name}"
    if name in NOT_OBSERVED:
        sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
        assert f"def {NOT_OBSERVED[name]}(" in sources


@pytest.fixture
def halving() -> Iterator[str]:
    """A further schedule, as the recipe has it: one class."""

    @registered(example="HalvingSchedule(period=10)")
    @dataclasses.dataclass(frozen=True)
    class HalvingSchedule:
        period: int

        def momentum(self, step: int) -> float:
            return math.ldexp(0.5, -(step // self.period))

        def to_json(self) -> dict[str, int]:
            return {"period": self.period}

    yield "HalvingSchedule"
    del SCHEDULES["HalvingSchedule"]
    vars(dist_ema).pop("HalvingSchedule", None)


def test_one_class_is_all_that_a_further_schedule_takes(halving, tmp_path, capsys, monkeypatch) -> None:
    """Named by the package, told by the command line, drawn, saved, inspected, restored; no warning."""
    monkeypatch.chdir(tmp_path)
    schedule = dist_ema.HalvingSchedule(period=3)
    assert halving in dist_ema.__all__ and halving in dir(dist_ema)
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    assert halving in capsys.readouterr().out
    ema = ShardedEMA(nn.Linear(2, 1), {"own": schedule, "later": dist_ema.after(2, schedule)})
    ema.update()
    ema.save("ema")
    assert main(["inspect", "ema"]) == 0
    assert "track own: HalvingSchedule(period=3), next momentum 0.5\n" in capsys.readouterr().out
    assert main(["plot", "ema", "--schedule", "after(5, HalvingSchedule(10))", "--out", "picture.svg"]) == 0
    again = ShardedEMA(nn.Linear(2, 1), {"own": schedule, "later": dist_ema.after(2, schedule)})
    again.load("ema")
    assert again.num_updates == 1


def test_a_schedule_that_is_gone_is_refused_with_the_names_of_those_that_are(halving) -> None:
    record = schedule_to_json(schedule_from_text("HalvingSchedule(10)"))
    registration = SCHEDULES.pop(halving)
    try:
        with pytest.raises(ConfigError, match=r"cannot be rebuilt, expected one of .*'CosineSchedule'"):
            schedule_from_json(record)
    finally:
        SCHEDULES[halving] = registration


# An option

FIELDS = {field.name: field for field in dataclasses.fields(Options)}
# Option -> (what it is kept as, what a user may give): all others are taken as they are kept.
WIDENED = {
    "device": (torch.device | None, torch.device | str | None),
    "include": (tuple[str, ...], str | Iterable[str] | None),
    "exclude": (tuple[str, ...], str | Iterable[str] | None),
}
# Option -> (a value that is not the default, what is kept of it).
OTHERS = {
    "interval": (3, 3),
    "interval_correction": (True, True),
    "update_buffers": (True, True),
    "dtype": (torch.float64, torch.float64),
    "device": ("cpu", torch.device("cpu")),
    "include": ("weight", ("weight",)),
    "exclude": (["bias"], ("bias",)),
    "skip_nonfinite": (True, True),
    "compensated": (True, True),
    "overlap": (True, True),
}


def test_an_option_has_one_name_one_type_and_one_default_wherever_it_is_written() -> None:
    signature = inspect.signature(ShardedEMA)
    keywords = {name: each for name, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY}
    assert [*keywords] == [*FIELDS, "into"] == [*typing.get_type_hints(OptionArguments)]
    given, kept = typing.get_type_hints(ShardedEMA.__init__), typing.get_type_hints(Options)
    arguments = typing.get_type_hints(OptionArguments)
    for name, field in FIELDS.items():
        assert given[name] == arguments[name], name
        assert (kept[name], given[name]) == WIDENED.get(name, (kept[name], kept[name])), name
        default = keywords[name].default
        assert (() if name in ("include", "exclude") and default is None else default) == field.default, name
    assert given["into"] == arguments["into"] and keywords["into"].default is None
    assert OptionArguments.__total__ is False
    (attached,) = (
        each for each in inspect.signature(dist_ema.attach).parameters.values() if each.kind is each.VAR_KEYWORD
    )
    assert attached.annotation == "Unpack[OptionArguments]"


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_that_is_given_arrives(name) -> None:
    value, kept = OTHERS[name]
    ema = ShardedEMA(nn.Linear(2, 1), dist_ema.ConstantSchedule(decay=0.9), **{name: value})
    assert getattr(ema._state.options, name) == kept != FIELDS[name].default
    assert f"{name}=" in repr(ema)


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_says_whether_it_is_recorded(name) -> None:
    """What is recorded is compared over the ranks, kept in the manifest, and warned of at a load."""
    assert set(FIELDS[name].metadata) == {"recorded"}
    assert (name in Options().to_json()) == FIELDS[name].metadata["recorded"]
    assert FIELDS[name].type != "bool" or FIELDS[name].default is False


@pytest.mark.parametrize("name", [*FIELDS, "into"])
def test_an_option_is_told_wherever_a_reader_looks(name) -> None:
    assert re.search(rf"^ {{8}}{name}: ", ShardedEMA.__doc__, re.MULTILINE), "the docstring of ShardedEMA"
    table = (ROOT / "docs" / "training.md").read_text().split("## Options of")[1].split("\n## ")[0]
    assert re.search(rf"`{name}[=`]", table), "docs/training.md"
    if name in FIELDS:
        assert re.search(rf"^ {{8}}{name}: ", Options.__doc__, re.MULTILINE), "the docstring of Options"
        row = next(line for line in format_page().splitlines() if line.startswith("| `options` |"))
        assert (f"`{name}`" in row) == FIELDS[name].metadata["recorded"], "docs/checkpoint_format.md"


def format_page() -> str:
    return (ROOT / "docs" / "checkpoint_format.md").read_text()


def test_a_further_option_is_refused_by_what_lacks_it_until_it_is_everywhere() -> None:
    """A field of `Options` alone: it would be an option that nobody can choose."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Further(Options):
        further: bool = dataclasses.field(default=False, metadata={"recorded": True})

    assert Further(further=True).to_json() == {**Options().to_json(), "further": True}
    assert Further(further=True).arguments_text() == "further=True, "
    with pytest.raises(ConfigError, match="further is 1, expected True or False"):
        Further(further=1)
    with pytest.raises(TypeError, match="further"):
        ShardedEMA(nn.Linear(2, 1), dist_ema.ConstantSchedule(decay=0.9), further=True)


# A field of the manifest

RULES = {field.name: rule_of(field) for field in dataclasses.fields(Manifest)}
TABLE = [line.split("|")[1].strip().strip("`") for line in format_page().splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", RULES)
def test_a_field_of_the_manifest_is_told_on_the_page_of_the_format(name) -> None:
    assert name in TABLE and TABLE.index("format") < TABLE.index(name) < TABLE.index("checksum")
    lacked = re.search(r"Version 1 \(never released\) lacks ([^;]*);", format_page())[1]
    assert (f"`{name}`" in lacked) == (RULES[name].since == 2)


@pytest.mark.parametrize("name", RULES)
def test_a_record_lacks_what_came_later_and_nothing_else(name, tmp_path) -> None:
    """Whatever a field's declaration says of the versions holds when a record is read."""
    ema = ShardedEMA(nn.Linear(2, 1), dist_ema.ConstantSchedule(decay=0.9))
    ema.update()
    ema.save(tmp_path / "ema")
    path = tmp_path / "ema" / "manifest.json"
    whole = json.loads(path.read_bytes())
    del whole["checksum"]
    for version in (1, 2):
        record = {key: value for key, value in whole.items() if key != name} | {"format_version": version}
        if version == 2:
            record["checksum"] = f"{zlib.crc32(json.dumps(record, sort_keys=True, separators=(',', ':')).encode()):08x}"
        path.write_text(json.dumps(record))
        since = RULES[name].since
        if since is None or version < since:
            getattr(read_manifest(path.parent), name)
        else:
            with pytest.raises(CheckpointCorruptError, match=f"lacks the field '{name}'"):
                read_manifest(path.parent)


def test_only_what_is_declared_so_is_compared_over_the_ranks() -> None:
    """A count or a time in the digest would refuse ranks that are alike."""
    assert {name: each.compared for name, each in RULES.items() if each.compared is not Agreement.NONE} == {
        "options": Agreement.RUN,
        "tracks": Agreement.RUN,
        "tensors": Agreement.MODEL,
        "aliases": Agreement.MODEL,
        "written_by": Agreement.RUN,
    }


def test_one_declaration_is_all_that_a_further_field_takes(monkeypatch, tmp_path) -> None:
    """Written, checked when it is read, lacked by older records, and out of the comparison unless it says otherwise."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Further(Manifest):
        further: int = dataclasses.field(default=7, metadata=rule(counter, since=None, compared=Agreement.NONE))

    ema = ShardedEMA(nn.Linear(2, 1), dist_ema.ConstantSchedule(decay=0.9))
    ema.update()
    ema.save(tmp_path / "ema")
    path = tmp_path / "ema" / "manifest.json"
    before = read_manifest(path.parent)
    monkeypatch.setattr("dist_ema.disk.manifest.Manifest", Further)
    older = read_manifest(path.parent)
    assert older.further == 7 and not any(
        "further" in older.compared(each) for each in (Agreement.MODEL, Agreement.RUN)
    )
    path.write_bytes(dataclasses.replace(older, further=8).to_bytes())
    assert read_manifest(path.parent).further == 8
    path.write_bytes(dataclasses.replace(older, further=-1).to_bytes())
    with pytest.raises(CheckpointCorruptError, match="a count is -1"):
        read_manifest(path.parent)
    path.write_bytes(dataclasses.replace(older, further=8).to_bytes())
    monkeypatch.undo()
    overlooked = read_manifest(path.parent)  # as every reader overlooks what it does not know
    assert overlooked == before
    ema.load(path.parent)
