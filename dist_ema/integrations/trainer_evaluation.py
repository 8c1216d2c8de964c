"""`evaluate` and `predict` of a Trainer (transformers) show the averaged weights, in training and after it.

A Trainer tells its callbacks of an evaluation when it is over. Both methods run `trainer.evaluation_loop`, which is
made to be overridden. So the loop of the one object is extended, and its class stays as it is. Logs, metrics, datasets
and predictions stay the Trainer's own work.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from dist_ema.ema import ShardedEMA
from dist_ema.messages import tell

__all__ = ["Evaluated", "averaged_prefix", "evaluate_averages", "is_averaged_metric", "tell_at_evaluation"]

# Whose weights are evaluated.
Evaluated = Literal["averaged", "live", "both"]


def evaluate_averages(
    trainer: Any, ema: ShardedEMA, track: str, evaluated: Evaluated, is_wanted: Callable[[], bool]
) -> None:
    """Have a Trainer evaluate an average until `ema.detach()`. No communication here; an evaluation has that of a swap.

    Args:
        trainer: the Trainer.
        ema: the average of its model.
        track: the track that is evaluated.
        evaluated: whose weights.
        is_wanted: whether the Trainer still has the callback; if not, the next evaluation undoes this.
    """
    former = trainer.evaluation_loop
    arguments = inspect.signature(former)
    is_inside = False

    @functools.wraps(former)
    def with_average(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if not is_wanted():
            undo()
        if is_inside or not is_wanted():  # a metric may evaluate in its turn
            return former(*args, **kwargs)
        is_inside = True
        try:
            if evaluated == "both":
                return _both(trainer, ema, track, former, arguments.bind(*args, **kwargs))
            _end_steps(trainer)
            with ema.average_parameters(track):
                return former(*args, **kwargs)
        finally:
            is_inside = False

    if evaluated != "live":
        undo = _put_in(trainer, with_average)
        ema.on_detach(undo)


def tell_at_evaluation(trainer: Any, message: str, is_due: Callable[[], bool]) -> None:
    """Warn at the next evaluation of a Trainer, once, if it is due then. No communication: rank 0 alone warns."""
    former = trainer.evaluation_loop

    @functools.wraps(former)
    def with_message(*args: Any, **kwargs: Any) -> Any:
        undo()
        if is_due() and trainer.args.process_index == 0:
            tell(message)
        return former(*args, **kwargs)

    undo = _put_in(trainer, with_message)


def _put_in(trainer: Any, loop: Callable[..., Any]) -> Callable[[], None]:
    """Give a Trainer another loop of evaluation; the returned function undoes it."""
    of_class, former = "evaluation_loop" not in vars(trainer), trainer.evaluation_loop

    def undo() -> None:
        if vars(trainer).get("evaluation_loop") is not loop:
            return  # another one has been put around it
        if of_class:
            del trainer.evaluation_loop
        else:
            trainer.evaluation_loop = former

    trainer.evaluation_loop = loop
    return undo


def _end_steps(trainer: Any) -> None:
    """Let an optimizer that evaluates other weights than it trains (schedule-free) put these in, before the swap.

    The Trainer does so within the loop: it would change the averaged weights, and later change the live ones back that
    it had never changed.
    """
    if callable(getattr(trainer.optimizer, "eval", None)):
        trainer.optimizer.eval()


def _both(trainer: Any, ema: ShardedEMA, track: str, loop: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    """The live weights first, as without an average; then the averaged ones, whose metrics join those of the live."""
    output = loop(*bound.args, **bound.kwargs)
    bound.apply_defaults()
    prefix = averaged_prefix(bound.arguments["metric_key_prefix"])
    bound.arguments["metric_key_prefix"] = prefix
    with _undisturbed(trainer.args.device), _metrics_of_trl(trainer, prefix) as beside:
        with ema.average_parameters(track):
            averaged = loop(*bound.args, **bound.kwargs)
    output.metrics.update(averaged.metrics)
    output.metrics.update(beside)
    return output


def averaged_prefix(prefix: str) -> str:
    """The prefix of the metrics of averaged weights: "eval" is "eval_ema", "eval_books" is "eval_ema_books"."""
    first, *rest = prefix.split("_")
    return "_".join([first, "ema", *rest])


def is_averaged_metric(evaluated: Evaluated, metric: str | None) -> bool:
    """Whether `metric_for_best_model` is measured on averaged weights."""
    if evaluated == "both":
        return metric is not None and metric.removeprefix("eval_").startswith("ema_")
    return evaluated == "averaged"


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random numbers of training as they are: a loop draws some even where nothing is shuffled."""
    python, numpy = random.getstate(), np.random.get_state()
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _metrics_of_trl(trainer: Any, prefix: str) -> Iterator[dict[str, float]]:
    """Keep the metrics that TRL collects batch by batch apart: its `log` would give the mean over both loops.

    Yields:
        What is filled at the end: their means, under the names of averaged weights.
    """
    means: dict[str, float] = {}
    collected = getattr(trainer, "_metrics", None)
    batches = collected.get("eval") if isinstance(collected, dict) else None
    if not isinstance(batches, dict):
        yield means
        return
    of_live = dict(batches)
    batches.clear()
    try:
        yield means
        means.update({f"{prefix}_{name}": sum(values) / len(values) for name, values in batches.items() if values})
    finally:
        batches.clear()
        batches.update(of_live)
