"""Plait's offline store: Feast's DuckDB store with point-in-time joins by ASOF JOIN, in bounded memory.

In feature_store.yaml:
    offline_store:
      type: plait.stores.offline.AsofDuckDBOfflineStore
      created_cutoff: on        # what became known after an entity row's time is not visible to it
      memory_limit: 4GB         # default: DuckDB's, 80 % of the machine
      threads: 4                # default: all
      temp_directory: .plait/tmp

Everything Feast asks of its DuckDB store works the same; docs/offline_store.md tells what is better and what differs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileSource
from feast.infra.offline_stores.offline_store import OfflineStore
from feast.infra.offline_stores.offline_utils import get_pyarrow_schema_from_batch_source
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.utils import compute_non_entity_date_range
from pydantic import PositiveInt, field_validator

from plait.clock import Clock
from plait.errors import SettingsError, StoreError, did_you_mean
from plait.files import atomic_file
from plait.settings import find_home
from plait.stores.asof_engine import EngineLimits, connect, plain_errors, quote
from plait.stores.asof_entities import Entities, RangeEntities, TableEntities, from_micros, read_entities, to_micros
from plait.stores.asof_job import AsofMetadata, DuckDBJob, OpenView, Planned, PointInTime
from plait.stores.asof_sources import Relation, is_remote, resolve_path, source_relation
from plait.stores.asof_sql import TimeRange, ViewPlan, micros, time_bounds


class AsofDuckDBOfflineStoreConfig(FeastConfigBaseModel):
    """The `offline_store` block of feature_store.yaml; relative folders are below it."""

    type: Literal["plait.stores.offline.AsofDuckDBOfflineStore"] = "plait.stores.offline.AsofDuckDBOfflineStore"

    staging_location: str | None = None
    """As in Feast's DuckDB store."""

    staging_location_endpoint_override: str | None = None
    """As in Feast's DuckDB store."""

    created_cutoff: bool = False
    """Hide values whose created timestamp is later than the entity row's time, in every retrieval."""

    memory_limit: str | None = None
    """What one query may hold in memory before it spills, as DuckDB writes it: "2GB"."""

    threads: PositiveInt | None = None
    """CPU threads of one query."""

    temp_directory: str | None = None
    """Where a query spills to; the system's temporary folder by default."""

    @field_validator("created_cutoff", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        # YAML 1.1 reads on and off as booleans, but "on" in quotes, or from the environment, is text.
        return {"on": True, "off": False}.get(value.lower(), value) if isinstance(value, str) else value


class AsofDuckDBOfflineStore(OfflineStore):
    """Feast's OfflineStore contract on DuckDB; see the module."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(  # type: ignore[override]
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | pa.Table | str | Path | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> DuckDBJob:
        """Join the features to the entity rows as of their times; runs when the job's result is asked for.

        entity_df: pandas, Arrow, SQL for DuckDB, or the path of a parquet file or folder (relative to the repo).
        None: every key and moment from start_date to end_date, both included, at which a view got a value.
        Raises StoreError if the frame is none of these or a view cannot be read.
        """
        repo_path, limits = config.repo_path, engine_limits(config)
        cutoff = filter_by_created_timestamp or created_cutoff(config)
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        if entity_df is None:
            start, end = compute_non_entity_date_range(feature_views, start_date, end_date)
            entities: Entities = RangeEntities(start=start, end=end)
        else:
            # Only SQL can name them.
            listed = registry.list_data_sources(project, allow_cache=True) if isinstance(entity_df, str) else []
            sources = {source.name: source for source in listed}
            entities = read_entities(entity_df, sources=sources, repo_path=repo_path)
        retrieval = PointInTime(
            entities=entities,
            views=[_opener(view, feature_refs, full_feature_names, cutoff, repo_path) for view in feature_views],
            limits=limits,
            repo_path=repo_path,
            request_fields=[(view.name, name) for view in on_demand for name in view.get_request_data_schema()],
            warn_of_cutoff=cutoff and not filter_by_created_timestamp,
        )
        return DuckDBJob(
            plan=retrieval,
            repo_path=repo_path,
            on_demand=on_demand,
            full_feature_names=full_feature_names,
            metadata=_metadata(feature_refs, entities, retrieval),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> DuckDBJob:
        """The newest row of each key within [start_date, end_date]; ties by created, then the row written last.

        Under the created-timestamp cutoff only rows that are known by the home's now: the same that history sees.
        """
        return _pull(
            config,
            data_source,
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
            latest_of=join_key_columns,
        )

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> DuckDBJob:
        """All rows within [start_date, end_date], in the order of the source."""
        return _pull(
            config,
            data_source,
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
            latest_of=None,
        )

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Append rows to the view's source: a new part in its folder, or its one file rewritten aside and renamed.

        Raises StoreError if the columns are not the source's.
        """
        source = feature_view.batch_source
        is_parquet = isinstance(source, FileSource) and (
            source.file_format is None or isinstance(source.file_format, ParquetFormat)
        )
        if not isinstance(source, FileSource) or not is_parquet or is_remote(source.path):
            _feasts().offline_write_batch(_as_feasts(config), feature_view, table, progress)
            return
        _, names = get_pyarrow_schema_from_batch_source(config, source)
        if set(names) != set(table.column_names):
            raise StoreError(
                f"view {feature_view.name!r}: the rows have the columns {sorted(table.column_names)}, its source has "
                f"{sorted(names)}; give exactly these"
            )
        path = Path(resolve_path(source.path, config.repo_path))
        if path.is_dir():
            _append_part(path, table.select(names))
        else:
            _append_to_file(path, table.select(names))
        if progress:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,
    ) -> None:
        """Append logged features as parts of the destination folder (partitioned as it says)."""
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination) or is_remote(destination.path):
            _feasts().write_logged_features(_as_feasts(config), data, source, logging_config, registry)
            return
        folder = Path(resolve_path(destination.path, config.repo_path))
        folder.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(data) if isinstance(data, Path) else data
        if destination.partition_by:
            pq.write_to_dataset(
                table,
                root_path=folder,
                partition_cols=list(destination.partition_by),
                basename_template=f"part-{uuid.uuid4().hex}-{{i}}.parquet",
            )
        else:
            _append_part(folder, table)

    @staticmethod
    def compute_monitoring_metrics(
        config: RepoConfig,
        data_source: DataSource,
        feature_columns: list[tuple[str, str]],
        timestamp_field: str,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        histogram_bins: int = 20,
        top_n: int = 10,
    ) -> list[dict[str, Any]]:
        """Feast's own statistics, on any source this store reads and within its limits (stock: one parquet file)."""
        from feast.infra.offline_stores.duckdb import _duckdb_categorical_stats, _duckdb_numeric_stats

        within = TimeRange(
            first=to_micros(start_date) if start_date else None, last=to_micros(end_date) if end_date else None
        )
        with _opened(config, data_source) as (db, relation):
            times = time_bounds(quote(timestamp_field), relation.columns[timestamp_field], within)
            kinds = {kind: [name for name, k in feature_columns if k == kind] for kind in ("numeric", "categorical")}
            where = " AND ".join(times)
            metrics = []
            if kinds["numeric"]:
                metrics += _duckdb_numeric_stats(db, relation.sql, kinds["numeric"], where, histogram_bins)
            return metrics + [
                _duckdb_categorical_stats(db, relation.sql, name, where, top_n) for name in kinds["categorical"]
            ]

    @staticmethod
    def get_monitoring_max_timestamp(
        config: RepoConfig, data_source: DataSource, timestamp_field: str
    ) -> datetime | None:
        """The newest time in the source, aware; None if it has none."""
        with _opened(config, data_source) as (db, relation):
            at = micros(quote(timestamp_field), relation.columns[timestamp_field])
            row = db.execute(f"SELECT max({at}) FROM {relation.sql}").fetchone()
        return from_micros(row[0]) if row else None

    # Where Feast keeps these statistics is its own affair.

    @staticmethod
    def ensure_monitoring_tables(config: RepoConfig) -> None:
        _feasts().ensure_monitoring_tables(_as_feasts(config))

    @staticmethod
    def save_monitoring_metrics(config: RepoConfig, metric_type: str, metrics: list[dict[str, Any]]) -> None:
        _feasts().save_monitoring_metrics(_as_feasts(config), metric_type, metrics)

    @staticmethod
    def query_monitoring_metrics(config: RepoConfig, project: str, metric_type: str, *asked: Any, **by: Any) -> Any:
        return _feasts().query_monitoring_metrics(_as_feasts(config), project, metric_type, *asked, **by)

    @staticmethod
    def clear_monitoring_baseline(config: RepoConfig, project: str, *asked: Any, **by: Any) -> None:
        _feasts().clear_monitoring_baseline(_as_feasts(config), project, *asked, **by)


