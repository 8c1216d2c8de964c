"""FSDP through accelerate on a machine without an accelerator: for smoke runs and demonstrations only.

On CPU accelerate ignores an FSDP plugin without a word and trains with DDP. Its FSDP code itself (prepare,
save_state, load_state) runs well on gloo once its state says so. ``force_fsdp`` says so, through private
attributes of accelerate (written against 1.15): no GPU run may go this way.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState


def force_fsdp(
    accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin, mesh: ParallelismConfig | None = None
) -> None:
    """Turn a fresh multi-process CPU accelerator into an FSDP one; call it before ``prepare``.

    Raises ``RuntimeError`` where accelerate did not end up as a multi-process CPU run.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        raise RuntimeError(f"cannot force FSDP onto {accelerator.distributed_type}, only onto MULTI_CPU")
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    for shared_state in (PartialState._shared_state, AcceleratorState._shared_state):
        shared_state["distributed_type"] = DistributedType.FSDP
        # accelerate says cpu:0, and FSDP1 takes that for another device than cpu.
        shared_state["device"] = torch.device("cpu")
    accelerator.state.fsdp_plugin = plugin
    if mesh is not None:
        accelerator.state.parallelism_config = mesh
        accelerator.state.device_mesh = mesh.get_device_mesh("cpu")
        mesh._validate_accelerator(accelerator)
