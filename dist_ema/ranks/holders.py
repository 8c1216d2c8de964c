"""Ranks that bring equal digests, found through the store: each rank adds its number to the list of each digest.

A rank reads the lists of its own digests only. So it makes a few requests for each of them, however many ranks there
are, and reads four characters for each rank that has the same.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.store.link import Link
from dist_ema.ranks.store.shared_store import SharedStore

__all__ = ["ranks_by_digest"]

# 16 million ranks, in characters that the store keeps as they are.
_NUM_BYTES = 3
_NUM_CHARACTERS = 4


def ranks_by_digest(exchange: Exchange, action: str, digests: Sequence[str]) -> list[tuple[int, ...]]:
    """Collective: every rank must call it. For each digest the ranks that bring it, in ascending order.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for the message.
        digests: different short texts, as many as this rank likes; the ranks may bring different ones.

    Raises:
        CommunicationError: other ranks are gone, or did not call in time.
    """
    if exchange.world_size == 1:
        return [(0,)] * len(digests)
    own = base64.urlsafe_b64encode(exchange.rank.to_bytes(_NUM_BYTES, "big")).decode()

    def work(link: Link, store: SharedStore) -> list[tuple[int, ...]]:
        keys = [f"{link.name}/holders/{link.number}/{digest}" for digest in digests]
        for key in keys:
            store.append(key, own)
        link.combine(store, 0, max)  # now all have written
        ranks = [_ranks(store.look(key) or "") for key in keys]
        link.combine(store, 0, max)  # now all have read
        for key, of_key in zip(keys, ranks, strict=True):
            if of_key[0] == exchange.rank:
                store.delete(key)
        return ranks

    return exchange.channel.agreement(action, work)


def _ranks(text: str) -> tuple[int, ...]:
    parts = (text[at : at + _NUM_CHARACTERS] for at in range(0, len(text), _NUM_CHARACTERS))
    return tuple(sorted(int.from_bytes(base64.urlsafe_b64decode(part), "big") for part in parts))