def _feasts() -> type[OfflineStore]:
    """Feast's own DuckDB store, for what it does well. Asked for late: with ibis it takes 16 MB and 0.2 s."""
    from feast.infra.offline_stores.duckdb import DuckDBOfflineStore

    return DuckDBOfflineStore


def _as_feasts(config: RepoConfig) -> RepoConfig:
    """The same project with Feast's own DuckDB store, which insists on settings of its own class."""
    ours: AsofDuckDBOfflineStoreConfig = config.offline_store
    settings = {
        "type": "duckdb",
        "staging_location": ours.staging_location,
        "staging_location_endpoint_override": ours.staging_location_endpoint_override,
    }
    theirs = config.model_copy()
    theirs.offline_config, theirs._offline_store = settings, None
    return theirs


def engine_limits(config: RepoConfig) -> EngineLimits:
    """The limits that feature_store.yaml sets for one query."""
    store = config.offline_store
    if not isinstance(store, AsofDuckDBOfflineStoreConfig):
        return EngineLimits()
    spill = resolve_path(store.temp_directory, config.repo_path) if store.temp_directory else None
    return EngineLimits(
        memory_limit=store.memory_limit, threads=store.threads, temp_directory=Path(spill) if spill else None
    )


def created_cutoff(config: RepoConfig) -> bool:
    """Whether feature_store.yaml sets the created-timestamp cutoff for every retrieval."""
    return isinstance(config.offline_store, AsofDuckDBOfflineStoreConfig) and config.offline_store.created_cutoff


