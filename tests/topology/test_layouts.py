"""One rule for every layout: averages equal the naive whole-tensor ones bit for bit, wherever the live weights lie."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import WORLDS, bare, build_layout, read_whole, runs_forward, set_whole
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

from dist_ema import CosineSchedule, ShardedEMA

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=6)
CELLS = [(layout, size) for layout, sizes in WORLDS.items() for size in sizes]

Owned = list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def everything(layout: str, dtype: torch.dtype, folder: str) -> Owned:
    """Average, count collectives, swap, save: one model per cell. Returns what this rank owns."""
    model = build_layout(layout, dtype=dtype)
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    tokens = torch.randint(0, 11, (2, 3), generator=torch.Generator().manual_seed(0))
    for step in range(4):
        naive.update(set_whole(model, step))
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0, counted.get_comm_counts()
        logits(layout, model, tokens)  # leaves root groups gathered
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert set(state) == set(bare(layout).state_dict())
        for name, value in naive.values.items():
            assert torch.equal(state[name], value), name
    live = read_whole(model)
    live_logits = logits(layout, model, tokens)
    with ema.average_parameters():
        averaged = {name: value.to(dtype) for name, value in naive.values.items()}
        expected = bare(layout).to(dtype)
        expected.load_state_dict({**expected.state_dict(), **averaged, "head.weight": averaged["embed.weight"]})
        # Tensor parallelism adds its partial sums in another order; in bf16 that shows.
        loose = {"rtol": 0.1, "atol": 0.1} if "tp" in layout and dtype == torch.bfloat16 else {}
        torch.testing.assert_close(logits(layout, model, tokens), logits(layout, expected, tokens), **loose)
        for name, value in read_whole(model).items():
            assert torch.equal(value, averaged[name]), name
    for name, value in read_whole(model).items():
        assert torch.equal(value, live[name]), name
    assert torch.equal(logits(layout, model, tokens), live_logits)
    ema.save(folder)
    if dist.get_rank() == 0:
        saved = load_file(f"{folder}/model.safetensors")
        for name, value in naive.values.items():
            assert torch.equal(saved[name], value), name
    assert ema.nbytes == 4 * sum(shard.box.numel for shard in ema.shards)
    return [(shard.fqn, shard.global_shape, shard.offsets, shard.sizes) for shard in ema.shards]


def logits(layout: str, model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    if not runs_forward(layout):
        return torch.zeros(0)
    # Tensor parallelism needs the plain tokens to mix with replicated parameters.
    with torch.no_grad(), implicit_replication():
        out = model(tokens)
    return out.full_tensor() if hasattr(out, "full_tensor") else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "size"), CELLS, ids=[f"{layout}-{size}" for layout, size in CELLS])
def test_every_layout_averages_swaps_and_saves_exactly(world, tmp_path, layout, size, dtype) -> None:
    owned = world(size).run(everything, layout, dtype, str(tmp_path / "ema"))
    counts: dict[str, torch.Tensor] = {}
    for shards in owned:
        for fqn, shape, offsets, sizes in shards:
            region = tuple(slice(start, start + length) for start, length in zip(offsets, sizes, strict=True))
            counts.setdefault(fqn, torch.zeros(shape, dtype=torch.int64))[region] += 1
    parameters = dict(bare(layout).named_parameters())
    assert set(counts) == set(parameters)
    assert all((count == 1).all() for count in counts.values()), "one owner for every element"
    assert sum(count.sum() for count in counts.values()) == sum(value.numel() for value in parameters.values())
