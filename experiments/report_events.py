"""The event tables a report reads, and where the pass over them runs: DuckDB in this process, or Spark.

A report reads its events a few times and keeps what it found per unit. Only that pass grows with the log, so only it
can run on Spark; what it keeps is read by DuckDB, where all statistics are computed. Both engines run the same SQL:
the few functions of DuckDB's that Spark lacks are defined there under the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from plait.errors import DataError, StoreError
from plait.offline.engine import Engine, open_engine

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DAY_US = 86_400_000_000
TABLES = ("exposures", "feedback", "impressions")
SLICE_ROWS = 10_000_000  # what DuckDB joins and groups at a time: some 500 MB

_SPARK_FUNCTIONS = (
    "epoch_us(moment TIMESTAMP) RETURNS BIGINT RETURN unix_micros(moment)",
    "make_timestamptz(us BIGINT) RETURNS TIMESTAMP RETURN timestamp_micros(us)",
    "isfinite(value DOUBLE) RETURNS BOOLEAN RETURN NOT isnan(value) AND abs(value) < double('infinity')",
    f"day_of(us BIGINT) RETURNS BIGINT RETURN us DIV {DAY_US}",
    "in_slice(key STRING) RETURNS BOOLEAN RETURN true",
)


class Events(Protocol):
    """The views exposures, feedback and impressions, and DuckDB's connection to what is kept of them."""

    @property
    def db(self) -> duckdb.DuckDBPyConnection: ...

    def keep(self, name: str, query: str, *, n_rows: int = 0) -> None:
        """Compute `query` over the events and what was kept before; its rows are table `name` of `db`.

        A query that groups by key and has n_rows to do so names the rows it takes by in_slice(key): see `slices`.
        """

    def drop(self, name: str) -> None: ...


class DuckDBEvents:
    """Everything in one DuckDB connection, spilling to disk."""

    def __init__(self, db: duckdb.DuckDBPyConnection, folder: Path) -> None:
        self.db = db
        for table in TABLES:
            define_view(db, folder, table)

    def keep(self, name: str, query: str, *, n_rows: int = 0) -> None:
        create_by_slices(self.db, name, query, n_rows)

    def drop(self, name: str) -> None:
        self.db.execute(f"DROP TABLE {name}")


class SparkEvents:
    """Events read by Spark; what is kept of them is parquet, read by Spark and by DuckDB."""

    def __init__(self, db: duckdb.DuckDBPyConnection, folder: Path, engine: Engine) -> None:
        self.db, self._scratch, self._n = db, engine.scratch, 0
        self._spark: SparkSession = engine.spark
        for function in _SPARK_FUNCTIONS:
            self._spark.sql(f"CREATE OR REPLACE TEMPORARY FUNCTION {function}")
        for table in TABLES:
            define_view(db, folder, table)
            self._read(table, sorted((folder / table).glob("*.parquet")), columns=_view_columns(db, folder, table))

    def keep(self, name: str, query: str, *, n_rows: int = 0) -> None:
        self._n += 1
        folder = self._scratch / f"{name}-{self._n}"
        # A backslash, which can only stand in a text here, escapes in Spark's SQL but not in DuckDB's.
        self._spark.sql(query.replace("\\", "\\\\")).write.parquet(str(folder))
        parts = sorted(folder.glob("part-*.parquet"))
        self._read(name, parts)
        self.db.execute(
            f"CREATE OR REPLACE TEMP TABLE {name} AS SELECT * FROM read_parquet({quote(str(folder))} || '/part-*')"
        )

    def drop(self, name: str) -> None:
        self._spark.catalog.dropTempView(name)
        self.db.execute(f"DROP TABLE {name}")

    def _read(self, name: str, parts: list[Path], columns: str = "*") -> None:
        if not parts:
            parts = [self._scratch / f"{name}-none.parquet"]
            pq.write_table(event_schema(name).empty_table(), parts[0])
            columns = "*"
        frame = self._spark.read.option("mergeSchema", "true").parquet(*map(str, parts))
        frame.createOrReplaceTempView(f"{name}_parts")
        self._spark.sql(f"SELECT {columns} FROM {name}_parts").createOrReplaceTempView(name)