def _opener(
    view: FeatureView, feature_refs: Sequence[str], full_feature_names: bool, cutoff: bool, repo_path: Path | None
) -> OpenView:
    """Opens the view's source and says what is read of it; has neither looked for ties nor for late rows."""
    source = view.batch_source
    if source is None:
        raise StoreError(f"feature view {view.name!r} has no batch_source, so it has no history; give it one")
    prefix = f"{view.projection.name_to_use()}:"
    wanted = list(dict.fromkeys(ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix)))
    # As in Feast: the column takes the alias or the name, without a version tag.
    full_name = view.projection.name_alias or view.name
    join_keys = {
        column.name: view.projection.join_key_map.get(column.name, column.name)
        for column in view.entity_columns
        if column.name != DUMMY_ENTITY_ID
    }
    features = {name: f"{full_name}__{name}" if full_feature_names else name for name in wanted}
    # An on-demand view made from a view that was not applied yet asks for its keys too; the frame has them.
    features = {name: result for name, result in features.items() if join_keys.get(name) != result}

    def open_view(db: duckdb.DuckDBPyConnection) -> ViewPlan:
        return ViewPlan(
            name=view.projection.name_to_use(),
            relation=source_relation(db, source, repo_path),
            join_keys=join_keys,
            features=features,
            timestamp_field=source.timestamp_field,
            created_field=source.created_timestamp_column or None,
            ttl=view.ttl or None,
            cutoff=cutoff and bool(source.created_timestamp_column),
        )

    return open_view


def _metadata(feature_refs: list[str], entities: Entities, retrieval: PointInTime) -> AsofMetadata:
    def keys() -> list[str]:
        if isinstance(entities, TableEntities):
            return [name for name in entities.table.column_names if name != entities.time_column]
        with retrieval.bound() as bound:
            return [name for name in bound.columns if name != bound.time_column]

    def bounds() -> TimeRange:
        if isinstance(entities, TableEntities):
            return entities.bounds()
        with retrieval.bound() as bound:
            return bound.bounds

    return AsofMetadata(feature_refs, keys, bounds)


@contextmanager
def _opened(config: RepoConfig, source: DataSource) -> Iterator[tuple[duckdb.DuckDBPyConnection, Relation]]:
    """A source in a connection of its own; what goes wrong with it while open is told in plain words."""
    limits, files = engine_limits(config), list[str]()
    with plain_errors(limits, doing=f"source {source.name!r}", files=files), connect(limits) as db:
        relation = source_relation(db, source, config.repo_path)
        files += relation.files
        yield db, relation


