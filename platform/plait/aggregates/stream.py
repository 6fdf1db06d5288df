"""Online values from a stream of events, by the same declarations as the feature tables.

New events are normalised by the batch's own expression, then move the running values of their keys; a key that is met
for the first time brings its history along from the event tables. Rows that changed, by an event or because one left
a window, are pushed through Feast with the event_timestamp that the feature table gives the same values.

Nothing is kept on disk: a stream that starts again reads its folder again, and events count once by their ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from plait.aggregates.events import normalised, raw_events
from plait.aggregates.keystate import KeyState
from plait.aggregates.plan import Plan
from plait.aggregates.spec import AggregateSpec
from plait.errors import PlaitError, StoreError
from plait.offline.engine import Engine, open_engine

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from feast import FeatureStore

    from plait.settings import Home

TIMESTAMP = pa.timestamp("us", tz="UTC")
# view, rows: keys, event_timestamp, created, features
Push = Callable[[str, pa.Table], None]
Key = tuple[Any, ...]


class StreamUpdater:
    """Keeps the running values of the keys it meets. Made by `stream_updater`; not for several threads."""

    def __init__(self, home: Home, specs: Sequence[AggregateSpec], push: Push, engine: Engine) -> None:
        self._views = [_ViewStream(home, Plan(spec), push, engine) for spec in specs]

    @property
    def tables(self) -> set[str]:
        """The event tables that the views read."""
        return {view.plan.spec.events.table for view in self._views}

    def absorb(self, table: str, events: pa.Table) -> int:
        """Take in events of an event table, in its schema, in any order; how many (event, key) pairs were new."""
        if not events.num_rows:
            return 0
        return sum(view.absorb(events) for view in self._views if view.plan.spec.events.table == table)

    def advance(self, now: datetime) -> dict[str, int]:
        """Push every row that changed up to `now` (aware): rows per view.

        Raises StoreError if the online store refuses; what was not pushed is pushed by the next call.
        """
        now_us = round(now.timestamp() * 1_000_000)
        return {view.plan.spec.name: view.advance(now_us) for view in self._views}


@contextmanager
def stream_updater(home: Home, specs: Sequence[AggregateSpec], push: Push) -> Iterator[StreamUpdater]:
    """An updater with a small DuckDB of its own."""
    with open_engine("duckdb", threads=1) as engine:
        yield StreamUpdater(home, specs, push, engine)


def push_through(store: FeatureStore) -> Push:
    """Pushes rows with Feast's write_to_online_store."""

    def push(view: str, rows: pa.Table) -> None:
        frame = rows.to_pandas(types_mapper={pa.int64(): _nullable_int()}.get)
        store.write_to_online_store(view, frame, allow_registry_cache=True)

    return push


def _nullable_int() -> Any:
    import pandas as pd

    return pd.Int64Dtype()


class _ViewStream:
    def __init__(self, home: Home, plan: Plan, push: Push, engine: Engine) -> None:
        self.home, self.plan, self.engine = home, plan, engine
        self._push = push
        self._keys: dict[Key, KeyState] = {}
        self._timers: list[tuple[int, int, Key]] = []
        self._n_timers = 0
        self._dirty: set[Key] = set()
        self._schema: pa.Schema | None = None

    def absorb(self, events: pa.Table) -> int:
        arrived = self._normalised(self.engine.from_arrow(events))
        unknown = {key for key, _ in arrived} - self._keys.keys()
        if unknown:
            self._remember(unknown)
        touched = set()
        n = 0
        for key, event in arrived:
            if self._keys[key].add(event):
                touched.add(key)
                n += 1
        for key in touched | unknown:
            self._watch(key)
        return n

    def advance(self, now: int) -> int:
        while self._timers and self._timers[0][0] <= now:
            _, _, key = heapq.heappop(self._timers)
            if self._keys[key].advance(now):
                self._dirty.add(key)
                self._watch(key)
        if not self._dirty:
            return 0
        rows = self._rows(sorted(self._dirty), now)
        try:
            self._push(self.plan.spec.name, rows)
        except PlaitError:
            raise
        except Exception as error:
            raise StoreError(
                f"{self.plan.spec.name}: the online store took no rows ({error}); they will be sent again"
            ) from error
        self._dirty.clear()
        return rows.num_rows

    def _watch(self, key: Key) -> None:
        """Come back to the key when something of it is due; a timer too many does no harm."""
        at = self._keys[key].next_at
        if at is not None:
            self._n_timers += 1
            heapq.heappush(self._timers, (at, self._n_timers, key))

    def _remember(self, keys: Iterable[Key]) -> None:
        """Make states for keys met for the first time, from what the event tables hold of them."""
        wanted = list(keys)
        for key in wanted:
            self._keys[key] = KeyState(self.plan)
        folder = self.home.events / self.plan.spec.events.table
        if not any(folder.glob("**/*.parquet")):
            return
        table = self.engine.read_parquet(folder)
        direct = [i for i, name in enumerate(self.plan.spec.keys) if name in table.columns]
        chosen = set(wanted)
        for i in direct:
            name = self.plan.spec.keys[i]
            table = table.filter(table[name].isin(sorted({key[i] for key in chosen})))
        for key, event in self._normalised(table):
            if key in chosen:
                self._keys[key].add(event)

    def _normalised(self, table: ir.Table) -> list[tuple[Key, Mapping[str, Any]]]:
        raw = raw_events(self.engine, self.plan, table)
        attributes = {
            name: self.engine.read_parquet(self.home.events / name) for name in self.plan.spec.events.attribute_tables
        }
        rows = normalised(self.engine, self.plan, raw, attributes)
        if self._schema is None:
            self._schema = self._table_schema(rows)
        names = self.plan.spec.keys
        found = self.engine.to_arrow(rows).to_pylist()
        return [(tuple(row[name] for name in names), row) for row in found]

    def _table_schema(self, rows: ir.Table) -> pa.Schema:
        plain = rows.schema().to_pyarrow()
        kinds = {"count": pa.int64(), "distinct": pa.int64(), "last_time": pa.int64()}
        fields = [(key, plain.field(key).type) for key in self.plan.spec.keys]
        fields += [("event_timestamp", TIMESTAMP), ("created", TIMESTAMP)]
        for feature in self.plan.spec.features:
            windows = self.plan.spec.windows if feature.windowed else ("",)
            for window in windows:
                kind = kinds.get(feature.kind, pa.float64())
                if feature.kind == "last_n":
                    kind = pa.list_(plain.field(f"_l{self.plan.lists.index(feature)}").type)
                fields.append((f"{feature.name}_{window}" if window else feature.name, kind))
        return pa.schema(fields)

    def _rows(self, keys: Sequence[Key], now: int) -> pa.Table:
        assert self._schema is not None  # a key is dirty only after events were normalised
        rows = []
        for key in keys:
            state = self._keys[key]
            # Known now: a late event changes the values of a moment already pushed, and the newer knowledge wins.
            stamps = {"event_timestamp": state.at, "created": max(now, state.at or 0)}
            rows.append(dict(zip(self.plan.spec.keys, key, strict=True)) | stamps | state.values())
        return pa.Table.from_pylist(rows, schema=self._schema)
