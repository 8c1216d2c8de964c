"""Pairs of jobs that save into one folder, or save and load: one wins whole, the other is told, and nothing is lost.

    python launch/crash/job_pairs.py --random 50

A requeued job and the dying one before it do this. First one job stops before each change that it makes in the folder,
in each state that the folder may be in, and another job runs there from beginning to end; then the first goes on, or
is killed. Then both stop before their own turning points. Then pairs run at once, at random moments. After each pair
the folder must be one whole average: of a save that has returned, or, if none has, the former one. A later save must
work, and leave nothing beside the folder. Exit status 1 if anything else was found.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from generations import ADDED, ADDED_TEXT, beside, generation_of
from jobs import Job, load, save

from dist_ema import DistEMAError

OLD, FIRST, SECOND, LATER = 1, 2, 3, 4

# Names change there as on a disk, and no trial waits for one.
MEMORY = Path("/dev/shm")

# Changes next to which another job's may make a difference.
TURNING_POINTS = (
    *("open .ema.writer-TOKEN", "mkdir .ema.staging-TOKEN", "open manifest.json", "rename ema .ema.old"),
    *("rename .ema.staging-TOKEN ema", "rename .ema.old .ema.old-TOKEN", "remove .ema.writer-TOKEN"),
    "rename ema .ema.old-TOKEN",  # of a target that is not whole, beside a former content that is
)


def nothing(target: Path) -> None:
    """No average yet."""


def whole(target: Path) -> None:
    """An average, and a file that somebody has added."""
    run(save(target, OLD), target)
    (target / ADDED).write_text(ADDED_TEXT)


def between_renames(target: Path) -> None:
    """A save was killed between its renames."""
    whole(target)
    target.rename(target.parent / ".ema.old")


def file_in_the_way(target: Path) -> None:
    """The same, and then somebody has put a file into the target."""
    between_renames(target)
    target.mkdir()
    (target / ADDED).write_text(ADDED_TEXT)


def leftovers(target: Path) -> None:
    """Saves were killed while staging and while they removed the former content."""
    whole(target)
    shutil.copytree(target, target.parent / ".ema.old")
    for name in (".ema.staging", ".ema.staging-0123456789ab", ".ema.trash-01234567", ".ema.old-0123456789ab"):
        shutil.copytree(target, target.parent / name)


STATES = (nothing, whole, between_renames, file_in_the_way, leftovers)


def run(work: Callable[[], None], target: Path) -> str:
    """Have a job do it, undisturbed."""
    return Job(work, target).end()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a pair: how both ended, which generation was there, what lay beside, and what is wrong."""

    first: str
    second: str
    found: int
    beside: tuple[str, ...]
    bad: str


class Pairs:
    """Pairs of jobs in one folder after the other.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.target = folder / "saves" / "ema"
        self.log = folder / "log"

    def prepare(self, state: Callable[[Path], None]) -> None:
        """Make the folder anew."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.target.parent.mkdir()
        state(self.target)

    def events(self, state: Callable[[Path], None], *, loads: bool) -> list[str]:
        """What a job does in the folder."""
        self.prepare(state)
        job = Job(load(self.target, verify=False) if loads else save(self.target, FIRST), self.target, stop_at=0)
        if job.end() != "returned":
            raise RuntimeError(f"undisturbed, from {state.__name__}: {job.log.read_text()}")
        return job.events()

    def interleaved(
        self,
        state: Callable[[Path], None],
        at: int,
        *,
        first: str = "saves",
        second: str = "saves",
        kill: bool = False,
        exclusive: bool = False,
    ) -> Outcome:
        """The first job stops before its event number `at`, the second does its work, the first goes on or dies.

        `exclusive`: what the first is going to replace is fixed by then, so only one of two saves may return.
        """
        self.prepare(state)
        one = Job(self._work(first, FIRST), self.target, stop_at=at)
        stopped = one.wait_for_stop()
        end_of_second = run(self._work(second, SECOND), self.target)
        if stopped and kill:
            one.kill()
        elif stopped:
            one.go_on()
        return self._outcome(state, (first, one.end()), (second, end_of_second), exclusive=exclusive)

    def nested(self, state: Callable[[Path], None], at: int, other_at: int) -> Outcome:
        """Both stop; the first goes on to its end, then the second."""
        self.prepare(state)
        one = Job(save(self.target, FIRST), self.target, stop_at=at)
        one_stopped = one.wait_for_stop()
        two = Job(save(self.target, SECOND), self.target, stop_at=other_at)
        two_stopped = two.wait_for_stop()
        if one_stopped:
            one.go_on()
        end_of_first = one.end()
        if two_stopped:
            two.go_on()
        return self._outcome(state, ("saves", end_of_first), ("saves", two.end()))

    def at_once(self, state: Callable[[Path], None], delays_seconds: tuple[float, float], second: str) -> Outcome:
        """Both run."""
        self.prepare(state)
        one = Job(save(self.target, FIRST), self.target, delay_seconds=delays_seconds[0])
        two = Job(self._work(second, SECOND), self.target, delay_seconds=delays_seconds[1])
        return self._outcome(state, ("saves", one.end()), (second, two.end()))

    def _work(self, kind: str, generation: int) -> Callable[[], None]:
        return save(self.target, generation) if kind == "saves" else load(self.target, verify=False)

    def _outcome(
        self,
        state: Callable[[Path], None],
        first: tuple[str, str],
        second: tuple[str, str],
        *,
        exclusive: bool = False,
    ) -> Outcome:
        had = state is not nothing
        saves = {generation: end for generation, (kind, end) in ((FIRST, first), (SECOND, second)) if kind == "saves"}
        returned = [generation for generation, end in saves.items() if end == "returned"]
        killed = [generation for generation, end in saves.items() if end == "killed"]
        bad = [f"a save {end}" for end in saves.values() if end not in ("returned", "told", "killed")]
        for kind, end in (first, second):
            if kind == "loads" and end not in ("returned", "killed") and (had or end != "nothing there"):
                bad.append(f"a load {end}")
        if saves and not returned and not killed:
            bad.append("none of the saves returned")
        if exclusive and len(returned) > 1:
            bad.append("both saves returned, though one has replaced what it had not seen")
        found = self._generation(bad, added=had, expected=had or bool(returned))
        allowed = {*returned, *killed} | (set() if returned else {OLD, 0} if not had else {OLD})
        if found not in allowed:
            bad.append(f"generation {found} is there, expected one of {sorted(allowed)}")
        left = tuple(beside(self.target))
        if run(save(self.target, LATER), self.target) != "returned":
            bad.append("a later save is refused")
        elif self._generation(bad, added=had, expected=True) != LATER or beside(self.target):
            bad.append(f"a later save leaves {beside(self.target)}")
        if bad:
            bad.append(f"the jobs' errors: {self.log.read_text()[-2000:] if self.log.exists() else 'none'}")
        return Outcome(first[1], second[1], found, left, "; ".join(bad))

    def _generation(self, bad: list[str], *, added: bool, expected: bool) -> int:
        try:
            return generation_of(self.target, added=added)
        except (DistEMAError, ValueError, OSError) as error:
            if expected:
                bad.append(f"{type(error).__name__}: {error}")
            return 0


