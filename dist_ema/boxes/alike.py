"""Whether some ranks bring equal digests, for any number of sets of ranks: one integer of each rank. No communication.

A list of digests would grow with the run: with HSDP there are as many sets as ranks in a shard group. So the ranks add
up one number, to which each of them contributes, for each of its sets,

    digest * (h(position) - h(position + 1))    mod 2^61 - 1

where h is a hash of the set and of a position among its ranks, which wraps around. If all digests of a set are equal,
and all of its ranks contribute, the h cancel. Else the sum is that of h(position) * (digest - digest of the position
before), which is zero with a probability of about 2^-61.
"""

from __future__ import annotations

import hashlib

__all__ = ["are_alike", "digest", "term"]

_PRIME = 2**61 - 1


def digest(content: object) -> str:
    """A digest of what `repr` shows."""
    return hashlib.sha256(repr(content).encode()).hexdigest()


def term(of_set: str, position: int, size: int, own: str) -> int:
    """What a rank contributes for one of its sets of ranks.

    Args:
        of_set: a name of the set, that no other set has.
        position: the place of the rank in the set.
        size: the number of ranks in the set.
        own: the digest that the rank brings, in hexadecimal.
    """
    return int(own, 16) * (_hash(of_set, position) - _hash(of_set, (position + 1) % size)) % _PRIME


def are_alike(total: int) -> bool:
    """Whether the digests of every set are equal, from the sum of the terms of all ranks."""
    return total % _PRIME == 0


def _hash(of_set: str, position: int) -> int:
    return int(digest(f"{of_set} {position}"), 16)