@contextmanager
def open_events(
    folder: Path, *, engine: str = "duckdb", memory: str = "1000MB", threads: int | None = None
) -> Iterator[Events]:
    """The event tables under `folder` for the length of the block.

    memory: DuckDB's limit, beyond which it spills. engine: "duckdb", or "spark" for the pass over the events
    (PLAIT_SPARK_MASTER names a cluster, PLAIT_MEMORY sizes its driver).
    Raises UnknownNameError for another engine, DataError for a table that lacks a column or has a corrupt part.
    """
    with TemporaryDirectory(prefix="plait-report-") as scratch, duckdb.connect() as db:
        db.execute(f"SET memory_limit = {quote(memory)}; SET preserve_insertion_order = false; SET TimeZone = 'UTC'")
        db.execute(f"SET temp_directory = {quote(scratch)}")
        if threads:
            db.execute(f"SET threads = {threads}")
        db.execute(f"CREATE TEMP MACRO day_of(us) AS us // {DAY_US}")
        with readable(folder):
            if engine == "duckdb":
                yield DuckDBEvents(db, folder)
            else:
                with open_engine(engine, threads=threads, scratch=Path(scratch)) as spark:
                    yield SparkEvents(db, folder, spark)


def slices(db: duckdb.DuckDBPyConnection, n_rows: int) -> Iterator[int]:
    """0, 1, …: meanwhile in_slice(key) is true for one part of the keys after another, of some SLICE_ROWS rows each.

    A join and a GROUP BY of all keys at once each want their hash tables in memory; DuckDB spills one, but not both.
    """
    n = 1 + n_rows // SLICE_ROWS
    for i in range(n):
        test = "true" if n == 1 else f"hash(key) % {n} = {i}"
        db.execute(f"CREATE OR REPLACE TEMP MACRO in_slice(key) AS {test}")
        yield i


def create_by_slices(db: duckdb.DuckDBPyConnection, name: str, query: str, n_rows: int) -> None:
    """Table `name` with the rows of `query`, a slice of the keys at a time."""
    for i in slices(db, n_rows):
        db.execute(f"INSERT INTO {name} {query}" if i else f"CREATE OR REPLACE TEMP TABLE {name} AS {query}")


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """DuckDB's complaints about the event tables under `folder` as one clear line."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise StoreError(f"the report needs more memory or disk than it may have: {error}") from error
    except duckdb.Error as error:
        if isinstance(error, duckdb.ProgrammingError) and not isinstance(error, duckdb.InvalidInputException):
            raise  # a query of ours is wrong, not the data
        raise DataError(f"event tables in {folder} cannot be read: {error}; restore that part or delete it") from error


@contextmanager
def event_views(folder: Path, *tables: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection, in UTC, with views over the named event tables under `folder`."""
    with readable(folder), duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        for table in tables:
            define_view(db, folder, table)
        yield db


def define_view(db: duckdb.DuckDBPyConnection, folder: Path, table: str) -> None:
    """A view over one event table; empty, with the table's schema, where there is no file yet."""
    if any((folder / table).glob("*.parquet")):
        db.execute(
            f"CREATE TEMP VIEW {table} AS SELECT {_view_columns(db, folder, table)} FROM {_parts(folder, table)}"
        )
    else:
        # A table of DuckDB's own: a join may push filters into a scan that those of Arrow tables cannot take.
        db.register("none", event_schema(table).empty_table())
        db.execute(f"CREATE TEMP TABLE {table} AS SELECT * FROM none")
        db.unregister("none")


def event_schema(table: str) -> pa.Schema:
    """The columns of an event table."""
    from plait.eventlog import EXPOSURES, FEEDBACK, IMPRESSIONS

    return {"exposures": EXPOSURES, "feedback": FEEDBACK, "impressions": IMPRESSIONS}[table]


def _parts(folder: Path, table: str) -> str:
    return f"read_parquet({quote(str(folder / table / '*.parquet'))}, union_by_name = true)"


def _view_columns(db: duckdb.DuckDBPyConnection, folder: Path, table: str) -> str:
    """What to select from the parts: their columns, and as null those that earlier releases did not write.

    Raises DataError for a column that every release wrote.
    """
    from plait.eventlog import LATER_COLUMNS

    if not any((folder / table).glob("*.parquet")):
        return "*"
    described = db.execute(f"DESCRIBE SELECT * FROM {_parts(folder, table)}").fetchall()
    present = {row[0] for row in described}
    schema = event_schema(table)
    lacking = [name for name in schema.names if name not in present and name not in ("features", "created")]
    if missing := [name for name in lacking if name not in LATER_COLUMNS]:
        raise DataError(f"{folder / table} has no column {missing[0]!r}; it holds {', '.join(sorted(present))}")
    kinds = {name: "DOUBLE" if pa.types.is_floating(schema.field(name).type) else "STRING" for name in lacking}
    return ", ".join(["*", *(f"CAST(NULL AS {kind}) AS {name}" for name, kind in kinds.items())])


def micros(moment: datetime) -> int:
    """Microseconds since 1970; exact."""
    return (moment - datetime.fromtimestamp(0, tz=moment.tzinfo)) // timedelta(microseconds=1)


def quote(text: str) -> str:
    """The text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
