"""One parquet file of batches whose columns and types become known as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from plait.data.convert import Place
from plait.errors import DataError

_LONGEST = pa.decimal128(19, 0)  # holds every int64


class WideningWriter:
    """Writes batches to a parquet file; a batch may bring further columns, or a wider type for one.

    Null becomes any type, int64 becomes double or decimal where no digit is lost, a column that earlier rows lack is
    null in them. Every batch that widens starts a further file in `folder`; `finish` makes one of them. One batch is
    held at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stretches: list[tuple[Path, Place]] = []
        self._writer: pq.ParquetWriter | None = None
        self._schema = pa.schema([])

    def write(self, table: pa.Table, place: Place) -> None:
        """Raises DataError, with the column and the row, if a type and that of earlier rows have none in common."""
        wider = _wider(self._schema, table.schema) if self._stretches else table.schema
        table = _in_types(table, wider, place, "in earlier rows")
        if self._writer is None or not wider.equals(self._schema):
            self.close()
            path = self._folder / str(len(self._stretches))
            self._stretches.append((path, place))
            self._schema = wider
            self._writer = pq.ParquetWriter(path, wider)
        self._writer.write_table(table)

    def finish(self) -> Path:
        """The file with all rows. Raises DataError if numbers of early rows cannot be in the type of later ones."""
        self.close()
        if len(self._stretches) == 1:
            return self._stretches[0][0]
        whole = self._folder / "whole"
        with pq.ParquetWriter(whole, self._schema) as writer:
            for path, place in self._stretches:
                with pq.ParquetFile(path) as stretch:
                    for batch in stretch.iter_batches():
                        table = pa.Table.from_batches([batch])
                        writer.write_table(_in_types(table, self._schema, place, "in later rows"))
                path.unlink()
        return whole

    def close(self) -> None:
        """Let go of the file that is open."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _wider(before: pa.Schema, now: pa.Schema) -> pa.Schema:
    """The columns of both. A type that cannot hold both is left as it was before: values may still fit."""
    fields = {field.name: field for field in before}
    for field in now:
        known = fields.get(field.name, field)
        with suppress(pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            schemas = [pa.schema([one]) for one in _as_decimals(known, field)]
            known = pa.unify_schemas(schemas, promote_options="permissive").field(0)
        fields[field.name] = known
    return pa.schema(list(fields.values()))


def _as_decimals(*pair: pa.Field) -> Iterator[pa.Field]:
    """Arrow's common type of a decimal and an integer has no room for large integers."""
    decimal = any(pa.types.is_decimal(field.type) for field in pair)
    for field in pair:
        yield field.with_type(_LONGEST) if decimal and pa.types.is_integer(field.type) else field


def _in_types(table: pa.Table, schema: pa.Schema, place: Place, elsewhere: str) -> pa.Table:
    columns: list[pa.ChunkedArray | pa.Array] = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{place.row(0)} and after: column {field.name!r} is {column.type} here and {field.type} {elsewhere}: "
                f"{error}"
            ) from error
    return pa.Table.from_arrays(columns, schema=schema)
