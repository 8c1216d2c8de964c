"""Folders that are either whole or not there: staged beside the target, committed by rename.

    stage:     check everything first; then clear what dead saves left, and make .ema.staging-TOKEN
    publish:   ema -> .ema.old     .ema.staging-TOKEN -> ema     remove .ema.old

[Note: two writers]
Other jobs may save into the same folder at any moment, and only the renames are atomic. So a save remembers the
fingerprint of the content that it is going to replace, and replaces that content or nothing:

    - a folder is renamed onto a free name only, which fails if another save was faster;
    - the content that the first rename has moved is looked at again, and put back if another save wrote it;
    - whole content is removed only when whole content lies at the target, and then under a name of its own.

One of two writers wins, and the other raises an error. contents.py lists the names beside the target.

Every function works on local files only and is called by one rank. No communication.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from dist_ema.disk.folders.carried_files import carry_over, sync
from dist_ema.disk.folders.claims import Claim, is_dead, writer_text
from dist_ema.disk.folders.contents import (
    Content,
    beside,
    content_of,
    fingerprint,
    is_average,
    is_whole,
    old_of,
)
from dist_ema.disk.folders.mounts import free_bytes, is_mount_point, mounted_within
from dist_ema.errors import CheckpointError

__all__ = ["Staged", "discard", "former_of", "publish", "stage", "sync_folder"]

_log = logging.getLogger(__name__)

_ATTEMPTS = 5
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


class Staged:
    """A folder that is being written; the caller of `stage` must publish or discard it.

    Attributes:
        target: the path that it will have.
        folder: the path that it has until then.
    """

    def __init__(self, target: Path) -> None:
        token = secrets.token_hex(6)
        self.target = target
        self.folder = target.parent / f".{target.name}.staging-{token}"
        self._claim = Claim(target.parent / f".{target.name}.writer-{token}")
        self._replaced = fingerprint(former_of(target))

    def make(self) -> bool:
        """Make the empty folder. False if another save took this one for dead before it was claimed."""
        if not self._claim.take():
            return False
        self.folder.mkdir()
        return True

    def is_current(self) -> bool:
        """Whether the content to replace is still there, at the target or as the former content."""
        return fingerprint(former_of(self.target)) == self._replaced

    def was(self, folder: Path) -> bool:
        """Whether the folder has the content to replace."""
        return fingerprint(folder) == self._replaced

    def release(self) -> None:
        """Tell other saves that this one has ended."""
        self._claim.release()


def stage(target: Path, replaceable: Callable[[Path], bool], needed_bytes: int = 0) -> Staged:
    """Make an empty staging folder of `target`, after clearing what dead saves left.

    It refuses a target before it changes anything.

    Args:
        target: the folder that will be committed.
        replaceable: tells whether a folder at the target may be replaced: `is_average` or `is_export`.
        needed_bytes: the number of bytes that will be written.

    Raises:
        CheckpointError: the target exists and may not be replaced, cannot be renamed, or there is too little space.
        OSError: the folder cannot be written.
    """
    _check_replaceable(target, replaceable)
    _clear(target)
    _check_space(target, needed_bytes)
    _make_parents(target)
    for _ in range(_ATTEMPTS):
        staged = Staged(target)
        try:
            if staged.make():
                return staged
        except BaseException:
            discard(staged)
            raise
        discard(staged)
    raise CheckpointError(
        f"{target} cannot be written: other jobs remove what is staged beside it. End them, and retry"
    )


def publish(staged: Staged, unfit: Collection[str] = ()) -> None:
    """Rename the staged folder to its final name, in place of the former content; the change is durable on return.

    Files that the user has added to the former folder are carried over. Once the new folder is in place nothing raises:
    leftovers that cannot be removed are logged, and the next save removes them.

    Args:
        staged: the folder that `stage` returned, filled.
        unfit: names of added files that would be wrong beside the new tensors, and are not carried over.

    Raises:
        CheckpointError: another job has saved into the folder since this one was staged; its save stays.
        OSError: the folder cannot be written; the former content stays.
    """
    target, aside = staged.target, _beside(staged.target, "old")
    try:
        for source in (target,) if is_whole(target) else (target, old_of(target)):
            if source.is_dir():
                carry_over(source, staged.folder, unfit)
        sync_folder(staged.folder)
    except FileNotFoundError as error:
        if staged.is_current():
            raise
        raise _taken(target) from error
    _swap(staged, aside)
    try:
        sync(target.parent)
        if os.path.lexists(aside):
            _remove(aside)
        _retire_old(target)
    except Exception as error:
        _log_once(target, f"{target} is in place, but its folder could not be put in order: {error}")
    staged.release()


def _swap(staged: Staged, aside: Path) -> None:
    """Do the renames. A target that is not whole becomes `aside`: readers and other saves keep what is whole there."""
    target, old = staged.target, old_of(staged.target)
    moved: Path | None = None
    try:
        content = content_of(target)
        if content is Content.FOREIGN or not staged.is_current():
            raise _taken(target)
        if content is not Content.NOTHING:
            if former_of(target) == old:  # the target is not whole, and must not replace the former content, which is
                carry_over(target, old)
                target.rename(aside)
                moved = aside
                if is_whole(aside):  # by another save, since the last look
                    raise _taken(target)
            else:
                _retire_old(target)
                target.rename(old)
                moved = old
                if not staged.was(old):
                    raise _taken(target)
        staged.folder.rename(target)
    except BaseException as error:
        if moved is not None and not os.path.lexists(target):
            with suppress(OSError):  # another save has taken the name at this moment
                moved.rename(target)
        if isinstance(error, OSError) and error.errno in _TAKEN:
            raise _taken(target) from error
        raise


def _taken(target: Path) -> CheckpointError:
    return CheckpointError(
        f"{target} was not written: another job has saved into it, or has removed what was staged, since this save "
        "began. What the other job saved stays. End one of the two jobs, or give each a folder of its own"
    )


def discard(staged: Staged) -> None:
    """Remove a staged folder that will not be published, or has been published. It does not raise an OSError."""
    try:
        if staged.folder.exists():
            _remove(staged.folder)
    except OSError as error:
        _log_once(staged.target, f"{staged.folder} could not be removed: {error}")
    finally:
        staged.release()


def former_of(target: Path) -> Path:
    """The folder that a save replaces: the target, or the former content if that is whole and the target is not."""
    old = old_of(target)
    return old if os.path.lexists(old) and not is_whole(target) and is_whole(old) else target


def _clear(target: Path) -> None:
    """Remove the leftovers beside the target of saves whose writers are dead."""
    for trash in beside(target, "trash"):
        shutil.rmtree(trash, ignore_errors=True)
    staging_name, writer_name = f".{target.name}.staging", f".{target.name}.writer"
    for staging in beside(target, "staging"):
        writer = staging.with_name(writer_name + staging.name.removeprefix(staging_name))
        if staging.name == staging_name or is_dead(writer):  # former versions had no tokens
            with suppress(OSError):  # another save does the same, or the folder belongs to another user
                aside = _beside(target, "trash")
                staging.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
        else:
            _log_once(
                staging,
                f"{staging} stays: {writer_text(writer)} writes it, or wrote it and cannot be looked up from here. If "
                "another job saves here, end one of them; if that process is gone, remove the folder",
            )
    for writer in beside(target, "writer"):
        staging = writer.with_name(staging_name + writer.name.removeprefix(writer_name))
        if not os.path.lexists(staging) and is_dead(writer):
            with suppress(OSError):
                writer.unlink()
    for aside in beside(target, "old"):
        if aside == old_of(target):
            with suppress(OSError):  # the commit raises the error, if the folder is still in its way
                _retire_old(target)
        elif is_whole(former_of(target)):
            shutil.rmtree(aside, ignore_errors=True)
        elif is_whole(aside):
            # Two writers died, one of them in the moment before it saw that it had moved the only whole content.
            with suppress(OSError):
                aside.rename(old_of(target))


def _retire_old(target: Path) -> None:
    """Remove the former content, unless it is the only whole content.

    The folder gets a name of its own first: another save may use the name `.ema.old` by now.
    """
    old = old_of(target)
    before = fingerprint(old)
    if not os.path.lexists(old) or former_of(target) == old:
        return
    aside = _beside(target, "old")
    try:
        os.rename(old, aside)
    except FileNotFoundError:
        return
    if fingerprint(aside) != before:  # another save had put its former content there
        with suppress(OSError):  # another save has cleared it, or has put its former content there again
            os.rename(aside, old)
        return
    _remove(aside)


def _remove(folder: Path) -> None:
    """Remove a folder that has a name of its own. NFS keeps files that are open: the next save clears what stays."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if os.path.lexists(folder):  # otherwise another save has cleared it
            _log_once(folder.parent, f"{folder} could not be removed ({error}): the next save does it")


