"""What the commands have in common: an answer that is bad, and the progress bar."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from dist_ema.errors import DistEMAError

__all__ = ["BadAnswer", "progress_bar"]


class BadAnswer(DistEMAError):
    """An answer to print all the same; the message of the error says what is bad about it."""

    def __init__(self, text: str, bad: str) -> None:
        super().__init__(bad)
        self.text = text


def progress_bar(total_bytes: int) -> tqdm[Any]:
    """A progress bar on stderr, if that is a terminal."""
    return tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False)
