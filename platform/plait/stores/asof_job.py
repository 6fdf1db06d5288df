"""Retrieval jobs: a query that is run when its result is asked for, whole, as a stream, or into parquet parts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast.data_format import DeltaFormat, ParquetFormat
from feast.data_source import DataSource
from feast.errors import RequestDataNotFoundInEntityDfException, SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.saved_dataset import SavedDatasetStorage
from feast.type_map import feast_value_type_to_pa

from plait.errors import StoreError
from plait.files import atomic_file, atomic_folder
from plait.stores.asof_engine import EngineLimits, connect, plain_errors
from plait.stores.asof_entities import BoundEntities, Entities, from_micros
from plait.stores.asof_gather import gather
from plait.stores.asof_sources import is_remote, resolve_path
from plait.stores.asof_sql import TimeRange, ViewPlan, join_query, late_query, withheld_query
from plait.stores.asof_ties import settle_ties

logger = logging.getLogger(__name__)

BATCH_ROWS = 131_072
PART_ROWS = 1_000_000


class CreatedCutoffWarning(UserWarning):
    """The created-timestamp cutoff of feature_store.yaml took values away from entity rows; says how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A connection and the query to run on it; `whole` is a cheaper way to its result if all is wanted at once."""

    db: duckdb.DuckDBPyConnection
    query: Callable[[], str]
    whole: Callable[[], pa.Table] | None = None


Planner = Callable[[], AbstractContextManager[Planned]]
OpenView = Callable[[duckdb.DuckDBPyConnection], ViewPlan]  # opens the view's source in a connection


class AsofMetadata(RetrievalMetadata):
    """Feast's metadata; the range of times is asked of the frame when somebody reads it (a query may take long)."""

    def __init__(self, features: list[str], keys: Callable[[], list[str]], bounds: Callable[[], TimeRange]) -> None:
        self.features = features
        self._keys, self._bounds = keys, bounds

    @property
    def keys(self) -> list[str]:  # type: ignore[override]
        return self._keys()

    @property
    def min_event_timestamp(self) -> datetime | None:  # type: ignore[override]
        return from_micros(self._bounds().first)

    @property
    def max_event_timestamp(self) -> datetime | None:  # type: ignore[override]
        return from_micros(self._bounds().last)


