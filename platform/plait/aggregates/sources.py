"""What a build asks of the files below events/ before it starts, and who is to blame when reading them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from plait.aggregates.spec import ATTRIBUTE_KEYS, AggregateSpec
from plait.data.tables import SCHEMAS
from plait.errors import DataError
from plait.offline.engine import check_columns, check_parquet, parquet_files

if TYPE_CHECKING:
    from plait.settings import Home


def check_sources(home: Home, spec: AggregateSpec) -> None:
    """Every part of the spec's tables has the columns that tell who and when, and one type per column.

    Other columns may be absent from a part, as from those written before the column was: they are null there.
    Raises DataError that names the part and the column.
    """
    events = spec.events
    needed = {events.time, *events.id, *spec.keys} - events.attributes.keys()
    if events.types:
        needed.add("type")
    _check(home.events / events.table, needed, spec.source_columns | {"created"})
    for table in events.attribute_tables:
        references = [name.split(".") for name in events.attributes.values()]
        columns = {column for name, column in references if name == table}
        _check(home.events / table, {ATTRIBUTE_KEYS[table], "event_timestamp"}, columns | {"created"})


@contextmanager
def corrupt_part_named(home: Home, spec: AggregateSpec) -> Iterator[None]:
    """Footers are read before a build, pages while it runs: if one is damaged the engine fails, and does not always
    say on which file. Then, and only then, the files are read through, and the first bad one is named."""
    try:
        yield
    except DataError as error:
        for table in (spec.events.table, *spec.events.attribute_tables):
            for path in parquet_files(home.events / table):
                _read_through(path, error)
        raise


def _read_through(path: Path, cause: DataError) -> None:
    try:
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches():
                pass
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is damaged ({reason}); restore it, or delete it and write that part again") from cause


def _check(folder: Path, needed: set[str], used: set[str]) -> None:
    files = parquet_files(folder)
    check_parquet(files)
    declared = SCHEMAS.get(folder.name)
    types: dict[str, pa.DataType] = {} if declared is None else {field.name: field.type for field in declared}
    present: set[str] = set()
    for path in files:
        schema = pq.read_schema(path)
        present.update(schema.names)
        for field in schema:
            if not pa.types.is_null(field.type):
                types.setdefault(field.name, field.type)
    wanted = {name: kind for name in needed | used if name in types and (kind := _kind(types[name]))}
    # A column that no part has is a mistake in the declaration, which is told elsewhere with what is meant.
    check_columns(files, wanted, required=sorted(needed & present))


def _kind(dtype: pa.DataType) -> str | None:
    """`check_columns`' name of a type; None for one that it does not tell apart."""
    if pa.types.is_integer(dtype):
        return "int64"
    if pa.types.is_floating(dtype):
        return "float64"
    if pa.types.is_timestamp(dtype):
        return "timestamp"
    return "string" if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) else None
