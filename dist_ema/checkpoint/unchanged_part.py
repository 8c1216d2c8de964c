"""What a save or an export writes of a model that may have changed since its average was built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dist_ema.boxes.plan import Plan
from dist_ema.ranks.exchange import Exchange

__all__ = ["Part"]

_MOST_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """The tensors to write.

    Attributes:
        plan: the plan of these tensors; it does not show who owns them (`Plan.only`).
        left_out: fqns of the planned tensors that have changed or are gone.
        others: fqns of the tensors that the model has now instead.
    """

    plan: Plan
    left_out: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @staticmethod
    def of(plan: Plan, *, only_unchanged: bool) -> Part:
        """The whole plan, or what remains of it. No communication.

        Raises:
            ModelChangedError: the model has changed, and `only_unchanged` is False or nothing remains.
        """
        if only_unchanged:
            remains = plan.remains()
            return Part(plan.only(remains), plan.gone(remains), remains.others)
        plan.check_model()
        return Part(plan)

    @property
    def has_changed(self) -> bool:
        """Whether the model differs from the planned one."""
        return bool(self.left_out or self.others)

    def texts(self, whole: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
        """The small files of a whole model; of a part none, as a reader of a config.json makes the rest at random."""
        return {} if self.has_changed else whole()

    def warn(self, exchange: Exchange) -> None:
        """Collective: every rank must call it. Warn on rank 0 of the tensors that are not written."""
        changes = []
        if self.left_out:
            whole = len(self.left_out) + len(self.plan.specs)
            changes.append(f"{_listed(self.left_out)} ({len(self.left_out)} of {whole} tensors) are not as they were")
        added = tuple(fqn for fqn in self.others if fqn not in self.left_out)
        if added:
            changes.append(f"{_listed(added)} are new")
        if changes:
            new = f", new=[{_listed(self.others, quoted=True)}]" if self.others else ""
            exchange.warn(
                f"the model has changed since the average was built: {', '.join(changes)}; they are left out, the "
                f"others are written. A new ShardedEMA of the changed model goes on from such a save by load(path{new})"
            )


def _listed(names: tuple[str, ...], *, quoted: bool = False) -> str:
    shown = [repr(name) if quoted else name for name in names[:_MOST_LISTED]]
    return ", ".join(shown + ["..."] * (len(names) > _MOST_LISTED))
