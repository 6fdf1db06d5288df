"""The point-in-time join of samples to a feature service on an engine of Plait's: DuckDB, or Spark.

The other way to a training set, beside Feast's get_historical_features (retrieval.py), with equal rows: the stored
views are joined by one ibis expression (asof.py), the request-time transforms run here, over batches of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis
import pyarrow as pa

from plait.errors import SpecError, StoreError, did_you_mean
from plait.offline.asof import (
    CREATED,
    EVENT,
    TIME,
    AsofView,
    features_as_of,
    late_rows,
    latest_as_of,
    withheld,
)
from plait.offline.asof import ROW as ASOF_ROW
from plait.offline.engine import WRITTEN, Engine
from plait.offline.retrieval import ROW, Rows, canonical, entity_frame
from plait.offline.retrieval import TIME as SAMPLE_TIME
from plait.service import ServiceSpec, reading_stages
from plait.stores.asof_job import warn_of_cutoff
from plait.stores.asof_sources import is_remote, parquet_files, resolve_path
from plait.transforms import output_column

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from feast import FeatureStore


def stream_on_engine(
    engine: Engine,
    store: FeatureStore,
    spec: ServiceSpec,
    files: Sequence[Path],
    samples: Callable[[], Iterator[pa.RecordBatch]],
    *,
    cutoff: bool,
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(rows of samples, their features) in order of sample_id, a batch at a time.

    files: the samples' parquet parts. samples: opens their batches, in that order. cutoff: hide what became known after
    a sample's time; warns where it takes something away. Raises StoreError, SpecError, DataError.
    """
    views = {view.name: _view(engine, store, spec, view.name, cutoff=cutoff) for view in spec.views}
    frame = _frame(engine, spec, files)
    stages = reading_stages(spec)
    for stage in stages:
        derived = {key: of for key, of in spec.derived_keys.items() if of[0] in stage}
        for key, (name, feature) in derived.items():
            # As of the sample, as everything else: a movie's genre of then, not of now.
            found = latest_as_of(frame, replace(views[name], features=(feature,)))
            found = found.select(_derived_row=found[ASOF_ROW], _derived=found[feature])
            joined = frame.left_join(found, frame[ASOF_ROW] == found["_derived_row"])
            frame = joined.mutate(**{key: joined["_derived"]}).drop("_derived_row", "_derived")
        if derived:
            frame = engine.keep(frame)
    if cutoff:
        views = _settle_cutoff(engine, frame, views)
    rows = Rows(samples())
    joined = features_as_of(frame, list(views.values())).order_by(ASOF_ROW)
    for batch in engine.batches(joined):
        beside = rows.take(batch.num_rows)
        if not batch.column(ASOF_ROW).equals(beside.column(ROW).combine_chunks()):
            raise StoreError("the join returned other rows than the samples are; run `plait samples build` again")
        yield beside, canonical(spec, _with_transforms(spec, beside, pa.Table.from_batches([batch])))
    if left := rows.count():
        raise StoreError(f"the join returned {left} rows fewer than there are samples")


def _frame(engine: Engine, spec: ServiceSpec, files: Sequence[Path]) -> ir.Table:
    samples = engine.read_parquet(files)
    keys = {key: samples[key] for key in (*spec.request_keys, *spec.candidate_keys)}
    return samples.select(**{ASOF_ROW: samples[ROW], TIME: engine.micros(samples[SAMPLE_TIME])}, **keys)


