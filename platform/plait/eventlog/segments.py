"""The server's event log: append-only segments, one writer each, group-committed, checksummed.

A segment is a sequence of frames: magic, payload length, CRC-32, payload (orjson of `[kind, records]`). A frame is
whole or it is not there: a reader stops at the first frame whose length or checksum does not hold, so what `kill -9`
or a power cut tears off is exactly what was never acknowledged. The writer holds a lock on its open segment; a
segment that is open but not locked belongs to a dead process and is as final as a closed one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from plait.errors import StoreError
from plait.files import fsync_folder

logger = logging.getLogger("plait")

KINDS = ("request", "feedback", "exposure")
OPEN, CLOSED = ".seg.open", ".seg"
_HEADER = struct.Struct("<2sII")
_MAGIC = b"PL"
_MAX_FRAME_BYTES = 64 << 20


class EventLog:
    """One process's writer; safe to call from many threads. Make it after fork, close it before exit.

    folder: where the segments lie. label: who writes, part of the file name. max_queue: frames that may wait before
    `enqueue` drops. segment_bytes: a segment is closed when it has grown past this. on_lost: set it to hear, in the
    writer's thread, of the kind and number of records that `enqueue` took and that then could not be written.
    """

    def __init__(self, folder: Path, label: str, *, max_queue: int = 10_000, segment_bytes: int = 64 << 20) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.label, self.segment_bytes = folder, label, segment_bytes
        self.n_dropped = 0
        self.n_written = 0
        self.on_lost: Callable[[str, int], None] = lambda kind, n_records: None
        self._queue: queue.Queue[_Pending | None] = queue.Queue(max_queue)
        self._fd = -1
        self._path: Path | None = None
        self._size = 0
        self._closed = False
        self._thread = threading.Thread(target=self._commit_groups, name=f"eventlog-{label}", daemon=True)
        self._thread.start()

    def append(self, kind: str, records: Sequence[Mapping[str, Any]], *, timeout_s: float = 10.0) -> None:
        """Write the records and return once they are on disk.

        Raises StoreError if they could not be made durable (disk full, log closed, time out); none of them is kept
        then, except on a time out, when the outcome is unknown and a retry with the same event ids is safe.
        """
        pending = _Pending(_frame(kind, records))
        self._refuse_when_closed()
        try:
            self._queue.put(pending, timeout=timeout_s)
        except queue.Full as full:
            raise StoreError(f"the event log is {self._queue.maxsize} writes behind; try again later") from full
        if not pending.done.wait(timeout_s):
            raise StoreError(f"the event log did not answer in {timeout_s:g} s; try again, event ids make that safe")
        if pending.error is not None:
            raise StoreError(f"the event log could not write to {self.folder}: {pending.error}") from pending.error

    def enqueue(self, kind: str, records: Sequence[Mapping[str, Any]]) -> bool:
        """Hand the records over without waiting; False, and counted in `n_dropped`, if the queue is full."""
        self._refuse_when_closed()
        try:
            self._queue.put_nowait(_Pending(_frame(kind, records), (kind, len(records))))
        except queue.Full:
            self.n_dropped += len(records)
            return False
        return True

    @property
    def queue_length(self) -> int:
        return self._queue.qsize()

    def flush(self, *, timeout_s: float = 10.0) -> None:
        """Return once everything handed over so far is on disk (or has failed)."""
        pending = _Pending(b"")
        self._queue.put(pending, timeout=timeout_s)
        pending.done.wait(timeout_s)

    def close(self) -> None:
        """Write what waits, close the segment and stop; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(timeout=30)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StoreError("the event log is closed: the process is shutting down")

    def _commit_groups(self) -> None:
        while True:
            group = [self._queue.get()]
            while len(group) < 1000:
                try:
                    group.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            wanted = [pending for pending in group if pending is not None]
            self._commit(wanted)
            if len(wanted) < len(group):
                self._close_segment()
                return

    def _commit(self, group: list[_Pending]) -> None:
        """One write and one fsync for the whole group; on failure the segment is cut back to its last good end."""
        data = b"".join(pending.frame for pending in group)
        error: OSError | None = None
        if data:
            try:
                if self._fd < 0:
                    self._open_segment()
                _write_all(self._fd, data)
                os.fsync(self._fd)
                self._size += len(data)
                self.n_written += sum(1 for pending in group if pending.frame)
            except OSError as failure:
                error = failure
                self._cut_back()
        if error is not None:
            # Told before anyone wakes: whoever sees the log fail finds the counts already right.
            self._tell_lost([pending.unwatched for pending in group if pending.unwatched is not None], error)
        for pending in group:
            pending.error = error
            pending.done.set()
        if self._size > self.segment_bytes:
            self._close_segment()

    def _tell_lost(self, frames: Sequence[tuple[str, int]], error: OSError) -> None:
        for kind in KINDS:
            n_records = sum(n for of, n in frames if of == kind)
            if n_records:
                logger.error("%d %s records could not be written to %s: %s", n_records, kind, self.folder, error)
                try:
                    self.on_lost(kind, n_records)
                except Exception:  # the listener's fault must not end the writer
                    logger.exception("on_lost failed")

    def _open_segment(self) -> None:
        name = f"{self.label}-{os.getpid()}-{time.time_ns()}-{uuid.uuid4().hex[:6]}{OPEN}"
        self._path = self.folder / name
        # Locked before it has its name, so that no roll can take a newborn segment for a dead process's.
        newborn = self._path.with_name(f".{name}")
        self._fd = os.open(newborn, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        newborn.rename(self._path)
        self._size = 0
        fsync_folder(self.folder)

    def _cut_back(self) -> None:
        if self._fd >= 0:
            try:
                os.ftruncate(self._fd, self._size)
            except OSError:
                # The tail cannot be removed: leave this segment to recovery and go on in a new one.
                os.close(self._fd)
                self._fd, self._path = -1, None

    def _close_segment(self) -> None:
        if self._fd >= 0 and self._path is not None:
            os.close(self._fd)
            self._path.rename(self._path.with_name(self._path.name.removesuffix(OPEN) + CLOSED))
            fsync_folder(self.folder)
        self._fd, self._path, self._size = -1, None, 0


class _Pending:
    """unwatched: kind and number of records of a frame that nobody waits for."""

    __slots__ = ("done", "error", "frame", "unwatched")

    def __init__(self, frame: bytes, unwatched: tuple[str, int] | None = None) -> None:
        self.frame, self.unwatched = frame, unwatched
        self.done = threading.Event()
        self.error: OSError | None = None


def read_segment(path: Path, offset: int = 0) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """Whole frames of a segment from byte `offset`: (offset after the frame, kind, records).

    Ends without an error at the first frame that is not whole: what follows was never acknowledged.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, length, checksum = _HEADER.unpack(header)
            if magic != _MAGIC or length > _MAX_FRAME_BYTES:
                return
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            offset += _HEADER.size + length
            kind, records = orjson.loads(payload)
            yield offset, kind, records


def is_final(path: Path) -> bool:
    """Whether nobody will write to this segment any more: it was closed, or its writer is dead."""
    if path.name.endswith(CLOSED):
        return True
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _frame(kind: str, records: Sequence[Mapping[str, Any]]) -> bytes:
    if kind not in KINDS:
        raise ValueError(f"no kind of event {kind!r}; known: {', '.join(KINDS)}")
    payload = orjson.dumps([kind, list(records)], option=orjson.OPT_SERIALIZE_NUMPY)
    if len(payload) > _MAX_FRAME_BYTES:
        raise StoreError(f"{len(records)} records make a frame of {len(payload):,} bytes; send fewer at a time")
    return _HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
