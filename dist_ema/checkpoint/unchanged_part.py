"""What a save or an export writes of a model that may have changed since its average was built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dist_ema.boxes.plan import Plan
from dist_ema.ranks.exchange import Exchange

__all__ = ["Part"]

_MOST_TOLD = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """The tensors to write.

    Attributes:
        plan: of these tensors; not for asking who owns them (`Plan.only`).
        left_out: fqns of the planned tensors that are not as they were.
        others: fqns of what the model has now instead.
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
            left_out = tuple(spec.fqn for spec in plan.specs if spec.fqn not in remains.names)
            return Part(plan.only(remains), left_out, remains.others)
        plan.verify()
        return Part(plan)

    @property
    def has_changed(self) -> bool:
        """Whether the model is another than the planned one."""
        return bool(self.left_out or self.others)

    def texts(self, whole: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
        """The small files of the whole model, if it is whole: a config.json would have the rest made at random."""
        return {} if self.has_changed else whole()

    def warn(self, exchange: Exchange) -> None:
        """Collective: every rank must call it. Name on rank 0 what is not written."""
        changes = []
        if self.left_out:
            whole = len(self.left_out) + len(self.plan.specs)
            changes.append(f"{_told(self.left_out)} ({len(self.left_out)} of {whole} tensors) are not as they were")
        added = tuple(fqn for fqn in self.others if fqn not in self.left_out)
        if added:
            changes.append(f"{_told(added)} are new")
        if changes:
            new = f", new=[{_told(self.others, quoted=True)}]" if self.others else ""
            exchange.warn(
                f"the model has changed since the average was built: {', '.join(changes)}; they are left out, the "
                f"others are written. A new ShardedEMA of the changed model goes on from such a save by load(path{new})"
            )


def _told(names: tuple[str, ...], *, quoted: bool = False) -> str:
    shown = [repr(name) if quoted else name for name in names[:_MOST_TOLD]]
    return ", ".join(shown + ["..."] * (len(names) > _MOST_TOLD))
