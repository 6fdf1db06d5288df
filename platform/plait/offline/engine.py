"""Where the offline expressions run: DuckDB in this process (spilling to disk), or Spark.

Both give the same rows for the same ibis expression: the time zone is UTC, the numbers are 64-bit, the row order is
only ever what the caller asked for. Nothing here is shared between threads or calls.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from plait.errors import DataError, SettingsError, StoreError, UnknownNameError

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from ibis.backends import BaseBackend
    from pyspark.sql import DataFrame, SparkSession

EngineName = Literal["duckdb", "spark"]
ENGINES: tuple[EngineName, ...] = ("duckdb", "spark")
DEFAULT_MEMORY = "2GB"
WRITTEN = ("_written_file", "_written_row")


@ibis.udf.scalar.builtin(name="epoch_us", signature=(("timestamp",), "int64"))
def _epoch_us(moment):  # type: ignore[no-untyped-def]
    """DuckDB's name of it."""


@ibis.udf.scalar.builtin(name="unix_micros", signature=(("timestamp",), "int64"))
def _unix_micros(moment):  # type: ignore[no-untyped-def]
    """Spark's name of it."""


@dataclass(kw_only=True)
class Engine:
    """An ibis connection and a scratch folder of its own."""

    name: EngineName
    connection: BaseBackend
    scratch: Path
    _cached: list[Any] = field(default_factory=list)
    _files: list[str] = field(default_factory=list)  # what was read, to find the part that an error is about

    def read_parquet(self, source: Path | Sequence[Path], columns: Sequence[str] | None = None) -> ir.Table:
        """A folder of parquet parts (or the files themselves) as one table; `columns` keeps only those.

        Raises DataError if there is no part, or a part is corrupt.
        """
        files = parquet_files(source)
        check_parquet(files)
        paths = [str(file) for file in files]
        self._files += paths
        if self.name == "duckdb":
            table = self.connection.read_parquet(paths, table_name=_name("parquet"), union_by_name=True)
        else:
            table = self.spark_table(self.spark.read.option("mergeSchema", "true").parquet(*paths))
        return table.select(*columns) if columns is not None else table

    def read_written(self, files: Sequence[str], *, base: str | None = None) -> ir.Table:
        """The same with the columns of WRITTEN, which rise in the order in which the rows were written.

        files: in order of their names. base: the folder below which `key=value` folders are columns.
        """
        self._files += files
        if self.name == "duckdb":
            name = _name("written")
            listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
            self.connection.raw_sql(
                f"CREATE TEMP VIEW {name} AS SELECT *, file_index::BIGINT AS {WRITTEN[0]}, "
                f"file_row_number::BIGINT AS {WRITTEN[1]} FROM read_parquet([{listed}], union_by_name = true)"
            )
            return self.connection.table(name)
        reader = self.spark.read.option("mergeSchema", "true")
        frame = (reader.option("basePath", base) if base else reader).parquet(*files)
        place = ("_metadata.file_path", "_metadata.row_index")
        return self.spark_table(
            frame.selectExpr("*", *(f"{column} AS {name}" for column, name in zip(place, WRITTEN, strict=True)))
        )

    def from_arrow(self, table: pa.Table) -> ir.Table:
        """A small in-memory table, visible to this engine (through a scratch file, so dtypes and zones survive)."""
        path = self.scratch / f"{_name('arrow')}.parquet"
        pq.write_table(table, path)
        return self.read_parquet([path])

    def keep(self, expr: ir.Table) -> ir.Table:
        """Compute `expr` once; later expressions read the stored result.

        A DuckDB table, or parquet in Spark's scratch: Spark's own cache keeps the whole plan that led to it, and
        plans that grow with every step take longer to analyse than to run.
        """
        if self.name == "duckdb":
            cached = expr.cache()
            self._cached.append(cached)
            return cached
        folder = self.scratch / _name("kept")
        self.spark.sql(self.connection.compile(expr)).write.parquet(str(folder))
        name = folder.name
        self.spark.read.parquet(str(folder)).createOrReplaceTempView(name)
        return self.connection.table(name)

    def count(self, expr: ir.Table) -> int:
        return int(expr.count().execute())

    def to_arrow(self, expr: ir.Table) -> pa.Table:
        """The whole result. Order only as `expr` asks."""
        schema = utc_schema(expr)
        return pa.Table.from_batches(self.batches(expr, schema=schema), schema=schema)

    def batches(
        self, expr: ir.Table, *, rows: int = 65_536, schema: pa.Schema | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The result in batches, in the order `expr` asks for, without holding it whole in memory.

        schema: what to cast to; by default the expression's own, in which Spark's timestamps have no zone.
        """
        schema = schema or utc_schema(expr)
        if self.name == "duckdb":
            for batch in expr.to_pyarrow_batches(chunk_size=rows):
                yield _conform(batch, schema)
            return
        # Through the driver's memory nothing large passes: Spark writes parts, whose names keep the global order.
        folder = self.scratch / _name("result")
        self.spark.sql(self.connection.compile(expr)).write.parquet(str(folder))
        try:
            for part in sorted(folder.glob("part-*.parquet")):
                for batch in pq.ParquetFile(part).iter_batches(batch_size=rows):
                    yield _conform(batch, schema)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def micros(self, moment: ir.TimestampValue) -> ir.IntegerValue:
        """Microseconds since 1970 of a timestamp column; ibis has no operation for it."""
        return (_epoch_us if self.name == "duckdb" else _unix_micros)(moment)

    def spark_table(self, frame: DataFrame) -> ir.Table:
        """A Spark frame as a table of this engine."""
        name = _name("frame")
        frame.createOrReplaceTempView(name)
        return self.connection.table(name)

    @property
    def spark(self) -> SparkSession:
        return self.connection._session

    def release(self) -> None:
        for cached in self._cached:
            cached.release()
        self._cached.clear()


@contextmanager
def open_engine(
    name: str = "duckdb", *, memory: str | None = None, threads: int | None = None, scratch: Path | None = None
) -> Iterator[Engine]:
    """An engine for the length of the block.

    memory: DuckDB's limit ("2GB"; PLAIT_MEMORY overrides the default), beyond which it spills into `scratch`; for
    Spark the driver's memory. PLAIT_SPARK_MASTER names a cluster; without it Spark runs in this process.
    Raises UnknownNameError for an engine that is neither duckdb nor spark, SettingsError if Spark cannot start.
    """
    if name not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    memory = memory or os.environ.get("PLAIT_MEMORY", DEFAULT_MEMORY)
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory, flags=re.IGNORECASE):
        raise SettingsError(f"memory limit {memory!r} is not a size; write it like 500MB or 4GB")
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="plait-engine-", dir=scratch))
    try:
        if name == "duckdb":
            yield from _duckdb(folder, memory, threads)
        else:
            yield from _spark(folder, memory, threads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quiet_ibis() -> None:
    """For commands: ibis 12 calls DuckDB by names that DuckDB 1.5 deprecates, which is no news to who runs a command;
    feast, once imported, has every such warning printed."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ibis\.")


