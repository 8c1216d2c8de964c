"""A teacher: an average kept in another module's tensors, so that it can run forward at every step.

Each rank averages what it holds of the student into what it holds of the teacher, so nothing is sent:

    FSDP2    student  [ shard of rank 0 ] [ shard of rank 1 ]        DDP    student  [ whole ]   [ whole ]
                             v                   v                              v           v
             teacher  [ shard of rank 0 ] [ shard of rank 1 ]               teacher  [ whole ]   [ whole ]

A teacher of a coarser dtype (bfloat16) would lose the motion of an average. Each rank then keeps an fp32 average of all
that it holds of the teacher, and rounds it into the teacher whenever it has moved.

The owners of the student's boxes write the files, as for any average. After a load the owners send their boxes to the
ranks that hold these alike. What is not averaged (buffers, excluded tensors) is copied from the student at each update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch

from dist_ema.averaging.averages import Averages, copy_pairwise
from dist_ema.boxes.counterparts import matched, tensors_by_names
from dist_ema.boxes.plan import Plan, Remains
from dist_ema.boxes.shards import Box, Held, Shard
from dist_ema.errors import ConfigError, UnsupportedModelError
from dist_ema.live.spreading import spread

__all__ = ["Teacher", "TeacherAverages", "copy_pairs"]


class Teacher:
    """A module that is laid out like the student, tensor by tensor. Of its methods only `gather` communicates.

    Attributes:
        plan: the student's plan, whose `drop_gathered` and `check_model` are also for the teacher.
        whole_shards: shards of all that this rank holds of the averaged tensors, also of what others hold alike.
        shown: the plan of the teacher's tensors that are not averaged.
        is_rounded: whether the teacher has the averages in a coarser dtype than they are kept in.
        repeated: the names of the tensors of which an earlier rank holds the same piece.

    Args:
        student: the plan of the student.
        teacher: the plan of the teacher.
        dtype: the dtype of the averages.

    Raises:
        UnsupportedModelError: names, shapes or layouts differ.
        ConfigError: the teacher has another dtype, or shares memory with the student.
    """

    def __init__(self, student: Plan, teacher: Plan, dtype: torch.dtype) -> None:
        _check_names(student, teacher)
        names_of_student = tensors_by_names(student)
        # Fqn in the teacher -> fqn of the same tensor in the student.
        student_fqns = {fqn: names_of_student[names] for names, fqn in tensors_by_names(teacher).items()}
        self._counterparts = matched(student, teacher, student_fqns, "into")
        self._drop_gathered = teacher.drop_gathered

        def drop_gathered() -> None:
            student.drop_gathered()
            teacher.drop_gathered()

        def check_model() -> None:
            student.check_model()
            teacher.check_model()

        def remains() -> Remains:
            left = student.remains()
            kept = {student_fqns[fqn] for fqn in teacher.remains().names if fqn in student_fqns}
            gone = set(student_fqns.values()) - kept
            names = {fqn: names for fqn, names in left.names.items() if fqn not in gone}
            return Remains(names=names, others=(*left.others, *(fqn for fqn in left.names if fqn in gone)))

        self.plan = dataclasses.replace(student, drop_gathered=drop_gathered, check_model=check_model, remains=remains)
        self.whole_shards = tuple(
            Shard(held, held.box) for division in student.divisions if division.averaged for held in division.held
        )
        self.repeated = {
            held.spec.fqn for division in student.divisions if division.position > 0 for held in division.held
        }
        self.shown = _part(self.plan, set(student_fqns.values()))
        for shard in self.whole_shards:
            _check_pair(shard.held, self._counterparts[shard.held.box], dtype)
        self.is_rounded = any(self.counterpart(shard).spec.dtype != dtype for shard in self.whole_shards)
        self._kept: Mapping[Box, torch.Tensor] = {}

    def values_of(self, shard: Shard) -> torch.Tensor:
        """The averaged values of a shard of the student, sharing memory with the teacher, or with what is kept."""
        return shard.within(self._averaged(shard.held.box))

    def _averaged(self, box: Box) -> torch.Tensor:
        return self._kept[box] if self.is_rounded else self._counterparts[box].values()

    def keep(self, values: Sequence[torch.Tensor]) -> None:
        """Keep the averages in these tensors, one for each of `whole_shards`; the teacher has them rounded."""
        self._kept = {shard.box: value for shard, value in zip(self.whole_shards, values, strict=True)}

    @torch.no_grad()
    def show_averaged(self) -> None:
        """Round the averages that are kept into the teacher."""
        boxes = list(self._kept)
        copy_pairwise([self._counterparts[box].values() for box in boxes], [self._kept[box] for box in boxes])

    def counterpart(self, shard: Shard) -> Held:
        """What the teacher holds for the tensor of the student in which the shard lies."""
        return self._counterparts[shard.held.box]

    def drop_gathered(self) -> None:
        """Drop gathered copies of the teacher, so that its next forward uses the new averages."""
        self._drop_gathered()

    def gather(
        self, averaged: Sequence[torch.Tensor], shown: Sequence[torch.Tensor] | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Collective along replicas only. What this rank's teacher is to hold, from the values that the owners have.

        The teacher itself does not change here: what other ranks send comes into new memory.

        Args:
            averaged: the values of the student's `plan.owned(averaged=True)`.
            shown: the values of `shown.owned(averaged=False)`; None for the live ones.

        Returns:
            Pairs of a tensor of the teacher and the values that are to be copied to it.
        """
        self.drop_gathered()
        pairs = self._spread(self.plan, averaged, averaged=True)
        return pairs + (self._shown() if shown is None else self._spread(self.shown, shown, averaged=False))

    @torch.no_grad()
    def _spread(
        self, plan: Plan, values: Sequence[torch.Tensor], *, averaged: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = plan.owned(averaged=averaged)
        divisions = [division for division in plan.divisions if division.averaged == averaged]
        if all(len(division.ranks) == 1 for division in divisions):
            where = self.values_of if averaged else self._shown_of
            return [(where(shard), value) for shard, value in zip(own, values, strict=True)]
        boxes = [held.box for division in divisions for held in division.held]
        targets = {box: self._averaged(box) if averaged else self._counterparts[box].values() for box in boxes}
        arrived = {box: torch.empty_like(target) for box, target in targets.items()}
        spread(plan, values, lambda shard: shard.within(arrived[shard.held.box]), averaged=averaged)
        return [(target, arrived[box]) for box, target in targets.items()]

    def _shown_of(self, shard: Shard) -> torch.Tensor:
        return shard.within(self.counterpart(shard).values())

    def show_live(self) -> None:
        """Copy the tensors that are not averaged from the student."""
        copy_pairs(self._shown())

    def _shown(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (self._counterparts[held.box].values(), held.values())
            for division in self.shown.divisions
            for held in division.held
        ]


@torch.no_grad()
def copy_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy to the first tensor of each pair the values of the second. No communication."""
    copy_pairwise([target for target, _ in pairs], [source for _, source in pairs])


class TeacherAverages(Averages):
    """Averaged values that lie in the tensors of a teacher."""

    def __init__(self, shards: Sequence[Shard], teacher: Teacher) -> None:
        self._shards = tuple(shards)
        self._teacher = teacher
        self._residuals = ()

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """One tensor per shard, taken anew at each use: a wrapper may have replaced the memory behind it."""
        return tuple(self._teacher.values_of(shard) for shard in self._shards)

    def held_by_teacher(self) -> Sequence[Held]:
        """The tensors of the teacher that `values` lie in."""
        return [self._teacher.counterpart(shard) for shard in self._shards]


def _part(plan: Plan, names: Collection[str]) -> Plan:
    """The tensors of these names that are not averaged. A teacher has extra state of its own, which is left out."""
    made = {held.spec.fqn for division in plan.divisions if division.extra_state for held in division.held}
    return dataclasses.replace(
        plan,
        specs=tuple(spec for spec in plan.specs if spec.fqn in names and not spec.averaged and spec.fqn not in made),
        divisions=tuple(
            dataclasses.replace(division, held=tuple(held for held in division.held if held.spec.fqn in names))
            for division in plan.divisions
            if not division.averaged and not division.extra_state
        ),
    )


def _check_names(student: Plan, teacher: Plan) -> None:
    of_student, of_teacher = tensors_by_names(student), tensors_by_names(teacher).keys()
    averaged = {spec.fqn for spec in student.specs if spec.averaged}
    missing = sorted(sorted(names) for names, fqn in of_student.items() if fqn in averaged and names not in of_teacher)
    extra = sorted(map(sorted, of_teacher - of_student.keys()))
    if missing or extra:
        raise UnsupportedModelError(
            f"into lacks {len(missing)} averaged tensors of the model {missing[:3]} and has {len(extra)} that it has "
            f"not {extra[:3]}, expected a module with the same names, tied alike: exclude= what a teacher need not have"
        )


def _check_pair(student: Held, teacher: Held, dtype: torch.dtype) -> None:
    fqn = student.spec.fqn
    if teacher.spec.dtype != dtype and not _is_coarser(teacher.spec.dtype, dtype):
        raise ConfigError(
            f"{fqn} of into is {teacher.spec.dtype}, expected the averaged dtype {dtype}, or a coarser one beside "
            f"which the average is kept: convert the teacher (teacher.to({dtype})), or give dtype={teacher.spec.dtype}"
        )
    live, averaged = student.values(), teacher.values()
    if live.numel() and live.data_ptr() == averaged.data_ptr():
        raise ConfigError(f"{fqn} of into is the model's own tensor, expected another one: copy.deepcopy it first")


def _is_coarser(dtype: torch.dtype, averaged: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.finfo(dtype).eps > torch.finfo(averaged).eps