def _log_once(about: Path, message: str) -> None:
    """Log once, where a warning might raise. The next save mends what is logged."""
    if about not in _logged:
        _logged.add(about)
        _log.warning("%s", message)


_logged: set[Path] = set()


def _beside(target: Path, kind: str) -> Path:
    """A new name beside the target."""
    return target.parent / f".{target.name}.{kind}-{secrets.token_hex(6)}"


def _make_parents(target: Path) -> None:
    """Make the folders above the target, durably."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder, and of all folders below it, durable."""
    for path, _, _ in os.walk(folder):
        sync(Path(path))


def _check_space(target: Path, needed_bytes: int) -> None:
    free = free_bytes(target.parent)
    if free is not None and free < needed_bytes:
        raise CheckpointError(
            f"{target} needs {needed_bytes:,} bytes, and its file system has {free:,} free. A save needs room beside "
            "the former folder, which stays until the new one is complete: make room, or save elsewhere"
        )


def _check_replaceable(target: Path, replaceable: Callable[[Path], bool]) -> None:
    """Refuse a target that must not be replaced. It changes nothing."""
    if os.path.lexists(target) and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder to write or a free name")
    working = _working_folder()
    if working is not None and (target == working or target in working.parents):
        raise CheckpointError(f"{target} is the working folder, and saving replaces the whole folder: name one in it")
    if os.path.lexists(target) and is_mount_point(target):
        raise CheckpointError(
            f"{target} is a mount point, and a save replaces the whole folder by renaming it: name a folder in it, "
            f"such as {target / 'ema'}"
        )
    within = mounted_within(target)
    if within is not None:
        raise CheckpointError(
            f"something is mounted at {within}, within {target}: a save replaces the whole folder, and would empty "
            "what is mounted there. Unmount it, or save into another folder"
        )
    former, content = former_of(target), content_of(target)
    if former != target:
        fits = replaceable(former) and content in (Content.NOTHING, Content.ADDED, Content.PART)
    else:
        fits = content is Content.NOTHING or replaceable(target)
    if not fits:
        refused = former if content is Content.NOTHING else target
        kind = "a saved average" if is_average(refused) else "no saved average of this package"
        old = old_of(target)
        rest = f". The former content is whole, in {old}, and stays there" if is_whole(old) else ""
        raise CheckpointError(
            f"{refused} is {kind}, and this call would "
            f"replace it by something else: give the name of a new or empty folder{rest}"
        )


def _working_folder() -> Path | None:
    """The working folder; None if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None
