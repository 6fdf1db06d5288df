"""Online values from a stream of events, by the same declarations as the feature tables.

New events are normalised by the batch's own expression, then move the running values of their keys; a key that is met
for the first time brings its history along from the event tables. Rows that changed, by an event or because one left
a window, are pushed through Feast with the event_timestamp that the feature table gives the same values.

Nothing is kept on disk: a stream that starts again reads its folder again, and events count once by their ids. Of
copies that name different keys the first to arrive counts, or of those in the event tables the one known first. Where
another was known before, the tables say otherwise: that is logged; the next build and materialization put it right.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ibis
import pyarrow as pa

from plait.aggregates.events import ENTER, ID, TIME, normalised, raw_events
from plait.aggregates.keystate import KeyState
from plait.aggregates.plan import Plan
from plait.aggregates.spec import AggregateSpec
from plait.errors import PlaitError, StoreError
from plait.offline.engine import Engine, open_engine

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from feast import FeatureStore

    from plait.settings import Home

logger = logging.getLogger(__name__)

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
        # Which keys are columns of the events, not attributes; and per event id what was counted: (enter, time, keys).
        self._own_keys = [i for i, name in enumerate(plan.spec.keys) if name not in plan.spec.events.attributes]
        self._owners: dict[str, tuple[int, int, Key]] = {}

    def absorb(self, events: pa.Table) -> int:
        arrived = self._rows_of(raw_events(self.engine, self.plan, self.engine.from_arrow(events)))
        unknown = {key for key, _ in arrived} - self._keys.keys()
        if unknown:
            self._remember(unknown)
        touched = set()
        n = 0
        for key, rows in arrived:
            if self._owned(key, rows[0]) and self._keys[key].add(rows):
                touched.add(key)
                n += 1
        for key in touched | unknown:
            self._watch(key)
        return n

    def _owned(self, key: Key, row: Mapping[str, Any]) -> bool:
        """Whether this copy of an event is the one that counts: the first that was met."""
        name = row[ID]
        if name is None:
            return True
        owner = tuple(key[i] for i in self._own_keys)
        counted = self._owners.setdefault(name, (row[ENTER], row[TIME], owner))
        if counted[2] == owner:
            return True
        if (row[ENTER], row[TIME]) < counted[:2]:
            logger.warning(
                "%s: event %s counts for %s and was known before for %s; "
                "`plait features build` and `feast materialize` put that right",
                *(self.plan.spec.name, name, counted[2], owner),
            )
        return False

    def advance(self, now: int) -> int:
        while self._timers and self._timers[0][0] <= now:
            _, _, key = heapq.heappop(self._timers)
            if self._keys[key].advance(now):
                self._dirty.add(key)
                self._watch(key)
        if not self._dirty:
            return 0
        rows = self._rows(sorted(self._dirty))
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
        table = raw_events(self.engine, self.plan, self.engine.read_parquet(folder))
        mine, chosen = table, set(wanted)
        for i in self._own_keys:
            name = self.plan.spec.keys[i]
            mine = mine.filter(mine[name].isin(sorted({key[i] for key in chosen})))
        ids = list(self.plan.spec.events.id)
        if self._own_keys:  # with the copies that name other keys, of which one may be the one that counts
            nameless = mine.filter(ibis.or_(*(mine[name].isnull() for name in ids)))
            mine = ibis.union(table.semi_join(mine.select(*ids).distinct(), ids), nameless)
        for key, rows in self._rows_of(mine):
            if self._owned(key, rows[0]) and key in chosen:
                self._keys[key].add(rows)

    def _rows_of(self, raw: ir.Table) -> list[tuple[Key, list[Mapping[str, Any]]]]:
        """Per event and key, the rows of it: more than one if an attribute of the event is a list."""
        attributes = {
            name: self.engine.read_parquet(self.home.events / name) for name in self.plan.spec.events.attribute_tables
        }
        rows = normalised(self.engine, self.plan, raw, attributes)
        if self._schema is None:
            self._schema = self._table_schema(rows)
        found: dict[tuple[Key, Any], list[Mapping[str, Any]]] = {}
        for i, row in enumerate(self.engine.to_arrow(rows).to_pylist()):
            key = tuple(row[name] for name in self.plan.spec.keys)
            event = i if row[ID] is None else row[ID]
            found.setdefault((key, event), []).append(row)
        return [(key, rows) for (key, _), rows in found.items()]

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

    def _rows(self, keys: Sequence[Key]) -> pa.Table:
        assert self._schema is not None  # a key is dirty only after events were normalised
        rows = []
        for key in keys:
            state = self._keys[key]
            # As in the feature table: where both tell of the same moment, the stores keep what was written last.
            stamps = {"event_timestamp": state.at, "created": state.at}
            rows.append(dict(zip(self.plan.spec.keys, key, strict=True)) | stamps | state.values())
        return pa.Table.from_pylist(rows, schema=self._schema)
