"""What has been done with an average, as far as something may have to be said about it. Holds no tensor."""

from __future__ import annotations

import dataclasses

__all__ = ["Use"]


@dataclasses.dataclass
class Use:
    """The use of an average so far. It may outlive the average.

    Attributes:
        num_calls: of `update`, by a hook or by hand; unlike `num_updates` it is never taken back.
        is_given: whether the averages left their buffers: into a file, a state dict or the model.
        is_begun_on_purpose: whether the user chose where the counter stands, by a load, `start_from` or `restart`.
    """

    num_calls: int = 0
    is_given: bool = False
    is_begun_on_purpose: bool = False
