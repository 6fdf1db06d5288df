"""Users' own events: parquet, CSV, JSON lines, Delta and Iceberg tables, SQL databases → the home's event tables.

`open_source` streams any of them as Arrow batches; `import_table` gives columns their names and types in the event
table, and writes one parquet file that takes the place of an earlier import of the same source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.dataset as pads
import pyarrow.json as pjson
import pyarrow.parquet as pq

from plait.data.tables import SCHEMAS, TIMESTAMP
from plait.errors import DataError, PlaitError, SettingsError, SpecError, UnknownNameError
from plait.files import atomic_file
from plait.settings import Home

FORMATS = ("parquet", "csv", "jsonl", "delta", "iceberg", "sql")
UNITS = ("s", "ms", "us", "ns")
BATCH_ROWS = 65_536
REQUIRED = {
    "impressions": ("timestamp", "user_id", "item_id"),
    "feedback": ("type", "timestamp", "user_id"),
    "users": ("user_id", "event_timestamp"),
    "items": ("item_id", "event_timestamp"),
}
_ID = {"impressions": "request_id", "feedback": "event_id"}
_TIME = {"impressions": "timestamp", "feedback": "timestamp", "users": "event_timestamp", "items": "event_timestamp"}
_OPEN = ("users", "items")  # these may have any further attribute


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSpec:
    """How a source becomes rows of an event table.

    source: a path, a folder of parts, or an SQLAlchemy URL. columns: event column -> source column; others keep their
    name. constants: event column -> value for every row (scene, type, …). unit: of timestamps that are numbers.
    query: SQL to run, or `table` to read whole, for databases.
    """

    kind: str
    source: str
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "s"
    query: str | None = None
    table: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCHEMAS:
            raise UnknownNameError("event table", self.kind, SCHEMAS)
        if self.unit not in UNITS:
            raise UnknownNameError("time unit", self.unit, UNITS)
        if self.kind not in _OPEN:
            known = SCHEMAS[self.kind].names
            for name in (*self.columns, *self.constants):
                if name not in known:
                    raise UnknownNameError("column", name, known, where=self.kind)
        if both := set(self.columns) & set(self.constants):
            raise SpecError(f"{self.kind}: {', '.join(sorted(both))} is given both as a column and as a constant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What `import_table` wrote."""

    kind: str
    path: Path
    rows: int


def detect_format(source: str) -> str:
    """The format a source's name and content tell. Raises DataError if they tell none.

    >>> detect_format("postgresql://db/events")
    'sql'
    """
    if "://" in source:
        return "sql"
    path = Path(source)
    if (path / "_delta_log").is_dir():
        return "delta"
    if (path / "metadata").is_dir() or source.endswith(".metadata.json"):
        return "iceberg"
    suffixes = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    files = [path] if path.is_file() else sorted(file for file in path.glob("**/*") if file.suffix in suffixes)
    found = {suffixes[file.suffix] for file in files if file.suffix in suffixes}
    if len(found) == 1:
        return found.pop()
    what = "does not exist" if not path.exists() else f"holds {', '.join(sorted(found)) or 'none of the known formats'}"
    raise DataError(f"{source} {what}; give a path and a format of {', '.join(FORMATS)}")


