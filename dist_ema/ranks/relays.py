"""Small messages from many ranks to one, without many partners for anyone: they travel together, in few hops.

    64 ranks, hops of 8:     rank 13  ->  rank 8 + 3  ->  rank 43         the last digit of 43 first, then the first one
                             rank 14  ->  rank 8 + 3  /
                             rank 21  ->  rank 16 + 3  ->  rank 43

A hop changes one digit of the rank, in base `PARTNERS`, into that of the target: two hops up to 1,024 ranks, three up
to 32,768. So a rank hears from less than `PARTNERS` ranks in a hop. Where the way leads over a rank that does not
exist, since the world ends within a block, the message goes to its target at once; a rank hears from as many such ranks
at most.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial

from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.wires.wires import Wires

__all__ = ["PARTNERS", "deliver"]

PARTNERS = 32
_HEAD = struct.Struct("<qq")  # target, bytes

_Letters = Sequence[tuple[int, bytes]]


def deliver(exchange: Exchange, wires: Wires, action: str, letters: _Letters) -> list[bytes]:
    """Collective: every rank must call it. Bring small messages to their targets.

    Args:
        exchange: the control traffic of all ranks.
        wires: the wires of the work.
        action: a name of the work, for the message.
        letters: (target, content) of the messages of this rank.

    Returns:
        The messages for this rank, in no order.

    Raises:
        CommunicationError: other ranks are gone.
        WireError: a message did not get through.
    """
    held, block = list(letters), 1
    while block < exchange.world_size:
        block *= PARTNERS
        by_next: dict[int, list[tuple[int, bytes]]] = {}
        for target, content in held:
            by_next.setdefault(next_hop(exchange.rank, target, block, exchange.world_size), []).append(
                (target, content)
            )
        held = by_next.pop(exchange.rank, [])
        messages = {rank: _packed(together) for rank, together in by_next.items()}
        wires.announce({rank: len(message) for rank, message in messages.items()})
        exchange.raise_together(action, None)  # all have announced
        inbox = {source: bytearray(size) for source, size in wires.announced()}
        wires.pass_all([(rank, partial(bytes, message)) for rank, message in messages.items()], inbox)
        for received in inbox.values():
            held += _unpacked(received)
    return [content for _, content in held]


def next_hop(rank: int, target: int, block: int, world_size: int) -> int:
    """The rank of the same block of ranks whose last digits are those of the target. No communication."""
    stop = rank // block * block + target % block
    return stop if stop < world_size else target


def _packed(letters: _Letters) -> bytes:
    return b"".join(part for target, content in letters for part in (_HEAD.pack(target, len(content)), content))


def _unpacked(message: bytearray) -> list[tuple[int, bytes]]:
    letters, at = [], 0
    while at < len(message):
        target, size = _HEAD.unpack_from(message, at)
        at += _HEAD.size
        letters.append((target, bytes(message[at : at + size])))
        at += size
    return letters