def _pull(
    config: RepoConfig,
    source: DataSource,
    columns: list[str],
    timestamp_field: str,
    created_field: str | None,
    start: datetime | None,
    end: datetime | None,
    *,
    latest_of: list[str] | None,
) -> DuckDBJob:
    fields = list(dict.fromkeys([*columns, timestamp_field, *([created_field] if created_field else [])]))

    within = (to_micros(start) if start else None, to_micros(end) if end else None)
    hides = latest_of is not None and created_field is not None and created_cutoff(config)

    @contextmanager
    def plan() -> Iterator[Planned]:
        known_by = to_micros(_home_now(config)) if hides else None
        with _opened(config, source) as (db, relation):
            query = _pull_query(relation, fields, timestamp_field, created_field, within, latest_of, known_by)
            yield Planned(db=db, query=lambda: query)

    return DuckDBJob(plan=plan, repo_path=config.repo_path)


def _home_now(config: RepoConfig) -> datetime:
    """The present of the project's home, which may replay history; the wall's without a home."""
    try:
        home = find_home(Path(config.repo_path or "."))
    except SettingsError:
        return datetime.now(UTC)
    return Clock.of(home).now()


def _pull_query(
    relation: Relation,
    fields: Sequence[str],
    timestamp_field: str,
    created_field: str | None,
    within: tuple[int | None, int | None],
    latest_of: Sequence[str] | None,
    known_by: int | None,
) -> str:
    """`fields` of the rows within two moments; only the newest of each key if `latest_of` names the keys; only what
    was known by then if `known_by` is a moment.

    Names are the source's own: Feast maps them before and after.
    """
    for field in fields:
        if field not in relation.columns:
            raise StoreError(f"{relation.name}: no column {field!r}; {did_you_mean(field, relation.columns)}")
    at = micros(quote(timestamp_field), relation.columns[timestamp_field])
    first, last = within
    sql = f"SELECT {', '.join(quote(field) for field in fields)} FROM {relation.sql}"
    bounds = time_bounds(quote(timestamp_field), relation.columns[timestamp_field], TimeRange(first=first, last=last))
    if known_by is not None and created_field is not None:
        bounds.append(f"{micros(quote(created_field), relation.columns[created_field])} <= {known_by}")
    where = f" WHERE {' AND '.join(bounds)}" if bounds else ""
    sql += where
    if latest_of is None:
        return sql
    order = [f"{at} DESC NULLS LAST"]
    if created_field:
        order.append(f"{micros(quote(created_field), relation.columns[created_field])} DESC NULLS LAST")
    order += [f"{column} DESC" for column in relation.order]
    partition = f"PARTITION BY {', '.join(quote(key) for key in latest_of)} " if latest_of else ""
    newest = f"QUALIFY row_number() OVER ({partition}ORDER BY {', '.join(order)}) = 1"
    if not relation.files:
        return f"{sql} {newest}"
    # The values of rows that are not the newest need not be read, nor those of any go through the window's sort.
    rows = f"SELECT {relation.row} FROM {relation.sql}{where} {newest}"
    return f"{sql}{' AND' if where else ' WHERE'} {relation.row} IN ({rows})"


def _append_part(folder: Path, table: pa.Table) -> None:
    """A new part whose name sorts after what is there, so that of rows that tie in all times the newer wins."""
    newest = max((path.stat().st_mtime_ns for path in folder.glob("*.parquet")), default=0)
    stamp = max(newest + 1, time.time_ns())
    with atomic_file(folder / f"pushed-{stamp:020d}-{uuid.uuid4().hex[:8]}.parquet") as aside:
        pq.write_table(table, aside, compression="zstd")


def _append_to_file(path: Path, table: pa.Table) -> None:
    """Rewrite the file with the rows at its end, row group by row group."""
    with pq.ParquetFile(path) as old, atomic_file(path) as aside:
        with pq.ParquetWriter(aside, old.schema_arrow, compression="zstd") as writer:
            for group in range(old.num_row_groups):
                writer.write_table(old.read_row_group(group))
            writer.write_table(table.cast(old.schema_arrow))
