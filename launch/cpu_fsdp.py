"""FSDP2 through accelerate on a machine without an accelerator: for smoke runs and demonstrations only.

On CPU accelerate ignores an FSDP plugin without a word and trains with DDP. Its FSDP2 code itself (prepare,
save_state, load_state) runs well on gloo once its state says so. ``force_fsdp`` says so, through private
attributes of accelerate (written against 1.15): no GPU run may go this way.
"""

from __future__ import annotations

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState


def force_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Turn a fresh multi-process CPU accelerator into an FSDP one; call it before ``prepare``.

    Raises ``RuntimeError`` where accelerate did not end up as a multi-process CPU run.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        raise RuntimeError(f"cannot force FSDP onto {accelerator.distributed_type}, only onto MULTI_CPU")
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    for shared_state in (PartialState._shared_state, AcceleratorState._shared_state):
        shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
