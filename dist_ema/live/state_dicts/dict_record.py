"""What stands beside the tensors in the dict of an average: its counters, schedules and options. No communication.

    {"tracks": {"ema": {"0.weight": ..., ...}}, "num_updates": 400, "num_refused": 0,
     "schedules": {"ema": <JSON text>}, "options": <JSON text>}

The texts are tensors of bytes, so that nothing of it is pickled, neither by `torch.save` nor by torch's DCP. They have
one length, because DCP refuses to load a tensor into one of another length, and another schedule has another text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.checks import json_object
from dist_ema.disk.manifest import Manifest
from dist_ema.disk.manifest_fields import begun_at, counter, names, starts, tracks
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, ConfigError
from dist_ema.schedules.records import schedule_to_json

__all__ = ["manifest_of_dict", "record_of", "record_tensors"]

_TEXT_BYTES = 4096

# Fields of the record that stand beside the options: DCP would ask an older checkpoint for an entry of their own.
_FURTHER = ("kept_buffers", "starts", "begun_at")


def record_of(state: AveragedState) -> Manifest:
    """The record of the averages of now, as it is compared with that of a dict."""
    return Manifest(
        num_updates=state.num_updates,
        options=_shortened(state.options.to_json()),
        tracks={name: _shortened(schedule_to_json(schedule)) for name, schedule in state.schedules.items()},
        tensors={},
        aliases={},
        kept_buffers=[name for name in state.schedules if state.kept_buffers(name) is not None],
        starts=state.beginnings.starts,
        begun_at=state.beginnings.begun_at,
        written_by={},
    )


def record_tensors(record: Manifest) -> dict[str, Any]:
    """The entries of a dict beside its tracks. The counters are numbers."""
    further = {name: getattr(record, name) for name in _FURTHER if getattr(record, name)}
    return {
        "num_updates": record.num_updates,
        "num_refused": record.num_refused,
        "schedules": {name: _as_tensor(schedule) for name, schedule in record.tracks.items()},
        "options": _as_tensor(_shortened({**record.options, **further})),
    }


def manifest_of_dict(state_dict: Mapping[str, Any], now: Manifest) -> Manifest:
    """The record that a dict has.

    Args:
        state_dict: what `record_tensors` returned, and the tracks. The counters may be tensors.
        now: the record of the averages that take it over, whose tracks it must have.

    Raises:
        CheckpointMismatchError: an entry is missing, or it has other tracks.
        CheckpointCorruptError: an entry is not what `record_tensors` makes.
    """
    expected = {"num_updates", "num_refused", "schedules", "options"}
    if not isinstance(state_dict, Mapping) or not expected <= state_dict.keys():
        given = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise CheckpointMismatchError(
            f"the state dict has {given}, expected {sorted(expected)} and 'tracks', as state_dict() of an average "
            "gives it. For the weights of a model, or of another tool, call start_from(path)"
        )
    schedules = state_dict["schedules"]
    if not isinstance(schedules, Mapping) or schedules.keys() != now.tracks.keys():
        present = list(schedules) if isinstance(schedules, Mapping) else type(schedules).__name__
        raise CheckpointMismatchError(
            f"the state dict holds the tracks {present}, expected {list(now.tracks)}: give the same track names as the "
            "run that saved it"
        )
    try:
        options = json_object(_from_tensor(state_dict["options"]))
        return Manifest(
            num_updates=counter(_number(state_dict["num_updates"])),
            num_refused=counter(_number(state_dict["num_refused"])),
            kept_buffers=names(options.pop("kept_buffers", [])),
            starts=starts(options.pop("starts", {})),
            begun_at=begun_at(options.pop("begun_at", {})),
            options=options,
            tracks=tracks({name: _from_tensor(text) for name, text in schedules.items()}),
            tensors={},
            aliases={},
            written_by={},
        )
    except (ValueError, TypeError, AttributeError, RuntimeError, RecursionError, ConfigError) as error:
        raise CheckpointCorruptError(f"the state dict was changed since an average made it: {error}") from error


def _number(value: object) -> object:
    return value.item() if isinstance(value, torch.Tensor) else value


def _shortened(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, or what tells it from others if its text has no room."""
    text = json.dumps(record)
    if len(text) <= _TEXT_BYTES:
        return dict(record)
    return {"type": "too long a record", "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _as_tensor(record: Mapping[str, Any]) -> torch.Tensor:
    text = json.dumps(record).encode()  # ASCII
    return torch.tensor(list(text.ljust(_TEXT_BYTES)), dtype=torch.uint8, device="cpu")


def _from_tensor(text: torch.Tensor) -> Any:
    return json.loads(bytes(text.cpu().tolist()))
