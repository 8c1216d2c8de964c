"""The warnings before a save: it replaces a better average, or it has no update. A run gives each of them once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.usage import Use
from dist_ema.boxes.plan import Plan
from dist_ema.checkpoint.writing import Pieces
from dist_ema.disk.folders import commit
from dist_ema.disk.formats.headers import read_small
from dist_ema.disk.manifest import MANIFEST_NAME
from dist_ema.errors import DistEMAError
from dist_ema.messages import tell
from dist_ema.ranks.exchange import Exchange

__all__ = ["SaveWarnings"]


# An average of fewer updates is no loss: it comes from a smoke run or a test.
_FEWEST_TO_LOSE = 3

# Tensors of which a save looks at some elements: a step with a loss of NaN spoils all of them.
_MOST_SAMPLED = 64


class SaveWarnings:
    """What this run has warned of, and the weights that it began with."""

    def __init__(self) -> None:
        self._warned_of_better = False
        self._warned_of_no_updates_in: int | None = None  # an epoch of the exchange
        self._warned_of_buffers = False
        self._warned_of_nan = False
        self._sample: bytes | None = None
        self._expected_from = 0  # the number of updates when the sample was taken
        self._user_resumes = False
        self._written: set[Path] = set()

    def expect_updates(self, plan: Plan, num_updates: int, *, user_resumes: bool) -> None:
        """Keep a sample of the live weights: `warn_of_no_updates` looks whether they have changed. No communication.

        Waits for the device: a few elements of every tensor go to the host.

        Args:
            plan: the model as boxes.
            num_updates: the number of updates so far.
            user_resumes: whether the user's own program says when a run resumes, and may forget it; no trainer does.
        """
        self._sample = _live_sample(plan)
        self._user_resumes = self._user_resumes or user_resumes
        self._expected_from = num_updates

    def tell_of_a_better_one(self, target: Path, num_updates: int, use: Use) -> None:
        """On rank 0: warn if an average of more updates is at `target`. No communication.

        Where the user's program resumes, and a hook saves, an average of any number counts that this run has not
        written: one that was attached too late may have caught up by now. There is no warning after a load,
        `start_from` or `restart`: there the user chose where the counter stands.
        """
        is_first = target not in self._written
        self._written.add(target)
        if self._warned_of_better or use.is_begun_on_purpose:
            return
        saved = _updates_in(target)
        is_lost = saved is not None and (saved > num_updates or (is_first and self._user_resumes))
        if saved is not None and is_lost and saved >= _FEWEST_TO_LOSE:
            self._warned_of_better = True
            tell(
                f"{target} holds an average of {saved} updates, and this save replaces it by one of {num_updates}: an "
                "average that is attached after load_state, or built without load, begins anew. To go on from the "
                "saved one, attach before load_state (or call load first); to keep both, save into another folder; if "
                "it is meant to begin anew, call restart() first"
            )

    def warn_of_no_updates(self, exchange: Exchange, plan: Plan, num_updates: int) -> None:
        """Warn if weights of a rank changed, and nothing was averaged since updates were expected.

        Collective until the first update since then, and no communication after that.
        """
        is_stepped = num_updates != self._expected_from
        if is_stepped or self._warned_of_no_updates_in == exchange.epoch or self._sample is None:
            return
        changed = exchange.agree("comparing the weights", lambda: _live_sample(plan) != self._sample)
        if exchange.sum_integers([int(changed)]) != [0]:
            self._warned_of_no_updates_in = exchange.epoch
            since, written = (
                ("", ": what is written are the live weights")
                if num_updates == 0
                else (f" since its checkpoint was loaded, at {num_updates}", "")
            )
            exchange.warn(
                f"the average has had 0 updates{since}, though the weights are no longer those of when it was "
                f"attached{written}. The step() of the attached optimizer was never called (first_step "
                "and second_step of a SAM optimizer do not call it; or another optimizer has stepped): call "
                "ema.update() after each of its steps. If you have only loaded weights, or put an average into the "
                "model, all is well"
            )

    def tell_of_nan(self, target: Path, tracks: Mapping[str, Pieces], part: Plan) -> None:
        """On rank 0: warn if averaged parameters that are written have NaN. No communication.

        It looks at three elements of each of some tensors that this rank owns, and waits for the device.

        Args:
            target: the folder to write.
            tracks: the name of each average that is written, and every box of it that this rank owns, with its values.
            part: the part of the plan that is written.
        """
        if self._warned_of_nan:
            return
        averaged = {spec.fqn for spec in part.specs if spec.averaged and not spec.is_buffer}
        spoilt = [
            track
            for track, pieces in tracks.items()
            if _has_nan([value for box, value in pieces if box.fqn in averaged and value.numel()])
        ]
        if spoilt:
            self._warned_of_nan = True
            tell(
                f"the average (track {', '.join(spoilt)}) that is written to {target} has values that are not a "
                "number: a step with a loss of NaN was made, and averaged. Load a checkpoint from before it; give each "
                "checkpoint a folder of its own, so that this one does not replace it. skip_nonfinite=True keeps NaN "
                "out of an average"
            )

    def tell_of_lost_buffers(self, state: AveragedState, tracks: Sequence[str], part: Plan) -> None:
        """On rank 0: warn if buffers were kept with one of these averages, which has moved since. No communication.

        Args:
            state: the averages of this rank.
            tracks: the names of the averages that are written.
            part: the part of the plan that is written.
        """
        if self._warned_of_buffers or not _has_live_buffers(state.plan):
            return
        lost = [name for name in tracks if name in state.use.tracks_with_buffers and state.kept_buffers(name) is None]
        if lost:
            self._warned_of_buffers = True
            written = "the live buffers" if _has_live_buffers(part) else "no buffers (averaged_only=True)"
            tell(
                f"the buffers that were kept with the average (track {', '.join(lost)}) fitted its former weights, and "
                f"an update has moved it since: what is written has {written}. To write recalibrated ones, run "
                "update_bn in average_parameters(keep_buffers=True) after the last update before the save"
            )


def _has_live_buffers(plan: Plan) -> bool:
    """Whether a part of the plan has buffers such as `update_bn` computes, and not their averages."""
    return any(spec.is_buffer and not spec.averaged and spec.dtype.is_floating_point for spec in plan.specs)


def _updates_in(target: Path) -> int | None:
    """The number of updates of the average at `target`; None if no manifest there has it."""
    with suppress(DistEMAError, OSError, ValueError, RecursionError):
        record = json.loads(read_small(commit.former_of(target) / MANIFEST_NAME))
        if isinstance(record, dict) and type(record.get("num_updates")) is int and record.get("format") == "dist_ema":
            return int(record["num_updates"])
    return None


@torch.no_grad()
def _has_nan(values: Sequence[torch.Tensor]) -> bool:
    """Whether a sample of these tensors has NaN."""
    sampled = values[:: 1 + len(values) // _MOST_SAMPLED]
    return any(bool(_three_elements(value).isnan().any()) for value in sampled)


def _three_elements(values: torch.Tensor) -> torch.Tensor:
    """The first, middle and last element of a tensor that is not empty."""
    indices = [tuple(int((size - 1) * part) for size in values.shape) for part in (0.0, 0.5, 1.0)]
    return torch.stack([values[index] for index in indices])


@torch.no_grad()
def _live_sample(plan: Plan) -> bytes:
    """The bytes of three elements of each averaged parameter that this rank holds: its first, middle and last."""
    elements: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for held in (held for division in plan.divisions if division.averaged for held in division.held):
        if held.spec.is_buffer or not held.box.numel:
            continue
        values = held.values()
        elements.setdefault((values.device, values.dtype), []).append(_three_elements(values))
    return b"".join(torch.cat(sample).cpu().view(torch.uint8).numpy().tobytes() for sample in elements.values())
