"""`dist-ema inspect`: an average, all averages of a run, or weights without a manifest."""

from __future__ import annotations

import argparse
import collections
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ema.checks import local
from dist_ema.cli.answers import BadAnswer, json_answer
from dist_ema.disk.folders import contents
from dist_ema.disk.folders.steady_reading import steadily
from dist_ema.disk.formats.file_names import stem_in
from dist_ema.disk.listing import ListedAverage, averages_below, bytes_of, read_listing
from dist_ema.disk.manifest import find_saved, read_manifest
from dist_ema.disk.saved_average import check_files
from dist_ema.disk.sources import find_weights
from dist_ema.errors import CheckpointCorruptError, ConfigError
from dist_ema.schedules.records import schedule_from_json, schedule_text

__all__ = ["inspect", "kind_of_weights"]


def inspect(options: argparse.Namespace) -> str:
    """Tell what lies at a path."""
    source = local(options.src)
    facts, text = steadily([source], lambda check: _look(source))
    answer = json_answer(facts) if options.json else text
    damaged = [row["damaged"] for row in facts.get("averages", ()) if "damaged" in row]
    if damaged:
        raise BadAnswer(answer, f"{len(damaged)} of {len(facts['averages'])} cannot be read: {damaged[0]}")
    return answer


def _look(source: Path) -> tuple[dict[str, Any], str]:
    """The facts, and their text."""
    folder = source if source.is_file() else contents.resolve(source)
    if source.is_file() or not contents.has_manifest(folder):
        below = [] if source.is_file() else averages_below(folder)
        if len(below) > 1 or (below and below != contents.averages_in(folder)):
            return _of_run(folder, read_listing(folder))
        if source.is_file() or (not below and stem_in(folder) is not None):
            return _of_weights(source)
    return _of_average(find_saved(source))


def _of_average(folder: Path) -> tuple[dict[str, Any], str]:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    averaged = [saved for saved in manifest.tensors.values() if saved.averaged]
    facts = {
        "folder": str(folder),
        "num_updates": manifest.num_updates,
        "tracks": {
            name: {
                "schedule": schedule,
                "momentum": _momentum(schedule, manifest.count_of(name)),
                "num_updates": manifest.count_of(name),
            }
            for name, schedule in manifest.tracks.items()
        },
        "num_tensors": len(manifest.tensors),
        "num_averaged_tensors": len(averaged),
        "num_averaged_elements": sum(math.prod(saved.shape) for saved in averaged),
        "file_bytes": bytes_of(folder, manifest),
        "options": dict(manifest.options),
        "kept_buffers": list(manifest.kept_buffers),
        "written_by": dict(manifest.written_by),
    }
    return facts, _text_of_average(facts)


def _momentum(schedule: Mapping[str, Any], num_updates: int) -> float | None:
    """The momentum of the next update; None for a schedule that only its author can rebuild."""
    try:
        return schedule_from_json(schedule).momentum(num_updates)
    except (ConfigError, ArithmeticError):
        return None


def _text_of_average(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['folder']}: {facts['num_updates']:,} updates",
        f"  {facts['num_averaged_tensors']} averaged tensors of {facts['num_tensors']}, "
        f"{facts['num_averaged_elements']:,} elements, {facts['file_bytes']:,} bytes",
    ]
    for name, track in facts["tracks"].items():
        momentum = "unknown" if track["momentum"] is None else f"{track['momentum']:.6g}"
        own = track["num_updates"]
        late = "" if own == facts["num_updates"] else f", {own:,} updates since it was added"
        kept = ", with buffers of its own" if name in facts["kept_buffers"] else ""
        lines.append(f"  track {name}: {schedule_text(track['schedule'])}, next momentum {momentum}{late}{kept}")
    lines.append("  options: " + ", ".join(f"{key}={value}" for key, value in facts["options"].items()))
    lines.append("  written by: " + ", ".join(f"{key} {value}" for key, value in facts["written_by"].items()))
    return "\n".join(lines)


def _of_run(folder: Path, listed: Sequence[ListedAverage]) -> tuple[dict[str, Any], str]:
    """A table with a row for each average, of their manifests alone."""
    if all(one.manifest is None for one in listed):
        raise CheckpointCorruptError(
            f"{folder} holds {len(listed)} saved averages, none of them readable: {listed[0].damage}"
        )
    rows: list[dict[str, Any]] = []
    cells = [("name", "updates", "tracks", "bytes", "saved")]
    for one in listed:
        name = str(one.folder.relative_to(folder))
        row: dict[str, Any] = {"name": name, "folder": str(one.folder)}
        name = name.replace("\n", "\\n")  # a row is a line
        if one.manifest is None:
            row["damaged"] = one.damage
            cells.append((name, "-", "damaged", "-", "-"))
        else:
            at = datetime.datetime.fromtimestamp(one.saved_at).astimezone()
            row["num_updates"] = one.manifest.num_updates
            row["tracks"] = list(one.manifest.tracks)
            row["file_bytes"] = one.file_bytes
            row["saved_at"] = at.isoformat(timespec="seconds")
            count, size = f"{one.manifest.num_updates:,}", f"{one.file_bytes:,}"
            cells.append((name, count, " ".join(one.manifest.tracks), size, f"{at:%Y-%m-%d %H:%M}"))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"{folder}: {len(rows)} saved average{'s' * (len(rows) > 1)}"]
    for name, count, tracks, size, at_text in cells:
        line = f"  {name:<{widths[0]}}  {count:>{widths[1]}}  {tracks:<{widths[2]}}  {size:>{widths[3]}}  {at_text}"
        lines.append(line.rstrip())
    return {"folder": str(folder), "averages": rows}, "\n".join(lines)


def _of_weights(source: Path) -> tuple[dict[str, Any], str]:
    """Weights that have no manifest."""
    weights = find_weights(source, None)
    model, kind = weights.model, kind_of_weights(source)
    dtypes = collections.Counter(stored.dtype for stored in model.tensors.values())
    facts = {
        "folder": str(weights.folder),
        "kind": kind,
        "files": list(model.files),
        "num_tensors": len(model.tensors),
        "num_elements": sum(math.prod(stored.shape) for stored in model.tensors.values()),
        "file_bytes": sum(file.size_bytes for file in model.files.values()),
        "dtypes": dict(dtypes),
    }
    files = f"{len(model.files)} file{'s' * (len(model.files) > 1)}, {facts['file_bytes']:,} bytes"
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
    return facts, (
        f"{weights.path}: {kind}\n  {len(model.tensors)} tensors ({kinds}), {facts['num_elements']:,} elements\n"
        f"  {files}: {', '.join(list(model.files)[:3])}{', ...' * (len(model.files) > 3)}"
    )


def kind_of_weights(source: Path) -> str:
    """What weights without a manifest are."""
    if source.is_file():
        return "weights without a manifest"
    return "an export, without a manifest" if contents.is_export(contents.resolve(source)) else "a model folder"
