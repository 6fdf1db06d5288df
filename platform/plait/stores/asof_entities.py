"""The entity frame: the rows, keys and times that features are joined to, in whatever form they came.

A pandas or Arrow table, a parquet file or folder, SQL for DuckDB, or a date range: each becomes a relation in the
job's connection with the frame's own columns, a row number (__row) and the time in microseconds (__at).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast.data_source import DataSource
from feast.errors import EntityTimestampInferenceException

from plait.errors import StoreError, did_you_mean
from plait.stores.asof_engine import one_line, quote
from plait.stores.asof_sources import is_remote, parquet_relation, resolve_path, source_relation
from plait.stores.asof_sql import AT, ROW, TimeRange, ViewPlan, micros

DEFAULT_TIME_COLUMN = "event_timestamp"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BEFORE_ALL = -(2**62)  # the time of a row without one: DuckDB's ASOF join would match a null with something
_ONE_WORD = re.compile(r"[^\s(]+(\.parquet|/)$")  # a path, though it begin as values.parquet does
_QUERY = re.compile(r"\s*(\(|select\b|with\b|from\b|values\b|table\b|pivot\b|--|/\*)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundEntities:
    """The frame inside a connection: `sql` has `columns` (name → DuckDB type), __row and __at."""

    sql: str
    columns: Mapping[str, str]
    time_column: str
    bounds: TimeRange
    n_rows: int | None
    files: tuple[str, ...] = ()
    table: pa.Table | None = None  # the rows themselves, in order, where the frame is in memory
    registered: Mapping[str, pa.Table] = field(default_factory=dict)  # what `sql` names and a cursor does not see

    def cursor(self, db: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
        """A further connection to `db`, for another thread, in which `sql` works too."""
        own = db.cursor()
        own.execute("SET enable_progress_bar = false")
        for name, table in self.registered.items():
            own.register(name, table)
        return own

    def check_keys(self, view: ViewPlan) -> None:
        """Raises StoreError unless the frame and the source have the view's keys, in types that can be compared."""
        for key, column in view.join_keys.items():
            if column not in self.columns:
                raise StoreError(
                    f"the entity frame has no column {column!r}, a join key of view {view.name!r}; "
                    f"{did_you_mean(column, self.columns)}"
                )
            view.relation.column(key, what=f"a join key of view {view.name!r}")  # raises where there is none
            theirs, ours = view.relation.type_of(key), self.columns[column]
            if (theirs == "VARCHAR") != (ours == "VARCHAR") and '"NULL"' not in (theirs, ours):
                raise StoreError(
                    f"join key {column!r} is {ours} in the entity frame but {theirs} in {view.relation.name} "
                    f"(view {view.name!r}); cast the one that is wrong"
                )


