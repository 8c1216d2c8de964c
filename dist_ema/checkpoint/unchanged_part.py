"""What a save or an export writes of a model that may have changed since its average was built."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from dist_ema.boxes.plan import Plan
from dist_ema.errors import RankMismatchError
from dist_ema.ranks.exchange import Exchange

__all__ = ["Changes", "Part"]

_MOST_LISTED = 8


class Changes(NamedTuple):
    """What has changed in a model, as JSON. Ranks have other tensors, so each of them sees a part of it.

    Attributes:
        lost: fqn -> the names of that tensor that are not as they were.
        others: fqns of the tensors that the model has now instead.
    """

    lost: dict[str, list[str]]
    others: list[str]

    @staticmethod
    def merged(lower: list[Any], higher: list[Any]) -> list[Any]:
        """The changes of some ranks and of ranks after them, for `Exchange.reduce`. Associative."""
        (lost, others), (further, others_there) = lower, higher
        return [{**further, **lost}, list(dict.fromkeys([*others, *others_there]))]


_NOTHING = Changes({}, [])


@dataclasses.dataclass(frozen=True)
class Part:
    """The tensors to write.

    Attributes:
        plan: the plan of these tensors; it does not show who owns them (`Plan.only`).
        is_whole: whether these are all tensors of the planned model.
        left_out: fqns of the planned tensors that have changed or are gone.
        others: fqns of the tensors that the model has now instead.
        own: the changes of this rank.
    """

    plan: Plan
    is_whole: bool
    left_out: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    own: Changes = _NOTHING

    @staticmethod
    def of(plan: Plan, in_files: Plan, *, only_unchanged: bool, of_all: Changes | None = None) -> Part:
        """The whole plan, or what remains of it. No communication.

        Args:
            plan: the plan.
            in_files: the part of the plan that files hold.
            only_unchanged: whether the model may have changed.
            of_all: the changes of all ranks; None for those of this rank alone.

        Raises:
            ModelChangedError: the model has changed, and `only_unchanged` is False or nothing remains.
            RankMismatchError: a tensor has changed on some of the ranks that hold it.
        """
        is_whole = in_files is plan or (len(in_files.specs) == len(plan.specs) and not plan.left_out)
        if not only_unchanged:
            plan.check_model()
            return Part(in_files, is_whole)
        present = plan.remains()
        own = Changes(plan.lost(present), list(present.others))
        changes = own if of_all is None else Changes(*of_all)
        held = {held.spec.fqn for division in plan.divisions for held in division.held}
        for fqn, names in changes.lost.items():
            if fqn in held and names != own.lost.get(fqn):
                raise RankMismatchError(
                    f"{fqn} has changed on some of the ranks that hold it, and not, or otherwise, on others: expected "
                    "the same change on all of them"
                )
        remains = plan.without(*changes)
        # A tensor that files do not hold is not missing there, whatever has become of it.
        absent = {*plan.names}.difference(in_files.names_in_plan)
        others = tuple(fqn for fqn in remains.others if fqn not in absent)
        left_out = in_files.gone(remains)
        return Part(in_files.only(remains), is_whole and not (left_out or others), left_out, others, own)

    @property
    def has_changed(self) -> bool:
        """Whether the model differs from the planned one."""
        return bool(self.left_out or self.others)

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
