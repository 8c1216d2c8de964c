"""An option has one name, one type and one default wherever it is written."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dist_ema
from dist_ema import ConfigError, Experts, ShardedEMA
from dist_ema.options import OptionArguments, Options

ROOT = Path(dist_ema.__file__).parent.parent
FORMAT_PAGE = (ROOT / "docs" / "checkpoint_format.md").read_text()
FIELDS = {field.name: field for field in dataclasses.fields(Options)}
# Option -> (what it is kept as, what a user may give): all others are taken as they are kept.
WIDENED = {
    "device": (torch.device | None, torch.device | str | None),
    "include": (tuple[str, ...], str | Iterable[str] | None),
    "exclude": (tuple[str, ...], str | Iterable[str] | None),
    "experts": (tuple[Experts, ...], Iterable[Experts]),
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
    "trainable_only": (True, True),
    "averaged_only": (True, True),
    "skip_nonfinite": (True, True),
    "compensated": (True, True),
    "overlap": (True, True),
    "masters": (True, True),
    "experts": ([Experts("weight", dim=0)], (Experts("weight", dim=0),)),
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
    model = nn.Linear(2, 1)
    # As in DeepSpeed's engine, for `masters`.
    model.optimizer = SimpleNamespace(fp16_groups=[[*model.parameters()]], fp32_groups=[[*model.parameters()]])
    ema = ShardedEMA(model, dist_ema.ConstantSchedule(decay=0.9), **{name: value})
    assert getattr(ema._state.options, name) == kept != FIELDS[name].default
    assert f"{name}=" in repr(ema)


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_says_whether_it_is_recorded(name) -> None:
    """What is recorded is compared over the ranks, kept in the manifest, and warned of at a load."""
    assert set(FIELDS[name].metadata) == {"recorded"}
    assert (name in Options().to_json()) == FIELDS[name].metadata["recorded"]
    assert FIELDS[name].type != "bool" or FIELDS[name].default is False
    assert FIELDS[name].type != "bool | None" or FIELDS[name].default is None


@pytest.mark.parametrize("name", [*FIELDS, "into"])
def test_an_option_is_told_wherever_a_reader_looks(name) -> None:
    assert re.search(rf"^ {{4}}{name}: ", inspect.getdoc(ShardedEMA), re.MULTILINE), "the docstring of ShardedEMA"
    table = (ROOT / "docs" / "options.md").read_text().split("## Options of")[1].split("\n## ")[0]
    assert re.search(rf"`{name}[=`]", table), "docs/options.md"
    if name in FIELDS:
        assert re.search(rf"^ {{4}}{name}: ", inspect.getdoc(Options), re.MULTILINE), "the docstring of Options"
        row = next(line for line in FORMAT_PAGE.splitlines() if line.startswith("| `options` |"))
        assert (f"`{name}`" in row) == FIELDS[name].metadata["recorded"], "docs/checkpoint_format.md"


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
