"""The use of an average, as far as a warning may depend on it. It has no tensor."""

from __future__ import annotations

import dataclasses

__all__ = ["Use"]


@dataclasses.dataclass
class Use:
    """The use of an average so far. It may outlive the average.

    Attributes:
        num_calls: the number of calls of `update`, by a hook or by hand; unlike `num_updates` it is never taken back.
        is_given: whether the averages left their buffers: into a file, a state dict or the model.
        is_begun_on_purpose: whether the user set the counter, by a load, by `start_from`, or by `restart`.
        first_start: the number of the update at which the first track began.
        tracks_with_buffers: the tracks with whose average buffers were kept at some time, by a swap or in a checkpoint.
    """

    num_calls: int = 0
    is_given: bool = False
    is_begun_on_purpose: bool = False
    first_start: int = 0
    tracks_with_buffers: set[str] = dataclasses.field(default_factory=set)
