"""A schedule is one registered class; what is forgotten beside it fails here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import dist_ema
import dist_ema.schedules
from dist_ema import ConfigError, ShardedEMA
from dist_ema.cli import main
from dist_ema.schedules.records import (
    SCHEDULES,
    is_known,
    schedule_from_json,
    schedule_from_text,
    schedule_text,
    schedule_to_json,
)

ROOT = Path(dist_ema.__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
GOLDEN_MOMENTA = json.loads((ROOT / "tests" / "golden" / "schedules.json").read_text())

# A schedule that no installed tool has -> the test that compares it with a naive twin.
NOT_OBSERVED = {
    "BemaSchedule": "test_the_momentum_is_that_of_the_callback_of_trl",
    "LinearSchedule": "test_a_line_is_the_list_of_decays_of_v_jepa",
    "MergeSchedule": "test_the_weights_are_the_published_coefficients",
    "chain": "test_a_chain_asks_the_schedule_of_the_part_with_a_count_of_its_own",
    "HalfLifeSchedule": "test_a_half_life_is_that_of_the_ramp_in_images",
    "per_batch": "test_batches_of_several_sizes_move_the_average_as_far_as_their_samples_would",
    "scaled_batch": "test_a_scaled_batch_moves_as_far_as_the_small_batches_it_is_made_of",
}


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
        is_known_to_have_none = each.__name__ == "FunctionSchedule" or getattr(each, "_is_protocol", False)
        assert each in kinds or is_known_to_have_none, f"{each.__name__} lacks @registered"
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
    catalogue, combining = (
        (ROOT / "docs" / "schedules" / f"{page}.md").read_text() for page in ("catalogue", "combining")
    )
    assert f"\n## {name}\n" in catalogue or f"\n| `{name}(" in combining, (
        f"no section of docs/schedules, no row of {name}"
    )
    is_observed = any(f"{name}(" in case["ours"] for case in GOLDEN_MOMENTA)
    assert is_observed != (name in NOT_OBSERVED), f"tests/golden/schedules.json, or a reason in NOT_OBSERVED: {name}"
    if name in NOT_OBSERVED:
        assert f"`{name}`" in catalogue.split("\n## ")[0], "the page tells which are compared with a twin"
        sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
        assert f"def {NOT_OBSERVED[name]}(" in sources


@pytest.fixture
def halving() -> Iterator[str]:
    """The further schedule of the page, as it stands there."""
    (code,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/extending.md", "exec", dont_inherit=True), {"__name__": "docs.extending"})
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
