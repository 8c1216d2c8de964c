"""A callback for Lightning's Trainer: the average follows the steps, lies beside the checkpoints, and is evaluated.

    setup                   all ranks check; saves and removals of checkpoints are followed from now on
    on_train_start          the average is built, or loaded from beside the checkpoint that was loaded
    on_train_batch_end      an update, if an optimizer has stepped
    on_validation_start     the averaged weights are put into the model; also of test and predict
    on_validation_end       the live weights are put back
    on_train_end            an export is written, if it is wanted

Lightning loads a checkpoint before `on_fit_start` under some strategies, and after it under others. So the average is
loaded at its first use, which is later than both.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dist_ema.checks import folder_name, local
from dist_ema.disk.manifest import find_saved, read_manifest
from dist_ema.ema import ShardedEMA
from dist_ema.errors import AttachError, CheckpointMismatchError, CheckpointNotFoundError, ConfigError
from dist_ema.integrations.lightning_passes import further_pass, merged
from dist_ema.integrations.lightning_saves import (
    extend,
    link_last,
    place_for,
    place_of,
    remove_average,
    writes_folders,
)
from dist_ema.integrations.lightning_steps import StepsOfBatches
from dist_ema.ranks.calls import ended_for_all
from dist_ema.ranks.exchange import Exchange
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.records import schedule_from_json, schedule_to_json
from dist_ema.topology.planning import trained_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Callback
    from typing_extensions import Unpack

    from dist_ema.live.swap import Swap
    from dist_ema.options import OptionArguments
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:  # the same code is also shipped under this name
        from pytorch_lightning import Callback

__all__ = ["EMACallback"]

_log = logging.getLogger(__name__)

Schedules = Schedule | Mapping[str, Schedule]

_SERVED = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy")
# They derive from strategies that are served.
_REFUSED = ("DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")


class EMACallback(Callback):
    """Averages the LightningModule while `trainer.fit` trains it, under the names of its state dict.

    There is one update after each real optimizer step; of several optimizers (manual optimization) one at the end of
    each batch in which any has stepped. `X.ckpt` has its average in `X.<name>/` beside it, a folder checkpoint in
    `<folder>/<name>/`; it is removed with its checkpoint, and `ckpt_path` loads it. Validation, test and predict see
    the averaged weights; between them, and after `fit`, the model holds the live ones.

    Args:
        schedule: a schedule, `{track_name: schedule}`, or a function of the run's number of optimizer steps
            (`trainer.estimated_stepping_batches`) that returns one of these. Of several tracks the first is evaluated.
        name: the name of this average among the files of a checkpoint.
        evaluate: the weights that validation, test and predict see: "averaged", "live", or "both": the live ones under
            the names that the module logs, the averaged ones as `val_ema_loss`; predict then sees the averaged ones.
        on_missing: what `ckpt_path` does with a checkpoint that has no average: "error", or "live" to begin it anew
            from the loaded weights, at the first update.
        consolidate: write the average as a model folder, `default_root_dir/<name>`, at the end of `fit`; of several
            tracks one folder each within it.
        **options: the options of `ShardedEMA`, which `OptionArguments` lists for editors.

    Raises:
        ConfigError: an argument is not one of the above.
    """

    def __init__(
        self,
        schedule: Schedules | Callable[[int], Schedules],
        *,
        name: str = "ema",
        evaluate: Literal["averaged", "live", "both"] = "averaged",
        on_missing: Literal["error", "live"] = "error",
        consolidate: bool = False,
        **options: Unpack[OptionArguments],
    ) -> None:
        folder_name("name", name)
        if evaluate not in ("averaged", "live", "both"):
            raise ConfigError(f"evaluate is {evaluate!r}, expected 'averaged', 'live' or 'both'")
        if on_missing not in ("error", "live"):
            raise ConfigError(f"on_missing is {on_missing!r}, expected 'error' or 'live'")
        if not isinstance(consolidate, bool):
            raise ConfigError(f"consolidate is {consolidate!r}, expected True or False")
        known = sorted(set(inspect.signature(ShardedEMA).parameters) - {"model", "schedule"})
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"EMACallback was given {unknown}, expected options of ShardedEMA: {', '.join(known)}")
        self.name = name
        self.evaluate = evaluate
        self._schedule = schedule
        self._on_missing = on_missing
        self._consolidate = consolidate
        self._options = options
        self._exchange = Exchange()
        self._ema: ShardedEMA | None = None
        self._steps: StepsOfBatches | None = None
        self._swap: Swap | None = None
        # Whose average it is, whose saves are followed, and a loaded checkpoint whose average was not needed yet.
        self._owner: tuple[Any, Any] = (None, None)
        self._followed: weakref.WeakSet[Any] = weakref.WeakSet()
        self._unread: tuple[Any, Any] = (None, None)
        self._is_current = False
        self._is_live_pass = False
        self._saved_updates: int | None = None

    @property
    def ema(self) -> ShardedEMA | None:
        """The average; None before `fit` has begun."""
        return self._ema

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint."""
        return self._generate_state_key(name=self.name)

    # What Lightning calls, in its order.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Collective: every rank must call it. Check the trainer, and follow its saves.

        Raises:
            AttachError: the strategy cannot be served, or two callbacks get in each other's way.
            ConfigError: the trainer writes to a place that is no folder of a file system.
        """
        self._exchange = exchange = Exchange()
        with ended_for_all(exchange, "EMACallback"):
            exchange.arrive("EMACallback")
            exchange.agree("EMACallback", lambda: self._check(trainer, stage))
        self._is_current = False
        self._saved_updates = None
        if trainer not in self._followed:
            self._followed.add(trainer)
            extend(trainer, "save_checkpoint", functools.partial(self._saving, trainer))
            extend(trainer.strategy, "remove_checkpoint", functools.partial(self._removing, trainer))
            for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
                extend(loop, "run", functools.partial(self._running, trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of updates that a checkpoint was saved with. No communication."""
        self._saved_updates = state_dict["num_updates"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the number of updates into a checkpoint, which ties the average to it. No communication."""
        if self._ema is not None:
            checkpoint.setdefault("callbacks", {})[self.state_key] = {"num_updates": self._ema.num_updates}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Collective: every rank must call it. Build the average, or load it, and follow the optimizers."""
        ema = self._current(trainer, pl_module)
        if ema is not None:
            trained = trained_parameters(pl_module)
            stepping = [optimizer for optimizer in trainer.optimizers if _steps_any(optimizer, trained)]
            self._stop_steps()
            self._steps = StepsOfBatches(ema, stepping)
            ema.expect_updates()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Link the averages of linked checkpoints. No communication."""
        self._link_last(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update, if an optimizer has stepped. No communication."""
        if self._steps is not None:
            self._steps.end_batch()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the averaged weights into the model. Collective where `average_parameters` is."""
        self._swap_in(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the live weights back. No communication."""
        self._swap_out()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """As `on_validation_start`."""
        self._swap_in(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """As `on_validation_end`."""
        self._swap_out()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """As `on_validation_start`."""
        self._swap_in(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """As `on_validation_end`."""
        self._swap_out()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Collective where it consolidates. Write the export, and leave the optimizers."""
        self._stop_steps()
        if self._ema is not None and self._consolidate and not trainer.fast_dev_run:
            root = os.path.join(trainer.default_root_dir, self.name)
            for track in self._ema.tracks:
                self._ema.consolidate(root if len(self._ema.tracks) == 1 else os.path.join(root, track), track=track)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the live weights back, and leave the optimizers. No communication."""
        self._swap_out()
        self._stop_steps()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remember a checkpoint whose average was not needed. No communication."""
        self._swap_out()
        self._link_last(trainer)
        if not self._is_current and trainer.ckpt_path:
            self._unread = (weakref.ref(pl_module), trainer.ckpt_path)

    # The work.

    def _check(self, trainer: Any, stage: str) -> None:
        strategy = trainer.strategy
        kinds = [kind.__name__ for kind in type(strategy).__mro__]
        if not set(_SERVED).intersection(kinds) or set(_REFUSED).intersection(kinds):
            raise AttachError(
                f"the Trainer runs with {type(strategy).__name__}, expected a single device, DDPStrategy, FSDPStrategy "
                "or ModelParallelStrategy: other strategies keep their own copies of the weights. Give "
                "Trainer(strategy=...) one of these"
            )
        if stage == "fit" and trainer.world_size != self._exchange.world_size:
            raise AttachError(
                f"the Trainer counts {trainer.world_size} process(es), the process group {self._exchange.world_size}: "
                "the ranks train apart, and an average would mix different models. Give Trainer(devices=..., "
                "num_nodes=...) all of them"
            )
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, EMACallback)]
        names = [callback.name for callback in callbacks]
        if len(set(names)) < len(names):
            raise AttachError(
                f"Trainer(callbacks=...) has EMACallbacks with the names {names}: they would overwrite each other's "
                "folders. Give one callback, with several averages as {track_name: schedule}, or other names="
            )
        if sum(callback.evaluate != "live" for callback in callbacks) > 1:
            raise AttachError(
                f"Trainer(callbacks=...) has the EMACallbacks {names}, and more than one of them puts its weights into "
                "the model for an evaluation: give evaluate='live' to all others"
            )
        folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        for folder in [*folders, trainer.default_root_dir if self._consolidate else None]:
            if folder:
                local(folder)

    def _current(self, trainer: Any, module: Any) -> ShardedEMA | None:
        """Collective: every rank must call it. The average that belongs to the weights which the run has loaded.

        It is None where nothing was trained or loaded: the average would be the live model.
        """
        if self._is_current:
            return self._ema
        trains = trainer.state.fn == "fit"
        (read_into, unread), self._unread = self._unread, (None, None)
        path = trainer.ckpt_path or (unread if read_into is not None and read_into() is module else None)
        place = Path(self._exchange.on_rank_0("EMACallback", lambda: str(place_of(path, self.name)))) if path else None
        of_trainer, of_module = (None if ref is None else ref() for ref in self._owner)
        former = self._ema if of_module is module and (of_trainer is trainer or not trains) else None
        is_there = place is not None and self._is_there(place, path)
        ema = former
        if trains or (former is None and is_there):
            schedules = self._schedules(trainer, place)
            if former is None or (trains and _records(schedules) != _records(self._built_with)):
                ema = self._rebuilt(trainer, module, schedules, None if place else former)
        self._ema = ema
        if ema is not None and place is not None:
            self._load(ema, place if is_there else None, path)
        self._is_current = True
        return ema

    def _is_there(self, place: Path, path: Any) -> bool:
        """Collective: every rank must call it. Whether the checkpoint that was loaded has an average."""
        if self._exchange.on_rank_0("EMACallback", lambda: os.path.lexists(place)):
            return True
        if self._on_missing == "error":
            raise CheckpointNotFoundError(
                f"the checkpoint {path} has no average: there is no {place}. If it was moved, move both. If the run "
                "that saved it had no average, give EMACallback(on_missing='live'): the average then starts from the "
                "loaded weights, at the first update"
            )
        if self._exchange.rank == 0:
            _log.warning("%s holds no average: it starts anew from the live weights at the next update", path)
        return False

    def _rebuilt(self, trainer: Any, module: Any, schedules: Schedules, former: ShardedEMA | None) -> ShardedEMA:
        """Collective: every rank must call it. A new average, which goes on from a former one of the same model."""
        kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        # FSDP's own wrapper has parameters. That of DDP has none, and would be kept alive beyond `fit`.
        ema = ShardedEMA(trainer.strategy.model if "FSDPStrategy" in kinds else module, schedules, **self._options)
        if former is not None and former.num_updates and former.tracks == ema.tracks:
            for track in ema.tracks:
                values = former.sharded_state_dict(track)
                ema.load_sharded_state_dict(values, track=track, num_updates=former.num_updates)
        self._built_with = schedules
        self._owner = (weakref.ref(trainer), weakref.ref(module))
        return ema

    def _schedules(self, trainer: Any, place: Path | None) -> Schedules:
        """Collective where a run only evaluates: a function of steps gives way to the schedules of the checkpoint."""
        schedule: Any = self._schedule
        if isinstance(schedule, Schedule | Mapping) or not callable(schedule):
            return schedule  # type: ignore[no-any-return]
        if trainer.state.fn != "fit" and place is not None:
            records = self._exchange.on_rank_0("EMACallback", lambda: _tracks_at(place))
            return {track: schedule_from_json(record) for track, record in records.items()}

        def of_steps() -> Schedules:
            steps = trainer.estimated_stepping_batches
            if not 1 <= steps < math.inf:
                raise ConfigError(
                    f"schedule is a function of the number of optimizer steps, and the Trainer has no such number (it "
                    f"says {steps}): give Trainer(max_steps=...), or a schedule"
                )
            return schedule(int(steps))  # type: ignore[no-any-return]

        return self._exchange.agree("EMACallback", of_steps)

    def _load(self, ema: ShardedEMA, place: Path | None, path: Any) -> None:
        """Collective: every rank must call it. Load the average of a checkpoint; without one it begins anew."""
        if place is None:
            ema.restart()
            return
        ema.load(place)
        if self._saved_updates not in (None, ema.num_updates):
            raise CheckpointMismatchError(
                f"{place} has {ema.num_updates} updates, the checkpoint {path} was saved with {self._saved_updates}: a "
                "save was cut off between the two, or one of them was replaced. Use another checkpoint"
            )

    def _swap_in(self, trainer: Any, module: Any) -> None:
        if self.evaluate == "live" or self._is_live_pass or trainer.sanity_checking or self._swap is not None:
            return
        with _no_inference():
            ema = self._current(trainer, module)
            if ema is not None and ema.num_updates:
                swap = ema.average_parameters(ema.tracks[0])
                swap.__enter__()
                self._swap = swap

    def _swap_out(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None:
            with _no_inference():
                swap.close()

    def _saving(self, trainer: Any, former: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Collective: every rank must call it. `trainer.save_checkpoint`: first the average, then its checkpoint."""
        ema, (_, of_module) = self._ema, self._owner
        if ema is None or of_module() is not trainer.lightning_module or self not in trainer.callbacks:
            former(filepath, *args, **kwargs)
            return
        was_swapped = self._swap is not None
        self._swap_out()
        if self._steps is not None:
            self._steps.before_save()
        work = functools.partial(place_for, filepath, self.name, as_folder=writes_folders(trainer.strategy))
        ema.save(self._exchange.on_rank_0("save_checkpoint", lambda: str(work())))
        former(filepath, *args, **kwargs)
        if was_swapped:
            self._swap_in(trainer, trainer.lightning_module)

    def _removing(self, trainer: Any, former: Any, filepath: Any) -> None:
        """`strategy.remove_checkpoint`. No communication."""
        former(filepath)
        if self._exchange.rank == 0 and self in trainer.callbacks:
            remove_average(filepath, self.name)

    def _running(self, trainer: Any, former: Any) -> Any:
        """The `run` of a loop of evaluation: for both weights it runs twice, and the second time as it would alone."""
        if self.evaluate != "both" or trainer.sanity_checking or self not in trainer.callbacks:
            return former()
        with further_pass(trainer, self, self.name):
            averaged = former()
        self._is_live_pass = True
        try:
            return merged(averaged, former())
        finally:
            self._is_live_pass = False

    def _stop_steps(self) -> None:
        if self._steps is not None:
            self._steps.stop()
            self._steps = None

    def _link_last(self, trainer: Any) -> None:
        if self._ema is not None and self._exchange.rank == 0:
            link_last(trainer, self.name)


@contextmanager
def _no_inference() -> Iterator[None]:
    """A context out of the inference mode of an evaluation, whose tensors no later update could write to."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _tracks_at(place: Path) -> dict[str, Any]:
    return dict(read_manifest(find_saved(place)).tracks)


def _records(schedules: Schedules) -> Any:
    if isinstance(schedules, Mapping):
        return {track: schedule_to_json(schedule) for track, schedule in schedules.items()}
    return schedule_to_json(schedules)


def _steps_any(optimizer: torch.optim.Optimizer, parameters: Mapping[int, str]) -> bool:
    return any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"])
