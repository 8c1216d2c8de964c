"""The exceptions of the package.

    DistEMAError
    ├── ConfigError (also ValueError)            an option or a schedule has a value out of range
    ├── UnsupportedModelError (also TypeError)   the model cannot be averaged as it is
    ├── AttachError                              model, optimizer and accelerator do not belong together
    ├── ModelChangedError                        the model is no longer the one that was planned
    ├── SwapError                                not allowed while averages are in the model, streamed, or moved
    ├── CommunicationError                       other ranks died, left the call, or made another one
    ├── RankMismatchError                        the ranks differ in model, options or counter
    └── CheckpointError                          a folder could not be written or read
        ├── CheckpointNotFoundError              there is nothing to read at the path
        ├── CheckpointMismatchError              it belongs to another model or other options
        └── CheckpointCorruptError               it is damaged or was not written by this package

A message says what was given, what was expected and what to do. An error of one of several ranks is raised
on all of them with the same class and text (see `dist_ema.ranks.exchange.Exchange.agree`).
"""

from __future__ import annotations

__all__ = [
    "AttachError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CommunicationError",
    "ConfigError",
    "DistEMAError",
    "ModelChangedError",
    "RankMismatchError",
    "SwapError",
    "UnsupportedModelError",
]


class DistEMAError(Exception):
    """Root of every refusal of this package."""


class ConfigError(DistEMAError, ValueError):
    """An option or a schedule has a value that is out of range."""


class UnsupportedModelError(DistEMAError, TypeError):
    """The model, or one of its tensors, cannot be averaged exactly as it is."""


class AttachError(DistEMAError):
    """The model, the optimizer and the accelerator do not belong together."""


class ModelChangedError(DistEMAError):
    """The model's modules, names or shapes are no longer those the average was built for."""


class SwapError(DistEMAError):
    """The call is not allowed while the averaged weights are in the model, are being streamed, or are being moved."""


class CommunicationError(DistEMAError):
    """The other ranks are gone, have left the call, or did not make it in time."""


class RankMismatchError(DistEMAError):
    """The ranks differ in the model, the options or the number of updates."""


class CheckpointError(DistEMAError):
    """A checkpoint or export could not be written or read."""


class CheckpointNotFoundError(CheckpointError):
    """There is no checkpoint at the given path."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint belongs to another model, or to other options."""


class CheckpointCorruptError(CheckpointError):
    """The checkpoint is damaged, incomplete, or was not written by this package."""


def error_class(name: str) -> type[DistEMAError]:
    """The class of this module called `name`; `DistEMAError` for any other name.

    With it every rank raises an error that one rank reported by name. No communication.
    """
    kind = globals().get(name) if name in __all__ else None
    return kind if isinstance(kind, type) and issubclass(kind, DistEMAError) else DistEMAError


def agreed(error: DistEMAError) -> DistEMAError:
    """The error, marked as one that all ranks raise. No communication."""
    error._agreed = True  # type: ignore[attr-defined]
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether all ranks raise the error. No communication."""
    return getattr(error, "_agreed", False)


def described(failure: Exception) -> tuple[str, str]:
    """Class name and text of the error that all ranks raise for a failure of one. No communication."""
    if isinstance(failure, DistEMAError):
        return type(failure).__name__, str(failure)
    if isinstance(failure, OSError):
        return (
            CheckpointError.__name__,
            f"{type(failure).__name__}: {failure}. Check the path, its permissions and the space",
        )
    return DistEMAError.__name__, f"{type(failure).__name__}: {failure}"
