"""Building an average loads neither the compiler nor the modules of sharding, and serves what is loaded later."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Run in a fresh process, in which things come in the worst order: torch's modules after the average.
STAGES = """
import json, sys, tempfile
import torch, accelerate
from torch import nn

known = set(sys.modules)
told = {}

from dist_ema import ConstantSchedule, ShardedEMA

model, schedule = nn.Linear(2, 1), ConstantSchedule(momentum=0.1)
ema = ShardedEMA(model, schedule)
ema.update()
told["built"] = sorted(set(sys.modules) - known)
with tempfile.TemporaryDirectory() as folder:
    ema.save(folder + "/saved")
    ema.load(folder + "/saved")
    with ema.average_parameters():
        pass
    ema.consolidate(folder + "/export")
ema.sharded_state_dict()
told["used"] = sorted(set(sys.modules) - known)

from torch.distributed import HashStore, init_process_group
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
fully_shard(model)
try:
    ema.update()
except Exception as error:
    told["sharded since"] = f"{type(error).__name__}: {error}"
sharded = ShardedEMA(model, schedule)
sharded.update()
told["sharded"] = [type(each).__name__ for each in sharded.sharded_state_dict().values()]
flat = ShardedEMA(FullyShardedDataParallel(nn.Linear(2, 1), device_id=torch.device("cpu")), schedule)
flat.update()
told["flat"] = [shard.fqn for shard in flat.shards]

plain = nn.Linear(2, 1)
late = ShardedEMA(plain, schedule)


@torch.compile(backend="eager")
def train(value):
    out = plain(value).sum()
    late.update()
    return out


for _ in range(3):
    train(torch.ones(2))
from torch._dynamo.utils import counters

told["graphs"] = counters["stats"]["unique_graphs"]
told["num_updates"] = late.num_updates
print(json.dumps(told))
"""

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch.distributed",
    "torch.onnx",
    "torch.testing",
    "sympy",
    "matplotlib",
    "transformers",
    "diffusers",
    "peft",
    "lightning",
    "huggingface_hub.hf_api",
    "huggingface_hub.hub_mixin",
    "tqdm",
)


@pytest.fixture(scope="module")
def told() -> dict:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STAGES],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["built", "used"])
def test_an_average_of_a_plain_model_does_not_make_a_run_wait_for_the_compiler(told, stage) -> None:
    """Beyond what `import torch, accelerate` loads; `used` saves, loads, swaps and exports besides."""
    loaded = told[stage]
    assert "dist_ema.topology.dtensor" in loaded
    assert [name for name in loaded if name.startswith(HEAVY)] == []


def test_a_model_that_is_sharded_after_its_average_was_built_is_refused_by_name(told) -> None:
    assert told["sharded since"].startswith("ModelChangedError") and "DTensor now" in told["sharded since"]


def test_sharding_that_is_loaded_after_the_first_average_is_seen(told) -> None:
    assert told["sharded"] == ["DTensor", "DTensor"]
    assert told["flat"] == ["weight", "bias"]


def test_a_compiler_that_is_loaded_after_the_first_update_does_not_trace_updates(told) -> None:
    """One graph is the model's. An update that was traced would make more, and new ones as its counters grow."""
    assert (told["graphs"], told["num_updates"]) == (1, 3)
