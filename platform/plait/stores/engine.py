"""Materialization in columns: the latest row per key from the offline store, packed and written in batches.

The offline store finds the latest rows and streams them as Arrow; DuckDB sorts them by key, within a memory limit and
spilling to disk past it, which gives the online store its rows in the order of its own tree and makes batches the same
in every run. A run that was interrupted is started again with the same command: batches it had stored are recognised by
their content and skipped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import reduce
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.base import ComputeEngine
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _convert_arrow_to_proto, _get_column_names
from pydantic import Field

from plait.errors import PlaitError, StoreError
from plait.stores.asof_engine import EngineLimits, connect, plain_errors, quote
from plait.stores.keys import StoredView
from plait.stores.online_base import PackedOnlineStore

if TYPE_CHECKING:
    from feast import Entity, FeatureView, OnDemandFeatureView, RepoConfig
    from feast.infra.offline_stores.offline_store import OfflineStore
    from feast.infra.online_stores.online_store import OnlineStore
    from feast.infra.registry.base_registry import BaseRegistry

Interval = tuple[datetime, datetime]
RUNS_ON_RECORD = 100  # of a view: a hundred days, if it is materialized daily
STREAM_ROWS = 4_096
logger = logging.getLogger(__name__)


class ColumnarComputeEngineConfig(FeastConfigBaseModel):
    """`batch_engine:` of feature_store.yaml."""

    type: Literal["plait.stores.engine.ColumnarComputeEngine"] = "plait.stores.engine.ColumnarComputeEngine"
    overlap: timedelta = timedelta(days=1)
    """How far before the end of the last run an incremental one starts, in event time: rows may arrive that late.
    ISO 8601 ("P1D", "PT6H") or seconds."""
    batch_rows: int = Field(default=10_000, gt=0)
    """Rows packed and committed at a time."""
    memory_limit: str = "1GB"
    """Memory for sorting; past it DuckDB spills to a temporary folder."""
    threads: int | None = None


class ColumnarMaterializationJob(MaterializationJob):
    """One view's materialization, over and done."""

    def __init__(self, job_id: str, error: BaseException | None = None) -> None:
        self._job_id, self._error = job_id, error

    def status(self) -> MaterializationJobStatus:
        return MaterializationJobStatus.ERROR if self._error else MaterializationJobStatus.SUCCEEDED

    def error(self) -> BaseException | None:
        return self._error

    def should_be_retried(self) -> bool:
        return False

    def job_id(self) -> str:
        return self._job_id

    def url(self) -> str | None:
        return None


