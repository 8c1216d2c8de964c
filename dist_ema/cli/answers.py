"""What the commands have in common: an answer that is bad, and the progress bar."""

from __future__ import annotations

import json
import math
from typing import Any

from tqdm import tqdm

from dist_ema.errors import DistEMAError

__all__ = ["BadAnswer", "json_answer", "progress_bar"]


class BadAnswer(DistEMAError):
    """An answer to print all the same; the message of the error says what is bad about it."""

    def __init__(self, text: str, bad: str) -> None:
        super().__init__(bad)
        self.text = text


def progress_bar(total_bytes: int) -> tqdm[Any]:
    """A progress bar on stderr, if that is a terminal."""
    return tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False)


def json_answer(facts: dict[str, Any]) -> str:
    """Facts as one JSON object. JSON has no number for NaN and the infinities: they are null."""
    return json.dumps(_finite(facts), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
