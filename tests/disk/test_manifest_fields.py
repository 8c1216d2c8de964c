"""A field of the manifest is declared once; the declaration is all that reading, writing and comparing know."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from pathlib import Path

import pytest
from torch import nn

import dist_ema
from dist_ema import CheckpointCorruptError, ShardedEMA
from dist_ema.disk.manifest import Agreement, Manifest, read_manifest
from dist_ema.disk.manifest_fields import counter, rule, rule_of

ROOT = Path(dist_ema.__file__).parent.parent
FORMAT_PAGE = (ROOT / "docs" / "checkpoint_format.md").read_text()
RULES = {field.name: rule_of(field) for field in dataclasses.fields(Manifest)}
TABLE = [line.split("|")[1].strip().strip("`") for line in FORMAT_PAGE.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", RULES)
def test_a_field_of_the_manifest_is_told_on_the_page_of_the_format(name) -> None:
    assert name in TABLE and TABLE.index("format") < TABLE.index(name) < TABLE.index("checksum")
    lacked = re.search(r"Version 1 \(never released\) lacks ([^;]*);", FORMAT_PAGE)[1]
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