def stack(top: ir.Table, bottom: ir.Table) -> ir.Table:
    """Rows of both, in the columns and types of `top` (Spark narrows a literal's type, so unions must be told)."""
    schema = top.schema()
    return ibis.union(top, bottom.select(*(bottom[name].cast(dtype).name(name) for name, dtype in schema.items())))


def _duckdb(folder: Path, memory: str, threads: int | None) -> Iterator[Engine]:
    # On disk rather than ":memory:": kept intermediate tables may then be larger than the memory limit.
    config: dict[str, Any] = {"memory_limit": memory, "temp_directory": str(folder / "spill")}
    if threads:
        config["threads"] = threads
    engine = None
    try:
        connection = ibis.duckdb.connect(folder / "engine.duckdb", **config)
        # Its bar, on a terminal, would come and go once per query, in between the commands' own.
        connection.raw_sql("SET enable_progress_bar = false")
        engine = Engine(name="duckdb", connection=connection, scratch=folder)
        yield engine
    except duckdb.OutOfMemoryException as error:
        raise StoreError(f"DuckDB ran out of its {memory}: {error}; give more with --memory or PLAIT_MEMORY") from error
    except duckdb.ProgrammingError as error:
        raise DataError(f"DuckDB cannot compute this: {error}") from error
    except duckdb.Error as error:
        from plait.stores.asof_engine import broken_parts

        if engine is not None and (broken := broken_parts(engine._files)):
            raise DataError(f"corrupt parquet: {broken}; restore it, or delete it and write that part again") from error
        if isinstance(error, duckdb.IOException):
            raise StoreError(
                f"DuckDB cannot read its input or spill into {folder}: {error}; if the disk is full, make room there "
                "or let TMPDIR name a larger disk"
            ) from error
        raise DataError(f"DuckDB cannot compute this: {error}") from error
    finally:
        if engine is not None:
            engine.release()
            engine.connection.disconnect()


