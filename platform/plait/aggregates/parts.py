"""What a build writes: the parts of a feature table, and the state from which the next increment starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from plait.aggregates.plan import Plan
from plait.aggregates.tables import AT, Base, Span, base_at_end, changes, list_base_at_end, seen_at_end
from plait.offline.engine import Engine

if TYPE_CHECKING:
    import ibis.expr.types as ir

TIMESTAMP = pa.timestamp("us", tz="UTC")


def part_name(since: int, until: int) -> str:
    """The name of the part with the rows of (since, until], in us."""
    return f"{since}-{until}.parquet"


def part_span(name: str) -> tuple[int, int]:
    """(since, until] in us of a part, from its name."""
    since, _, until = name.removesuffix(".parquet").partition("-")
    return int(since), int(until)


class TableWriter:
    """Streams rows into one parquet part, in the feature table's schema."""

    def __init__(self, path: Path, schema: pa.Schema, engine: Engine) -> None:
        self.schema, self.engine, self.rows = schema, engine, 0
        self._file = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, rows: ir.Table) -> None:
        """Rows as `feature_rows` makes them; a row is known from the moment it is about."""
        for batch in self.engine.batches(rows):
            at = batch.column(AT).cast(TIMESTAMP)
            given = ("event_timestamp", "created")
            columns = [at if field.name in given else batch.column(field.name) for field in self.schema]
            self._write(pa.RecordBatch.from_arrays(columns, schema=self.schema))

    def write_rows(self, rows: ir.Table) -> None:
        """Rows that are the table's already."""
        for batch in self.engine.batches(rows.select(*self.schema.names)):
            columns = [batch.column(field.name).cast(field.type) for field in self.schema]
            self._write(pa.RecordBatch.from_arrays(columns, schema=self.schema))

    def _write(self, batch: pa.RecordBatch) -> None:
        self._file.write_batch(batch)
        self.rows += batch.num_rows

    def close(self) -> None:
        self._file.close()


class StateWriter:
    """The folder from which the next increment starts: `sums/` and `seen<i>/`, a part per call of `add`."""

    def __init__(self, plan: Plan, engine: Engine, folder: Path, token: str) -> None:
        self.plan, self.engine, self.folder, self.token = plan, engine, folder, token
        self._n = 0

    def add(self, events: ir.Table, span: Span, base: Base | None) -> None:
        if self.plan.lists:
            self._write("sums", list_base_at_end(self.plan, events, span, base))
        else:
            self._write("sums", base_at_end(self.plan, changes(self.plan, events, span, base)))
        for i, seen in enumerate(seen_at_end(self.plan, events, span, base)):
            self._write(f"seen{i}", seen)
        self._n += 1

    def _write(self, name: str, table: ir.Table) -> None:
        path = self.folder / name / f"{self._n}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([field.with_nullable(True) for field in table.schema().to_pyarrow()])
        with pq.ParquetWriter(path, schema, compression="zstd") as file:
            for batch in self.engine.batches(table):
                file.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