class DuckDBJob(RetrievalJob):
    """One query on a connection of its own; safe to use from any thread, and more than once.

    `plan` opens the connection and yields the query; nothing is read before a result is asked for.
    """

    def __init__(
        self,
        *,
        plan: Planner,
        repo_path: Path | None,
        on_demand: Sequence[OnDemandFeatureView] = (),
        full_feature_names: bool = False,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        super().__init__()
        self._plan, self._repo_path = plan, repo_path
        self._on_demand, self._full_feature_names, self._metadata = list(on_demand), full_feature_names, metadata

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def to_sql(self) -> str:
        """The query, as it would run now: it names the files and the time range it found."""
        with self._plan() as planned:
            return planned.query()

    def to_arrow_reader(self, batch_rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
        """The result as a stream of batches of at most `batch_rows` rows, in the entity frame's order.

        On-demand transformations run on one batch at a time. Nothing but the batch (and what DuckDB sorts, within
        memory_limit) is in memory. Closing the reader, or reading it to its end, frees the connection.
        """
        with ExitStack() as stack:
            planned = stack.enter_context(self._plan())
            stream = planned.db.execute(planned.query()).to_arrow_reader(batch_rows)
            schema = self._streamed(stream.schema.empty_table()).schema
            # From here on the connection belongs to the stream.
            return pa.RecordBatchReader.from_batches(schema, self._batches(stream, schema, stack.pop_all()))
        raise AssertionError("an ExitStack over these contexts swallows nothing")

    def to_parquet(
        self, path: str | Path, *, rows_per_part: int = PART_ROWS, batch_rows: int = BATCH_ROWS, overwrite: bool = False
    ) -> list[Path]:
        """Write the result into the folder `path` (relative to the repo) as part-00000.parquet and so on; the paths.

        The folder appears when it is complete. Raises StoreError if it exists and `overwrite` is False.
        """
        folder = Path(resolve_path(path, self._repo_path))
        if folder.exists() and not overwrite:
            raise StoreError(f"{folder} exists; pass overwrite=True or choose another folder")
        names: list[str] = []
        with self.to_arrow_reader(batch_rows) as reader, atomic_folder(folder) as aside:
            for table in _parts(reader, rows_per_part):
                names.append(f"part-{len(names):05d}.parquet")
                _write_stream(aside / names[-1], reader.schema, table)
        return [folder / name for name in names]

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Stream the result, on-demand features included, to a file (*.parquet), a folder of parts or a Delta table."""
        source = storage.to_data_source()
        if not isinstance(storage, SavedDatasetFileStorage) or not isinstance(source, FileSource):
            self._persist_by_feast(source, allow_overwrite=allow_overwrite)
            return
        path = resolve_path(source.path, self._repo_path)
        if isinstance(source.file_format, DeltaFormat):
            self._persist_delta(path, allow_overwrite=allow_overwrite)
        elif source.file_format is not None and not isinstance(source.file_format, ParquetFormat):
            raise StoreError(f"cannot save a dataset as {type(source.file_format).__name__}; use parquet or Delta")
        elif is_remote(path):
            self._persist_by_feast(source, allow_overwrite=allow_overwrite)
        elif Path(path).exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=source.path)
        elif path.endswith(".parquet"):
            with self.to_arrow_reader() as reader, atomic_file(Path(path)) as aside:
                _write_stream(aside, reader.schema, reader)
        else:
            self.to_parquet(path, overwrite=allow_overwrite)

    def _persist_by_feast(self, source: DataSource, *, allow_overwrite: bool) -> None:
        import ibis
        from feast.infra.offline_stores.duckdb import _write_data_source

        repo_path = str(self._repo_path or ".")
        _write_data_source(ibis.memtable(self.to_arrow()), source, repo_path, "overwrite", allow_overwrite)

    def _persist_delta(self, path: str, *, allow_overwrite: bool) -> None:
        from deltalake import write_deltalake

        if not is_remote(path) and Path(path).exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=path)
        with self.to_arrow_reader() as reader:
            write_deltalake(path, reader, mode="overwrite" if allow_overwrite else "error")

    def to_arrow(self, validation_reference: Any = None, timeout: int | None = None) -> pa.Table:
        """The whole result; on-demand features have the type their view declares."""
        table = super().to_arrow(validation_reference=validation_reference, timeout=timeout)
        return self._declared(table)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        with self._plan() as planned:
            if planned.whole is not None:
                try:
                    return planned.whole()
                except (pa.ArrowInvalid, pa.ArrowCapacityError):
                    # More than 2 GB of text in one column: Arrow cannot take from it, DuckDB can join it.
                    logger.info("the result is too large to be gathered; joining all columns", exc_info=True)
            return planned.db.execute(planned.query()).to_arrow_table()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    def _batches(self, stream: pa.RecordBatchReader, schema: pa.Schema, stack: ExitStack) -> Iterator[pa.RecordBatch]:
        with stack:
            while batch := _next_batch(stream):
                yield from self._streamed(pa.Table.from_batches([batch])).cast(schema).to_batches()

    def _streamed(self, table: pa.Table) -> pa.Table:
        """One batch with its on-demand features."""
        if not self._on_demand:
            return table
        return self._declared(_Chunk(table, self).to_arrow())

    def _declared(self, table: pa.Table) -> pa.Table:
        """On-demand columns cast to their declared type: what a function returns may depend on the rows it saw."""
        for view in self._on_demand:
            for feature in view.features:
                name = f"{view.projection.name_to_use()}__{feature.name}" if self._full_feature_names else feature.name
                index = table.schema.get_field_index(name)
                if index < 0:
                    continue
                type_ = feast_value_type_to_pa(feature.dtype.to_value_type())
                try:
                    column = table.column(index).cast(type_)
                except pa.ArrowException as error:
                    raise StoreError(
                        f"on-demand view {view.name!r} declares {feature.name!r} as {type_} but returned "
                        f"{table.column(index).type}: {error}"
                    ) from error
                table = table.set_column(index, name, column)
        return table


class _Chunk(RetrievalJob):
    """A piece of a result that Feast's own code gives its on-demand features to."""

    def __init__(self, table: pa.Table, whole: DuckDBJob) -> None:
        super().__init__()
        self._table, self._whole = table, whole

    @property
    def full_feature_names(self) -> bool:
        return self._whole.full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._whole.on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._whole.metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._table


@dataclass(frozen=True, kw_only=True, slots=True)
class PointInTime:
    """A whole historical retrieval; calling it plans the query on a fresh connection."""

    entities: Entities
    views: Sequence[OpenView]
    limits: EngineLimits
    repo_path: Path | None
    request_fields: Sequence[tuple[str, str]]  # (on-demand view, column the entity frame must hold)
    warn_of_cutoff: bool

    @contextmanager
    def __call__(self) -> Iterator[Planned]:
        files: list[str] = []
        with plain_errors(self.limits, doing="historical features", files=files):
            with connect(self.limits, search_path=self.repo_path) as db:
                plans = [open_view(db) for open_view in self.views]
                files += [file for plan in plans for file in plan.relation.files]
                bound = self.entities.bind(db, plans)
                files += bound.files
                self._check(bound, plans)
                plans = [self._settle_cutoff(db, bound, plan) for plan in plans]
                yield Planned(db=db, query=partial(_query, db, bound, plans), whole=partial(gather, db, bound, plans))

    @contextmanager
    def bound(self) -> Iterator[BoundEntities]:
        """The entity frame alone, for those who ask about its columns or its range of times."""
        with connect(self.limits, search_path=self.repo_path) as db:
            yield self.entities.bind(db, [open_view(db) for open_view in self.views])

    def _check(self, bound: BoundEntities, plans: Sequence[ViewPlan]) -> None:
        taken = set(bound.columns)
        for plan in plans:
            bound.check_keys(plan)
            for result in plan.features.values():
                if result in taken:
                    raise StoreError(
                        f"two columns named {result!r}: the feature of view {plan.name!r} and another one, or a column "
                        "of the entity frame; use full_feature_names=True or rename the column"
                    )
                taken.add(result)
        for view, column in self.request_fields:
            if column not in bound.columns:
                raise RequestDataNotFoundInEntityDfException(feature_name=column, feature_view_name=view)

    def _settle_cutoff(self, db: duckdb.DuckDBPyConnection, bound: BoundEntities, plan: ViewPlan) -> ViewPlan:
        """Without the cutoff where nothing was known late."""
        if plan.cutoff:
            if db.execute(late_query(plan, bound.bounds)).fetchone() is None:
                return replace(plan, cutoff=False)
            if self.warn_of_cutoff:
                _warn_withheld(db, bound, plan)
        return plan


def _query(db: duckdb.DuckDBPyConnection, bound: BoundEntities, plans: Sequence[ViewPlan]) -> str:
    settled = [settle_ties(db, plan, bound.bounds) for plan in plans]
    return join_query(bound.sql, list(bound.columns), settled, bound.bounds)


def _warn_withheld(db: duckdb.DuckDBPyConnection, bound: BoundEntities, plan: ViewPlan) -> None:
    row = db.execute(withheld_query(bound.sql, plan, bound.bounds)).fetchone()
    if row:
        warn_of_cutoff(plan.name, older=row[0], none=row[1], of=bound.n_rows)


def warn_of_cutoff(view: str, *, older: int, none: int, of: int | None) -> None:
    """Warn that the cutoff gave an older value to `older` and no value to `none` of `of` entity rows, if it did."""
    if older or none:
        n_rows = f" of {of:,}" if of is not None else ""
        warnings.warn(
            f"created_cutoff: view {view!r} had newer values that were not known yet for {older + none:,}"
            f"{n_rows} entity rows; {older:,} got an older value, {none:,} none. If its created timestamps "
            "are only the time of a bulk load, set offline_store.created_cutoff: off in feature_store.yaml",
            CreatedCutoffWarning,
            stacklevel=2,
        )


def _next_batch(stream: pa.RecordBatchReader) -> pa.RecordBatch | None:
    """The next batch, or None. DuckDB's errors come through the Arrow stream as text: they become its own again."""
    try:
        return next(stream, None)
    except (OSError, pa.ArrowException) as error:
        raise duckdb.Error(str(error)) from error


def _write_stream(path: Path, schema: pa.Schema, batches: Any) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _parts(reader: pa.RecordBatchReader, rows: int) -> Iterator[Iterator[pa.RecordBatch]]:
    """The stream cut into runs of `rows` rows, each to be read to its end before the next; at least one run."""
    pending: list[pa.RecordBatch] = []
    more = True

    def run() -> Iterator[pa.RecordBatch]:
        nonlocal more
        left = rows
        while left:
            if not pending:
                batch = next(reader, None)
                if batch is None:
                    more = False
                    return
                pending.append(batch)
            batch = pending.pop()
            yield batch.slice(0, left)
            if batch.num_rows > left:
                pending.append(batch.slice(left))
            left -= min(left, batch.num_rows)

    def next_is_there() -> bool:
        if not pending and more:
            batch = next(reader, None)
            if batch is not None:
                pending.append(batch)
        return bool(pending)

    yield run()
    while next_is_there():
        yield run()