def open_source(
    source: str, *, as_format: str | None = None, query: str | None = None, table: str | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of a source, in its own columns and types, without holding it whole.

    Raises DataError for a source that is missing or corrupt (with the line or file, as the reader knows it),
    UnknownNameError for an unknown format or SQL table, SettingsError if the format's library is not installed.
    """
    known = as_format or detect_format(source)
    if known not in FORMATS:
        raise UnknownNameError("format", known, FORMATS)
    if known == "sql":
        yield from _sql(source, query, table)
        return
    if not Path(source).exists():
        raise DataError(f"{source} does not exist; give the path of a {known} file or table")
    readers = {"parquet": _parquet, "csv": _csv, "jsonl": _json_lines, "delta": _delta, "iceberg": _iceberg}
    with _plain_errors(source, known):
        yield from readers[known](Path(source))


def import_table(home: Home, spec: ImportSpec) -> Imported:
    """Write the source into events/<kind>/ as one file; importing the same source again replaces that file.

    Impressions without a request_id and feedback without an event_id get one from the source and the row's number.
    `created` defaults to the row's own time. Raises DataError; the table is then as it was.
    """
    identity = hashlib.sha256(json.dumps([spec.source, spec.query, spec.table]).encode()).hexdigest()[:12]
    target = home.events / spec.kind / f"import-{identity}.parquet"
    rows = 0
    with atomic_file(target) as aside:
        writer: pq.ParquetWriter | None = None
        try:
            for batch in open_source(spec.source, as_format=spec.format, query=spec.query, table=spec.table):
                table = shape(pa.Table.from_batches([batch]), spec, first_row=rows, identity=identity)
                writer = writer or pq.ParquetWriter(aside, table.schema)
                writer.write_table(table.cast(writer.schema))
                rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
        if writer is None or rows == 0:
            raise DataError(f"{spec.source} holds no row; nothing was imported")
    return Imported(kind=spec.kind, path=target, rows=rows)


def shape(table: pa.Table, spec: ImportSpec, *, first_row: int = 0, identity: str = "row") -> pa.Table:
    """Rows of a source in the event table's columns and types. Raises DataError naming the column."""
    schema = SCHEMAS[spec.kind]
    taken: dict[str, Any] = {}
    names = list(dict.fromkeys([*schema.names, *(table.column_names if spec.kind in _OPEN else ()), *spec.columns]))
    renamed = set(spec.columns.values())
    for name in names:
        source = spec.columns.get(name, name)
        if name in spec.constants:
            taken[name] = pa.array([spec.constants[name]] * table.num_rows)
        elif source in table.column_names and not (name not in spec.columns and name in renamed):
            taken[name] = table.column(source)
        elif name in spec.columns:
            raise UnknownNameError("source column", source, table.column_names, where=spec.source)
    for name in REQUIRED[spec.kind]:
        if name not in taken:
            raise DataError(
                f"{spec.source} gives no {name!r} for {spec.kind}; its columns are {', '.join(table.column_names)}: "
                f"say which one it is"
            )
    number = _ID.get(spec.kind)
    if number and number not in taken:
        taken[number] = pa.array([f"{identity}-{first_row + i}" for i in range(table.num_rows)])
    types = {field.name: field.type for field in schema}
    out = {}
    for name in names:
        if name not in taken:
            continue
        wanted = types.get(name)
        out[name] = taken[name] if wanted is None else _convert(taken[name], wanted, f"{spec.kind}.{name}", spec.unit)
    out.setdefault("created", out[_TIME[spec.kind]])
    for name in REQUIRED[spec.kind]:
        if nulls := out[name].null_count:
            raise DataError(f"{spec.source}: {nulls} rows from row {first_row} on have no {name!r}, which is required")
    for name in schema.names:
        out.setdefault(name, pa.nulls(table.num_rows, types[name]))
    ordered = [*schema.names, *(name for name in out if name not in types)]
    return pa.table({name: out[name] for name in ordered})


def _convert(column: Any, wanted: pa.DataType, name: str, unit: str) -> Any:
    given = column.type
    try:
        if not pa.types.is_timestamp(wanted) or pa.types.is_timestamp(given):
            return column.cast(wanted)
        if pa.types.is_floating(given):
            scale = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}[unit]
            return pc.round(pc.multiply(column, scale)).cast(pa.int64()).cast(TIMESTAMP)
        if pa.types.is_integer(given):
            return column.cast(pa.int64()).cast(pa.timestamp(unit, tz="UTC")).cast(wanted, safe=False)
        if pa.types.is_date(given):
            return column.cast(pa.timestamp("us")).cast(wanted)
        # ISO 8601 text; without an offset it is UTC, as all times here.
        text = column.cast(pa.string())
        zoned = pc.match_substring_regex(text, r"(Z|[+-]\d\d:?\d\d)$")
        return text.cast(TIMESTAMP) if pc.all(zoned).as_py() else text.cast(pa.timestamp("us")).cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{name} came as {given} and cannot become {wanted}: {error}") from error


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"no parquet file in {path}")
    for file in files:
        with _plain_errors(str(file), "parquet"), pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(batch_size=BATCH_ROWS)