class Entities(Protocol):
    """An entity frame before it meets a connection."""

    def bind(self, db: duckdb.DuckDBPyConnection, views: Sequence[ViewPlan]) -> BoundEntities:
        """The frame in `db`; `views` are the plans without their cutoff and tie decisions. Raises StoreError."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TableEntities:
    """Rows in memory; `table` has its time column as timestamp[us, UTC]."""

    table: pa.Table
    time_column: str

    def bind(self, db: duckdb.DuckDBPyConnection, views: Sequence[ViewPlan]) -> BoundEntities:
        times = self.table[self.time_column]
        numbered = self.table.append_column(ROW, pa.array(np.arange(len(times), dtype=np.int64)))
        at = pc.fill_null(times.cast(pa.int64()), BEFORE_ALL)
        numbered = numbered.append_column(AT, at)
        db.register("__entity", numbered)
        described = db.execute("DESCRIBE SELECT * FROM __entity").fetchall()
        return BoundEntities(
            sql="__entity",
            columns={row[0]: row[1] for row in described if row[0] not in (ROW, AT)},
            time_column=self.time_column,
            bounds=self.bounds(),
            n_rows=self.table.num_rows,
            table=self.table,
            registered={"__entity": numbered},
        )

    def bounds(self) -> TimeRange:
        extremes = pc.min_max(self.table[self.time_column].cast(pa.int64())).as_py()
        return TimeRange(first=extremes["min"], last=extremes["max"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetEntities:
    """Rows in a parquet file or folder, scanned once per run and never held in memory."""

    path: str

    def bind(self, db: duckdb.DuckDBPyConnection, views: Sequence[ViewPlan]) -> BoundEntities:
        relation = parquet_relation(db, self.path, name="the entity frame")
        bound = _bind_query(db, relation.sql, relation.columns, row=relation.row, n_rows=relation.n_rows)
        return replace(bound, files=relation.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryEntities:
    """A DuckDB query. It may read files (relative to the repo) and the project's data sources by their names."""

    query: str
    sources: Mapping[str, DataSource]
    repo_path: Path | None

    def bind(self, db: duckdb.DuckDBPyConnection, views: Sequence[ViewPlan]) -> BoundEntities:
        for name, source in self.sources.items():
            if re.search(rf"(?<![\w']){re.escape(name)}(?![\w'])", self.query):
                db.execute(f"CREATE TEMP VIEW {quote(name)} AS FROM {source_relation(db, source, self.repo_path).sql}")
        query = self.query.strip().rstrip(";")
        try:
            # Run once: a second run of the query need not give the same rows in the same order.
            db.execute(f"CREATE TABLE __query AS FROM ({query})")
        except duckdb.Error as error:
            raise StoreError(
                f"the entity query does not run: {one_line(error)}. It is SQL for DuckDB; tables it may name: "
                f"{', '.join(sorted(self.sources)) or 'none'}, read_parquet('…')"
            ) from error
        columns = {row[0]: row[1] for row in db.execute("DESCRIBE __query").fetchall()}
        counted = db.execute("SELECT count(*) FROM __query").fetchone()
        return _bind_query(db, "__query", columns, row="rowid", n_rows=counted[0] if counted else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeEntities:
    """No frame: one row for each key and moment in [start, end] at which one of the views got a value, in time order.

    A key that a view does not have is null in the rows that come from it.
    """

    start: datetime
    end: datetime

    def bind(self, db: duckdb.DuckDBPyConnection, views: Sequence[ViewPlan]) -> BoundEntities:
        bounds = TimeRange(first=to_micros(self.start), last=to_micros(self.end))
        keys = list(dict.fromkeys(column for view in views for column in view.join_keys.values()))
        spines = []
        for view in views:
            at = f"greatest({view.event}, {view.created})" if view.cutoff and view.created else view.event
            own = dict(zip(view.join_keys.values(), view.keys, strict=True))
            selected = "".join(f", {own.get(key, 'NULL')} AS {quote(key)}" for key in keys)
            # A row without a key is nobody's, and one of which nobody knows when it became known is never known.
            there = [f"{key} IS NOT NULL" for key in view.keys]
            if view.cutoff and view.created:
                there.append(f"{view.created} IS NOT NULL")
            spines.append(
                f"SELECT make_timestamptz({at}) AS {DEFAULT_TIME_COLUMN}{selected} FROM {view.relation.sql} "
                f"WHERE {' AND '.join([f'{at} BETWEEN {bounds.first} AND {bounds.last}', *there])}"
            )
        order = ", ".join([DEFAULT_TIME_COLUMN, *(f"{quote(key)} NULLS LAST" for key in keys)])
        db.execute(f"CREATE TABLE __query AS FROM ({' UNION '.join(spines)}) ORDER BY {order}")
        columns = {row[0]: row[1] for row in db.execute("DESCRIBE __query").fetchall()}
        counted = db.execute("SELECT count(*) FROM __query").fetchone()
        return _bind_query(db, "__query", columns, row="rowid", n_rows=counted[0] if counted else None)


def read_entities(
    frame: object, *, sources: Mapping[str, DataSource], repo_path: Path | None
) -> TableEntities | ParquetEntities | QueryEntities:
    """The frame a user gave: pandas, Arrow, a path to parquet, or SQL. Raises StoreError on anything else."""
    if isinstance(frame, pd.DataFrame):
        return _from_table(_from_pandas(frame))
    if isinstance(frame, pa.RecordBatch):
        return _from_table(pa.Table.from_batches([frame]))
    if isinstance(frame, pa.Table):
        return _from_table(frame)
    if isinstance(frame, Path):
        return ParquetEntities(path=resolve_path(frame, repo_path))
    if isinstance(frame, str):
        path = resolve_path(frame, repo_path)
        if _QUERY.match(frame) and not _ONE_WORD.match(frame):
            return QueryEntities(query=frame, sources=sources, repo_path=repo_path)
        if frame.endswith((".parquet", "/")) or Path(path).exists() or is_remote(path):
            return ParquetEntities(path=path)
        raise StoreError(
            f"the entity frame {frame[:80]!r} is neither SQL (it would begin with SELECT, WITH or FROM) nor a parquet "
            f"file or folder (nothing at {path})"
        )
    raise StoreError(
        f"the entity frame is a {type(frame).__name__}; give a pandas DataFrame, a pyarrow Table, SQL, the path of a "
        "parquet file or folder, or start_date and end_date"
    )


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 UTC; a naive time is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - EPOCH) // timedelta(microseconds=1)


