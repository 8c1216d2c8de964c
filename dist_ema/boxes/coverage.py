"""Whether the boxes of all ranks cover every tensor once: no overlap, no hole. No communication.

Counts of elements would not show it: two overlapping boxes may leave a hole of their size. So a box has a fingerprint,

    h(box) = product over the dims d of  r_d^offset + r_d^(offset + 1) + ... + r_d^(offset + size - 1)    mod 2^61 - 1

which is the sum of `r_0^i * r_1^j * ...` over its elements (i, j, ...), with a random r_d for every dim of a tensor.
The boxes must not depend on the r_d. Then the fingerprints of boxes that tile a tensor add up to that of the
whole, and those of other boxes do so with a probability of at most sum(sizes) / 2^61, as two different polynomials
agree at few points (Schwartz 1980, Zippel 1979).

The fingerprints of all tensors, each times a random weight, add up to one number: it shows whether all tensors are
covered. So do those of a class of tensors, which are alike but for their names, for the tensors of that class: a large
model has thousands of tensors, and a dozen classes. The numbers of each tensor then show which one is not covered.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from dist_ema.boxes.shards import Box, TensorSpec
from dist_ema.errors import UnsupportedModelError

__all__ = ["Coverage"]

_PRIME = 2**61 - 1
# Integers that a rank contributes for a tensor: elements, and the fingerprint.
_NUM_INTEGERS = 2
# Where tensors are of more classes, several classes are one.
_MOST_CLASSES = 64


class Coverage:
    """The fingerprints of a model's tensors.

    Args:
        specs: every tensor; the same on every rank.
        seed: random; the same on every rank.
    """

    def __init__(self, specs: Sequence[TensorSpec], seed: int) -> None:
        draw = random.Random(seed)
        self._specs = specs
        self._points = {spec.fqn: [draw.randrange(2, _PRIME) for _ in spec.shape] for spec in specs}
        self._weights = {spec.fqn: draw.randrange(1, _PRIME) for spec in specs}
        classes: dict[tuple[object, ...], int] = {}
        alike = ((spec.fqn, (spec.shape, spec.dtype, spec.averaged, spec.is_buffer)) for spec in specs)
        self._class_of = {fqn: classes.setdefault(key, len(classes)) % _MOST_CLASSES for fqn, key in alike}

    def fingerprint(self, owned: Iterable[Box]) -> int:
        """The integer that a rank that owns these boxes contributes to the sum over all ranks."""
        return sum(self._weights[box.fqn] * self._fingerprint(box) for box in owned) % _PRIME

    def is_whole(self, fingerprint: int) -> bool:
        """Whether this sum over all ranks is that of ranks that cover every tensor once."""
        return (fingerprint - self.fingerprint(map(_whole, self._specs))) % _PRIME == 0

    def by_class(self, owned: Iterable[Box]) -> list[int]:
        """The integers, one for each class, that a rank that owns these boxes contributes to the sums."""
        prints = [0] * (1 + max(self._class_of.values(), default=0))
        for box in owned:
            prints[self._class_of[box.fqn]] += self._weights[box.fqn] * self._fingerprint(box)
        return [total % _PRIME for total in prints]

    def not_covered(self, sums: Sequence[int]) -> list[str]:
        """The tensors of the classes in which some element has no owner, or several.

        Args:
            sums: the sums of all ranks' integers by class.
        """
        whole = self.by_class(map(_whole, self._specs))
        wrong = {number for number, total in enumerate(sums) if (total - whole[number]) % _PRIME}
        return [fqn for fqn, number in self._class_of.items() if number in wrong]

    def contribution(self, owned: Iterable[Box], names: Collection[str]) -> list[int]:
        """The integers, for each of these tensors, that a rank that owns these boxes contributes to the sums."""
        numels = dict.fromkeys(names, 0)
        prints = dict(numels)
        for box in owned:
            if box.fqn in numels:
                numels[box.fqn] += box.numel
                prints[box.fqn] += self._fingerprint(box)
        return [integer for fqn in numels for integer in (numels[fqn], prints[fqn] % _PRIME)]

    def check(self, sums: Sequence[int], names: Sequence[str]) -> None:
        """Refuse ownership that leaves elements out or has them twice; this package then misread a wrapper.

        Args:
            sums: the sums of the contributions of all ranks.
            names: the tensors of which they are.

        Raises:
            UnsupportedModelError: it names the first tensor that is not covered once.
        """
        specs = {spec.fqn: spec for spec in self._specs}
        for fqn, numel, total in zip(names, sums[::_NUM_INTEGERS], sums[1::_NUM_INTEGERS], strict=True):
            spec = specs[fqn]
            if numel == spec.numel and (total - self._fingerprint(_whole(spec))) % _PRIME == 0:
                continue
            defect = "of which the ranks own some twice and others not at all"
            if numel != spec.numel:
                defect = f"but the ranks own {numel} of them together"
            raise UnsupportedModelError(
                f"{spec.fqn} has {spec.numel} elements, {defect}: its layout is not understood. Either ranks hold "
                "overlapping parts of it (a rank outside a device mesh may have a copy of its own), or a part lies on "
                "no rank. Lay it out with fully_shard or distribute_tensor, on a mesh whose ranks all build the average"
            )

    def _fingerprint(self, box: Box) -> int:
        product = 1
        for point, offset, size in zip(self._points[box.fqn], box.offsets, box.sizes, strict=True):
            series = (pow(point, size, _PRIME) - 1) * pow(point - 1, -1, _PRIME)  # the sum of a geometric series
            product = product * pow(point, offset, _PRIME) * series % _PRIME
        return product


def _whole(spec: TensorSpec) -> Box:
    return Box(spec.fqn, (0,) * len(spec.shape), spec.shape)
