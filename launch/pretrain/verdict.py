"""Whether a run kept its two promises; exit status 1 if not.

    python launch/pretrain/verdict.py runs/demo/loss.csv runs/demo/export.json

1. At the last evaluation the averaged weights are better than the live ones.
2. A fresh process that read the averaged weights from disk saw the loss that the trainer saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from journal import read_rows

TOLERANCE = 1e-4  # nats per byte


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: verdict.py LOSS.CSV EXPORT.JSON")
    final = read_rows(Path(sys.argv[1]))[-1]
    export = json.loads(Path(sys.argv[2]).read_text())
    difference = abs(export["loss"] - final.averaged)
    print(f"fresh process: loss {export['loss']:.6f}, {difference:.1e} from the trainer's averaged loss")
    # "not a < b" instead of "a >= b": a loss that is not a number must fail too.
    if not final.averaged < final.live:
        raise SystemExit(f"FAILED: averaged loss {final.averaged:.4f} is not below live {final.live:.4f}")
    if not difference <= TOLERANCE:
        raise SystemExit(f"FAILED: the weights on disk give a loss that is off by {difference:.1e}")
    print(
        f"averaged weights: {export['weights']}  "
        f"final validation loss: live {final.live:.4f}, averaged {final.averaged:.4f}"
    )


if __name__ == "__main__":
    main()
