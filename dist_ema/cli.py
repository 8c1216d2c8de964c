"""The command line, `dist-ema`. Loads no torch.

Exit codes: 0 the answer is good, 1 it is bad (told on stderr, without a traceback), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ema._version import __version__
from dist_ema.errors import ConfigError, DistEMAError
from dist_ema.manifest import Manifest, find_saved, read_manifest
from dist_ema.schedules import schedule_from_json, schedule_text

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        told = chosen.run(chosen)
    except (DistEMAError, OSError) as error:
        print(_printable(f"dist-ema: {error}"), file=sys.stderr)
        return 1
    try:
        print(_printable(told))
        sys.stdout.flush()
    except OSError as error:
        # Keep the interpreter from complaining at exit. The reader of a pipe that closed has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if isinstance(error, BrokenPipeError) else 1
    return 0


def _printable(text: str) -> str:
    """Names in a checkpoint are somebody's input: escape what a terminal would obey."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ema",
        description="Look at saved averages of model weights.",
        epilog="exit codes: 0 good, 1 bad answer, 2 wrong usage",
    )
    parser.add_argument("--version", action="version", version=f"dist-ema {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="tell what a saved average is",
        description="Tell what a saved average is: updates, tracks, schedules, tensors, bytes.",
        epilog="example: dist-ema inspect checkpoint-400 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("src", metavar="SRC", type=Path, help="folder of an average, or the checkpoint that holds it")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)
    return parser


def _inspect(chosen: argparse.Namespace) -> str:
    folder = find_saved(chosen.src)
    facts = _facts(folder, read_manifest(folder))
    return json.dumps(facts, indent=1) if chosen.json else _told(facts)


def _facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    averaged = [saved for saved in manifest.tensors.values() if saved.averaged]
    return {
        "folder": str(folder),
        "num_updates": manifest.num_updates,
        "tracks": {
            name: {"schedule": schedule, "momentum": _momentum(schedule, manifest.num_updates)}
            for name, schedule in manifest.tracks.items()
        },
        "num_tensors": len(manifest.tensors),
        "num_averaged_tensors": len(averaged),
        "num_averaged_elements": sum(math.prod(saved.shape) for saved in averaged),
        "file_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "options": dict(manifest.options),
        "written_by": dict(manifest.written_by),
    }


def _momentum(schedule: Mapping[str, Any], num_updates: int) -> float | None:
    """Momentum of the next update; None for a schedule that only its author can rebuild."""
    try:
        return schedule_from_json(schedule).momentum(num_updates)
    except (ConfigError, ArithmeticError):
        return None


def _told(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['folder']}: {facts['num_updates']:,} updates",
        f"  {facts['num_averaged_tensors']} averaged tensors of {facts['num_tensors']}, "
        f"{facts['num_averaged_elements']:,} elements, {facts['file_bytes']:,} bytes on disk",
    ]
    for name, track in facts["tracks"].items():
        momentum = "unknown" if track["momentum"] is None else f"{track['momentum']:.6g}"
        lines.append(f"  track {name}: {schedule_text(track['schedule'])}, next momentum {momentum}")
    lines.append("  options: " + ", ".join(f"{key}={value}" for key, value in facts["options"].items()))
    lines.append("  written by: " + ", ".join(f"{key} {value}" for key, value in facts["written_by"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
