"""The tensors of another module that is laid out like the model, matched by name and by box. No communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box, Held
from dist_ema.errors import UnsupportedModelError

__all__ = ["matched", "tensors_by_names"]


def tensors_by_names(plan: Plan) -> dict[frozenset[str], str]:
    """All names of a tensor -> its fqn."""
    return {frozenset(names): fqn for fqn, names in plan.names_of_tensors.items()}


def matched(student: Plan, teacher: Plan, student_fqns: Mapping[str, str], what: str) -> Mapping[Box, Held]:
    """Box that this rank holds of the student -> what this rank holds of the teacher there.

    Args:
        student: the plan of the model.
        teacher: the plan of the other module.
        student_fqns: fqn in the teacher -> fqn of the same tensor in the student; other tensors are left out.
        what: the argument that the other module was given as, for messages.

    Raises:
        UnsupportedModelError: this rank holds other pieces of the teacher than of the student.
    """
    by_box = {
        dataclasses.replace(held.box, fqn=student_fqns[held.spec.fqn]): held
        for division in teacher.divisions
        for held in division.held
        if held.spec.fqn in student_fqns
    }
    known = set(student_fqns.values())
    of_student = [held for division in student.divisions if not division.extra_state for held in division.held]
    for held in of_student:
        if held.spec.fqn in known and held.box not in by_box:
            raise UnsupportedModelError(
                f"{held.spec.fqn} of {what} is not laid out as in the model: this rank holds {held.box.sizes} at "
                f"{held.box.offsets} of the model's {list(held.spec.shape)}. Wrap both alike, on the same mesh "
                "(fully_shard both, or keep both whole)"
            )
    # Nothing would ever move what a teacher has on this rank beyond that.
    present = {held.box for held in of_student}
    for division in teacher.divisions:
        for held in division.held if not division.extra_state else ():
            if not held.box.numel or held.spec.fqn not in student_fqns:
                continue
            box = dataclasses.replace(held.box, fqn=student_fqns[held.spec.fqn])
            if box not in present:
                raise UnsupportedModelError(
                    f"{what} has {held.spec.fqn} on this rank ({box.sizes} at {box.offsets} of "
                    f"{list(held.spec.shape)}), "
                    "and the model has not: expected a teacher of what this rank trains, such as a copy of its stage"
                )
    return by_box
