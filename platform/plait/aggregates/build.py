"""Build feature tables: whole, by the increment, or re-tiling just the keys that late files touch.

Cost of an increment is that of the new events and of those that can still leave a window. Parts are written aside and
renamed, the manifest last; a build that dies leaves the old table, or one that the next build puts right.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from plait.aggregates.attributes import changed_versions, unknown_at
from plait.aggregates.events import (
    ENTER,
    FULL,
    TIME,
    check_magnitudes,
    copy_order,
    has_copies,
    normalised,
    once,
    raw_events,
)
from plait.aggregates.manifest import (
    BuildManifest,
    FileStamps,
    added,
    read_manifest,
    source_stamps,
    stamps,
    state_folder,
    table_folder,
    write_manifest,
)
from plait.aggregates.parts import TIMESTAMP, StateWriter, TableWriter, part_name, part_span
from plait.aggregates.plan import Plan
from plait.aggregates.sources import check_sources, corrupt_part_named
from plait.aggregates.spec import ATTRIBUTE_KEYS, AggregateSpec
from plait.aggregates.tables import (
    AT,
    Base,
    Span,
    feature_rows,
)
from plait.errors import StoreError
from plait.files import atomic_file, atomic_folder, full_disk_told, remove_orphans
from plait.offline.engine import Engine, open_engine

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from plait.settings import Home

# Rows sorted at once: about 100 bytes each, so that a shard fits the default memory limit several times over.
SHARD_ROWS = 8_000_000
MAX_PARTS = 32
Mode = Literal["full", "increment", "retile", "current"]


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did. retiled_keys: keys whose history late files changed."""

    view: str
    mode: Mode
    rows: int
    retiled_keys: int
    seconds: float


