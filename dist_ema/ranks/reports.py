"""What ranks tell one another at an agreement: whether any failed, and whether they are alike. No communication.

A report of many ranks is as short as one of few: counts, and the first ranks.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

from dist_ema.errors import described
from dist_ema.messages import MOST_NAMED

__all__ = ["Report", "failure_text", "merge_reports", "report_of"]

# "failed": how many ranks failed, whether all for the same reason, and (rank, class, text) of the first ones.
# "sums": integers that are added up over the ranks.
# "alike": a digest, the lowest of these ranks, which has it, and the lowest one that has another (None if none has).
Report = dict[str, Any]


def report_of(rank: int, failure: Exception | None, record: str, terms: Sequence[int] = ()) -> Report:
    """The report of one rank.

    Args:
        rank: the rank.
        failure: why its work failed; None if it did not.
        record: what must be alike on all ranks.
        terms: this rank's part of the sums; none if it failed.
    """
    failed = [] if failure is None else [[rank, *described(failure)]]
    alike = [hashlib.sha256(record.encode()).hexdigest(), rank, None]
    return {"failed": len(failed), "same": True, "first": failed, "alike": alike, "sums": list(terms)}


def merge_reports(left: Report, right: Report) -> Report:
    """The report of two parts of the ranks, the lower ones in `left`."""
    first = [*left["first"], *right["first"]]
    digest, lowest, other = left["alike"]
    if other is None:
        other = right["alike"][2] if right["alike"][0] == digest else right["alike"][1]
    return {
        "failed": left["failed"] + right["failed"],
        "same": left["same"] and right["same"] and all(reason[1:] == first[0][1:] for reason in first),
        "first": first[:MOST_NAMED],
        "alike": [digest, lowest, other],
        "sums": list(map(operator.add, left["sums"], right["sums"])),  # those of a failed agreement do not count
    }


def failure_text(action: str, report: Report, world_size: int) -> str:
    """The message that all ranks raise. It names the first failed ranks, unless all have failed for the same reason."""
    count, first = report["failed"], report["first"]
    if count == world_size and report["same"]:
        return str(first[0][2])
    reasons = "; ".join(f"rank {rank}: {reason}" for rank, _, reason in first)
    more = f"; and {count - len(first)} more" if count > len(first) else ""
    return f"{action} failed on {count} of {world_size} ranks: {reasons}{more}"
