"""Users' own events: parquet, CSV, JSON lines, Delta and Iceberg tables, SQL databases → the home's event tables.

`open_source` streams any of them as Arrow batches; `import_table` gives columns their names and types in the event
table, and writes one parquet file that takes the place of an earlier import of the same source.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.data.convert import UNITS, Place, convert
from plait.data.databases import sql_batches
from plait.data.lakes import (
    CATALOG,
    LAKES,
    OBJECT_STORES,
    delta_batches,
    iceberg_batches,
    local_path,
    scheme_of,
    without_secrets,
)
from plait.data.tables import SCHEMAS
from plait.data.textfiles import csv_batches, json_batches
from plait.data.widening import WideningWriter
from plait.errors import DataError, PlaitError, SpecError, UnknownNameError
from plait.files import folder_beside, put
from plait.settings import Home

FORMATS = ("parquet", "csv", "jsonl", "delta", "iceberg", "sql")
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

    source: a path, a folder of parts, a table's address in an object store, iceberg://CATALOG/NAMESPACE.TABLE, or an
    SQLAlchemy URL. columns: event column -> source column; others keep their name. constants: event column -> value
    for every row (scene, type, …). unit: of timestamps that are numbers. query: SQL to run, or `table` to read whole,
    for databases. options: deltalake's storage options, or properties of pyiceberg's catalog or FileIO; never shown.
    """

    kind: str
    source: str
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "s"
    query: str | None = None
    table: str | None = None
    options: Mapping[str, str] = field(default_factory=dict, repr=False)

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
    scheme = scheme_of(source)
    if scheme == CATALOG or (scheme in OBJECT_STORES and source.endswith(".metadata.json")):
        return "iceberg"
    if scheme in OBJECT_STORES:
        shown = without_secrets(source, {})
        raise DataError(f"{shown} tells no format; say which kind of table it is (--format delta or iceberg)")
    if scheme not in ("", "file"):
        return "sql"
    path = local_path(source, "table") or Path()
    if (path / "_delta_log").is_dir():
        return "delta"
    if (path / "metadata").is_dir() or path.name.endswith(".metadata.json"):
        return "iceberg"
    found = {known for known, (_, suffixes) in _FILES.items() if _files(path, suffixes)}
    if len(found) > 1 and path.is_dir():  # a .json beside files of another format is a note about them
        found = {known for known in found if known != "jsonl" or _files(path, _LINES)}
    if len(found) == 1:
        return found.pop()
    what = "does not exist" if not path.exists() else f"holds {', '.join(sorted(found)) or 'none of the known formats'}"
    raise DataError(f"{source} {what}; give a path and a format of {', '.join(FORMATS)}")