def _csv(path: Path) -> Iterator[pa.RecordBatch]:
    files = sorted([*path.rglob("*.csv"), *path.rglob("*.tsv")]) if path.is_dir() else [path]
    for file in files:
        delimiter = "\t" if file.suffix == ".tsv" else ","
        with _plain_errors(str(file), "csv"):
            yield from pcsv.open_csv(file, parse_options=pcsv.ParseOptions(delimiter=delimiter))


def _json_lines(path: Path) -> Iterator[pa.RecordBatch]:
    files = sorted([*path.rglob("*.jsonl"), *path.rglob("*.ndjson")]) if path.is_dir() else [path]
    for file in files:
        with _plain_errors(str(file), "jsonl"):
            yield from pjson.open_json(file)


def _delta(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        from deltalake import DeltaTable
    except ImportError as error:
        raise SettingsError(
            "reading Delta tables needs deltalake; install it with `pip install plait[lakes]`"
        ) from error
    # Only files of the table's present version: those it has removed still lie in the folder.
    dataset: pads.Dataset = DeltaTable(str(path)).to_pyarrow_dataset()
    yield from dataset.to_batches(batch_size=BATCH_ROWS)


def _iceberg(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        from pyiceberg.table import StaticTable
    except ImportError as error:
        raise SettingsError(
            "reading Iceberg tables needs pyiceberg; install it with `pip install plait[lakes]`"
        ) from error
    if path.is_dir():
        versions = sorted((path / "metadata").glob("*.metadata.json"))
        if not versions:
            raise DataError(f"{path} has no metadata/*.metadata.json; it is no Iceberg table")
        path = max(versions, key=lambda file: json.loads(file.read_text()).get("last-updated-ms", 0))
    yield from StaticTable.from_metadata(str(path)).scan().to_arrow_batch_reader()


def _sql(url: str, query: str | None, table: str | None) -> Iterator[pa.RecordBatch]:
    import sqlalchemy as sa

    if bool(query) == bool(table):
        raise SpecError("reading a database needs either a query or the name of a table")
    try:
        address = sa.make_url(url)
        engine = sa.create_engine(address)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise SettingsError(
            f"cannot open the database: {error}; give an SQLAlchemy URL and install its driver"
        ) from error
    shown = address.render_as_string(hide_password=True)
    try:
        with engine.connect() as connection:
            if table:
                known = sa.inspect(connection).get_table_names()
                if table not in known:
                    raise UnknownNameError("table", table, known, where=shown)
                statement: Any = sa.select(sa.Table(table, sa.MetaData(), autoload_with=connection))
            else:
                statement = sa.text(str(query))
            result = connection.execution_options(stream_results=True).execute(statement)
            names = list(result.keys())
            for rows in result.partitions(BATCH_ROWS):
                yield _batch(names, rows)
    except PlaitError:
        raise
    except (sa.exc.SQLAlchemyError, pa.ArrowException) as error:
        raise DataError(f"{shown} cannot be read: {str(error)[:500]}") from error
    finally:
        engine.dispose()


def _batch(names: Sequence[str], rows: Sequence[Any]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True))
    return pa.RecordBatch.from_arrays([pa.array(list(column)) for column in columns], names=list(names))


@contextmanager
def _plain_errors(source: str, known: str) -> Iterator[None]:
    try:
        yield
    except PlaitError:
        raise
    except Exception as error:  # each library has its own tree of errors, and all of them mean the same here
        raise DataError(f"{source} cannot be read as {known}: {error}") from error
