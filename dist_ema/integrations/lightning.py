"""A callback for Lightning's Trainer: the average follows the steps, lies beside the checkpoints, and is evaluated.

    setup                   all ranks check; saves and removals of checkpoints are followed from now on
    on_train_start          the average is built, or loaded from beside the checkpoint that was loaded
    on_train_batch_end      an update, if an optimizer has stepped
    on_validation_start     the averaged weights are put into the model; also of test and predict
    on_validation_end       the live weights are put back
    on_train_end            an export is written, if it is wanted

Where it finds the average of a checkpoint is in lightning_saves.py, which average it is in lightning_runs.py.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from dist_ema.checks import folder_name, local
from dist_ema.ema import ShardedEMA
from dist_ema.errors import AttachError, ConfigError
from dist_ema.integrations.lightning_passes import further_pass, merged
from dist_ema.integrations.lightning_runs import AverageOfRuns, Schedules
from dist_ema.integrations.lightning_saves import (
    extend,
    link_last,
    place_for,
    remove_average,
    writes_folders,
)
from dist_ema.integrations.lightning_steps import StepsOfBatches
from dist_ema.integrations.resume import checked_load_arguments
from dist_ema.live.blending import Blending
from dist_ema.options import check_names
from dist_ema.ranks.calls import ended_for_all
from dist_ema.topology.planning import trained_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Callback
    from typing_extensions import Unpack

    from dist_ema.options import OptionArguments
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:  # the same code is also shipped under this name
        from pytorch_lightning import Callback

__all__ = ["EMACallback"]

_SERVED = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy")
# They derive from strategies that are served.
_REFUSED = ("DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")


class EMACallback(Callback):
    """Averages the LightningModule while `trainer.fit` trains it, under the names of its state dict.

    Collective: all ranks train, and every rank has the callback. There is one update after each real optimizer step; of
    several optimizers (manual optimization) one at the end of each batch in which any has stepped. `X.ckpt` has its
    average in `X.<name>/` beside it, a folder checkpoint in `<folder>/<name>/`; it is removed with its checkpoint, and
    `ckpt_path` loads it. Validation, test and predict see the averaged weights; between them, and after `fit`, the
    model holds the live ones.

    Args:
        schedule: a schedule, `{track_name: schedule}`, or a function of the run's number of optimizer steps
            (`trainer.estimated_stepping_batches`) that returns one of these. Of several tracks the first is evaluated.
        name: the name of this average among the files of a checkpoint.
        evaluate: the weights that validation, test and predict see: "averaged", "live", or "both": the live ones under
            the names that the module logs, the averaged ones as `val_ema_loss`; predict then sees the averaged ones.
        on_missing: what `ckpt_path` does with a checkpoint that has no average: "error", or "live" to begin it anew
            from the loaded weights, at the first update.
        on_load: keywords of `ShardedEMA.load` for a resume, such as `dict(new_tracks={"slow": "live"})`.
        consolidate: write the average as a model folder, `default_root_dir/<name>`, at the end of `fit`; of several
            tracks one folder each within it.
        blend_every: as in `attach`: with n, the average of the (first) track is blended into the live weights after
            every n updates; and `blend_weight`, the weight of the average in it.
        blend_weight: see `blend_every`.
        **options: the options of `ShardedEMA`, which `OptionArguments` lists for editors.

    Raises:
        ConfigError: an argument is not one of the above.
        AttachError: the Trainer cannot be served; when `fit` begins.
        CheckpointNotFoundError: the checkpoint of `ckpt_path` has no average; when `fit` begins.
    """

    def __init__(
        self,
        schedule: Schedules | Callable[[int], Schedules],
        *,
        name: str = "ema",
        evaluate: Literal["averaged", "live", "both"] = "averaged",
        on_missing: Literal["error", "live"] = "error",
        on_load: Mapping[str, Any] | None = None,
        consolidate: bool = False,
        blend_every: int | None = None,
        blend_weight: float = 0.5,
        **options: Unpack[OptionArguments],
    ) -> None:
        folder_name("name", name)
        if evaluate not in ("averaged", "live", "both"):
            raise ConfigError(f"evaluate is {evaluate!r}, expected 'averaged', 'live' or 'both'")
        if on_missing not in ("error", "live"):
            raise ConfigError(f"on_missing is {on_missing!r}, expected 'error' or 'live'")
        if not isinstance(consolidate, bool):
            raise ConfigError(f"consolidate is {consolidate!r}, expected True or False")
        check_names("EMACallback", options)
        blending = Blending.of(blend_every, blend_weight, options.get("interval", 1))
        self.name = name
        self.evaluate = evaluate
        self._consolidate = consolidate
        self._average = AverageOfRuns(
            schedule,
            name,
            begins_anew=on_missing == "live",
            on_load=checked_load_arguments(on_load),
            blending=blending,
            options=options,
        )
        self._steps: StepsOfBatches | None = None
        self._swap: ExitStack | None = None
        self._followed: list[weakref.ref[Any]] = []  # the trainers whose saves are followed
        self._is_live_pass = False

    @property
    def ema(self) -> ShardedEMA | None:
        """The average; None before `fit` has begun."""
        return self._average.ema

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint."""
        return f"EMACallback({self.name})"

    # What Lightning calls, in its order.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Collective: every rank must call it. Check the trainer, and follow its saves.

        Raises:
            AttachError: the strategy cannot be served, or two callbacks get in each other's way.
            ConfigError: the trainer writes to a place that is no folder of a file system.
        """
        self._average.begin_run()
        exchange = self._average.exchange
        with ended_for_all(exchange, "EMACallback"):
            exchange.arrive("EMACallback")
            exchange.agree("EMACallback", lambda: self._check(trainer, stage))
        if not any(followed() is trainer for followed in self._followed):
            self._followed.append(weakref.ref(trainer))
            extend(trainer, "save_checkpoint", functools.partial(self._saving, trainer))
            extend(trainer.strategy, "remove_checkpoint", functools.partial(self._removing, trainer))
            for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
                extend(loop, "run", functools.partial(self._running, trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of updates that a checkpoint was saved with. No communication."""
        self._average.expect(state_dict["num_updates"])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the number of updates into a checkpoint, which ties the average to it. No communication."""
        if self.ema is not None and self._average.is_of(pl_module):
            checkpoint.setdefault("callbacks", {})[self.state_key] = {"num_updates": self.ema.num_updates}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Collective: every rank must call it. Build the average, or load it, and follow the optimizers."""
        ema = self._average.current(trainer, pl_module)
        watch = self._average.watch
        if ema is not None and watch is not None:
            trained = trained_parameters(trainer.model)
            stepping = [optimizer for optimizer in trainer.optimizers if _steps_any(optimizer, trained)]
            self._stop_steps()
            self._steps = StepsOfBatches(ema, watch, stepping)
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
        if self.ema is not None and self._consolidate and not trainer.fast_dev_run:
            root = os.path.join(trainer.default_root_dir, self.name)
            for track in self.ema.tracks:
                self.ema.consolidate(root if len(self.ema.tracks) == 1 else os.path.join(root, track), track=track)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the live weights back, and leave the optimizers. No communication."""
        self._swap_out()
        self._stop_steps()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Collective after `fit`. Load the average of a checkpoint if no step was left, and remember others."""
        self._swap_out()
        self._link_last(trainer)
        if stage == "fit" and trainer.ckpt_path:
            self._average.current(trainer, pl_module)
        self._average.end_run(trainer, pl_module)

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
        if stage == "fit" and trainer.world_size != self._average.exchange.world_size:
            raise AttachError(
                f"the Trainer counts {trainer.world_size} process(es), the process group "
                f"{self._average.exchange.world_size}: the ranks train apart, and an average would mix different "
                "models. Give Trainer(devices=..., num_nodes=...) all of them"
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

    def _swap_in(self, trainer: Any, module: Any) -> None:
        if self.evaluate == "live" or self._is_live_pass or trainer.sanity_checking or self._swap is not None:
            return
        with _no_inference():
            ema = self._average.current(trainer, module)
            if ema is not None and ema.num_updates:
                swap = ExitStack()
                swap.enter_context(ema.average_parameters(ema.tracks[0]))
                self._swap = swap

    def _swap_out(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None:
            with _no_inference():
                swap.close()

    def _saving(self, trainer: Any, former: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Collective: every rank must call it. `trainer.save_checkpoint`: first the average, then its checkpoint."""
        ema = self.ema
        if ema is None or not self._average.is_of(trainer.lightning_module) or self not in trainer.callbacks:
            former(filepath, *args, **kwargs)
            return
        was_swapped = self._swap is not None
        self._swap_out()
        if self._steps is not None:
            self._steps.before_save()
        work = functools.partial(place_for, filepath, self.name, as_folder=writes_folders(trainer.strategy))
        ema.save(self._average.exchange.on_rank_0("save_checkpoint", lambda: str(work())))
        former(filepath, *args, **kwargs)
        if was_swapped:
            self._swap_in(trainer, trainer.lightning_module)

    def _removing(self, trainer: Any, former: Any, filepath: Any) -> None:
        """`strategy.remove_checkpoint`. No communication."""
        former(filepath)
        if self._average.exchange.rank == 0 and self in trainer.callbacks:
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
        if self.ema is not None and self._average.exchange.rank == 0:
            link_last(trainer, self.name)


@contextmanager
def _no_inference() -> Iterator[None]:
    """A context out of the inference mode of an evaluation, whose tensors no later update could write to."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _steps_any(optimizer: torch.optim.Optimizer, parameters: Mapping[int, str]) -> bool:
    return any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"])
