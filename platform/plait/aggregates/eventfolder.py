"""A folder to which events are appended: parquet files, or the server's log segments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from plait.data.tables import SCHEMAS, conform
from plait.errors import DataError
from plait.eventlog import FEEDBACK, IMPRESSIONS
from plait.eventlog.rolling import impression_rows
from plait.eventlog.segments import CLOSED, OPEN, read_segment

PATIENCE_S = 5.0


class EventFolder:
    """Reads each file, or each further frame of a segment, once. `table`: the event table parquet files belong to.

    A parquet file that cannot be read yet is tried again; once it has not grown for PATIENCE_S it is an error. Segments
    may be rolled away while they are read: their rows are then found in `rolled`, the event tables' folder.
    """

    def __init__(self, folder: Path, *, table: str = "feedback", rolled: Path | None = None) -> None:
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder} to stream from; give --from a folder of event segments or parquet files"
            )
        self.folder, self.table, self.rolled = folder, table, rolled
        self._read: set[str] = set()
        # Of a file that cannot be read: its (size, time of change), and since when these are so.
        self._failed: dict[str, tuple[tuple[int, int], float]] = {}
        self._offsets: dict[str, int] = {}
        self._gone: set[str] = set()

    @property
    def waiting(self) -> bool:
        """Whether a file is there that cannot be read yet."""
        return bool(self._failed)

    def poll(self) -> Iterator[tuple[str, pa.Table]]:
        """What has been added since the last poll: (event table, rows)."""
        yield from self._parquet()
        yield from self._segments()

    def _parquet(self) -> Iterator[tuple[str, pa.Table]]:
        for path in sorted(self.folder.glob("*.parquet")):
            if path.name in self._read or path.name.startswith((".", "_")):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # taken away just now
                self._failed.pop(path.name, None)
                continue
            try:
                rows = pq.read_table(path)
            except (OSError, pa.ArrowInvalid) as error:
                stamp = (stat.st_size, stat.st_mtime_ns)
                before, since = self._failed.get(path.name, (None, 0.0))
                if before != stamp:
                    self._failed[path.name] = (stamp, time.monotonic())
                    continue
                if time.monotonic() - since < PATIENCE_S:
                    continue
                raise DataError(
                    f"{path} is not a readable parquet file ({error}); remove it or write it again"
                ) from error
            self._failed.pop(path.name, None)
            self._read.add(path.name)
            if self.table in SCHEMAS:
                rows = conform(rows, SCHEMAS[self.table], str(path))
            yield self.table, rows

    def _segments(self) -> Iterator[tuple[str, pa.Table]]:
        present = set()
        for path in sorted([*self.folder.glob(f"*{CLOSED}"), *self.folder.glob(f"*{OPEN}")]):
            name = path.name.removesuffix(OPEN).removesuffix(CLOSED)
            present.add(name)
            feedback, shown = [], []
            try:
                for end, kind, records in read_segment(path, self._offsets.get(name, 0)):
                    self._offsets[name] = end
                    if kind == "feedback":
                        feedback += [{"created": record["timestamp"], **record} for record in records]
                    elif kind == "request":
                        shown += [row for record in records for row in impression_rows(record)]
            except FileNotFoundError:
                continue  # renamed by its writer just now: the next poll finds it
            for table, rows, schema in (("feedback", feedback, FEEDBACK), ("impressions", shown, IMPRESSIONS)):
                if rows:
                    yield table, pa.Table.from_pylist(rows, schema=schema)
        yield from self._rolled(set(self._offsets) - present)

    def _rolled(self, gone: set[str]) -> Iterator[tuple[str, pa.Table]]:
        """What a roll took away before its last frames were read here; ids keep what was read from counting twice."""
        if self.rolled is None:
            return
        for name in gone - self._gone:
            self._gone.add(name)
            for table in ("feedback", "impressions"):
                for path in sorted((self.rolled / table).glob(f"log-{name}-*.parquet")):
                    yield table, pq.read_table(path)
