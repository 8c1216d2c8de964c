"""What a run writes down: ``loss.csv``, one row for each evaluation, and the table printed at the end."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluation. Losses are in nats per byte; ``train`` is the mean since the evaluation before."""

    step: int
    train: float
    live: float
    averaged: float
    momentum: float  # of the latest update


COLUMNS = [field.name for field in fields(Row)]


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Row(step=int(line.pop("step")), **{name: float(value) for name, value in line.items()}) for line in lines]


def start_journal(path: Path, *, from_step: int) -> None:
    """Make the file, or on resume drop the rows of steps that are about to be taken again."""
    kept = [row for row in read_rows(path) if row.step <= from_step] if from_step and path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in kept)


def add_row(path: Path, row: Row) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(asdict(row))


def table(rows: list[Row]) -> str:
    lines = ["  step   train loss   validation loss             momentum", " " * 22 + "live     averaged"]
    for row in rows:
        lines.append(
            f"{row.step:6d}   {row.train:10.4f}   {row.live:8.4f}   {row.averaged:8.4f}   {row.momentum:10.5f}"
        )
    return "\n".join(lines)
