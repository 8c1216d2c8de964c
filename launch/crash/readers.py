"""Readers of every kind while a job saves over one folder again and again: each read is of one whole average.

    python launch/crash/readers.py --saves 200

All values of a save are one number, another one for each save, so what a reader returns tells whether it is of one.
Our readers: `load` with and without comparing checksums, `verify`, `inspect`, `diff`, `consolidate_checkpoint`,
`synthesize`. Beside them, for the record, a stock one: safetensors' `load_file` of one file after the other, which
cannot notice. Exit status 1 if one of ours called the folder damaged or missing, or returned a mixture.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from generations import fill
from jobs import build
from safetensors.torch import load_file

from dist_ema import ConstantSchedule, ShardedEMA, consolidate_checkpoint, synthesize
from dist_ema.cli import main as command

STOCK = "stock load_file"
MEMORY = Path("/dev/shm")  # names change there as on a disk, and no save waits for one


HALF = ConstantSchedule(momentum=0.5)


class Mixed(Exception):
    """What was read is of several saves."""


def one_generation(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors of several generations."""
    found = {value for name, values in tensors.items() if name != "running" for value in values.unique().tolist()}
    if len(found) != 1:
        raise Mixed(f"values of the generations {sorted(found)}")


def model_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder, as stock tools read them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in sorted(set(index.values()))}
    return {fqn: files[name][fqn] for fqn, name in index.items()}


def asked(*arguments: object) -> str:
    """The answer of `dist-ema`, which must be good."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = command([str(argument) for argument in arguments])
    if status:
        raise RuntimeError(errors.getvalue())
    return out.getvalue()


def readers(target: Path, scratch: Path) -> dict[str, Callable[[], None]]:
    """Name -> one read."""

    def consolidated() -> None:
        consolidate_checkpoint(target, scratch / "consolidated", dtype=torch.float64, max_shard_size=4200)
        one_generation(model_folder(scratch / "consolidated"))

    def synthesized() -> None:
        synthesize(target.parent, scratch / "synthesized", HALF, max_shard_size=2100)
        one_generation(model_folder(scratch / "synthesized"))

    def differing() -> None:
        found = json.loads(asked("diff", target, scratch / "one", "--json"))["tensors"]
        one_generation({name: torch.tensor([round(value, 3)]) for name, value in found.items()})

    ema = ShardedEMA(build(), HALF)

    def loaded(verify: bool) -> None:
        ema.load(target, verify=verify)
        one_generation(ema.full_state_dict())

    return {
        "load": lambda: loaded(True),
        "load, verify=False": lambda: loaded(False),
        "dist-ema verify": lambda: void(asked("verify", target)),
        "dist-ema inspect": lambda: void(asked("inspect", target)),
        "dist-ema diff": differing,
        "consolidate_checkpoint": consolidated,
        "synthesize": synthesized,
        STOCK: lambda: one_generation(model_folder(target)),
    }


def void(answer: str) -> None:
    """An answer that only has to be good."""


class _Rereads(logging.Handler):
    """Counts what `steadily` says of reads that it began again."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def read_on(read: Callable[[], None], done: Path, log: Path) -> Counter[str]:
    """Read again and again until the saves are done."""
    handler = _Rereads()
    logger = logging.getLogger("dist_ema.disk.folders.steady_reading")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    found: Counter[str] = Counter()
    while not done.exists():
        found["reads"] += 1
        try:
            read()
        except Mixed:
            found["mixed"] += 1
        except Exception:
            found["damaged or missing"] += 1
            with log.open("a") as file:
                traceback.print_exc(file=file)
        time.sleep(0.0005)
    found["again"] = handler.count
    return found


def forked(work: Callable[[], Counter[str]], answer: Path) -> int:
    """A process that does it and writes what it counted."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        answer.write_text(json.dumps(work()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def count_reads(
    folder: Path, saves: int, kinds: list[str] | None = None, pause_seconds: float = 0.03
) -> dict[str, Counter[str]]:
    """Save over one folder while readers of each kind read it. Returns what each counted."""
    target, scratch, done = folder / "saves" / "ema", folder / "scratch", folder / "done"
    target.parent.mkdir()
    scratch.mkdir()
    model = build()
    ema = ShardedEMA(model, HALF)

    def save() -> None:
        fill(model, ema.num_updates + 1)
        ema.update()
        ema.save(target, max_shard_size=2100)

    save()
    shutil.copytree(target, scratch / "one")
    names = list(readers(target, scratch)) if kinds is None else kinds
    pids = []
    for number, name in enumerate(names):
        own = scratch / str(number)
        own.mkdir()
        shutil.copytree(scratch / "one", own / "one")
        work = functools.partial(read_on, readers(target, own)[name], done, folder / "log")
        pids.append(forked(work, folder / f"answer{number}"))
    for _ in range(saves - 1):
        save()
        time.sleep(pause_seconds)
    done.touch()
    for pid in pids:
        os.waitpid(pid, 0)
    return {name: Counter(json.loads((folder / f"answer{number}").read_text())) for number, name in enumerate(names)}


def is_bad(name: str, found: Counter[str]) -> bool:
    """Whether a reader of ours went wrong, or did not read."""
    return not found["reads"] or (name != STOCK and bool(found["mixed"] + found["damaged or missing"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Readers of one folder while a job saves into it; is each read whole?")
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument(
        "--folder", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="of a local file system"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        results = count_reads(folder, options.saves)
        columns = ("reads", "damaged or missing", "mixed", "again")
        print(
            f"{options.saves} saves over one folder\n| reader | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
        )
        for reader, found in results.items():
            print(f"| {reader} | {' | '.join(str(found[column]) for column in columns)} |")
        bad = [reader for reader, found in results.items() if is_bad(reader, found)]
        num_reads = sum(found["reads"] for reader, found in results.items() if reader != STOCK)
        print(f"{num_reads} reads by our readers; {len(bad)} of {len(results) - 1} readers bad")
        if bad:
            log = folder / "log"
            sys.exit(f"FAILED: {', '.join(bad)}\n{log.read_text()[-4000:] if log.exists() else ''}")


if __name__ == "__main__":
    main()
