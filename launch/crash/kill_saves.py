"""Kills ranks while they save, and looks whether the folder is the whole old or the whole new checkpoint.

    OMP_NUM_THREADS=1 python launch/crash/kill_saves.py --kills 200 --ranks 2

First at random moments, spread over the time that a save takes: one rank or all, in the foreground or the background,
DDP or FSDP2, in a save that finds nothing beside the folder or what the kill before left there. Then just before each
change that rank 0 makes in the file system, also while it clears what an earlier kill left. At the end one save that
nobody disturbs must leave nothing beside the folder. Exit status 1 if a folder was neither, or if a survivor did not
end with a CommunicationError within seconds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from killing import Kill, Result, Trials

KINDS = tuple(itertools.product(("ddp", "fsdp2"), (False, True)))  # layouts, in the background or not
BETWEEN_RENAMES = "rename .ema.staging-TOKEN ema"  # the change before which only `.ema.old` is whole
HEAD = ("victims", "kills", "inside the save", "old whole", "new whole", "neither", "survivors", "told", "hung")


def warm_up(trials: Trials) -> None:
    """Make the first checkpoint, and measure saves."""
    for layout, background in KINDS:
        trials.undisturbed(Kill((), layout=layout, background=background), saves=3)


def random_kills(trials: Trials, count: int, rng: random.Random) -> Iterator[Result]:
    """One rank and all ranks by turns, at moments that are uniform over the usual time of a save."""
    for number in range(count):
        layout, background = rng.choice(KINDS)
        yield trials.kill(
            Kill(
                victims=tuple(rng.sample(range(trials.size), k=trials.size if number % 2 else 1)),
                save=rng.choice((1, 2)),
                seconds=rng.random() * trials.save_seconds(layout, background),
                layout=layout,
                background=background,
            )
        )


def kills_at_changes(trials: Trials, *, everyone: bool) -> Iterator[Result]:
    """Rank 0, or all ranks, just before its first change in the file system, its second, and so on to the last."""
    victims = tuple(range(trials.size if everyone else 1))
    for event in range(1, 1 + len(trials.events(Kill((0,))))):
        yield trials.kill(Kill(victims, event=event))


def kills_in_recovery(trials: Trials, until: int = 12) -> Iterator[Result]:
    """Rank 0 at and after the renames; then again before each of the first changes of the save that goes on from there.

    The first changes clear what was left behind, and put back a folder that has only got its old name.
    """
    changes = trials.events(Kill((0,)))
    renamed = 1 + changes.index(BETWEEN_RENAMES)
    for left_at in (renamed, renamed + 1, renamed + 3):
        for event in range(1, until + 1):
            yield trials.kill(Kill((0,), event=left_at))
            yield trials.kill(Kill((0,), save=1, event=event))


def row(name: str, results: Sequence[Result]) -> str:
    """One line of the table."""
    outcomes = Counter(result.outcome for result in results)
    numbers = [
        len(results),
        sum(result.inside for result in results),
        *(outcomes[outcome] for outcome in ("old", "new", "neither")),
        *(sum(getattr(result, field) for result in results) for field in ("survivors", "told", "hung")),
    ]
    return f"| {name} | {' | '.join(map(str, numbers))} |"


def try_all(trials: Trials, kills: int, rng: random.Random) -> tuple[dict[str, list[Result]], Result | None]:
    """All kills by name of their row, up to the first that went wrong; and that one. Prints each full row."""
    results: dict[str, list[Result]] = {}
    for name, series in (
        ("", random_kills(trials, kills, rng)),
        ("rank 0, before each change", kills_at_changes(trials, everyone=False)),
        ("all ranks, before each change", kills_at_changes(trials, everyone=True)),
        ("rank 0, in commits and in recoveries", kills_in_recovery(trials)),
    ):
        bad, told = None, len(results)
        for result in series:
            random_name = "one rank, any moment" if len(result.kill.victims) == 1 else "all ranks, any moment"
            results.setdefault(name or random_name, []).append(result)
            if not result.good:
                bad = result
                break
        for name_of_row in list(results)[told:]:
            print(row(name_of_row, results[name_of_row]), flush=True)
        if bad is not None:
            return results, bad
    return results, None


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill ranks while they save; is the checkpoint whole?")
    parser.add_argument("--kills", type=int, default=200, help="at random moments")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), options.ranks)
        warm_up(trials)
        usual_ms = ", ".join(f"{1000 * trials.save_seconds(*kind):.0f}" for kind in KINDS)
        print(f"{options.ranks} ranks, seed {options.seed}; a save takes {usual_ms} ms {KINDS}", flush=True)
        print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
        results, bad = try_all(trials, options.kills, random.Random(options.seed))
        everything = [result for series in results.values() for result in series]
        inside = statistics.fmean(result.inside for result in everything)
        beside = Counter(" and ".join(result.beside) or "nothing" for result in everything)
        slowest = max((result.seconds for result in everything if result.survivors), default=0.0)
        print(f"{inside:.0%} of the kills came before the save had returned on all victims")
        print(f"the slowest survivor ended {slowest:.2f} s after the kill")
        print(f"left beside the folder: {', '.join(f'{name} {count} times' for name, count in beside.most_common())}")
        if bad is not None:
            sys.exit(f"FAILED: {bad.outcome}, {bad.reason or 'not all survivors were told'}: {bad.kill}\n{bad.log}")
        trials.undisturbed(Kill(()))
        print(f"generation {trials.generation} was saved at last, and nothing lies beside the folder")
        print(f"{len(everything)} kills, 0 bad")


if __name__ == "__main__":
    main()
