"""Parquet parts: written with fixed boundaries, so that equal rows give equal files and one content hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 65_536  # a reader shuffles row groups; small enough for many, large enough to decode fast
PART_ROWS = 16 * ROW_GROUP_ROWS


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One written file: its path below the written folder, rows, bytes and SHA-256."""

    path: str
    rows: int
    size_bytes: int
    sha256: str


class PartWriter:
    """Writes batches to `folder`/part-00000.parquet, … in row groups and parts of fixed size, whatever the batches."""

    def __init__(self, folder: Path, schema: pa.Schema, *, root: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.schema, self.root = folder, schema, root or folder
        self.parts: list[Part] = []
        self.n_rows = 0
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._in_part = 0

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        self._waiting.append(table.select(self.schema.names).cast(self.schema))
        self._n_waiting += table.num_rows
        while self._n_waiting >= ROW_GROUP_ROWS:
            self._flush(ROW_GROUP_ROWS)

    def close(self) -> list[Part]:
        """Write what is waiting; an empty input still gives one part with the schema."""
        if self._n_waiting or (self._writer is None and not self.parts):
            self._flush(self._n_waiting)
        self._end_part()
        return self.parts

    def _flush(self, rows: int) -> None:
        whole = pa.concat_tables(self._waiting) if self._waiting else self.schema.empty_table()
        group, rest = whole.slice(0, rows), whole.slice(rows)
        self._waiting, self._n_waiting = ([rest] if rest.num_rows else []), rest.num_rows
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path(), self.schema, **_encodings(self.schema))
        self._writer.write_table(group.combine_chunks(), row_group_size=ROW_GROUP_ROWS)
        self.n_rows += group.num_rows
        self._in_part += group.num_rows
        if self._in_part >= PART_ROWS:
            self._end_part()

    def _path(self) -> Path:
        return self.folder / f"part-{len(self.parts):05d}.parquet"

    def _end_part(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        path = self._path()
        self.parts.append(
            Part(
                path=str(path.relative_to(self.root)),
                rows=self._in_part,
                size_bytes=path.stat().st_size,
                sha256=file_sha256(path),
            )
        )
        self._writer, self._in_part = None, 0


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """LZ4, whole numbers as packed differences, dictionaries for the rest but floats.

    Measured on 26 ids + 13 floats: decodes 2.4 times faster than pyarrow's defaults (snappy, dictionaries) and takes
    two thirds of the space. DuckDB and Spark read it too.
    """
    whole = [f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_timestamp(f.type)]
    plain = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_boolean(f.type)]
    return {
        "compression": "lz4",
        "column_encoding": dict.fromkeys(whole, "DELTA_BINARY_PACKED"),
        "use_dictionary": [_leaf(f) for f in schema if f.name not in {*whole, *plain}],
        # Keeps the name of a list's items, so that the schema read is the schema written.
        "use_compliant_nested_type": False,
    }


def _leaf(field: pa.Field) -> str:
    """Parquet's path of a column's values."""
    path, kind = field.name, field.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        path, kind = f"{path}.list.{kind.value_field.name}", kind.value_type
    return path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(parts: Iterable[Part]) -> str:
    """One hash of all parts' contents and places."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.path}\0{part.sha256}\n".encode())
    return digest.hexdigest()
