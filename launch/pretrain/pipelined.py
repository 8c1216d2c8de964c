"""The byte-level model as a pipeline, a stage on each process, through torch.distributed.pipelining.

accelerate has no pipelines for training. It prepares the stage as it is, and its own files would have the stage and the
optimizer of the main process alone: so the stages are saved and loaded by torch's distributed checkpoint, under the
names of the whole model. Any other number of stages loads them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from byte_lm import ByteLM
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.utils.data import DataLoader

FOLDER = "stages"


class Stage(nn.Module):
    """A run of blocks of the model, under their names there; the first stage has the embeddings, the last the head."""

    def __init__(self, model: ByteLM, number: int, num_stages: int) -> None:
        super().__init__()
        depth = len(model.blocks)
        self.is_first, self.is_last = number == 0, number == num_stages - 1
        if self.is_first:
            self.symbols, self.positions = model.symbols, model.positions
        first, end = number * depth // num_stages, (number + 1) * depth // num_stages
        self.blocks = nn.ModuleDict({str(index): model.blocks[index] for index in range(first, end)})
        if self.is_last:
            self.norm, self.head = model.norm, model.head

    def forward(self, hidden: Tensor) -> Tensor:
        if self.is_first:
            time = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = self.symbols(hidden) + self.positions(time)
        for block in self.blocks.values():
            hidden = block(hidden)
        return self.head(self.norm(hidden)) if self.is_last else hidden


class Pipelined(nn.Module):
    """Bytes to logits, as the whole model does: every process gives the same bytes, and gets all logits.

    Args:
        model: the whole model, the same on every process; what other stages have of it is not kept.
        device: of this process.
        num_losses: by how many the loss is divided in a backward: the micro-batches that accelerate accumulates.
    """

    def __init__(self, model: ByteLM, device: torch.device, num_losses: int) -> None:
        super().__init__()
        self.rank, self.num_stages = dist.get_rank(), dist.get_world_size()
        self.stage = Stage(model, self.rank, self.num_stages)
        self.device, self.num_losses = device, num_losses
        self._schedules: dict[tuple[Any, ...], ScheduleGPipe] = {}

    def forward(self, text: Tensor) -> Tensor:
        """Collective. The logits, without a gradient."""
        inputs = self._inputs(text)
        logits = self._schedule(text, with_loss=False).eval(*inputs)
        if logits is None:
            logits = torch.empty(*text.shape, self._num_symbols, device=text.device)
        dist.broadcast(logits, src=self.num_stages - 1)
        return logits  # type: ignore[no-any-return]

    def _inputs(self, text: Tensor) -> list[Tensor]:
        return [text.contiguous()] if self.stage.is_first else []  # torch 2.11 refuses an input with gaps

    def forward_backward(self, windows: Tensor) -> Tensor:
        """Collective. Add the gradients of a batch, and return its mean loss."""
        text, target = windows[:, :-1], windows[:, 1:]
        losses: list[Tensor] = []
        inputs = self._inputs(text)
        told: dict[str, Any] = {"target": target, "losses": losses} if self.stage.is_last else {}
        self._schedule(text, with_loss=True).step(*inputs, **told)
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=text.device)
        dist.broadcast(loss, src=self.num_stages - 1)
        return loss * self.num_losses

    def clip_gradients(self, most: float) -> None:
        """Collective. Clip by the norm over all stages."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        squared = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squared)
        torch.nn.utils.clip_grads_with_norm_(self.parameters(), most, squared.sqrt())

    @property
    def _num_symbols(self) -> int:
        return 256

    def _schedule(self, text: Tensor, *, with_loss: bool) -> ScheduleGPipe:
        """What runs a batch of this shape; a stage of torch has buffers for one shape."""
        key = (*text.shape, with_loss)
        if key not in self._schedules:
            stage = PipelineStage(self.stage, self.rank, self.num_stages, self.device)
            num_micro_batches = math.gcd(len(text), self.num_stages)
            self._schedules[key] = ScheduleGPipe(stage, num_micro_batches, loss_fn=self._loss if with_loss else None)
        return self._schedules[key]

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten()) / self.num_losses


def prepare_pipeline(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], warmup: Any
) -> tuple[Any, ...]:
    """What ``accelerator.prepare`` does for other layouts; every process sees whole batches."""
    assert isinstance(model, Pipelined)
    stage = model.stage
    accelerator.prepare_model(stage, evaluation_mode=True)  # as it is: a stage is no replica of another one
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state() -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(stage, optimizer, options=options), strict=True))

    def save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        weights.clear()
        state_dict_saver.save(state(), checkpoint_id=str(Path(output_dir) / FOLDER))

    def load(models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        loaded = state()
        state_dict_loader.load(loaded, checkpoint_id=str(Path(input_dir) / FOLDER))
        of_model, of_optimizer = loaded["model"], loaded["optimizer"]
        set_state_dict(stage, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    whole_batches = prepare_data_loader(loader, device=accelerator.device, num_processes=1, process_index=0)
    # Not by `prepare`: accelerate would write the optimizer of the main process alone.
    return model, AcceleratedOptimizer(optimizer), whole_batches, accelerator.prepare_scheduler(warmup)
