"""What `launch/gpu.sh` runs: the tests that need a GPU, and every benchmark that has a figure to give there.

A part is one process. The most important parts come first: those that no time is left for are not run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

__all__ = ["JSON", "Part", "parts"]

# Stands for the file that a part shall write.
JSON = "{json}"

_BILLION = ("--width", "2048", "--depth", "20", "--heads", "16", "--context", "512", "--batch-size", "16")
_SMALL_STEP = ("--width", "16", "--depth", "1", "--heads", "2", "--context", "8", "--batch-size", "2", "--steps", "1")


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: a word for the table.
        shows: what it tells, for the table.
        command: the arguments of the Python interpreter.
        limit_seconds: after so long it is ended.
        is_on_ranks: whether it is to be the only rank of a process group.
        is_at_fault: whether it fails on purpose, to show that the other parts are run nevertheless.
    """

    name: str
    shows: str
    command: tuple[str, ...]
    limit_seconds: float
    is_on_ranks: bool = False
    is_at_fault: bool = False

    @property
    def is_of_tests(self) -> bool:
        """Whether it writes a JUnit record, and not the JSON of a benchmark."""
        return "pytest" in self.command


def parts(device: str, *, small: bool) -> list[Part]:
    """All parts.

    Args:
        device: "cuda" or "cpu".
        small: whether sizes only show that a part runs; then there are also two parts that fail on purpose.
    """

    def bench(file: str, *options: str) -> tuple[str, ...]:
        return (f"launch/bench/{file}.py", *options, "--device", device, "--json", JSON)

    def cases(*models: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> tuple[str, ...]:
        chosen = ("small", "--rounds", "1") if small else models
        return ("--models", *chosen, "--dtypes", *dtypes)

    def step(*options: str) -> tuple[str, ...]:
        sizes = _SMALL_STEP if small else (*_BILLION, "--mixed-precision", "bf16", "--steps", "10")
        return bench("step", *options, *sizes, "--rounds", "1" if small else "4", "--repeats", "1")

    def files(rounds: int) -> tuple[str, ...]:
        return ("--model", "small", "--rounds", "1") if small else ("--model", "gpt2", "--rounds", str(rounds))

    tests = ("-m", "pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider", "-W", "default", "--junitxml", JSON)
    offline = ("--elements", "8000", "--rounds", "1") if small else ("--rounds", "2")
    found = [
        Part("tests", "tests/test_gpu.py", tests, 100),
        Part("update", "an update, to a copy and to torch's _foreach", bench("update", *cases("gpt2-xl", "tiny")), 75),
        Part("peers", "an update, to those of other libraries", bench("peers", *cases("gpt2", "resnet50")), 75),
        Part("variants", "options, host time, waits of the host", bench("variants", *cases("gpt2", "tiny")), 60),
        Part("step", "a step of 1e9 parameters, with and without an update", step(), 70),
        Part("overlap", "the same, with overlap=True", step("--overlap"), 70),
        Part("offload", "averages in host memory, overlap=True", step("--overlap", "--offload", "--threads", "8"), 90),
        Part("files", "save and load on local disk", bench("checkpoint", *files(3)), 75, is_on_ranks=True),
        Part("export", "consolidate, to gathering on rank 0", bench("export", *files(3)), 60, is_on_ranks=True),
        Part("offline", "consolidate_checkpoint, to a copy", bench("export", *offline), 60),
        Part("tracks", "three tracks, to three averages", bench("tracks", *cases("gpt2", dtypes=("float32",))), 30),
    ]
    if small:
        fails, hangs = "raise RuntimeError('fails on purpose')", "import time; time.sleep(600)"
        at_fault = [
            Part("fails", "fails on purpose", ("-c", fails), 60, is_at_fault=True),
            Part("hangs", "hangs on purpose", ("-c", hangs), 2, is_at_fault=True),
        ]
        # Sizes are small, but the machine may be busy.
        found = [*at_fault, *(dataclasses.replace(part, limit_seconds=300) for part in found)]
    return found
