"""Whether the boxes of all ranks cover every tensor once: no overlap, no hole. No communication.

Counts of elements would not show it: two overlapping boxes may leave a hole of their size. So a box has a fingerprint,

    h(box) = product over the dims d of  r_d^offset + r_d^(offset + 1) + ... + r_d^(offset + size - 1)    mod 2^61 - 1

which is the sum of `r_0^i * r_1^j * ...` over its elements (i, j, ...), with a random r_d for every dim of a tensor.
The boxes must not depend on the r_d. Then the fingerprints of boxes that tile a tensor add up to that of the
whole, and those of other boxes do so with a probability of at most sum(sizes) / 2^61, as two different polynomials
agree at few points (Schwartz 1980, Zippel 1979).

The fingerprints of all tensors, each times a random weight, add up to one number: it shows whether all tensors are
covered. The numbers of each tensor then show which one is not.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from dist_ema.boxes.shards import Box, TensorSpec
from dist_ema.errors import UnsupportedModelError

__all__ = ["Coverage"]

_PRIME = 2**61 - 1
_HALF = 2**32
# Integers that a rank contributes for a tensor: elements, and the two halves of the fingerprint, so that no sum over
# the ranks leaves 64 bits.
_NUM_INTEGERS = 3


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

    def fingerprint(self, owned: Iterable[Box]) -> int:
        """The integer that a rank that owns these boxes contributes to the sum over all ranks."""
        return sum(self._weights[box.fqn] * self._fingerprint(box) for box in owned) % _PRIME

    def is_whole(self, fingerprint: int) -> bool:
        """Whether this sum over all ranks is that of ranks that cover every tensor once."""
        return (fingerprint - self.fingerprint(map(_whole, self._specs))) % _PRIME == 0

    def contribution(self, owned: Iterable[Box]) -> list[int]:
        """The integers that a rank that owns these boxes contributes to the sum over all ranks."""
        numels = {spec.fqn: 0 for spec in self._specs}
        prints = dict(numels)
        for box in owned:
            numels[box.fqn] += box.numel
            prints[box.fqn] += self._fingerprint(box)
        integers = []
        for fqn, numel in numels.items():
            high, low = divmod(prints[fqn] % _PRIME, _HALF)
            integers += [numel, low, high]
        return integers

    def check(self, sums: Sequence[int]) -> None:
        """Refuse ownership that leaves elements out or has them twice; this package then misread a wrapper.

        Args:
            sums: the sums of the contributions of all ranks.

        Raises:
            UnsupportedModelError: it names the first tensor that is not covered once.
        """
        for index, spec in enumerate(self._specs):
            numel, low, high = sums[_NUM_INTEGERS * index : _NUM_INTEGERS * (index + 1)]
            if numel != spec.numel:
                defect = f"has {spec.numel} elements, but the ranks own {numel} of them together"
            elif (high * _HALF + low) % _PRIME != self._fingerprint(_whole(spec)):
                defect = f"has {spec.numel} elements, of which the ranks own some twice and others not at all"
            else:
                continue
            raise UnsupportedModelError(
                f"{spec.fqn} {defect}: its layout is not understood. Lay it out evenly, with fully_shard or "
                "distribute_tensor on one mesh of all ranks"
            )

    def _fingerprint(self, box: Box) -> int:
        product = 1
        for point, offset, size in zip(self._points[box.fqn], box.offsets, box.sizes, strict=True):
            series = (pow(point, size, _PRIME) - 1) * pow(point - 1, -1, _PRIME)  # the sum of a geometric series
            product = product * pow(point, offset, _PRIME) * series % _PRIME
        return product


def _whole(spec: TensorSpec) -> Box:
    return Box(spec.fqn, (0,) * len(spec.shape), spec.shape)
