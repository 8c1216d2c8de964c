"""The command line, `dist-ema`. Loads torch only where tensors are converted.

Exit codes: 0 the answer is good, 1 it is bad (told on stderr, without a traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_ema._version import __version__
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, ConfigError, DistEMAError
from dist_ema.manifest import Manifest, find_saved, read_manifest
from dist_ema.saved import damage_told, damaged_tensors, read_saved
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
    except KeyboardInterrupt:
        print("dist-ema: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
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
        description="Look at saved averages of model weights, and make model folders of them.",
        epilog="exit codes: 0 good, 1 bad answer, 2 wrong usage, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"dist-ema {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "tell what a saved average is",
        "Tell what a saved average is: updates, tracks, schedules, tensors, bytes.",
        "dist-ema inspect checkpoint-400 --json",
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    _command(
        commands,
        "verify",
        _verify,
        "read all of it and compare the checksums",
        "Read every tensor of a saved average and compare it with its checksum.",
        "dist-ema verify checkpoint-400",
    )
    consolidate = _command(
        commands,
        "consolidate",
        _consolidate,
        "write one average as a plain model folder",
        "Write one average as a plain model folder: safetensors without the manifest, checksums compared on the way.",
        "dist-ema consolidate checkpoint-400 export --dtype bfloat16",
    )
    consolidate.add_argument("dst", metavar="DST", type=Path, help="folder to write; a former export is replaced")
    consolidate.add_argument("--track", help="which average, where there are several")
    consolidate.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="convert floating-point tensors (default: keep)",
    )
    consolidate.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="size of a file, such as 2GB (default: 5GB)",
    )
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], str], summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("src", metavar="SRC", type=Path, help="folder of an average, or the checkpoint that holds it")
    command.set_defaults(run=run)
    return command


def _verify(chosen: argparse.Namespace) -> str:
    saved = read_saved(chosen.src)
    if not saved.manifest.checksums:
        raise CheckpointMismatchError(
            f"{saved.folder} was written without checksums (format version 1): its files fit its manifest, more cannot "
            "be told. Load it and save it again to add them"
        )
    damaged, num_bytes = [], 0
    with _progress(sum(t.nbytes for model in saved.models.values() for t in model.tensors.values())) as bar:
        for name, size, is_damaged in damaged_tensors(saved):
            num_bytes += size
            bar.update(size)
            damaged += [name] if is_damaged else []
    if damaged:
        raise CheckpointCorruptError(damage_told(saved.folder, damaged))
    return f"{saved.folder}: sound, {len(saved.manifest.tensors) * len(saved.models)} tensors, {num_bytes:,} bytes"


def _consolidate(chosen: argparse.Namespace) -> str:
    import torch  # not needed by the other commands

    from dist_ema.offline import consolidate_checkpoint

    saved = read_saved(chosen.src)
    track = saved.track(chosen.track)
    total = sum(tensor.nbytes for tensor in saved.models[track].tensors.values())
    with _progress(total) as bar:
        consolidate_checkpoint(
            chosen.src,
            chosen.dst,
            track=track,
            dtype=None if chosen.dtype is None else getattr(torch, chosen.dtype),
            max_shard_size=chosen.max_shard_size,
            progress=bar.update,
        )
    return f"{chosen.dst}: {len(saved.manifest.tensors)} tensors of track {track} from {saved.folder}"


def _progress(total_bytes: int) -> tqdm[Any]:
    """A bar on stderr, where that is a terminal."""
    return tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False)


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
