"""The command line, `dist-ema`. It loads torch only where tensors are converted.

Exit codes: 0 the answer is good, 1 it is bad (stderr has the reason, without a traceback), 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from dist_ema._version import __version__
from dist_ema.cli import commands, consolidating, inspecting, merging
from dist_ema.cli.answers import BadAnswer
from dist_ema.errors import DistEMAError
from dist_ema.schedules.coefficients import SHAPES
from dist_ema.schedules.records import SCHEDULES

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        text = options.run(options)
    except BadAnswer as answer:
        return _print(answer.text) or _complain(answer)
    except (DistEMAError, OSError) as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("dist-ema: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    return _print(text)


def _complain(error: Exception) -> int:
    if sys.stderr is not None:
        print(_printable(f"dist-ema: {error}", sys.stderr), file=sys.stderr)
    return 1


def _print(text: str) -> int:
    if sys.stdout is None:
        return _complain(OSError("there is no standard output"))
    try:
        print(_printable(text, sys.stdout))
        sys.stdout.flush()
    except OSError as error:
        # With stdout on devnull the interpreter does not complain at exit. A closed pipe is no error: its reader has
        # what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if isinstance(error, BrokenPipeError) else _complain(error)
    return 0


def _printable(text: str, stream: TextIO) -> str:
    """Escape the characters that a terminal would obey, or the stream cannot encode: a checkpoint may be hostile."""
    encoding = stream.encoding or "utf-8"
    escaped = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ema",
        description="Look at saved averages of model weights, and make model folders of them.",
        epilog="exit codes: 0 good, 1 bad answer, 2 wrong usage, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"dist-ema {__version__}")
    known = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = _command(
        known,
        "inspect",
        inspecting.inspect,
        "tell what a saved average is, or list those of a run",
        "Tell what a saved average is: updates, tracks, schedules, tensors, bytes. Of the folder of a run or of\n"
        "snapshots: a table with a row for each average, from their manifests alone. Of an export, another model\n"
        "folder or a file of weights: tensors, dtypes, files.",
        "dist-ema inspect checkpoint-400 --json",
        source_help="folder of an average, of a checkpoint, run or snapshots that hold some, or of weights",
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    _command(
        known,
        "verify",
        commands.verify,
        "read all of it and compare the checksums",
        "Read every tensor of a saved average and compare it with its checksum. An export or another model folder has\n"
        "no checksums: there the headers, the sizes of the files and the index are compared, and the answer says so.",
        "dist-ema verify checkpoint-400",
        source_help="folder of an average, of the checkpoint that holds it, or of weights",
    )
    diff = _command(
        known,
        "diff",
        commands.diff,
        "tell how far two sets of weights lie apart",
        "Relative L2 distance of A from B, ||a - b|| / ||b||, whole and for each tensor. Each is a saved average, a\n"
        "model folder or a safetensors file. Of a checkpoint that holds live weights and an average, the average is\n"
        "read: give the file of the live ones. Exit code 1 if their names or shapes differ.",
        "dist-ema diff checkpoint-400 model/model.safetensors",
        source="a",
    )
    diff.add_argument("b", metavar="B", type=Path, help="the reference: the same kinds of things")
    diff.add_argument("--track", help="which average of A, where there are several")
    diff.add_argument("--track-b", help="which average of B (default: as --track)")
    diff.add_argument("--top", type=int, default=20, metavar="N", help="tensors to list, farthest first (default: 20)")
    diff.add_argument("--json", action="store_true", help="print one JSON object, with all tensors")
    plot = _command(
        known,
        "plot",
        commands.plot,
        "draw schedules, or what snapshots can express",
        "Draw the momentum of each update and the mean age of the average, to PNG or SVG: for each track of a saved\n"
        "average, and for other schedules. With --sigma-rel: the weights of the observations in such an average, and\n"
        "in the sum of snapshots that comes nearest.",
        "dist-ema plot checkpoint-400 --schedule 'PowerSchedule(sigma_rel=0.1)' --out schedule.svg",
        optional=True,
    )
    plot.add_argument("--out", type=Path, default=Path("schedule.png"), help="the picture (default: schedule.png)")
    plot.add_argument("--force", action="store_true", help="replace a picture that is there")
    plot.add_argument("--steps", type=int, help="updates along the axis (default: as long as the schedules tell)")
    plot.add_argument(
        "--schedule",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"a schedule, {_schedule_help()}; may be repeated",
    )
    plot.add_argument("--sigma-rel", type=float, metavar="X", help="SRC is a folder of snapshots: draw this profile")
    plot.set_defaults(refuse=plot.error)
    consolidate = _command(
        known,
        "consolidate",
        consolidating.consolidate,
        "write one average as a plain model folder",
        "Write one average as a plain model folder: safetensors without the manifest, checksums compared on the way.\n"
        "With --bema: the average plus a (live - start), as BEMA has it.",
        "dist-ema consolidate checkpoint-400 export --dtype bfloat16",
    )
    consolidate.add_argument("dst", metavar="DST", type=Path, help="folder to write; a former export is replaced")
    consolidate.add_argument("--track", help="which average, where there are several")
    consolidate.add_argument(
        "--link",
        action="store_true",
        help="give unchanged files a second name instead of a copy: who writes into DST then writes into SRC",
    )
    _add_export_options(consolidate, "keep")
    _add_bema(consolidate)
    synthesize = _command(
        known,
        "synthesize",
        commands.synthesize,
        "make an average that nobody tracked from the snapshots of a run",
        "Write the average that another schedule would have made, as a plain model folder: the sum of snapshots whose\n"
        "weights of all observations come nearest. The profile error tells how near (relative L2).",
        "dist-ema synthesize --sigma-rel 0.15 run/snapshots model",
        source="snapshots",
        source_help="folder of the saved averages of a run, or of checkpoints that hold them",
    )
    synthesize.add_argument("out", metavar="OUT", type=Path, help="folder to write; a former export is replaced")
    wanted = synthesize.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--sigma-rel", type=float, metavar="X", help="width of a power-function profile, such as 0.15")
    wanted.add_argument("--schedule", metavar="TEXT", help=f"any other schedule, {_schedule_help()}")
    synthesize.add_argument(
        "--num-updates", type=int, metavar="N", help="of the average (default: the latest snapshot's)"
    )
    _add_export_options(synthesize, "averages in float32, the rest as it is")
    synthesize.add_argument("--json", action="store_true", help="print one JSON object, with all weights")
    _add_merge(known)
    return parser


def _add_merge(known: Any) -> None:
    command = _command(
        known,
        "merge",
        merging.merge,
        "make the weighted mean of several folders of one model",
        "Write the weighted mean of saved weights as a plain model folder: with --decay what a learning-rate decay\n"
        "would have led to. The sources are model folders, safetensors files, saved averages and checkpoints of\n"
        "torch's DCP, in any mixture of one model's forms. The coefficients are printed, and lie in the model card.",
        "dist-ema merge model run/checkpoint-800 run/checkpoint-900 run/checkpoint-1000 --decay 1-sqrt",
        source="out",
        source_help="folder to write; a former export is replaced",
    )
    # Python's own usage has the options first, where --weights would take the folders for numbers.
    command.usage = "dist-ema merge OUT SRC [SRC ...] [options]"
    command.add_argument("sources", metavar="SRC", type=Path, nargs="+", help="what to merge, oldest first")
    kinds = command.add_mutually_exclusive_group()
    kinds.add_argument("--equal", action="store_true", help="equal weights (the default)")
    kinds.add_argument("--decay", choices=SHAPES, help="the weights of a learning-rate decay of that curve")
    kinds.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="weights, oldest first; they are divided by their sum"
    )
    command.add_argument("--base", type=Path, help="weights B of the task-vector form, B + scale (mean - B)")
    command.add_argument("--scale", type=float, metavar="A", default=1.0, help="the scale of that form (default: 1)")
    command.add_argument("--track", help="which average, where saved averages have several")
    _add_export_options(command, "the widest of the sources")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_bema(command: argparse.ArgumentParser) -> None:
    bema = command.add_argument_group("correction of the lag (BEMA)")
    bema.add_argument("--bema", action="store_true", help="add a (live - start), a = (rho + gamma t)^-eta")
    bema.add_argument("--live", type=Path, help="folder or file of the live weights that were saved with the average")
    bema.add_argument(
        "--start", type=Path, help="folder or file of the weights that the run began at (default: the track 'start')"
    )
    bema.add_argument("--eta", type=float, metavar="X", help="how fast the correction fades (default: 0.2)")
    of_schedule = "that of the saved BemaSchedule, else"
    bema.add_argument("--rho", type=float, metavar="X", help=f"see a (default: {of_schedule} 10)")
    bema.add_argument("--gamma", type=float, metavar="X", help=f"see a (default: {of_schedule} 1)")
    bema.add_argument(
        "--update-after-step", type=int, metavar="N", help=f"no correction until then (default: {of_schedule} 0)"
    )
    command.set_defaults(refuse=command.error)


def _schedule_help() -> str:
    return f"such as 'after(100, EqualSchedule())', made of {', '.join(sorted(SCHEDULES))}"


def _add_export_options(command: argparse.ArgumentParser, kept: str) -> None:
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        help=f"convert floating-point tensors (default: {kept})",
    )
    command.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="size of a file, such as 2GB, or in bytes (default: 5GB)",
    )


def _command(
    known: Any,
    name: str,
    run: Callable[[argparse.Namespace], str],
    summary: str,
    description: str,
    example: str,
    source: str = "src",
    source_help: str = "folder of an average, or the checkpoint that holds it",
    optional: bool = False,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = known.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(source, metavar=source.upper(), type=Path, nargs="?" if optional else None, help=source_help)
    command.set_defaults(run=run)
    return command
