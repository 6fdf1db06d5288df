"""Arms that stay: the first arm of each unit of a sticky experiment, in a table, with a bounded memory before it.

Reading a unit for the first time in a process costs one query; writing is left to a thread, because until the row is
there every process computes the same arm anyway. Rows are only ever added: the first writer wins. A database that
hangs costs one request its patience; then nobody asks it for a while, and the hashed arms serve.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from experiments.tables import SCHEMA, sticky_arms
from plait.database import first_line, prepare
from plait.errors import StoreError

logger = logging.getLogger("experiments")
Key = tuple[str, str, str]
_MAX_KNOWN, _MAX_QUEUED, _BATCH = 100_000, 10_000, 500
_PAUSE_S = 5.0  # after a read that hung


class StickyStore:
    """Sticky arms in a database. `dropped` counts rows that found the queue full; their next use tries again.

    patience_s: how long `get` waits for the database.
    """

    def __init__(
        self, engine: sa.Engine, *, patience_s: float = 1.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._patience_s, self._monotonic = engine, patience_s, monotonic
        self._ask_again = -1.0
        self._readers: ThreadPoolExecutor | None = None
        self._known: OrderedDict[Key, str] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: queue.Queue[tuple[Key, str] | threading.Event] = queue.Queue(_MAX_QUEUED)
        self._writer: threading.Thread | None = None
        self._made = False
        self.dropped = 0

    def get(self, experiment: str, unit_kind: str, unit: str) -> str | None:
        """The stored arm, or None. StoreError if the database does not answer."""
        key = (experiment, unit_kind, unit)
        with self._lock:
            arm = self._known.get(key)
            if arm is not None:
                self._known.move_to_end(key)
                return arm
        try:
            arm = self._read_in_time(key)
        except sa.exc.SQLAlchemyError as error:
            raise StoreError(f"sticky arms do not answer: {first_line(error)}") from error
        if arm is not None:
            self._remember(key, arm)
        return arm

    def _read_in_time(self, key: Key) -> str | None:
        if (wait_s := self._ask_again - self._monotonic()) > 0:
            raise StoreError(f"sticky arms do not answer: the database hung; asked again in {wait_s:.0f} s")
        if self._readers is None:
            with self._lock:
                self._readers = self._readers or ThreadPoolExecutor(4, thread_name_prefix="plait-sticky-read")
        reading = self._readers.submit(self._read, key)
        try:
            return reading.result(timeout=self._patience_s)
        except FutureTimeout:
            reading.cancel()
            self._ask_again = self._monotonic() + _PAUSE_S
            raise StoreError(f"sticky arms do not answer: the database took over {self._patience_s:g} s") from None

    def _read(self, key: Key) -> str | None:
        self._create()
        with self._engine.connect() as db:
            return db.execute(sa.select(sticky_arms.c.arm).where(_is(key))).scalar()

    def keep(self, experiment: str, unit_kind: str, unit: str, arm: str) -> None:
        """Store the unit's arm soon; without effect if it has one already."""
        key = (experiment, unit_kind, unit)
        try:
            self._queue.put_nowait((key, arm))
        except queue.Full:
            self.dropped += 1
            return
        self._remember(key, arm)
        if self._writer is None or not self._writer.is_alive():
            with self._lock:
                if self._writer is None or not self._writer.is_alive():
                    self._writer = threading.Thread(
                        target=_write, args=(weakref.ref(self), self._queue), name="plait-sticky", daemon=True
                    )
                    self._writer.start()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until what was kept so far is stored (or was refused by the database); False on time-out."""
        if self._writer is None:
            return True
        done = threading.Event()
        try:
            self._queue.put(done, timeout=timeout_s)
        except queue.Full:
            return False
        return done.wait(timeout_s)

    def forget_others(self, experiments: Collection[str]) -> None:
        """Drop from memory, not from the table, the arms of all other experiments: the table may be pruned of them."""
        with self._lock:
            for key in [key for key in self._known if key[0] not in experiments]:
                del self._known[key]

    def _remember(self, key: Key, arm: str) -> None:
        with self._lock:
            self._known[key] = arm
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)

    def _forget(self, key: Key) -> None:
        with self._lock:
            self._known.pop(key, None)

    def _create(self) -> None:
        if not self._made:
            prepare(self._engine, SCHEMA)
            self._made = True

    def store(self, rows: list[tuple[Key, str]]) -> None:
        """Write rows whose keys are new, at once; on failure forget them, so that their next use tries again."""
        wanted = dict(rows)
        try:
            self._create()
            with self._engine.begin() as db:
                _insert_new(db, wanted)
                for key, arm in wanted.items():
                    stored = db.execute(sa.select(sticky_arms.c.arm).where(_is(key))).scalar()
                    if stored is not None and stored != arm:  # another process, under other weights, was first
                        self._remember(key, stored)
        except sa.exc.SQLAlchemyError as error:
            logger.warning("sticky arms could not be stored, their next use tries again: %s", error)
            for key in wanted:
                self._forget(key)


def _insert_new(db: sa.Connection, wanted: dict[Key, str]) -> None:
    """Insert the rows whose keys are not there yet."""
    rows = [_row(key, arm) for key, arm in wanted.items()]
    if db.dialect.name == "sqlite":
        db.execute(sqlite.insert(sticky_arms).on_conflict_do_nothing(), rows)
    elif db.dialect.name == "postgresql":
        db.execute(postgresql.insert(sticky_arms).on_conflict_do_nothing(), rows)
    else:
        present = [key for key in wanted if db.execute(sa.select(sticky_arms.c.arm).where(_is(key))).first()]
        new = [_row(key, arm) for key, arm in wanted.items() if key not in present]
        if new:
            db.execute(sticky_arms.insert(), new)


def _write(store_ref: weakref.ref[StickyStore], waiting: queue.Queue[Any]) -> None:
    """The writer thread: batches of what is waiting, for as long as somebody holds the store."""
    while True:
        try:
            items = [waiting.get(timeout=1.0)]
        except queue.Empty:
            if store_ref() is None:
                return
            continue
        while len(items) < _BATCH and not waiting.empty():
            items.append(waiting.get_nowait())
        store = store_ref()
        rows = [item for item in items if not isinstance(item, threading.Event)]
        if store is not None and rows:
            store.store(rows)
        for item in items:
            if isinstance(item, threading.Event):
                item.set()
        del store


def _is(key: Key) -> sa.ColumnElement[bool]:
    experiment, unit_kind, unit = key
    table = sticky_arms.c
    return sa.and_(table.experiment == experiment, table.unit_kind == unit_kind, table.unit == _bytes(unit))


def _row(key: Key, arm: str) -> dict[str, Any]:
    return {"experiment": key[0], "unit_kind": key[1], "unit": _bytes(key[2]), "arm": arm, "created": datetime.now(UTC)}


def _bytes(unit: str) -> bytes:
    """Ids as bytes: no database's collation or encoding then decides which ids are equal."""
    return unit.encode("utf-8", "surrogatepass")