def _spark(folder: Path, memory: str, threads: int | None) -> Iterator[Engine]:
    try:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise SettingsError("--engine spark needs pyspark; install it with `pip install plait[spark]`") from error
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise SettingsError("--engine spark needs Java 17 and found no `java`; install a JRE or use --engine duckdb")
    # Workers must run this environment's Python, not the machine's.
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    running = SparkSession.getActiveSession()
    builder = SparkSession.builder.appName("plait")
    if running is None:
        master = os.environ.get("PLAIT_SPARK_MASTER", f"local[{threads or '*'}]")
        builder = (
            builder.master(master)
            .config("spark.driver.memory", re.sub(r"\s*i?B$", "", memory, flags=re.IGNORECASE).lower())
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.sql.shuffle.partitions", os.environ.get("PLAIT_SPARK_PARTITIONS", "8"))
            .config("spark.local.dir", str(folder))
            .config("spark.sql.warehouse.dir", str(folder / "warehouse"))
        )
        if master.startswith("local"):  # the executors of a cluster must find the driver by its real name
            builder = builder.config("spark.driver.host", "127.0.0.1")
    session = running.newSession() if running is not None else builder.getOrCreate()
    session.conf.set("spark.sql.session.timeZone", "UTC")
    session.conf.set("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")
    # Parquet timestamps without a zone are UTC here, as in DuckDB, not "no time zone".
    session.conf.set("spark.sql.parquet.inferTimestampNTZ.enabled", "false")
    connection = ibis.pyspark.connect(session)
    engine = Engine(name="spark", connection=connection, scratch=folder)
    try:
        yield engine
    except (PySparkException, Py4JError) as error:
        raise DataError(f"Spark cannot compute this: {str(error)[:2000]}") from error
    finally:
        engine.release()
        if running is None:
            session.stop()


def parquet_files(source: Path | Sequence[Path]) -> list[Path]:
    """The parquet parts of a folder, sorted, or the given files. Raises DataError if there is none."""
    if isinstance(source, Path):
        files = sorted(file for file in source.glob("**/*.parquet") if not file.name.startswith((".", "_")))
        if not files:
            raise DataError(f"no parquet file in {source}; run `plait data prepare` (or roll the event log) first")
        return files
    if not source:
        raise DataError("no parquet file given")
    return list(source)


def check_parquet(files: Sequence[Path]) -> None:
    """Read every part's footer. Raises DataError naming the first part that is missing or corrupt."""
    for file in files:
        with _readable(file):
            pq.read_metadata(file)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file} is not a readable parquet file ({error}); restore it, or delete it and write that part again"
        ) from error


def check_columns(files: Sequence[Path], wanted: Mapping[str, str], *, required: Sequence[str] = ()) -> set[str]:
    """The names that any part has; `wanted` says of which type (string, int64, int32, float64, timestamp) they must be.

    Raises DataError for a part that is corrupt, lacks a required column, or holds one of another type: the part, the
    column, the type found and the types that would do.
    """
    found: set[str] = set()
    for file in files:
        with _readable(file):
            schema = pq.read_schema(file)
        if missing := [name for name in required if name not in schema.names]:
            raise DataError(f"{file} lacks {', '.join(missing)}; its columns are {', '.join(sorted(schema.names))}")
        for name, dtype in wanted.items():
            if name in schema.names and not _FITS[dtype][1](schema.field(name).type):
                raise DataError(
                    f"{file}: column {name!r} is {schema.field(name).type}, expected {_FITS[dtype][0]}; write that "
                    "part again, or bring foreign events in with `plait data import`, which converts them"
                )
        found.update(schema.names)
    return found


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _or_null(fits: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    """A part in which a column is null throughout may have left its type open."""
    return lambda kind: pa.types.is_null(kind) or fits(kind.value_type if pa.types.is_dictionary(kind) else kind)


_FITS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "string": ("string", _or_null(_is_text)),
    "int64": ("int64 (or a shorter integer)", _or_null(pa.types.is_integer)),
    "int32": ("int32 (or another integer)", _or_null(pa.types.is_integer)),
    "float64": (
        "double (or float, or an integer)",
        _or_null(lambda k: pa.types.is_floating(k) or pa.types.is_integer(k)),
    ),
    "timestamp": ("timestamp[us, tz=UTC]", _or_null(pa.types.is_timestamp)),
}


def utc_schema(expr: ir.Table) -> pa.Schema:
    """The Arrow schema of a result: nullable, timestamps in microseconds UTC whichever engine computes it."""
    micros = pa.timestamp("us", tz="UTC")
    return pa.schema(
        [(spec.name, micros if pa.types.is_timestamp(spec.type) else spec.type) for spec in expr.schema().to_pyarrow()]
    )


def _conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Cast what an engine returns loosely (Spark: no zone; DuckDB: nullable flags) to the expression's schema."""
    columns = []
    for spec in schema:
        column = batch.column(spec.name)
        columns.append(column if column.type == spec.type else column.cast(spec.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _name(kind: str) -> str:
    return f"plait_{kind}_{uuid.uuid4().hex[:12]}"
