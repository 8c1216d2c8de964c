"""Draw a run's ``loss.csv``: validation loss of live and averaged weights, and the momentum below it.

$ python launch/pretrain/curves.py runs/demo/loss.csv runs/demo/curves.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from journal import Row, read_rows
from matplotlib.ticker import MaxNLocator

LIVE, AVERAGED, MUTED = "#b0622f", "#1f5fa8", "#666666"


def draw(rows: list[Row], path: Path) -> None:
    steps = [row.step for row in rows]
    figure, (loss, momentum) = plt.subplots(
        2, 1, figsize=(7.5, 6), sharex=True, height_ratios=(3, 1.2), layout="constrained"
    )
    for name, color in (("live", LIVE), ("averaged", AVERAGED)):
        values = [getattr(row, name) for row in rows]
        loss.plot(steps, values, color=color, marker="o", markersize=3.5, label=f"{name} {values[-1]:.3f}")
    loss.set_ylabel("validation loss (nats per byte)")
    loss.set_title("Byte-level language model: live and averaged weights", fontsize=11)
    loss.legend(frameon=False, title="weights, final loss", alignment="left")

    momentum.plot(steps, [row.momentum for row in rows], color=MUTED, marker="o", markersize=3.5)
    momentum.set_ylabel("momentum")
    momentum.set_title("weight of the new value in the average", fontsize=9, color=MUTED, loc="right")
    momentum.set_xlabel("optimizer step")
    momentum.set_ylim(bottom=0)
    momentum.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, momentum):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: curves.py LOSS.CSV OUT.PNG")
    draw(read_rows(Path(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
