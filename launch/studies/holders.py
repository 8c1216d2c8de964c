"""How the ranks of a very large run prove who holds what, or find it out: bytes and seconds of each of them.

    python launch/studies/holders.py          # the table of docs/scaling.md
    python launch/studies/holders.py --ranks 2048 --layouts "HSDP x TP 8"

Simulated ranks run the real code of a construction from the plan to the divisions (`live/holders/proving.py`). Their
plans have the boxes of Llama 3.1 405B as these layouts deal them, and no values:

    HSDP            FSDP2 over an eighth of the ranks, eight replicas
    HSDP x TP 8     the same on a mesh with a tensor-parallel axis; norms are replicated along it
    norms on a sub-mesh    as transformers has it: the mesh of the norms has no tensor-parallel axis, so no layout tells
                    that eight times as many ranks hold them
    16 stages x FSDP2      a pipeline, every stage sharded; a rank knows its stage only
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import random
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from simulated_ranks import Counts, FakeStore, FakeWires, Server, largest

from dist_ema.boxes import holding
from dist_ema.boxes.coverage import Coverage
from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan, Remains
from dist_ema.boxes.shards import Box, Held, NoForm, TensorSpec
from dist_ema.boxes.union import united
from dist_ema.live.holders import proving as holders
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.worlds import World, simulated

TP, REPLICAS, STAGES = 8, 8, 16
_HIDDEN, _FEED, _KEY_VALUE, _VOCABULARY, _LAYERS = 16384, 53248, 1024, 128256, 126

# A dim that tensor parallelism cuts; None for norms.
Cut = int | None


def llama_405b(layers: int = _LAYERS) -> list[tuple[str, tuple[int, ...], Cut]]:
    """Name, shape, and the dim that tensor parallelism cuts, of every parameter."""
    wide: list[tuple[str, tuple[int, ...], Cut]] = [
        ("self_attn.q_proj", (_HIDDEN, _HIDDEN), 0),
        ("self_attn.k_proj", (_KEY_VALUE, _HIDDEN), 0),
        ("self_attn.v_proj", (_KEY_VALUE, _HIDDEN), 0),
        ("self_attn.o_proj", (_HIDDEN, _HIDDEN), 1),
        ("mlp.gate_proj", (_FEED, _HIDDEN), 0),
        ("mlp.up_proj", (_FEED, _HIDDEN), 0),
        ("mlp.down_proj", (_HIDDEN, _FEED), 1),
        ("input_layernorm", (_HIDDEN,), None),
        ("post_attention_layernorm", (_HIDDEN,), None),
    ]
    named: list[tuple[str, tuple[int, ...], Cut]] = [("model.embed_tokens.weight", (_VOCABULARY, _HIDDEN), 0)]
    named += [
        (f"model.layers.{layer}.{name}.weight", shape, cut) for layer in range(layers) for name, shape, cut in wide
    ]
    return [*named, ("model.norm.weight", (_HIDDEN,), None), ("lm_head.weight", (_VOCABULARY, _HIDDEN), 0)]


@functools.cache
def specs(layers: int) -> dict[str, tuple[TensorSpec, Cut]]:
    return {name: (TensorSpec(name, shape, torch.float32, True, False), cut) for name, shape, cut in llama_405b(layers)}


@functools.cache
def specs_of(layers: int, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    return tuple(specs(layers)[name][0] for name in names)


@functools.cache
def held(layers: int, names: tuple[str, ...], tp: int, of_tp: int, shard: int, of_shards: int) -> tuple[Held, ...]:
    """The pieces at a place of a mesh of tensor parallelism and shards; the shards cut rows of what is left."""
    pieces = []
    for name in names:
        spec, cut = specs(layers)[name]
        offsets, sizes = [0] * len(spec.shape), list(spec.shape)
        for dim, place, parts in ((cut, tp, of_tp), (0, shard, of_shards)):
            if dim is not None:
                chunk = -(-sizes[dim] // parts)
                first = min(place * chunk, sizes[dim])
                offsets[dim], sizes[dim] = offsets[dim] + first, min(chunk, sizes[dim] - first)
        pieces.append(Held(spec, Box(name, tuple(offsets), tuple(sizes)), _no_values, NoForm("a study")))
    return tuple(pieces)


def _no_values() -> torch.Tensor:
    raise RuntimeError("no rank of this study has values")


def plan(layout: str, rank: int, size: int, layers: int) -> Plan:
    """What this rank plans alone: the ranks that the layout names are those along the Replicate axes of a mesh."""
    names = tuple(specs(layers))
    stages = STAGES if layout == "16 stages x FSDP2" else 1
    if stages > 1:
        stage, rank_there = divmod(rank, size // stages)
        per_stage = -(-len(names) // stages)
        names = names[stage * per_stage : (stage + 1) * per_stage]
        pieces = held(layers, names, 0, 1, rank_there, size // stages)
        parts = [Division(held=pieces, ranks=(rank,), position=0)]
    else:
        of_tp = TP if "TP" in layout or "norms" in layout else 1
        shards = size // REPLICAS // of_tp
        replica, shard, tp = rank // (shards * of_tp), rank // of_tp % shards, rank % of_tp
        alike = [(at * shards + shard) * of_tp for at in range(REPLICAS)]
        along = tuple(first + tp for first in alike)
        everywhere = tuple(first + other for first in alike for other in range(of_tp))
        norms = tuple(name for name in names if specs(layers)[name][1] is None)
        of = functools.partial(held, layers, tp=tp, of_tp=of_tp, shard=shard, of_shards=shards)
        group = SimpleNamespace(group_name="along the replicas")
        if "norms" in layout or of_tp == 1:
            parts = [Division(held=of(names), ranks=along, position=replica, groups=(group,))]
        else:
            wide = tuple(name for name in names if specs(layers)[name][1] is not None)
            parts = [
                Division(held=of(wide), ranks=along, position=replica, groups=(group,)),
                Division(
                    held=of(norms),
                    ranks=everywhere,
                    position=replica * of_tp + tp,
                    groups=(group, SimpleNamespace(group_name="along tp")),
                ),
            ]
    return Plan(
        specs=specs_of(layers, names),
        aliases={},
        left_out=(),
        divisions=tuple(parts),
        nearby=(),
        has_replicas=any(len(division.ranks) > 1 for division in parts),
        drop_gathered=lambda: None,
        check_model=lambda: None,
        remains=lambda: Remains(names={}, others=()),
    )


LAYOUTS = ("HSDP", "HSDP x TP 8", "norms on a sub-mesh", "16 stages x FSDP2")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the ranks of a layout did.

    Attributes:
        counts: what each rank said and heard, in rank order.
        seconds: the CPU time of a rank that shares nothing with the others.
        num_groups: the process groups that had to be made.
        is_whole: whether the divisions own every element once.
    """

    counts: list[Counts]
    seconds: float
    num_groups: int
    is_whole: bool


