"""With how many ranks a rank exchanges short pieces in a save: by byte arithmetic, without processes or tensors.

    python launch/studies/partners.py          # the table of docs/decisions/0032-sockets-between-ranks.md

FSDP2 cuts every tensor by rows. For each rank it divides its rows as a save does, and notes the writers to which it
sends. "hears from" is of the busiest writer: directly, and by relays in any hop. Both are summed over all files.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator

import torch
from scaling import MODELS, shard_boxes

from dist_ema.checkpoint import parcels, writing
from dist_ema.disk.formats.byte_ranges import strips_of_box
from dist_ema.disk.formats.model_files import ModelFiles, lay_out_files
from dist_ema.ranks.relays import PARTNERS, next_hop

_HEAD_BYTES = 40  # of a parcel with one strip


def parcels_of(files: ModelFiles, shapes: list[tuple[int, ...]], rank: int, size: int) -> Iterator[tuple[int, int]]:
    """(writer, bytes) of each parcel of a rank for another one."""
    places = files.locate()
    for box in shard_boxes(shapes, rank, size):
        file, entry = places[box.fqn]
        pages = max(-(-file.size_bytes // (size * writing._PAGE_BYTES)), writing._LEAST_PAGES)
        domain = pages * writing._PAGE_BYTES
        for _, strip in strips_of_box(entry.start, entry.shape, entry.dtype.itemsize, box):
            start, stop = strip.start, strip.stop
            first = -(-start // writing._PAGE_BYTES) * writing._PAGE_BYTES
            last = stop // writing._PAGE_BYTES * writing._PAGE_BYTES
            is_long = stop - start >= writing._LONG_BYTES and first < last
            for at, end in ((start, first), (last, stop)) if is_long else ((start, stop),):
                while at < end:
                    writer = at // domain
                    until = min(end, (writer + 1) * domain)
                    if writer != rank:
                        yield writer, until - at + _HEAD_BYTES
                    at = until


def measure(model: str, size: int) -> str:
    """One row of the table."""
    shapes = MODELS[model]
    tensors = [(str(index), torch.float32, shape) for index, shape in enumerate(shapes)]
    files = lay_out_files(tensors, max_shard_size="5GB", metadata={})
    hears_of: dict[int, set[int]] = collections.defaultdict(set)
    hears_directly: dict[int, set[int]] = collections.defaultdict(set)
    hops: list[dict[int, set[int]]] = []
    most_sent, relayed_bytes, sent_bytes = 0, 0, 0
    held: list[set[int]] = [set() for _ in range(size)]  # targets of the small parcels that a rank holds
    for rank in range(size):
        targets = set()
        for writer, nbytes in parcels_of(files, shapes, rank, size):
            targets.add(writer)
            hears_of[writer].add(rank)
            sent_bytes += nbytes
            if size > parcels._MOST_DIRECT and nbytes <= parcels._SMALL_BYTES:
                held[rank].add(writer)
                relayed_bytes += nbytes
            else:
                hears_directly[writer].add(rank)
        most_sent = max(most_sent, len(targets))
    block = 1
    while block < size and relayed_bytes:
        block *= PARTNERS
        received: list[set[int]] = [set() for _ in range(size)]
        hears: dict[int, set[int]] = collections.defaultdict(set)
        for rank, targets in enumerate(held):
            for target in targets:
                step = next_hop(rank, target, block, size)
                received[step].add(target)
                if step != rank:
                    hears[step].add(rank)
        held = received
        hops.append(hears)
    with_relays = max(len(hears_directly[rank]) + sum(len(hears[rank]) for hears in hops) for rank in range(size))
    return (
        f"| {model} | {size:,} | {most_sent} | {max(map(len, hears_of.values()), default=0):,} | "
        f"{max(map(len, hears_directly.values()), default=0):,} | {with_relays:,} | "
        f"{100 * relayed_bytes / max(sent_bytes, 1):.2f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 1024, 16384])
    options = parser.parse_args()
    print("| model | ranks | a rank sends to | busiest writer, all direct | now directly | with relays | relayed |")
    print("|---|---|---|---|---|---|---|")
    for model in ("Llama 3.1 8B", "Llama 3.1 405B"):
        for size in options.ranks:
            print(measure(model, size), flush=True)


if __name__ == "__main__":
    main()
