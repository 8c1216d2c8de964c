"""Damage done to a saved average, and the error that must answer it: by accident, by a bad disk, or on purpose.

Each case takes the folder of a sound average (one file, or several with an index) and spoils it.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_ema import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError

CORRUPT, MISMATCH, NOT_FOUND = CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError
MANIFEST, TENSORS, INDEX = "manifest.json", "model.safetensors", "model.safetensors.index.json"

Damage = Callable[[Path], None]


def sealed(record: dict[str, Any]) -> str:
    """The manifest's text with the checksum that fits it, as somebody who means harm would write it."""
    record = {key: value for key, value in record.items() if key != "checksum"}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return json.dumps({**record, "checksum": f"{zlib.crc32(text.encode()):08x}"})


def manifest(**changes: Any) -> Damage:
    """Change fields of the manifest; its checksum fits."""

    def damage(folder: Path) -> None:
        record = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(sealed({**record, **changes}))

    return damage


def edited(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Edit the manifest in place; its checksum fits."""

    def damage(folder: Path) -> None:
        record = json.loads((folder / MANIFEST).read_text())
        edit(record)
        (folder / MANIFEST).write_text(sealed(record))

    return damage


def replaced(name: str, content: str | bytes) -> Damage:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, num_bytes: int) -> Damage:
    """Shorten a file, or lengthen it where negative."""

    def damage(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size - num_bytes)

    return damage


def flipped(name: str, position: int) -> Damage:
    """Flip one bit of one byte; from the end where negative."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 4
        (folder / name).write_bytes(content)

    return damage


def header(edit: Callable[[dict[str, Any]], object], *, accepted: bool = True) -> Damage:
    """Edit the header of the tensor file; the manifest accepts the new one, so that only its content can tell."""

    def damage(folder: Path) -> None:
        content = (folder / TENSORS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        record = json.loads(content[8 : 8 + length])
        edit(record)
        text = json.dumps(record).encode()
        text += b" " * (-len(text) % 8)
        rewrite(folder, struct.pack("<Q", len(text)) + text, content[8 + length :], accepted=accepted)

    return damage


def rewrite(folder: Path, start: bytes, rest: bytes, *, accepted: bool = True) -> None:
    (folder / TENSORS).write_bytes(start + rest)
    record = json.loads((folder / MANIFEST).read_text())
    if accepted:
        record["files"][TENSORS] = {"size_bytes": len(start + rest), "checksum": f"{zlib.crc32(start):08x}"}
    (folder / MANIFEST).write_text(sealed(record))


def raw_header(text: bytes, length: int | None = None) -> Damage:
    """Replace the header by some bytes that claim some length."""

    def damage(folder: Path) -> None:
        start = struct.pack("<Q", len(text) if length is None else length) + text
        rewrite(folder, start, (folder / TENSORS).read_bytes()[-64:])

    return damage


def entry(**changes: Any) -> Damage:
    """Change fields of the header's entry of one tensor."""
    return header(lambda record: record["weight"].update(changes))


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def pickled(folder: Path) -> None:
    """What would run code if anything were unpickled."""
    code = b"cos\nsystem\n(S'touch " + str(folder.parent / "executed").encode() + b"'\ntR."
    (folder / TENSORS).write_bytes(code)
    (folder / MANIFEST).write_bytes(code)


def tensor(**changes: Any) -> Damage:
    """Change what the manifest says of one tensor."""
    return edited(lambda record: record["tensors"]["weight"].update(changes))


def index(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Edit the index of several files; the manifest accepts it."""

    def damage(folder: Path) -> None:
        record = json.loads((folder / INDEX).read_text())
        edit(record)
        text = json.dumps(record).encode()
        (folder / INDEX).write_bytes(text)
        told = json.loads((folder / MANIFEST).read_text())
        told["files"][INDEX] = {"size_bytes": len(text), "checksum": f"{zlib.crc32(text):08x}"}
        (folder / MANIFEST).write_text(sealed(told))

    return damage


def swapped(folder: Path) -> None:
    """Exchange the contents of two files."""
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def schedule(record: Any) -> Damage:
    """Replace the record of the only schedule."""
    return manifest(tracks={"ema": record})


def nested(levels: int, **inner: Any) -> dict[str, Any]:
    """A schedule within `levels` others."""
    return {"type": "after", "start_step": 1, "schedule": nested(levels - 1, **inner)} if levels else inner


def sparse(name: str, num_bytes: int) -> Damage:
    """Lengthen a file to a size that nobody wrote, without a disk full of it."""
    return lambda folder: os.truncate(folder / name, num_bytes)


CONSTANT = {"type": "ConstantSchedule", "momentum": 0.5}
HUGE = 10**400

# Records of schedules that ours do not write; each within another one, too.
SCHEDULES: dict[str, Any] = {
    "momentum is text": {**CONSTANT, "momentum": "0.5"},
    "momentum is a list": {**CONSTANT, "momentum": [0.5]},
    "momentum is true": {**CONSTANT, "momentum": True},
    "momentum is null": {**CONSTANT, "momentum": None},
    "momentum is an object": {**CONSTANT, "momentum": {"type": "ConstantSchedule"}},
    "momentum is huge": {**CONSTANT, "momentum": HUGE},
    "momentum is infinite": {**CONSTANT, "momentum": math.inf},
    "momentum is not a number": {**CONSTANT, "momentum": math.nan},
    "momentum is minus zero": {**CONSTANT, "momentum": -0.0},
    "momentum is negative": {**CONSTANT, "momentum": -1},
    "momentum twice": {**CONSTANT, "decay": 0.5},
    "no argument": {"type": "ConstantSchedule"},
    "an argument too many": {**CONSTANT, "self": 1},
    "steps are huge": {"type": "CosineSchedule", "momentum": 0.5, "total_steps": HUGE},
    "steps are a fraction": {"type": "CosineSchedule", "momentum": 0.5, "total_steps": 1.5},
    "steps are text": {"type": "CosineSchedule", "momentum": 0.5, "total_steps": "100"},
    "steps are true": {"type": "CosineSchedule", "momentum": 0.5, "total_steps": True},
    "steps are zero": {"type": "CosineSchedule", "momentum": 0.5, "total_steps": 0},
    "gamma is a list": {"type": "PowerSchedule", "gamma": [1]},
    "gamma is huge": {"type": "PowerSchedule", "gamma": HUGE},
    "width is text": {"type": "PowerSchedule", "sigma_rel": "wide"},
    "width is tiny": {"type": "PowerSchedule", "sigma_rel": 1e-300},
    "half-life is huge": {"type": "HalfLifeSchedule", "fraction": HUGE},
    "half-life is a list": {"type": "HalfLifeSchedule", "fraction": 0.5, "max_half_life_steps": []},
    "inv_gamma is text": {"type": "InverseGammaSchedule", "inv_gamma": "1"},
    "ramp begins at a huge step": {"type": "RampSchedule", "update_after_step": HUGE},
    "equal weights of text": {"type": "EqualSchedule", "every_steps": "7"},
    "after nothing": {"type": "after", "start_step": 5},
    "after text": {"type": "after", "start_step": 5, "schedule": "ConstantSchedule"},
    "after a list": {"type": "after", "start_step": 5, "schedule": [CONSTANT]},
    "after null": {"type": "after", "start_step": 5, "schedule": None},
    "after a huge step": {"type": "after", "start_step": HUGE, "schedule": CONSTANT},
    "after a record without a type": {"type": "after", "start_step": 5, "schedule": {"momentum": 0.5}},
    "after a type that is a list": {"type": "after", "start_step": 5, "schedule": {"type": ["ConstantSchedule"]}},
    "every billion": {"type": "every", "num_steps": 10**12, "schedule": CONSTANT},
    "a batch of text": {"type": "scaled_batch", "kappa": "2", "schedule": CONSTANT},
    "a batch that is huge": {"type": "scaled_batch", "kappa": HUGE, "schedule": CONSTANT},
    "wrong around one that only its author knows": {
        "type": "after",
        "start_step": -1,
        "schedule": {"type": "their.Schedule", "repr": "Schedule()"},
    },
    "25 within each other": nested(25, **CONSTANT),
    "40 within each other": nested(40, **CONSTANT),
    "40 within each other, unknown": nested(40, type="their.Schedule"),
    "type is null": {"type": None},
    "type is a number": {"type": 5},
    "type is an object": {"type": {"type": "ConstantSchedule"}},
    "is a list": [CONSTANT],
    "is text": "ConstantSchedule",
    "is null": None,
    "is empty": {},
}

# Of an average in one file.
# Fields of a form, of a plain folder with the tensors `bias` and `weight`.
FORMS: dict[str, dict[str, Any]] = {
    "kind is a list": {"kind": []},
    "kind needs other files": {"kind": "peft"},
    "names are a list": {"names": []},
    "a name is reserved": {"names": {"bias": "__metadata__"}},
    "two tensors of one name": {"names": {"bias": "weight"}},
    "a folder leads out": {"folders": {"bias": ".."}},
    "a folder is absolute": {"folders": {"bias": "/tmp"}},
    "a header is a number": {"headers": {".": {"key": 1}}},
    "a header is elsewhere": {"headers": {"../x": {}}},
    "small files are text": {"small_files": "config.json"},
    **{f"a small file is {name!r}": {"small_files": [name]} for name in (1, "", ".", "../x.json", "a/../x.json")},
    **{f"a small file is {name!r}": {"small_files": [name]} for name in ("/etc/hostname", "a/b/c", MANIFEST, TENSORS)},
    **{f"a small file is {name!r}": {"small_files": [name]} for name in (INDEX, f"a/{TENSORS}", "README.md")},
}

ONE_FILE: dict[str, tuple[Damage, type]] = {
    "no manifest": (removed(MANIFEST), NOT_FOUND),
    "manifest is a folder": (folder_instead(MANIFEST), CORRUPT),
    "manifest is a pipe": (pipe(MANIFEST), CORRUPT),
    "manifest is no JSON": (replaced(MANIFEST, "{]"), CORRUPT),
    "manifest is empty": (replaced(MANIFEST, ""), CORRUPT),
    "manifest is no text": (replaced(MANIFEST, b"\xff\xfe\x00"), CORRUPT),
    "manifest is of another program": (replaced(MANIFEST, "{}"), CORRUPT),
    "manifest is a list": (replaced(MANIFEST, "[]"), CORRUPT),
    "manifest is too deep": (replaced(MANIFEST, "[" * 100_000), CORRUPT),
    "manifest has a flipped bit": (flipped(MANIFEST, 90), CORRUPT),
    "manifest is cut": (cut(MANIFEST, 20), CORRUPT),
    "manifest edited by hand": (
        lambda folder: (
            (folder / MANIFEST).write_text(
                (folder / MANIFEST).read_text().replace('"num_updates": 2', '"num_updates": 3')
            )
            and None
        ),
        CORRUPT,
    ),
    "future version": (manifest(format_version=3), MISMATCH),
    "version is true": (manifest(format_version=True), MISMATCH),
    "no tracks": (manifest(tracks={}), CORRUPT),
    "track leaves the folder": (manifest(tracks={"../../etc": {"type": "CosineSchedule"}}), CORRUPT),
    "track without a type": (manifest(tracks={"ema": {"momentum": 1}}), CORRUPT),
    "type is a list": (manifest(tracks={"ema": {"type": []}}), CORRUPT),
    **{f"schedule: {name}": (schedule(record), CORRUPT) for name, record in SCHEDULES.items()},
    **{
        f"inner schedule: {name}": (schedule(nested(2, **record)), CORRUPT)
        for name, record in SCHEDULES.items()
        if isinstance(record, dict)
    },
    "manifest: form is a list": (manifest(form=[]), CORRUPT),
    "manifest: form is empty": (manifest(form={}), CORRUPT),
    **{
        f"manifest: form: {name}": (manifest(form={"kind": "plain", "stem": "model", **changes}), CORRUPT)
        for name, changes in FORMS.items()
    },
    "aliases are a list": (manifest(aliases=[]), CORRUPT),
    "alias of a number": (manifest(aliases={"tied": 5}), CORRUPT),
    "alias of nothing": (manifest(aliases={"tied": "other"}), CORRUPT),
    "alias of a tensor's name": (manifest(aliases={"bias": "weight"}), CORRUPT),
    "alias that is no text": (manifest(aliases={"half\ud800": "weight"}), CORRUPT),
    "tensor whose name is no text": (
        edited(lambda record: record["tensors"].update({"half\ud800": record["tensors"]["weight"]})),
        CORRUPT,
    ),
    "counter is huge": (manifest(num_updates=HUGE), CORRUPT),
    "counter is infinite": (manifest(num_updates=math.inf), CORRUPT),
    "refused values are huge": (manifest(num_refused=HUGE), CORRUPT),
    "manifest has a number of 5,000 digits": (
        replaced(MANIFEST, '{"format": "dist_ema", "format_version": 2, "num_updates": ' + "9" * 5000 + "}"),
        CORRUPT,
    ),
    "manifest is huge": (sparse(MANIFEST, 2**40), CORRUPT),
    "manifest is larger than any": (sparse(MANIFEST, 360_000_000), CORRUPT),
    "negative counter": (manifest(num_updates=-1), CORRUPT),
    "counter is text": (manifest(num_updates="many"), CORRUPT),
    "options are a list": (manifest(options=[]), CORRUPT),
    "no tensors": (manifest(tensors=[]), CORRUPT),
    "shape is text": (tensor(shape="33"), CORRUPT),
    "shape is nested": (tensor(shape=[[3]]), CORRUPT),
    "shape is negative": (tensor(shape=[-3]), CORRUPT),
    "shape is huge": (tensor(shape=[2**40, 2**40]), CORRUPT),
    "shape is another": (tensor(shape=[2, 8]), CORRUPT),
    "dtype is a number": (tensor(dtype=3), CORRUPT),
    "dtype is another": (tensor(dtype="float64"), CORRUPT),
    "no checksums": (manifest(checksums={}), CORRUPT),
    "checksum of a tensor lacks": (edited(lambda record: record["checksums"]["ema"].pop("weight")), CORRUPT),
    "checksum is a number": (edited(lambda record: record["checksums"]["ema"].update(weight=5)), CORRUPT),
    "file leaves the folder": (
        edited(lambda record: record["files"].update({"../x": {"size_bytes": 1, "checksum": "00000000"}})),
        CORRUPT,
    ),
    "tensors are missing": (removed(TENSORS), CORRUPT),
    "tensors are a pipe": (pipe(TENSORS), CORRUPT),
    "tensors are a folder": (folder_instead(TENSORS), CORRUPT),
    "tensors are empty": (replaced(TENSORS, b""), CORRUPT),
    "tensors are cut": (cut(TENSORS, 10), CORRUPT),
    "tensors are longer": (cut(TENSORS, -10), CORRUPT),
    "first byte of a tensor flipped": (flipped(TENSORS, -64), CORRUPT),
    "last byte of a tensor flipped": (flipped(TENSORS, -1), CORRUPT),
    "header has a flipped bit": (flipped(TENSORS, 40), CORRUPT),
    "header length has a flipped bit": (flipped(TENSORS, 0), CORRUPT),
    "header of another file": (header(lambda record: record["__metadata__"].update(x="y"), accepted=False), CORRUPT),
    "header length beyond the file": (raw_header(b"{}", 2**20), CORRUPT),
    "header length huge": (raw_header(b"{}", 2**63), CORRUPT),
    "header is no JSON": (raw_header(b"{]      "), CORRUPT),
    "header is no text": (raw_header(b"\xff" * 8), CORRUPT),
    "header is a list": (raw_header(b"[]      "), CORRUPT),
    "header is too deep": (raw_header(b"[" * 80_000), CORRUPT),
    "header repeats a name": (
        raw_header(b'{"w":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"w":{"dtype":"F32"}}'),
        CORRUPT,
    ),
    "header lacks a tensor": (header(lambda record: record.pop("weight")), CORRUPT),
    "header renames a tensor": (header(lambda record: record.update(other=record.pop("weight"))), CORRUPT),
    "metadata is no text": (header(lambda record: record.update(__metadata__={"a": 1})), CORRUPT),
    "dtype unknown": (entry(dtype="F999"), CORRUPT),
    "dtype is a list": (entry(dtype=["F32"]), CORRUPT),
    "dtype of other size": (entry(dtype="F64"), CORRUPT),
    "dtype of the same size": (entry(dtype="I32"), CORRUPT),
    "shape of another tensor": (entry(shape=[2, 2]), CORRUPT),
    "shape transposed": (entry(shape=[2, 8]), CORRUPT),
    "shape is no list": (entry(shape=16), CORRUPT),
    "offsets overlap": (entry(data_offsets=[4, 68]), CORRUPT),
    "offsets beyond the file": (entry(data_offsets=[2**40, 2**40 + 64]), CORRUPT),
    "offsets negative": (entry(data_offsets=[-64, 0]), CORRUPT),
    "offsets reversed": (entry(data_offsets=[64, 0]), CORRUPT),
    "offsets are one": (entry(data_offsets=[0]), CORRUPT),
    "offsets are floats": (entry(data_offsets=[0.0, 64.0]), CORRUPT),
    "a pickle that runs a command": (pickled, CORRUPT),
}

# Of an average in several files with an index.
SEVERAL_FILES: dict[str, tuple[Damage, type]] = {
    "index is huge": (sparse(INDEX, 2**40), CORRUPT),
    "a file of several is missing": (lambda folder: sorted(folder.glob("model-*"))[-1].unlink(), CORRUPT),
    "two files exchanged": (swapped, CORRUPT),
    "index missing": (removed(INDEX), CORRUPT),
    "index is no JSON": (replaced(INDEX, "{]"), CORRUPT),
    "index is empty": (index(lambda record: record.update(weight_map={})), CORRUPT),
    "index lacks a tensor": (index(lambda record: record["weight_map"].pop("weight")), CORRUPT),
    "index names another file": (
        index(lambda record: record["weight_map"].update(weight=record["weight_map"]["bias"])),
        CORRUPT,
    ),
    "index leaves the folder": (
        index(lambda record: record["weight_map"].update(weight="../../../etc/passwd")),
        CORRUPT,
    ),
    "index names an absolute path": (index(lambda record: record["weight_map"].update(weight="/etc/passwd")), CORRUPT),
    "index names a number": (index(lambda record: record["weight_map"].update(weight=7)), CORRUPT),
}
