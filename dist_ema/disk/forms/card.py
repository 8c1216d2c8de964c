"""The model card of an export: a small README.md, as the hub shows it. It is written only where the user has none.

The last line of a card of this package has the checksum of the lines before it. So a later export renews its own card,
and leaves a card that the user has edited. No communication.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ema._version import __version__
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import read_small
from dist_ema.disk.forms.form import CARD_NAME, DIFFUSERS, HUB, LORA, PEFT, TIMM, TRANSFORMERS, FolderForm
from dist_ema.errors import CheckpointCorruptError
from dist_ema.schedules.records import schedule_text

__all__ = ["CARD_NAME", "card_text", "merge_card_text", "takes_card"]

# The names by which the hub knows the libraries.
_LIBRARY_NAMES = {
    TRANSFORMERS: "transformers",
    DIFFUSERS: "diffusers",
    LORA: "diffusers",
    PEFT: "peft",
    TIMM: "timm",
    HUB: "pytorch",
}
_LAST_LINE = re.compile(rb"<!-- dist_ema ([0-9a-f]{8}): [^\n]*-->\n?\Z")


def card_text(form: FolderForm | None, schedule: Mapping[str, Any], num_updates: int) -> bytes:
    """The content of the card.

    Args:
        form: the form of the folder.
        schedule: the schedule of the average, as JSON.
        num_updates: the number of its updates.
    """
    facts = [f"schedule: `{schedule_text(schedule)}`", f"updates: {num_updates}"]
    return _card(form, "Averaged weights", "The weights are an average of the weights of a training run.", facts)


def merge_card_text(form: FolderForm | None, facts: Sequence[str], rows: Sequence[tuple[str, float]]) -> bytes:
    """The content of the card of a merge.

    Args:
        form: the form of the folder.
        facts: what there is to say beside the coefficients.
        rows: the sources, oldest first, and their coefficients.
    """
    table = ["| source | coefficient |", "|---|---|"]
    table += [f"| {source.replace('|', chr(92) + '|')} | {coefficient!r} |" for source, coefficient in rows]
    return _card(form, "Merged weights", "The weights are a weighted sum of the weights below.", facts, table)


def _card(form: FolderForm | None, title: str, says: str, facts: Sequence[str], table: Sequence[str] = ()) -> bytes:
    form = form or FolderForm()
    front = {"library_name": _LIBRARY_NAMES.get(form.kind, "safetensors"), "base_model": form.base_model}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value)]
    lines += ["tags:", *([] if table else ["- ema"]), "- dist_ema", "---", "", f"# {title}", "", says, ""]
    base_model = [f"base model: {form.base_model}"] if form.base_model else []
    lines += [f"- {fact}" for fact in (*base_model, *facts, f"written by: dist_ema {__version__}")]
    lines += ["", *table, ""] if table else [""]
    text = ("\n".join(lines) + "\n").encode()
    return text + f"<!-- dist_ema {checksum(text):08x}: an export renews this card until it is edited -->\n".encode()


def takes_card(former: Path) -> bool:
    """Whether an export that replaces a folder has a card of this package: the user has put none there."""
    try:
        content = read_small(former / CARD_NAME) if (former / CARD_NAME).is_file() else None
    except CheckpointCorruptError:
        return False
    if content is None:
        return not (former / CARD_NAME).is_symlink()
    last = _LAST_LINE.search(content)
    return last is not None and int(last[1], 16) == checksum(content[: last.start()])