def open_source(
    source: str,
    *,
    as_format: str | None = None,
    query: str | None = None,
    table: str | None = None,
    options: Mapping[str, str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of a source, in its own columns and types, without holding it whole.

    Raises DataError for a source that is missing or corrupt (with the line or file, as the reader knows it),
    UnknownNameError for an unknown format or SQL table, SettingsError for a scheme that is unknown or if the format's
    library is not installed.
    """
    for _, batch in _located(source, as_format=as_format, query=query, table=table, options=options or {}, texts=()):
        yield batch


def _located(
    source: str,
    *,
    as_format: str | None,
    query: str | None,
    table: str | None,
    options: Mapping[str, str],
    texts: Collection[str],
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The same, each batch with the file (or table) it is from. texts: columns of CSV files to leave as text."""
    known = as_format or detect_format(source)
    if known not in FORMATS:
        raise UnknownNameError("format", known, FORMATS)
    if options and known not in LAKES:
        raise SpecError(f"options ({', '.join(options)}) are for {' and '.join(LAKES)} tables; {known} takes none")
    if known == "sql":
        for batch in sql_batches(source, query, table, BATCH_ROWS):
            yield "query" if query else f"table {table}", batch
        return
    path = local_path(source, known)
    if path is not None and not path.exists():
        raise DataError(f"{source} does not exist; give the path of a {known} file or table")
    shown = without_secrets(source, options)
    with _plain_errors(shown, known, options):
        if path is None or known in LAKES:
            for batch in (delta_batches if known == "delta" else iceberg_batches)(source, options, BATCH_ROWS):
                yield shown, batch
            return
        read, suffixes = _FILES[known]
        files = _files(path, suffixes) if path.is_dir() else [path]
        if not files:
            raise DataError(f"no {known} file ({', '.join(suffixes)}) in {path}")
        for file in files:
            with _plain_errors(str(file), known):
                for batch in read(file, texts):
                    yield str(file), batch


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file, or the folder's files, with one of these suffixes; in a folder .json counts if nothing else does."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    files = [file for file in files if file.name.endswith(suffixes)]
    return [file for file in files if not file.name.endswith(_JSON)] or files


def import_table(home: Home, spec: ImportSpec, *, progress: Callable[[int], None] = lambda rows: None) -> Imported:
    """Write the source into events/<kind>/ as one file; importing the same source again replaces that file.

    Impressions without a request_id and feedback without an event_id get one from the source and the row's number.
    `created` defaults to the row's own time. Further attributes get the narrowest type that holds all their values.
    progress: called with the rows read so far. Raises DataError with the file, the row and the column, StoreError if
    the disk is full; the table is then as it was.
    """
    identity = hashlib.sha256(json.dumps([spec.source, spec.query, spec.table]).encode()).hexdigest()[:12]
    target = home.events / spec.kind / f"import-{identity}.parquet"
    rows = in_file = 0
    file = ""
    with folder_beside(target) as aside, closing(WideningWriter(aside)) as writer:
        texts = _text_columns(spec)
        for where, batch in _located(
            spec.source,
            as_format=spec.format,
            query=spec.query,
            table=spec.table,
            options=spec.options,
            texts=texts,
        ):
            file, in_file = where, (in_file if where == file else 0)
            place = Place(where, in_file)
            table = shape(pa.Table.from_batches([batch]), spec, first_row=rows, identity=identity, place=place)
            writer.write(table, place)
            rows += table.num_rows
            in_file += table.num_rows
            progress(rows)
        if rows == 0:
            raise DataError(f"{without_secrets(spec.source, spec.options)} holds no row; nothing was imported")
        put(writer.finish(), target)
    return Imported(kind=spec.kind, path=target, rows=rows)


def shape(
    table: pa.Table, spec: ImportSpec, *, first_row: int = 0, identity: str = "row", place: Place | None = None
) -> pa.Table:
    """Rows of a source in the event table's columns and types. Raises DataError naming the column and the row."""
    place = place or Place(spec.source, first_row)
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
            raise UnknownNameError("source column", source, table.column_names, where=place.file)
    for name in REQUIRED[spec.kind]:
        if name not in taken:
            raise DataError(
                f"{place.file} gives no {name!r} for {spec.kind}; its columns are {', '.join(table.column_names)}: "
                f"say which one it is (--column {name}=THEIRS)"
            )
    types = {field.name: field.type for field in schema}
    out = {}
    for name in names:
        if name in taken:
            wanted = types.get(name)
            named = f"{spec.kind}.{name}"
            out[name] = taken[name] if wanted is None else convert(taken[name], wanted, named, spec.unit, place)
    if (number := _ID.get(spec.kind)) and (number not in out or out[number].null_count):
        made = pa.array([f"{identity}-{first_row + i}" for i in range(table.num_rows)])
        out[number] = pc.coalesce(out[number], made) if number in out else made
    out.setdefault("created", out[_TIME[spec.kind]])
    for name in REQUIRED[spec.kind]:
        if nulls := out[name].null_count:
            first = pc.index(pc.is_null(out[name]), True).as_py()
            raise DataError(
                f"{place.row(first)}: no {name!r}, which {spec.kind} must have ({nulls} such rows in this batch); "
                "complete or leave out those rows"
            )
    for name in schema.names:
        out.setdefault(name, pa.nulls(table.num_rows, types[name]))
    ordered = [*schema.names, *(name for name in out if name not in types)]
    return pa.table({name: out[name] for name in ordered})


def _text_columns(spec: ImportSpec) -> set[str]:
    """Source columns that no CSV reader should guess the type of: a guess from the first rows can fail on later ones.

    Text is converted afterwards, with a row to name where it cannot be.
    """
    return {spec.columns.get(name, name) for name in SCHEMAS[spec.kind].names if name not in spec.constants}


def _parquet(file: Path, texts: Collection[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file) as parquet:
        yield from parquet.iter_batches(batch_size=BATCH_ROWS)


_JSON = (".json", ".json.gz")
_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_FILES: dict[str, tuple[Callable[[Path, Collection[str]], Iterator[pa.RecordBatch]], tuple[str, ...]]] = {
    "parquet": (_parquet, (".parquet",)),
    "csv": (csv_batches, (".csv", ".tsv", ".csv.gz", ".tsv.gz")),
    "jsonl": (json_batches, (*_LINES, *_JSON)),
}


@contextmanager
def _plain_errors(source: str, known: str, options: Mapping[str, str] | None = None) -> Iterator[None]:
    try:
        yield
    except PlaitError:
        raise
    except Exception as error:  # each library has its own tree of errors, and all of them mean the same here
        told = without_secrets(str(error), options or {})
        cause = error if told == str(error) else None  # whose traceback would show what `told` does not
        line = " ".join(re.sub(r"\x1b\[[\d;]*m|↳", "", told).split())
        raise DataError(f"{source} cannot be read as {known}: {line}") from cause