def _view(engine: Engine, store: FeatureStore, spec: ServiceSpec, name: str, *, cutoff: bool) -> AsofView:
    view = next(view for view in spec.views if view.name == name)
    source = store.get_feature_view(name).batch_source
    if source is None:
        raise StoreError(f"feature view {name!r} has no batch_source, so it has no history; give it one")
    table, written = _source_table(engine, source, store.repo_path)
    own = {new: old for old, new in (source.field_mapping or {}).items() if old in table.columns}

    def column(name: str) -> Any:
        # Not table.rename: where a column has the new name already, it keeps that one and drops the renamed.
        if (found := own.get(name, name)) not in table.columns:
            raise StoreError(f"source {source.name!r}: no column {found!r}; {did_you_mean(found, table.columns)}")
        return table[found]

    values = {name: column(name) for name in (*view.join_keys, *view.features)}
    created = source.created_timestamp_column or None
    times = {EVENT: _micros(engine, column(source.timestamp_field))}
    if created:
        times[CREATED] = _micros(engine, column(created))
    return AsofView(
        rows=table.select(*written, **values, **times),
        keys=view.join_keys,
        features=view.features,
        written=written,
        created=created is not None,
        ttl_us=round(view.ttl.total_seconds() * 1_000_000) if view.ttl else None,
        cutoff=cutoff and created is not None,
    )


def _micros(engine: Engine, moment: Any) -> ir.IntegerValue:
    return engine.micros(moment if moment.type().is_timestamp() else moment.cast("timestamp('UTC')"))


def _source_table(engine: Engine, source: Any, repo_path: Path | None) -> tuple[ir.Table, tuple[str, ...]]:
    """A batch source as a table, and its columns that tell which row was written last (none if nothing tells)."""
    path = getattr(source, "path", None)
    kind = str(getattr(source, "file_format", None) or "parquet")
    if path and not getattr(source, "table_format", None) and "delta" not in kind.lower():
        place = resolve_path(path, repo_path)
        if not is_remote(place):
            base = place if Path(place).is_dir() else None
            return engine.read_written(parquet_files(place, name=f"source {source.name!r}"), base=base), WRITTEN
        if engine.name == "spark":
            return engine.spark_table(engine.spark.read.parquet(place)), ()
    elif engine.name == "spark" and getattr(source, "table", None):
        return engine.spark_table(engine.spark.table(source.table)), ()
    elif engine.name == "spark" and getattr(source, "query", None):
        return engine.spark_table(engine.spark.sql(source.query)), ()
    raise StoreError(
        f"source {source.name!r} ({type(source).__name__}) is not readable by --engine {engine.name}, which reads "
        "local parquet (spark: also remote parquet, tables and queries); leave --engine out to ask the offline store"
    )


def _settle_cutoff(engine: Engine, frame: ir.Table, views: dict[str, AsofView]) -> dict[str, AsofView]:
    """Leave the cutoff out of views without late rows, where it costs and changes nothing; warn of what it takes."""
    asked = {name: view for name, view in views.items() if view.cutoff}
    if not asked:
        return views
    counts = [view.rows.aggregate(late=late_rows(view)).mutate(view=ibis.literal(name)) for name, view in asked.items()]
    late = {
        row["view"]
        for row in engine.to_arrow(ibis.union(*counts) if counts[1:] else counts[0]).to_pylist()
        if row["late"]
    }
    for name in sorted(late):
        taken = engine.to_arrow(withheld(frame, asked[name])).to_pylist()[0]
        warn_of_cutoff(name, older=taken["older"], none=taken["none"], of=engine.count(frame))
    return {name: view if name in late else replace(view, cutoff=False) for name, view in views.items()}


def _with_transforms(spec: ServiceSpec, samples: pa.Table, found: pa.Table) -> pa.Table:
    """The stored features with those of the on-demand transforms beside them."""
    if not spec.transforms:
        return found
    fields = entity_frame(spec, samples)
    for transform in spec.transforms:
        columns = {}
        for name in transform.inputs:
            if name not in (*found.column_names, *spec.request_fields):
                raise SpecError(f"transform {transform.reference} takes {name!r}, which nothing provides")
            columns[name] = (found if name in found.column_names else fields).column(name)
        outputs = transform.function(pa.table(columns).to_pandas())
        dtypes = {feature.name: feature.dtype for feature in spec.features if feature.view == transform.name}
        for name, dtype in dtypes.items():
            column = output_column(outputs, name, dtype, found.num_rows, transform.reference)
            found = found.append_column(name, column)
    return found
