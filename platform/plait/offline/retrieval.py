"""The point-in-time join of samples to a feature service, through Feast's get_historical_features.

With Plait's offline store the samples go in as a parquet folder and come out as a stream, in one query, so memory is
bounded by that store's limit; with any other store it is a query a chunk of rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.errors import PlaitError, SpecError, StoreError

if TYPE_CHECKING:
    from feast import FeatureStore

    from plait.service import ServiceSpec

ROW = "sample_id"
TIME = "event_timestamp"
REQUEST_TIME = "request_timestamp"


def streams(store: FeatureStore) -> bool:
    """Whether the project's offline store is Plait's, which takes Arrow or parquet and gives a stream in order."""
    from plait.stores.offline import AsofDuckDBOfflineStoreConfig

    return isinstance(store.config.offline_store, AsofDuckDBOfflineStoreConfig)


def stream_point_in_time(
    store: FeatureStore, spec: ServiceSpec, samples: Callable[[], Iterator[pa.RecordBatch]], *, work: Path
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(rows of samples, their features) in order, a batch at a time; `work` is a scratch folder, removed at the end.

    samples: opens the samples' batches anew; they are read twice. Raises StoreError, SpecError.
    """
    try:
        frame = work / "frame"
        _write_parts(frame, (entity_frame(spec, pa.Table.from_batches([batch])) for batch in samples()))
        for i, (key, (view, feature)) in enumerate(spec.derived_keys.items()):
            # As of the sample, as everything else: a movie's genre of then, not of now.
            wider = work / f"frame-{i}"
            with _reader(store, frame, [f"{view}:{feature}"]) as reader:
                names = [key if name == feature else name for name in reader.schema.names]
                _write_parts(wider, (pa.Table.from_batches([batch]).rename_columns(names) for batch in reader))
            shutil.rmtree(frame)
            frame = wider
        rows = Rows(samples())
        with _reader(store, frame, store.get_feature_service(spec.name)) as reader:
            for batch in reader:
                found = pa.Table.from_batches([batch])
                beside = rows.take(found.num_rows)
                if not found.column(ROW).combine_chunks().equals(beside.column(ROW).combine_chunks()):
                    raise StoreError("historical retrieval returned other rows than were asked for, or another order")
                yield beside, canonical(spec, found)
        if left := rows.count():
            raise StoreError(f"historical retrieval returned {left} rows fewer than were asked for")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def chunked(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows, the last one smaller."""
    left = Rows(iter(batches))
    while (chunk := left.take(rows)).num_rows:
        yield chunk


class Rows:
    """Rows of a stream of batches, taken in runs of any length."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self.batches = batches
        self.waiting: list[pa.RecordBatch] = []
        self.schema: pa.Schema | None = None

    def take(self, n: int) -> pa.Table:
        """The next n rows, or as many as there are left."""
        taken = []
        while n > 0:
            batch = self.waiting.pop() if self.waiting else next(self.batches, None)
            if batch is None:
                break
            self.schema = batch.schema
            taken.append(batch.slice(0, n))
            if batch.num_rows > n:
                self.waiting.append(batch.slice(n))
            n -= taken[-1].num_rows
        return pa.Table.from_batches(taken, schema=self.schema or pa.schema([]))

    def count(self) -> int:
        """How many rows are left; takes them."""
        return sum(batch.num_rows for batch in self.waiting) + sum(batch.num_rows for batch in self.batches)


def _job(store: FeatureStore, frame: Any, features: Any) -> Any:
    return store.get_historical_features(entity_df=frame, features=features)


def _reader(store: FeatureStore, frame: Path, features: Any) -> pa.RecordBatchReader:
    return _job(store, str(frame), features).to_arrow_reader()


def _write_parts(folder: Path, tables: Iterable[pa.Table]) -> None:
    """One file, a row group a table: its row order is the frame's order."""
    folder.mkdir(parents=True)
    writer = None
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(folder / "part-00000.parquet", table.schema)
            writer.write_table(table.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()


def point_in_time(store: FeatureStore, spec: ServiceSpec, samples: pa.Table) -> pa.Table:
    """Every feature of `spec` for every sample, as of its event_timestamp: canonical order and dtypes, samples' order.

    samples: sample_id, event_timestamp, the join keys, and columns for request fields other than request_timestamp.
    """
    frame = entity_frame(spec, samples)
    for key, (view, feature) in spec.derived_keys.items():
        # As of the sample, as everything else: a movie's genre of then, not of now.
        found = _retrieve(store, frame, [f"{view}:{feature}"])
        frame = frame.append_column(key, found.column(feature))
    found = _retrieve(store, frame, store.get_feature_service(spec.name))
    return canonical(spec, found)


def entity_frame(spec: ServiceSpec, samples: pa.Table) -> pa.Table:
    """sample_id, the join keys, event_timestamp and the request's own fields.

    Raises SpecError if the samples have no such field.
    """
    keys = [*spec.request_keys, *spec.candidate_keys]
    columns = {name: samples.column(name) for name in (ROW, *keys, TIME)}
    for name, dtype in spec.request_fields.items():
        if name == REQUEST_TIME:
            columns[name] = pc.floor_temporal(samples.column(TIME), unit="second").cast(pa.timestamp("s", tz="UTC"))
            columns[name] = columns[name].cast(pa.int64()).cast(dtype)
        elif name in samples.column_names:
            columns[name] = samples.column(name).cast(dtype)
        else:
            raise SpecError(
                f"{spec.name} needs the request field {name!r}, and the samples have no such column; "
                f"known: {', '.join([REQUEST_TIME, *samples.column_names])}"
            )
    return pa.table(columns)


def _retrieve(store: FeatureStore, frame: pa.Table, features: Any) -> pa.Table:
    """Feast's historical retrieval, back in the frame's order (the stock stores lose it)."""
    try:
        # Stock stores take pandas alone; ours takes the table as it is.
        job = _job(store, frame if streams(store) else frame.to_pandas(), features)
        found = job.to_arrow()
    except PlaitError:
        raise
    except Exception as error:
        raise StoreError(f"historical retrieval failed: {type(error).__name__}: {error}") from error
    if found.num_rows != frame.num_rows:
        raise StoreError(
            f"historical retrieval returned {found.num_rows} rows for {frame.num_rows}; a feature table holds "
            "several rows of one key and time: rebuild it with `plait features build`"
        )
    if not found.column(ROW).combine_chunks().equals(frame.column(ROW).combine_chunks()):
        found = found.take(pc.sort_indices(found.column(ROW)))
        wanted = frame.column(ROW).take(pc.sort_indices(frame.column(ROW)))
        if not found.column(ROW).combine_chunks().equals(wanted.combine_chunks()):
            raise StoreError("historical retrieval returned other rows than were asked for")
    return found


def _cast(column: pa.ChunkedArray, dtype: pa.DataType, name: str) -> pa.Array | pa.ChunkedArray:
    if column.type == dtype:
        return column
    try:
        if pa.types.is_integer(dtype) and pa.types.is_floating(column.type):
            # pandas holds an integer column with nulls as floats with NaN.
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        return column.cast(dtype)
    except pa.ArrowInvalid as error:
        raise StoreError(f"feature {name!r} came as {column.type} and is declared {dtype}: {error}") from error


def canonical(spec: ServiceSpec, found: pa.Table) -> pa.Table:
    """The service's features alone, in its order and its types."""
    return pa.Table.from_arrays(
        [_cast(found.column(feature.name), feature.dtype, feature.name) for feature in spec.features],
        schema=spec.schema(),
    )
