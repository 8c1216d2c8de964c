"""What several averages of one model cost together, against as many separate ones.

    python launch/bench/tracks.py --tracks 3

A separate update of fp32 moves 12 bytes a parameter: it reads the live and the averaged value, and writes the latter.
Three tracks that read the live value once move (1 + 2 * 3) / (3 * 3) = 0.78 of the bytes of three separate updates.
"""

from __future__ import annotations

from measuring import Report, benchmark_parser, measure, milliseconds, ratio
from models import add_cases, cases

from dist_ema import ConstantSchedule, ShardedEMA


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratio of several tracks to as many separate averages.", rounds=None)
    add_cases(parser)
    parser.add_argument("--tracks", type=int, default=3)
    options = parser.parse_args(arguments)
    report = Report("tracks", options)
    schedules = {f"track{index}": ConstantSchedule(momentum=0.001 * (index + 1)) for index in range(options.tracks)}
    rows = []
    for case in cases(options):
        model = case.build()
        together = ShardedEMA(model, schedules)
        separate = [ShardedEMA(model, schedule) for schedule in schedules.values()]
        for ema in (together, *separate):
            ema.update()

        def update_separate(separate: list[ShardedEMA] = separate) -> None:
            for ema in separate:
                ema.update()

        seconds = measure({"separate": update_separate, "together": together.update}, case.rounds, case.device)
        rows.append(
            {
                "case": str(case),
                "separate, ms": milliseconds(seconds["separate"]),
                "together, ms": milliseconds(seconds["together"]),
                "ratio": ratio(seconds["together"], seconds["separate"]),
                "bytes allow": (1 + 2 * options.tracks) / (3 * options.tracks),
            }
        )
    report.add(f"{options.tracks} tracks", rows)


if __name__ == "__main__":
    main()