def measure(layout: str, size: int, layers: int = _LAYERS) -> Measured:
    """Run every rank of a layout."""
    server, seconds = Server(size), [0.0]
    owned, made = [0], set[tuple[int, ...]]()
    memory = _Memory()

    def life(rank: int) -> Counts:
        world = World(None, rank, size, FakeStore(server, rank))
        world.make_wires = functools.partial(FakeWires, server)
        measured = rank == size // 2
        if measured:
            memory.share_nothing()
        with simulated(world):
            exchange = Exchange()
            exchange.arrive("ShardedEMA")
            before, began = copy.copy(server.counts[rank]), time.thread_time()
            own = plan(layout, rank, size, layers)
            proof = holding.Proof.of(own, rank, size, exchange.channel.drawn, lambda groups: ())
            _, sums = exchange.agree_and_sum("building", lambda: None, lambda _: proof.terms)
            own = holders.plan_of_all(exchange, "building", own, proof, sums)
            if measured:
                seconds[0] = time.thread_time() - began
            owned[0] += sum(shard.box.numel for shard in own.owned(averaged=True))
            made.update(world._groups)
            return server.counts[rank] - before

    with (
        mock.patch.object(holding, "Coverage", memory.coverage),
        mock.patch.object(holders, "Coverage", memory.coverage),
        mock.patch.object(holders, "united", memory.united),
    ):
        counts = server.run(life, random.Random(0))
    total = sum(spec.numel for spec, _ in specs(layers).values())
    return Measured(counts, seconds[0], len(made), owned[0] == total)


class _Memory:
    """Equal values of simulated ranks are one object, but of the rank that is measured: else no memory would do."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._kept: dict[Any, Any] = {}
        self._united, self._coverage = united, Coverage

    def share_nothing(self) -> None:
        """Say that this thread is measured."""
        self._of_thread.alone = True

    def coverage(self, specs: Sequence[TensorSpec], seed: int) -> Any:
        return self._get((specs, seed), lambda: self._coverage(specs, seed))

    def united(self, own: Plan, rank: int, of_all: str) -> Plan:
        whole = self._get(of_all, lambda: self._united(own, rank, of_all))
        return dataclasses.replace(own, specs=whole.specs, aliases=whole.aliases)

    def _get(self, key: Any, make: Callable[[], Any]) -> Any:
        if hasattr(self._of_thread, "alone"):
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16384])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    options = parser.parse_args(arguments)
    print(
        "| layout | ranks | busiest rank: messages | KB | one rank, CPU s | groups made | server, s |\n|---"
        + "|---" * 6
        + "|"
    )
    for layout in options.layouts:
        for size in options.ranks:
            done = measure(layout, size)
            most, messages = largest(done.counts), sum(each.sent for each in done.counts)
            print(
                f"| {layout} | {size:,} | {most.sent}, {most.received} | {most.num_bytes / 1000:,.0f} | "
                f"{done.seconds:.2f} | {done.num_groups} | {messages * 10e-6:,.1f} |",
                flush=True,
            )
            assert done.is_whole


if __name__ == "__main__":
    main()
