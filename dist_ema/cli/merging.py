"""`dist-ema merge`."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from dist_ema.checks import absolute, target_folder
from dist_ema.cli.answers import progress_bar
from dist_ema.disk.folders.steady_reading import steadily

if TYPE_CHECKING:
    from dist_ema.offline.merging.writing import Merge

__all__ = ["merge"]


def merge(options: argparse.Namespace) -> str:
    """Make the weighted mean of several folders."""
    import torch  # most commands do not need it

    from dist_ema.offline.merging.sources import watched
    from dist_ema.offline.merging.writing import checked_coefficients, plan_merge, write_merge

    target, paths = target_folder(options.out), [absolute(path) for path in options.sources]
    base = None if options.base is None else absolute(options.base)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        coefficients = checked_coefficients(len(paths), options.weights, options.decay)

    def work(check: Callable[[], None]) -> Merge:
        plan = plan_merge(target, paths, coefficients, base, options.scale, options.track)
        with progress_bar(plan.nbytes) as bar:
            return write_merge(plan, dtype, options.max_shard_size, bar.update, check)

    made = steadily([watched(path) for path in (*paths, *([] if base is None else [base]))], work)
    notes = [str(warning.message) for warning in warned]
    return _json(made, notes) if options.json else _table(made, notes)


def _json(made: Merge, notes: list[str]) -> str:
    facts = {
        "folder": str(made.folder),
        "sources": [
            {"path": str(source.path), "track": source.track or None, "coefficient": source.coefficient}
            for source in made.sources
        ],
        "base": None if made.base is None else str(made.base),
        "scale": made.scale,
        "warnings": notes,
    }
    return json.dumps(facts, indent=1)


def _table(made: Merge, notes: list[str]) -> str:
    lines = [f"{made.folder}: {len(made.sources)} sources, oldest first"]
    for source in made.sources:
        track = f", track {source.track}" if source.track else ""
        lines.append(f"  {source.coefficient:12.9f}  {source.path}{track}")
    if made.base is not None:
        lines.append(f"  from the base {made.base}, scale {made.scale:g}")
    return "\n".join([*lines, *(f"  warning: {note}" for note in notes)])