def from_micros(at: int | None) -> datetime | None:
    return None if at is None else EPOCH + timedelta(microseconds=at)


def _from_pandas(frame: pd.DataFrame) -> pa.Table:
    """Arrow of a frame whose time column may be text or hold a mix of zones."""
    name = _time_column({str(column): str(dtype) for column, dtype in frame.dtypes.items()}, _is_pandas_time)
    times = frame[name]
    if not isinstance(times.dtype, pd.DatetimeTZDtype) and not pd.api.types.is_datetime64_dtype(times.dtype):
        try:
            frame = frame.assign(**{name: pd.to_datetime(times, utc=True, format="mixed")})
        except (ValueError, TypeError) as error:
            raise StoreError(f"the entity frame's {name!r} does not hold times: {error}") from error
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except pa.ArrowException as error:
        raise StoreError(f"the entity frame has a column of mixed types: {error}") from error


def _from_table(table: pa.Table) -> TableEntities:
    name = _time_column({field.name: str(field.type) for field in table.schema}, _is_arrow_time)
    for column in table.column_names:
        _refuse_reserved(column)
    utc = pa.timestamp("us", tz="UTC")
    times = table[name]
    try:
        if pa.types.is_string(times.type) or pa.types.is_large_string(times.type):
            times = pa.chunked_array([pa.array(pd.to_datetime(times.to_pandas(), utc=True, format="mixed"))])
        # A naive timestamp is UTC; nanoseconds are cut, as DuckDB itself does.
        times = pc.cast(times, utc, safe=False)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise StoreError(f"the entity frame's {name!r} does not hold times: {error}") from error
    return TableEntities(table=table.set_column(table.column_names.index(name), name, times), time_column=name)


def _bind_query(
    db: duckdb.DuckDBPyConnection, sql: str, columns: Mapping[str, str], *, row: str, n_rows: int | None
) -> BoundEntities:
    name = _time_column(columns, lambda type_: type_.startswith("TIMESTAMP"))
    for column in columns:
        _refuse_reserved(column)
    at = micros(quote(name), columns[name])
    extremes = db.execute(f"SELECT min({at}), max({at}) FROM {sql}").fetchone() or (None, None)
    replaced = f"SELECT * REPLACE (make_timestamptz({at}) AS {quote(name)}), {row} AS {ROW}, "
    replaced += f"coalesce({at}, {BEFORE_ALL}) AS {AT} FROM {sql}"
    return BoundEntities(
        sql=f"({replaced})",
        columns=columns,
        time_column=name,
        bounds=TimeRange(first=extremes[0], last=extremes[1]),
        n_rows=n_rows,
    )


def _time_column(types: Mapping[str, str], is_time: TypeTest) -> str:
    """event_timestamp, or else the only column that holds times. Raises Feast's EntityTimestampInferenceException."""
    if DEFAULT_TIME_COLUMN in types:
        return DEFAULT_TIME_COLUMN
    times = [name for name, type_ in types.items() if is_time(type_)]
    if len(times) != 1:
        raise EntityTimestampInferenceException(DEFAULT_TIME_COLUMN)
    return times[0]


class TypeTest(Protocol):
    def __call__(self, type_: str, /) -> bool: ...


def _is_pandas_time(dtype: str) -> bool:
    return dtype.startswith("datetime64")


def _is_arrow_time(type_: str) -> bool:
    return type_.startswith("timestamp")


def _refuse_reserved(column: str) -> None:
    if column in (ROW, AT):
        raise StoreError(f"the entity frame's column {column!r} has a name that the join uses itself; rename it")
