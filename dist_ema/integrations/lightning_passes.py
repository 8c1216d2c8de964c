"""A further pass of an evaluation, whose metrics have names of their own, and of which training notices nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

try:
    from lightning.pytorch.utilities.seed import isolate_rng
except ModuleNotFoundError:  # the same code is also shipped under this name
    from pytorch_lightning.utilities.seed import isolate_rng

__all__ = ["further_pass", "merged", "metric_name"]

_OF_STAGE = re.compile(r"(val|valid|validation|test)([/_.-])")


def metric_name(metric: str, name: str) -> str:
    """The name of a metric of the averaged weights: `val_loss` becomes `val_ema_loss`, `loss` becomes `ema_loss`."""
    stage = _OF_STAGE.match(metric)
    end = stage.end() if stage else 0
    return f"{metric[:end]}{name}_{metric[end:]}"


@contextmanager
def further_pass(trainer: Any, only: Any, name: str) -> Iterator[None]:
    """A context in which a loop of evaluation may run once more than the trainer knows of.

    Other callbacks see nothing of it: `ModelCheckpoint` would save, and `EarlyStopping` lose patience. The generators
    of random numbers are set back, and `log` of the module takes the names of `metric_name`.

    Args:
        trainer: the Trainer.
        only: the one callback that takes part.
        name: the name of the average.
    """
    module, callbacks = trainer.lightning_module, trainer.callbacks
    former, was_own = module.log, "log" in vars(module)
    signature = inspect.signature(former)

    def log(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.arguments["name"] = metric_name(given.arguments["name"], name)
        former(*given.args, **given.kwargs)

    with isolate_rng():
        trainer.callbacks, module.log = [only], log
        try:
            yield
        finally:
            trainer.callbacks = callbacks
            if was_own:
                module.log = former
            else:
                del module.log


def merged(averaged: Sequence[dict[str, Any]], live: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of two passes over the same loaders, together."""
    if len(averaged) != len(live):  # a pass that was skipped
        return list(live)
    return [{**of_live, **of_averaged} for of_averaged, of_live in zip(averaged, live, strict=True)]
