"""A layout is one class in a file of its own and one line in a list."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_ema
import dist_ema.topology
from dist_ema import ShardedEMA, UnsupportedModelError
from dist_ema.boxes.shards import Box, NoForm
from dist_ema.topology.planning import LAYOUTS
from dist_ema.topology.seam.layout import HeldBox, Holders, Layout, Locator, Named, Where

ROOT = Path(dist_ema.__file__).parent.parent


def files_of(folder: str, *suffixes: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]


def test_every_layout_is_one_class_in_a_file_of_its_own_and_one_line_in_the_list() -> None:
    found = {}
    for path in files_of("dist_ema/topology", ".py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        for each in classes:
            if "Layout" in {base.id for base in each.bases if isinstance(base, ast.Name)}:
                assert found.setdefault(path.stem, each.name) == each.name, f"{path} has two layouts"
    assert sorted(found.values()) == sorted(type(layout).__name__ for layout in LAYOUTS), "planning.LAYOUTS"
    assert type(LAYOUTS[-1]).__name__ == found["plain"], "it claims whatever is a tensor"
    for file, name in found.items():
        assert file in dist_ema.topology.__doc__, f"{file} is not in the docstring of topology/__init__.py"
        users = [path.stem for path in files_of("dist_ema", ".py") if names_in_code(path, name)]
        assert sorted(users) == sorted({file, "planning"}), f"{name} is known outside its file and the list"


def names_in_code(path: Path, name: str) -> bool:
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.alias)}
    return name in used


class Stowing(nn.Module):
    """Keeps the values of its parameter elsewhere while it is idle, as ZeRO-3 does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0))
        self.stowed = [torch.arange(6.0).reshape(2, 3)]


class Stowed(Layout):
    """A further layout, as the recipe has it: one class."""

    def find(self, model: nn.Module) -> dict[Where, Any]:
        return {(id(each), "weight"): StowedTensor(each) for each in model.modules() if isinstance(each, Stowing)}

    def claims(self, named: Named) -> bool:
        return isinstance(named.source, StowedTensor)

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        form = NoForm("is stowed away: use save")
        return lambda named: (
            [HeldBox(Box(named.fqns[0], (0, 0), named.shape), lambda stowed=named.owner.stowed: stowed[0], form)],
            Holders((rank,), 0),
        )


class StowedTensor:
    dtype = torch.float32

    def __init__(self, module: Stowing) -> None:
        self.shape = module.stowed[0].shape


def test_one_class_and_one_line_are_all_that_a_further_layout_takes(monkeypatch, tmp_path) -> None:
    """Found, averaged, swapped in and out, saved and restored; what it has no form for is refused with its words."""
    monkeypatch.setattr("dist_ema.topology.planning.LAYOUTS", (Stowed(), *LAYOUTS))
    model = nn.ModuleDict({"a": Stowing(), "b": nn.Linear(2, 1)})
    ema = ShardedEMA(model, dist_ema.ConstantSchedule(decay=0.5))
    ema.update()
    model["a"].stowed[0] = model["a"].stowed[0] + 2.0  # new memory is followed
    ema.update()
    expected = torch.arange(6.0).reshape(2, 3) + 1.0
    assert torch.equal(ema.full_state_dict()["a.weight"], expected)
    with ema.average_parameters():
        assert torch.equal(model["a"].stowed[0], expected)
    assert torch.equal(model["a"].stowed[0], expected + 1.0)
    with pytest.raises(UnsupportedModelError, match=r"^a\.weight is stowed away: use save$"):
        ema.sharded_state_dict()
    ema.save(tmp_path / "ema")
    again = ShardedEMA(model, dist_ema.ConstantSchedule(decay=0.5))
    again.load(tmp_path / "ema")
    assert torch.equal(again.full_state_dict()["a.weight"], expected)
