"""Whether ranks that declare experts of their own have copies of the same ones: a group that is too large.

Without the right group a copy becomes experts of its own in the files. Equal values give it away. They are no proof,
since experts of different ranks may start alike; so this is a warning.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_ema.boxes import alike
from dist_ema.boxes.plan import Plan
from dist_ema.disk.formats.tensor_checksums import tensor_checksums
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.holders import ranks_by_digest

__all__ = ["warn_of_expert_copies"]


def warn_of_expert_copies(exchange: Exchange, action: str, plan: Plan, is_declared: Callable[[str], bool]) -> None:
    """Collective: every rank must call it. Warns once, of the first ranks whose declared tensors have equal values.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for the message.
        plan: the model as boxes.
        is_declared: whether a name, as the files have it, is that of a declared tensor.
    """

    def digest() -> tuple[str, set[int]]:
        held = [
            (held, division)
            for division in plan.divisions
            for held in division.held
            if held.box.numel and is_declared(held.spec.fqn)
        ]
        values = tensor_checksums([held.values() for held, _ in held])
        return alike.digest(values)[:32] if values else "", {rank for _, of in held for rank in of.ranks}

    own, holders = exchange.agree(action, digest)
    ranks = ranks_by_digest(exchange, action, [own] if own else [])
    copies = [rank for of_digest in ranks for rank in of_digest if rank not in holders]
    pair = exchange.reduce(action, [exchange.rank, copies[0]] if copies else [], lambda lower, higher: lower or higher)
    if pair:
        exchange.warn(
            f"ranks {pair[0]} and {pair[1]} have the same values in all tensors that experts= declares, at different "
            "places of the whole tensors. If they hold copies of the same experts, the files would have these twice: "
            "give Experts the group of the ranks that hold different experts, such as mesh['ep'].get_group(). If "
            "different experts only start alike, this is no mistake"
        )
