"""The loop around a stream updater: read what has arrived, push what has changed, look again."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from plait.aggregates.eventfolder import EventFolder
from plait.aggregates.stream import StreamUpdater
from plait.clock import Clock
from plait.data.tables import SCHEMAS
from plait.errors import DataError, StoreError, UnknownNameError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from plait.settings import Home


@dataclass(frozen=True, kw_only=True)
class Step:
    """One round: (event, key) pairs that were new, rows pushed per view, how long it took."""

    n_events: int
    pushed: dict[str, int]
    seconds: float


def follow(
    updater: StreamUpdater,
    home: Home,
    folder: Path,
    *,
    clock: Clock,
    table: str = "feedback",
    once: bool = True,
    poll_s: float = 0.5,
) -> Iterator[Step]:
    """Rounds over a folder of segments or parquet files: `once` until all that is there is read, else without end.

    A file still being written is waited for; one that stays unreadable is a DataError.
    A store that refuses rows ends a single round with StoreError; following, the rows are tried again.
    """
    source = EventFolder(folder, table=table, rolled=home.events)
    while True:
        yield _step(updater, list(source.poll()), clock, patient=not once)
        if once and not source.waiting:
            return
        time.sleep(poll_s)


def follow_spark(
    updater: StreamUpdater,
    folder: Path,
    *,
    clock: Clock,
    table: str = "feedback",
    once: bool = True,
    poll_s: float = 0.5,
) -> Iterator[Step]:
    """The same from Spark Structured Streaming over a folder of parquet files (and so, over what Spark can read).

    Spark hands its micro-batches over; the running values live here, in the driver.
    """
    from plait.offline.engine import open_engine

    if table not in SCHEMAS:
        raise UnknownNameError("event table", table, SCHEMAS)
    if not folder.is_dir():
        raise DataError(f"no folder {folder} to stream from; give --from a folder of parquet files")
    batches: queue.Queue[tuple[pa.Table, threading.Event]] = queue.Queue()

    def hand_over(frame: DataFrame, _: int) -> None:
        taken = threading.Event()
        batches.put((frame.toArrow(), taken))
        taken.wait()

    with open_engine("spark") as engine:
        from pyspark.sql.pandas.types import from_arrow_schema

        reader = engine.spark.readStream.schema(from_arrow_schema(SCHEMAS[table])).parquet(str(folder))
        writer = reader.writeStream.foreachBatch(hand_over)
        writer = writer.option("checkpointLocation", str(engine.scratch / "checkpoint"))
        trigger = {"availableNow": True} if once else {"processingTime": f"{poll_s} seconds"}
        query = writer.trigger(**trigger).start()
        try:
            while query.isActive or not batches.empty():
                try:
                    rows, taken = batches.get(timeout=poll_s)
                except queue.Empty:
                    yield _step(updater, [], clock, patient=not once)
                    continue
                try:
                    yield _step(updater, [(table, rows.cast(SCHEMAS[table]))], clock, patient=not once)
                finally:
                    taken.set()
            if (error := query.exception()) is not None:
                raise StoreError(f"Spark's stream over {folder} ended: {error}")
        finally:
            query.stop()


def _step(updater: StreamUpdater, arrived: list[tuple[str, pa.Table]], clock: Clock, *, patient: bool) -> Step:
    started = time.monotonic()
    n_events = sum(updater.absorb(table, rows) for table, rows in arrived if table in updater.tables)
    try:
        pushed = updater.advance(clock.now())
    except StoreError:
        if not patient:
            raise
        pushed = {}
    return Step(n_events=n_events, pushed=pushed, seconds=time.monotonic() - started)