Row = tuple[str, Iterable[tuple[str, Outcome]]]


def one_inside_the_other(
    pairs: Pairs, state: Callable[[Path], None], step: int = 1, points: Sequence[str] | None = None
) -> Iterator[tuple[str, Outcome]]:
    """Another save, and another load, before each change that a save makes; the first goes on, or is killed."""
    events = pairs.events(state, loads=False)
    staged, published = (1 + events.index(TURNING_POINTS[point]) for point in (1, 4))
    for at in range(1, len(events) + 1, step) if points is None else [1 + events.index(point) for point in points]:
        for second, kill in (("saves", False), ("saves", True), ("loads", False)):
            place = f"{state.__name__}, {events[at - 1]}"
            exclusive = staged < at <= published
            yield place, pairs.interleaved(state, at, second=second, kill=kill, exclusive=exclusive)


def inside_a_load(pairs: Pairs, state: Callable[[Path], None], step: int = 1) -> Iterator[tuple[str, Outcome]]:
    """A save before each file that a load opens."""
    for at in range(1, len(pairs.events(state, loads=True)) + 1, step):
        yield f"{state.__name__}, file {at}", pairs.interleaved(state, at, first="loads")


def both_stop(pairs: Pairs, state: Callable[[Path], None]) -> Iterator[tuple[str, Outcome]]:
    """Both stop before one of their turning points each."""
    events = pairs.events(state, loads=False)
    points = [1 + events.index(point) for point in TURNING_POINTS if point in events]
    for at, other_at in itertools.product(points, points):
        yield f"{state.__name__}, {events[at - 1]} and {events[other_at - 1]}", pairs.nested(state, at, other_at)


def at_random(pairs: Pairs, count: int, rng: random.Random, seconds: float) -> Iterator[tuple[str, Outcome]]:
    """Both begin within a save's time of each other."""
    for number in range(count):
        state, delays = rng.choice(STATES), (rng.random() * seconds, rng.random() * seconds)
        yield f"{state.__name__}, {delays}", pairs.at_once(state, delays, "loads" if number % 5 == 4 else "saves")


def rows(pairs: Pairs, count: int, seed: int) -> Iterator[Row]:
    """All pairs, by row of the table."""
    for state in STATES:
        yield f"one save inside another: {state.__name__}", one_inside_the_other(pairs, state)
    for state in STATES[1:]:
        yield f"a save inside a load: {state.__name__}", inside_a_load(pairs, state)
    for state in STATES:
        yield f"both stop: {state.__name__}", both_stop(pairs, state)
    yield "at random moments", at_random(pairs, count, random.Random(seed), seconds=0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description="Pairs of jobs in one folder; is the average whole?")
    parser.add_argument("--random", type=int, default=50, help="pairs at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="of a local file system"
    )
    options = parser.parse_args()
    num_pairs = num_bad = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        pairs = Pairs(Path(folder))
        print("| pairs | number | both returned | one was told | one was killed | bad |\n|---|---|---|---|---|---|")
        for name, outcomes in rows(pairs, options.random, options.seed):
            found = list(outcomes)
            ends: Counter[str] = Counter()
            for _, outcome in found:
                both = {outcome.first, outcome.second}
                ends["killed" if "killed" in both else "told" if "told" in both else "returned"] += 1
            bad = [f"{place}: {outcome}" for place, outcome in found if outcome.bad]
            print(
                f"| {name} | {len(found)} | {ends['returned']} | {ends['told']} | {ends['killed']} | {len(bad)} |",
                flush=True,
            )
            for each in bad:
                print(f"    {each}", flush=True)
            num_pairs, num_bad = num_pairs + len(found), num_bad + len(bad)
    print(f"{num_pairs} pairs, {num_bad} bad")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
