"""Runs all parts of `launch/gpu.sh`, and has its results after every part: see there.

Nothing here imports torch: where torch is broken, the table says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import Cell, Spread, markdown
from gpu_parts import JSON, Part, parts

ROOT = Path(__file__).parents[2]
_LIBRARIES = (
    *("torch", "triton", "numpy", "accelerate", "safetensors", "huggingface_hub", "isal"),
    *("timm", "ema-pytorch", "diffusers", "mmengine", "lightning"),
)
_DUMP_SECONDS = 3.0  # for the stacks of a part that is ended
_OK, _FAILED, _NOT_IMPORTABLE, _NOT_RUN = "ok", "failed", "not importable", "not run"


def run_all(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "runs" / "gpu", help="the folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with small sizes; two parts fail on purpose")
    parser.add_argument("--only", metavar="PART,PART", help="some parts, by name")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together; a dry run has an hour")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry_run else "cuda"
    chosen = parts(device, small=options.dry_run)
    if options.only:
        names = options.only.split(",")
        if unknown := set(names) - {part.name for part in chosen}:
            parser.error(f"--only has {sorted(unknown)}, expected some of {[part.name for part in chosen]}")
        chosen = [part for part in chosen if part.name in names]
    options.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"device": device, "dry_run": options.dry_run, **facts(), "parts": []}
    deadline = time.monotonic() + (3600 if options.dry_run else options.seconds)
    with tempfile.TemporaryDirectory() as folder, (options.out / "log.txt").open("w") as log:
        for part in chosen:
            result = run(part, min(part.limit_seconds, deadline - time.monotonic()), Path(folder), log.fileno(), device)
            told["parts"].append(result)
            write(options.out, told)
            print(f"{part.name}: {result['outcome']}, {result['seconds']:.0f} s {result['result']}", flush=True)
    print(f"results: {options.out}/results.md, results.json, log.txt")
    in_earnest = [result for result, part in zip(told["parts"], chosen, strict=True) if not part.is_at_fault]
    return int(any(result["outcome"] != _OK for result in in_earnest))


def facts() -> dict[str, Any]:
    """What a figure depends on."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    card, driver, memory = (*(text.strip() for text in output(*query).split("\n")[0].split(",")), "", "", "")[:3]
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "card": card or "no GPU",
        "driver": driver,
        "memory": memory,
        "versions": versions,
        "commit": output("git", "-C", str(ROOT), "rev-parse", "HEAD").strip(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def output(*command: str) -> str:
    """What a command prints; nothing if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def run(part: Part, limit_seconds: float, folder: Path, log: int, device: str) -> dict[str, Any]:
    """Run a part in a process of its own, and tell what came of it."""
    result: dict[str, Any] = {"part": part.name, "shows": part.shows, "limit_s": part.limit_seconds, "seconds": 0.0}
    if limit_seconds <= 0:
        return result | {"outcome": _NOT_RUN, "result": "no time was left"}
    record = folder / f"{part.name}.out"
    command = [sys.executable, *(argument.replace(JSON, str(record)) for argument in part.command)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONFAULTHANDLER": "1",  # a part that is ended shows where it was
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    if part.is_on_ranks:
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
    os.write(log, f"\n==== {part.name}: {' '.join(part.command)}\n".encode())
    began, printed = time.monotonic(), folder / f"{part.name}.txt"
    with printed.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, cwd=ROOT, env=environment, start_new_session=True
        )
        is_late = not ended(process, limit_seconds)
    content = printed.read_bytes()
    os.write(log, content)
    result["seconds"] = time.monotonic() - began
    try:
        outcome = judged(part, process.returncode, record, content.decode(errors="replace"), device)
    except Exception as error:  # whatever the part has written
        outcome = {"outcome": _FAILED, "result": f"{type(error).__name__}: {error}"}
    if is_late:
        outcome |= {"outcome": _FAILED, "result": f"ended after {limit_seconds:.0f} s"}
    return result | outcome


def ended(process: subprocess.Popen[bytes], limit_seconds: float) -> bool:
    """Wait for the process; False if it and its children had to be ended."""
    try:
        process.wait(limit_seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        for number, seconds in ((signal.SIGABRT, _DUMP_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, number)
                process.wait(seconds)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def judged(part: Part, status: int, record: Path, printed: str, device: str) -> dict[str, Any]:
    """The outcome of a part, the line for the table, and the numbers."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or [""]
    found: dict[str, Any] = {"outcome": _OK, "result": ""}
    if part.is_of_tests and record.exists():
        found |= tests_of(record)
        if device == "cuda" and not found["passed"]:
            found["outcome"] = _FAILED
    elif record.exists():  # also what a part has told before it failed
        found["told"] = json.loads(record.read_text())
    if status and not found.get("failures"):
        is_missing = lines[-1].startswith(("ModuleNotFoundError", "ImportError"))
        return found | {"outcome": _NOT_IMPORTABLE if is_missing else _FAILED, "result": lines[-1]}
    if status:
        found["outcome"] = _FAILED
    return found


def tests_of(record: Path) -> dict[str, Any]:
    """The counts of a JUnit record, and the last line of every failure."""
    passed, skipped, failures = 0, 0, {}
    for case in xml.etree.ElementTree.parse(record).getroot().iter("testcase"):
        broken = [*case.findall("failure"), *case.findall("error")]
        if broken:
            message = (broken[0].get("message") or broken[0].text or "").strip().splitlines() or [""]
            failures[f"{case.get('name')}"] = message[0]
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    counts = f"{passed} passed, {len(failures)} failed, {skipped} skipped"
    first = "".join(f"; {name}: {message}" for name, message in list(failures.items())[:1])
    return {"passed": passed, "skipped": skipped, "failures": failures, "result": counts + first}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write(folder: Path, told: Mapping[str, Any]) -> None:
    """Both files, as far as the results go."""
    (folder / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "results.md").write_text("\n".join(page(told)) + "\n")


def page(told: Mapping[str, Any]) -> list[str]:
    """The lines of the Markdown file."""
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    lines = [f"# {told['card']}{', a dry run on a CPU' if told['dry_run'] else ''}", ""]
    lines += [f"{told['date']}, driver {told['driver'] or 'none'}, {told['memory'] or 'no memory of a GPU'}, "]
    lines += [f"{told['cores']} cores, commit {told['commit'] or 'unknown'}.", "", f"{versions}.", ""]
    columns = ("part", "shows", "outcome", "seconds", "result")
    lines += markdown([{column: plain(result[column]) for column in columns} for result in told["parts"]])
    for result in told["parts"]:
        for name, message in result.get("failures", {}).items():
            lines += ["", f"- {name}: {message}"]
        for table in result.get("told", {}).get("tables", ()):
            lines += ["", f"## {result['part']}: {table['title']}", "", *markdown(cells_of(table["rows"]))]
    return lines


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Cell]]:
    return [{name: plain(cell) for name, cell in row.items()} for row in rows]


def plain(cell: Any) -> Cell:
    """A cell from JSON; a text may have what would end a cell of Markdown."""
    if isinstance(cell, Mapping):
        return Spread(**cell)
    return str(cell).replace("|", "\\|") if isinstance(cell, str) else cell


if __name__ == "__main__":
    sys.exit(run_all())
