"""The cells of the tables that benchmarks print: numbers, and the spread of a number over rounds. Without torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of the values of all rounds."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        last = len(ordered) - 1
        return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])

    def __str__(self) -> str:
        digits = 2 if abs(self.median) >= 0.1 else 3
        return f"{self.median:.{digits}f} ({self.p10:.{digits}f} to {self.p90:.{digits}f})"


Cell = float | str | Spread | None


def shown(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:#.3g}"
    return "" if cell is None else str(cell)


def markdown(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """The lines of a table, with the columns of all rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*lines, *(f"| {' | '.join(shown(row.get(column)) for column in columns)} |" for row in rows)]
