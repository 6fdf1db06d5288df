"""Writing so that a reader, or a power cut, never sees half a file: write aside, fsync, rename."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plait.errors import StoreError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; on any error the old file stays."""
    with atomic_file(path) as aside:
        aside.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends, and vanishes if the block fails.

    Raises StoreError if the disk is full; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with full_disk_told(path):
            yield aside
            put(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `path`, replacing what was there, when the block ends.

    On failure the old folder stays. Of two that end at once the later takes the place, whole. Linux exchanges the two
    folders in one step; elsewhere it is two renames, so that a reader in between finds nothing and should try again.
    What killed writers of `path` left beside it is removed. Raises StoreError if the disk is full.
    """
    with folder_beside(path) as aside:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        _take_place(aside, path)
        fsync_folder(path.parent)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder for what becomes the file `path`, which the caller puts in its place with `put`; gone afterwards.

    What killed writers of `path` left beside it is removed. Raises StoreError if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(path)
    aside, claim = _claimed_aside(path)
    try:
        with full_disk_told(path):
            yield aside
    finally:
        os.close(claim)
        shutil.rmtree(aside, ignore_errors=True)


def put(file: Path, path: Path) -> None:
    """Make `file`, which lies on the same disk, `path`, durably and in one step."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
    file.replace(path)
    fsync_folder(path.parent)


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turns the system's errors about space into a StoreError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        raise StoreError(
            f"cannot write {path}: {os.strerror(error.errno)} ({free:,.0f} MB free there); what was there before is as "
            "it was: make room, or let PLAIT_HOME name a larger disk, and run it again"
        ) from error


def _claimed_aside(path: Path) -> tuple[Path, int]:
    """A new folder beside `path` and its lock, which the kernel lets go of when this process dies."""
    while True:
        aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        aside.mkdir()
        # Another writer may take it for an orphan before it is locked, or before it is even opened.
        try:
            claim = os.open(aside, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(claim, fcntl.LOCK_EX)
        if aside.exists():
            return aside, claim
        os.close(claim)


def _take_place(aside: Path, path: Path) -> None:
    """Rename `aside` to `path`; what was at `path` is then at `aside`, or gone."""
    replaced = []
    while True:
        try:
            aside.rename(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if _exchange(aside, path):
                break
            old = path.with_name(f".{path.name}.old-{uuid.uuid4().hex[:8]}")
            path.rename(old)
            replaced.append(old)
        except FileNotFoundError:
            continue  # another writer moved it away just now
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can (renameat2 of Linux, on most of its file systems)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def remove_orphans(path: Path) -> None:
    """Delete what writers of `path` left that were killed: nobody holds the lock on those folders any more.

    One killed between two renames left the only copy aside: it goes back to its place.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.old-*"):
        with suppress(OSError):
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(path)
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        try:
            claim = os.open(orphan, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # not a folder, or its writer just finished
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(orphan, ignore_errors=True)
        except BlockingIOError:
            continue  # its writer lives
        finally:
            os.close(claim)
