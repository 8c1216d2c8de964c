"""DeepSpeed through accelerate on a machine without an accelerator: for smoke runs and demonstrations only.

On CPU accelerate either ignores a DeepSpeed plugin and trains with DDP, or believes that each process is alone. Its
DeepSpeed code itself (prepare, save_state, load_state) runs well on gloo once its state says so. ``deepspeed_on_cpu``
says so, through private attributes of accelerate (written against 1.15): no GPU run may go this way.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
from accelerate.state import PartialState


def deepspeed_for_cpu() -> Any:
    """DeepSpeed itself, imported for a CPU; it compiles nothing, since its own shared-memory reduction is left out."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import warns of what torch will change
        import deepspeed
        import deepspeed.comm.torch
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def deepspeed_on_cpu(configuration: dict[str, Any], **options: Any) -> Accelerator:
    """An accelerator of several processes on gloo that runs DeepSpeed, made before anything else of accelerate's state.

    Raises ``RuntimeError`` where accelerate did not end up as DeepSpeed.
    """
    deepspeed = deepspeed_for_cpu()
    state = PartialState(cpu=True)
    if state.distributed_type != DistributedType.MULTI_CPU:
        raise RuntimeError(f"cannot force DeepSpeed onto {state.distributed_type}, only onto MULTI_CPU")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    PartialState._shared_state["device"] = torch.device("cpu")
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configuration), **options)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(f"the accelerator runs as {accelerator.distributed_type}, expected DEEPSPEED")
    return accelerator