def build_view(
    home: Home,
    spec: AggregateSpec,
    *,
    until: datetime,
    engine: str = "duckdb",
    memory: str | None = None,
    full: bool = False,
    shard_rows: int = SHARD_ROWS,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Bring the feature table of `spec` up to `until` (aware), which is normally the home's now.

    on_shard: told how many of how many shards are written. Raises DataError for events that are missing, corrupt or
    lack a column; StoreError if another build of the view runs. The table stays as it was then.
    """
    started = time.monotonic()
    until_us = round(until.timestamp() * 1_000_000)
    with _only_builder(home, spec.name):
        check_sources(home, spec)
        with corrupt_part_named(home, spec), open_engine(engine, memory=memory) as running:
            builder = _Builder(home, spec, running, until_us, shard_rows, on_shard)
            mode, rows, retiled = builder.build(full)
    return BuildReport(view=spec.name, mode=mode, rows=rows, retiled_keys=retiled, seconds=time.monotonic() - started)


class _Builder:
    def __init__(
        self,
        home: Home,
        spec: AggregateSpec,
        engine: Engine,
        until_us: int,
        shard_rows: int,
        on_shard: Callable[[int, int], None],
    ) -> None:
        self.home, self.spec, self.plan, self.engine = home, spec, Plan(spec), engine
        self.until_us, self.shard_rows, self.on_shard = until_us, shard_rows, on_shard
        self.folder = table_folder(home, spec.name)
        self.state = state_folder(home, spec.name)
        self.keys = list(spec.keys)
        self._schema: pa.Schema | None = None

    def build(self, full: bool) -> tuple[Mode, int, int]:
        sources = source_stamps(self.home, self.spec)
        before = None if full else self._usable_manifest(sources)
        if before is None:
            return "full", self._full(sources), 0
        new = [
            self.home.events / self.spec.events.table / name
            for name in added(before.sources[self.spec.events.table], sources[self.spec.events.table]) or []
        ]
        if before.until_us == self.until_us and sources == before.sources:
            return "current", 0, 0
        if self._attributes_reach_back(before, sources):
            return "full", self._full(sources), 0
        rows, retiled = self._extend(before, sources, new)
        return ("retile" if retiled else "increment"), rows, retiled

    def _usable_manifest(self, sources: dict[str, FileStamps]) -> BuildManifest | None:
        """The manifest if the table can be extended from it, else None."""
        before = read_manifest(self.home, self.spec.name)
        if before is None or before.spec_hash != self.spec.hash or before.until_us > self.until_us:
            return None
        if any(added(before.sources[name], now) is None for name, now in sources.items()):
            return None
        present = stamps(self.folder)
        if any(present.get(name) != stamp for name, stamp in before.parts.items()):
            return None
        for name in present.keys() - before.parts.keys():  # left by a build that died before its manifest
            (self.folder / name).unlink()
        for aside in self.folder.glob(".*.tmp-*"):  # nobody else writes here: the lock is ours
            aside.unlink()
        remove_orphans(self.folder)
        return before

    def _attributes_reach_back(self, before: BuildManifest, sources: dict[str, FileStamps]) -> bool:
        """Whether new rows of items or users change what old events mean; then only a full build is right."""
        for name in self.spec.events.attribute_tables:
            new = added(before.sources[name], sources[name])
            if not new:
                continue
            key, folder = ATTRIBUTE_KEYS[name], self.home.events / name
            came, had = ([folder / file for file in files] for files in (new, sorted(before.sources[name])))
            changes = changed_versions(self.engine, self.spec.events, name, came, had)
            events = self._raw().filter(ibis._[TIME] <= before.until_us).select(key, TIME)
            touched = events.inner_join(changes, [key, events[TIME] >= changes["_since"]])
            if self.engine.count(touched.limit(1)):
                return True
        return False

    # --- reading ---

    def _raw(self, files: Sequence[Path] | None = None, *, from_us: int | None = None) -> ir.Table:
        table = self.engine.read_parquet(files or self.home.events / self.spec.events.table)
        if files:  # which may lack columns that others have: missing there, as when all are read together
            whole = self.engine.read_parquet(self.home.events / self.spec.events.table).schema()
            absent = {name: ibis.null(dtype) for name, dtype in whole.items() if name not in table.columns}
            table = table.mutate(**absent) if absent else table
        if from_us is not None:
            at = ibis.literal(_moment(from_us), "timestamp('UTC', 6)")
            table = table.filter(table[self.spec.events.time] >= at)
        return raw_events(self.engine, self.plan, table)

    def _attributes(self) -> dict[str, ir.Table]:
        return {name: self.engine.read_parquet(self.home.events / name) for name in self.spec.events.attribute_tables}

    def _normalised(self, raw: ir.Table) -> ir.Table:
        copies = has_copies(self.engine, self.plan, raw)
        return normalised(self.engine, self.plan, raw, self._attributes(), copies=copies)

    @contextmanager
    def _once_normalised(self, raw: ir.Table) -> Iterator[ir.Table]:
        """The normalised events, computed once and stored for the length of the block."""
        events = self._normalised(raw)
        with events.cache() as kept:
            # Spark stores a literal 1 as 32 bits whatever the expression says.
            yield kept.cast(events.schema())

    def _has_late(self, events: ir.Table) -> bool:
        """Whether an event entered after its time: only windows that end care."""
        return bool(self.spec.bounded_us and self.engine.count(events.filter(events[ENTER] > events[FULL]).limit(1)))

    # --- building ---

    def _full(self, sources: dict[str, FileStamps]) -> int:
        raw = self._raw()
        check_magnitudes(self.engine, self.plan, raw)
        shards = self._shards(raw)
        span = Span(until=self.until_us)
        name = part_name(0, self.until_us)
        with self._new_state() as state, atomic_folder(self.folder) as folder:
            self.on_shard(0, len(shards))
            with self._writer(folder / name, raw) as writer:
                for i, shard in enumerate(shards):
                    # Every kind of change, and the state, reads the events: normalise them once.
                    with self._once_normalised(shard) as events:
                        writer.write(feature_rows(self.plan, events, span, late=self._has_late(events)))
                        state.add(events, span, None)
                    self.on_shard(i + 1, len(shards))
        self._commit(sources, state.token, writer.rows)
        return writer.rows

    def _extend(
        self, before: BuildManifest, sources: dict[str, FileStamps], new_files: Sequence[Path]
    ) -> tuple[int, int]:
        since = before.until_us
        raw = self._raw()
        if new_files:
            check_magnitudes(self.engine, self.plan, self._raw(new_files))
        reach, told_again = self._reach(raw, since, new_files)
        raw = self._raw(from_us=reach)
        base = self._read_base(before)
        touched, first_us = self._stragglers(before, new_files, told_again=told_again)
        span = Span(since=since, until=self.until_us)
        name = part_name(since, self.until_us)
        with self._new_state() as state:
            if touched is None:
                with atomic_file(self.folder / name) as aside, self._writer(aside, raw) as writer:
                    with self._once_normalised(raw) as events:
                        writer.write(feature_rows(self.plan, events, span, base=base, late=self._has_late(events)))
                        state.add(events, span, base)
                n_touched = 0
            else:
                n_touched = self.engine.count(touched)
                writer = self._retile(before, raw, base, span, touched, first_us, state)
        self._commit(sources, state.token, before.rows + writer.rows)
        if len(stamps(self.folder)) > MAX_PARTS:
            self._compact(sources, state.token)
        return writer.rows, n_touched

    def _reach(self, raw: ir.Table, since: int, new_files: Sequence[Path]) -> tuple[int, bool]:
        """The earliest event time an increment must read: of events that can still leave, of events that are new or
        known only now however old they claim to be, and of earlier copies of those; and whether there are copies."""
        reach = since - self.plan.longest_us - self.spec.period_us
        ids = list(self.spec.events.id)
        late = [raw.filter(raw["_known"] > since)]
        late += unknown_at(self.engine, self.spec.events, raw, self._attributes(), since)
        if new_files:
            late.append(self._raw(new_files))
        fresh = self.engine.keep(ibis.union(*(events.select(*ids, TIME) for events in late)))
        earliest = fresh[TIME].min().execute()
        copies = raw.semi_join(fresh, ids)
        told = copies.aggregate(first=copies[TIME].min(), n=copies.count()).execute()
        n_ids = self.engine.count(fresh.filter([fresh[name].notnull() for name in ids]).select(*ids).distinct())
        times = [int(value) for value in (earliest, told["first"][0]) if not _missing(value)]
        return min([reach, *times]), int(told["n"][0]) > n_ids

    def _stragglers(
        self, before: BuildManifest, new_files: Sequence[Path], *, told_again: bool
    ) -> tuple[ir.Table | None, int]:
        """Keys whose past new files change, and from when; None if none do.

        Those of events that should have counted already, and those of counted events that a copy takes the place of.
        """
        if not new_files:
            return None, 0
        changed = self._normalised(self._raw(new_files))
        replaced = self._replaced(before, new_files) if told_again else None
        if replaced is not None:
            changed = changed.union(replaced)
        behind = changed.filter(changed[ENTER] <= before.until_us)
        first = behind[ENTER].min().execute()
        if _missing(first):
            return None, 0
        return self.engine.keep(behind.select(*self.keys).distinct()), int(first)

    def _replaced(self, before: BuildManifest, new_files: Sequence[Path]) -> ir.Table | None:
        """Events of earlier builds of which new files hold a copy that was known before; None if there are none."""
        ids = list(self.spec.events.id)
        table = self.spec.events.table
        old = self._raw([self.home.events / table / name for name in before.sources[table]])
        new = self._raw(new_files)
        old = self.engine.keep(old.semi_join(new.select(*ids), ids))
        if not self.engine.count(old):
            return None
        columns = [*ids, *copy_order(self.plan, old)]
        both = old.select(*columns).union(new.semi_join(old, ids).select(*columns))
        counted = once(self.plan, old)
        lost = counted.anti_join(once(self.plan, both), columns)
        return normalised(self.engine, self.plan, lost, self._attributes(), copies=False)

    def _retile(
        self,
        before: BuildManifest,
        raw: ir.Table,
        base: Base,
        span: Span,
        touched: ir.Table,
        first_us: int,
        state: StateWriter,
    ) -> TableWriter:
        """Extend all keys but the touched; compute those anew and put their rows into the parts they belong to."""
        others = self._normalised(raw).anti_join(touched, self.keys)
        base = Base(
            sums=base.sums.anti_join(touched, self.keys),
            seen=tuple(seen.anti_join(touched, self.keys) for seen in base.seen),
        )
        again = self._normalised(self._raw()).semi_join(touched, self.keys)
        whole = Span(until=span.until)
        late = self._has_late(again)
        anew = self.engine.keep(feature_rows(self.plan, again, whole, late=late).filter(ibis._[AT] >= first_us))
        with atomic_folder(self.folder) as folder:
            for name in before.parts:
                start, end = part_span(name)
                if end < first_us:
                    os.link(self.folder / name, folder / name)
                    continue
                part = self.engine.read_parquet([self.folder / name])
                at = ibis.literal(_moment(first_us), "timestamp('UTC', 6)")
                stays = part.filter(part["event_timestamp"] < at).union(
                    part.filter(part["event_timestamp"] >= at).anti_join(touched, self.keys)
                )
                with self._writer(folder / name, raw) as rewritten:
                    rewritten.write_rows(stays)
                    rewritten.write(anew.filter((anew[AT] > start) & (anew[AT] <= end)))
            with self._writer(folder / part_name(span.since, span.until), raw) as writer:
                writer.write(feature_rows(self.plan, others, span, base=base, late=self._has_late(others)))
                writer.write(anew.filter(anew[AT] > span.since))
            # Before the folders change places: a state that finds no room leaves the old table.
            state.add(others, span, base)
            state.add(again, whole, None)
        return writer

    def _compact(self, sources: dict[str, FileStamps], token: str) -> None:
        """Many small parts become one; the rows stay the same."""
        names = sorted(stamps(self.folder), key=part_span)
        joined = part_name(part_span(names[0])[0], part_span(names[-1])[1])
        rows = 0
        with atomic_folder(self.folder) as folder:
            with pq.ParquetWriter(folder / joined, pq.read_schema(self.folder / names[0])) as writer:
                for name in names:
                    for batch in pq.ParquetFile(self.folder / name).iter_batches():
                        writer.write_batch(batch)
                        rows += batch.num_rows
        self._commit(sources, token, rows)

    def _shards(self, raw: ir.Table) -> list[ir.Table]:
        """The events in pieces that share no key, each small enough to sort in memory."""
        listed = any(reference.startswith("items.") for reference in self.spec.events.attributes.values())
        per_event = (1 + len(self.spec.bounded_us) + 2 * len(self.plan.distincts)) * (3 if listed else 1)
        key = next((key for key in self.keys if key in raw.columns and raw[key].type().is_integer()), None)
        if key is None or self.engine.name != "duckdb":
            return [raw]
        n = max(1, math.ceil(self.engine.count(raw) * per_event / self.shard_rows))
        return [raw.filter((raw[key] % n + n) % n == i) for i in range(n)] if n > 1 else [raw]

    # --- writing ---

    @contextmanager
    def _writer(self, path: Path, raw: ir.Table) -> Iterator[TableWriter]:
        if self._schema is None:
            events = normalised(self.engine, self.plan, raw, self._attributes())
            rows = feature_rows(self.plan, events, Span(until=self.until_us), late=False).schema().to_pyarrow()
            stamped = [("event_timestamp", TIMESTAMP), ("created", TIMESTAMP)]
            values = [(name, rows.field(name).type) for name in self.spec.columns]
            self._schema = pa.schema([*((key, rows.field(key).type) for key in self.keys), *stamped, *values])
        writer = TableWriter(path, self._schema, self.engine)
        try:
            yield writer
        finally:
            writer.close()

    @contextmanager
    def _new_state(self) -> Iterator[StateWriter]:
        """A state that is kept if the block ends well; the manifest's commit drops the one before."""
        self.state.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex[:12]
        folder = self.state / token
        try:
            with full_disk_told(folder):
                yield StateWriter(self.plan, self.engine, folder, token)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _read_base(self, before: BuildManifest) -> Base:
        folder = self.state / before.state
        seen = [self.engine.read_parquet(folder / f"seen{i}") for i in range(len(self.plan.distincts))]
        return Base(sums=self.engine.read_parquet(folder / "sums"), seen=tuple(seen))

    def _commit(self, sources: dict[str, FileStamps], token: str, rows: int) -> None:
        write_manifest(
            self.home,
            self.spec.name,
            BuildManifest(
                spec_hash=self.spec.hash,
                until_us=self.until_us,
                sources=sources,
                parts=stamps(self.folder),
                state=token,
                rows=rows,
            ),
        )
        for folder in self.state.iterdir():
            if folder.is_dir() and folder.name != token:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _only_builder(home: Home, view: str) -> Iterator[None]:
    folder = state_folder(home, view)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another `plait features build` is working on {view}; wait for it to end") from error
        yield


def _moment(us: int) -> datetime:
    """A python datetime, cut to the years that python knows."""
    least, greatest = -62_135_596_800_000_000, 253_402_300_799_999_999
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=max(least, min(us, greatest)))


def _missing(value: object) -> bool:
    return value is None or value != value