class ColumnarComputeEngine(ComputeEngine):
    """Feast's compute engine for plain feature views: `feast materialize` and `feast materialize-incremental`."""

    def __init__(
        self, *, repo_config: RepoConfig, offline_store: OfflineStore, online_store: OnlineStore, **settings: Any
    ) -> None:
        super().__init__(repo_config=repo_config, offline_store=offline_store, online_store=online_store)
        self.config = ColumnarComputeEngineConfig(**settings)

    def update(
        self,
        project: str,
        views_to_delete: Sequence[FeatureView],
        views_to_keep: Sequence[FeatureView | OnDemandFeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
    ) -> None:
        """Nothing to prepare: the engine keeps no state outside the stores."""

    def teardown_infra(self, project: str, fvs: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Nothing to remove: the engine keeps no state outside the stores."""

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> ColumnarMaterializationJob:
        job_id = f"{task.feature_view.name}-{task.start_time.isoformat()}-{task.end_time.isoformat()}"
        try:
            self._materialize(registry, task)
            compact_intervals(registry, task.feature_view.name, task.project)
        except PlaitError as error:
            named = f"view {task.feature_view.name}"
            reason = error if str(error).startswith(named) else StoreError(f"{named}: {error}")
            return ColumnarMaterializationJob(job_id, reason)
        except Exception as error:
            reason = StoreError(f"view {task.feature_view.name}: {type(error).__name__}: {error}")
            reason.__cause__ = error
            return ColumnarMaterializationJob(job_id, reason)
        return ColumnarMaterializationJob(job_id)

    def _materialize(self, registry: BaseRegistry, task: MaterializationTask) -> None:
        view = task.feature_view
        if getattr(view, "feature_transformation", None) or getattr(view, "aggregations", None):
            raise StoreError(
                f"view {view.name} has a transformation or aggregations, which this engine does not run: declare an "
                "aggregate, run `plait features build`, and register a plain feature view on its table"
            )
        source = view.batch_source
        if source is None:
            raise StoreError(f"view {view.name} has no batch source to materialize from; push to it instead")
        entities = [registry.get_entity(name, task.project) for name in view.entities]
        join_keys, features, timestamp_field, created_field = _get_column_names(view, entities)
        start, end = self.range(task)
        job = self.offline_store.pull_latest_from_table_or_query(
            config=self.repo_config,
            data_source=source,
            join_key_columns=join_keys,
            feature_name_columns=features,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_field,
            start_date=start,
            end_date=end,
        )
        mapping = source.field_mapping or {}
        asked = (*join_keys, *features, timestamp_field, created_field)
        named = {own: mapping.get(own, own) for own in asked if own}
        with self._sorted(job, named, [named[key] for key in join_keys]) as (n_rows, n_keyless, batches):
            if n_keyless:
                logger.warning("view %s: left out %d rows whose join key is null", view.name, n_keyless)
            bar = task.tqdm_builder(n_rows) if task.tqdm_builder else None
            try:
                tables = (pa.table(batch) for batch in batches)
                for n_written in self._write(view, tables, named[timestamp_field], named.get(created_field or "", "")):
                    if bar is not None:
                        bar.update(n_written)
            finally:
                if bar is not None:
                    bar.close()

    def range(self, task: MaterializationTask) -> Interval:
        """Event times to read: the task's, begun earlier by the overlap where the task continues an earlier run."""
        if task.disable_event_timestamp:
            return datetime(1970, 1, 1, tzinfo=UTC), datetime.now(UTC)
        ends = [_aware(end) for _, end in task.feature_view.materialization_intervals]
        start = _aware(task.start_time)
        return (start - self.config.overlap if start in ends else start), _aware(task.end_time)

    @contextmanager
    def _sorted(
        self, job: Any, named: Mapping[str, str], keys: Sequence[str]
    ) -> Iterator[tuple[int, int, Iterator[pa.RecordBatch]]]:
        """(rows, rows left out for a null key, the rows in order of key) of a retrieval job.

        named: the columns the job was asked for, by the source's names, and Feast's name of each. keys: Feast's names.
        """
        stream = getattr(job, "to_arrow_reader", None)
        # Small batches: what is on its way is in memory beside what is sorted.
        pulled = stream(STREAM_ROWS) if stream else job.to_arrow().to_reader()
        names = pulled.schema.names
        # Feast's Spark store applies the field mapping by itself, its DuckDB store leaves it to the engine. Applied
        # twice, it renames a column whose new name is another's old one.
        if names[: len(named)] != [*named.values()]:
            names = [named.get(name, name) for name in names]
        n_rows, n_keyless = 0, 0

        def counted() -> Iterator[pa.RecordBatch]:
            nonlocal n_rows, n_keyless
            for batch in pulled:
                batch = batch.rename_columns(names)
                missing = [batch.column(key).is_null() for key in keys]
                whole = pc.invert(reduce(pc.or_, missing)) if missing else None
                kept = batch if whole is None else batch.filter(whole)
                n_rows, n_keyless = n_rows + kept.num_rows, n_keyless + batch.num_rows - kept.num_rows
                yield kept

        order = f"ORDER BY {', '.join(map(quote, keys))}" if keys else ""
        limits = EngineLimits(memory_limit=self.config.memory_limit, threads=self.config.threads)
        with plain_errors(limits, doing="sorting by key"), connect(limits) as db:
            schema = pa.schema([field.with_name(name) for field, name in zip(pulled.schema, names, strict=True)])
            db.register("pulled", pa.RecordBatchReader.from_batches(schema, counted()))
            ordered = db.sql(f"SELECT * FROM pulled {order}").to_arrow_reader(self.config.batch_rows)
            # Sorting takes in all rows before it gives out the first: from then on the counts are whole.
            first = list(islice(ordered, 1))
            yield n_rows, n_keyless, chain(first, ordered)

    def _write(
        self, view: FeatureView, tables: Iterator[pa.Table], event_timestamp: str, created: str
    ) -> Iterator[int]:
        """Write batch after batch; yields the size of each once it is stored."""
        store = self.online_store
        if not isinstance(store, PackedOnlineStore):
            yield from self._write_protos(view, tables)
            return
        stored = StoredView.of(self.repo_config, view)
        finished = store.finished_batches(self.repo_config, stored)
        for table in tables:
            digest = _digest(table, stored)
            if digest not in finished:
                store.write_columns(self.repo_config, stored, table, event_timestamp=event_timestamp, created=created)
                store.note_batch(self.repo_config, stored, digest)
            yield len(table)
        store.forget_batches(self.repo_config, stored)

    def _write_protos(self, view: FeatureView, tables: Iterator[pa.Table]) -> Iterator[int]:
        """Any other of Feast's online stores: value by value, as Feast does."""
        join_keys = {field.name: field.dtype.to_value_type() for field in view.entity_columns}
        for table in tables:
            rows = _convert_arrow_to_proto(table, view, join_keys)
            self.online_store.online_write_batch(self.repo_config, view, rows, progress=None)
            yield len(table)


def compact_intervals(registry: BaseRegistry, view_name: str, project: str) -> None:
    """Merge all but a view's last RUNS_ON_RECORD intervals in the registry; Feast appends one a run, for ever.

    The ends of the last ones stay, since they tell what was served when: the audit of live features asks.
    """
    view: Any = registry.get_any_feature_view(view_name, project)
    intervals = [(_aware(start), _aware(end)) for start, end in view.materialization_intervals]
    kept = sorted(set(intervals), key=lambda interval: interval[::-1])
    kept = merge_intervals(kept[:-RUNS_ON_RECORD]) + kept[-RUNS_ON_RECORD:]
    if len(kept) < len(intervals):
        view.materialization_intervals = kept
        registry.apply_feature_view(view, project)


def merge_intervals(intervals: Sequence[Interval]) -> list[Interval]:
    """The same moments in as few intervals as can be, in order of time.

    >>> day = [datetime(2024, 1, day) for day in range(1, 6)]
    >>> merge_intervals([(day[2], day[3]), (day[0], day[1]), (day[1], day[2])]) == [(day[0], day[3])]
    True
    """
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _digest(table: pa.Table, view: StoredView) -> bytes:
    """16 bytes that tell a batch by content and by the schema it is stored in."""
    digest = hashlib.blake2b(view.schema.fingerprint, digest_size=16)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    digest.update(sink.getvalue())
    return digest.digest()


def _aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
