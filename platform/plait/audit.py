"""The audit: do the features that were served equal the features that training would see?

Logged impressions carry the feature values served. The audit rebuilds the same features offline, as of each request,
compares them one by one, and scores both with the model that served. A difference gets the first reason that explains
it:

- "transform version": the module behind the on-demand view is not the one the model was trained with
- "not materialized": offline as of the last materialization before the request, the value is the served one
- "missing online": the server had no value and offline has one (missing entity, or expired there)
- "missing offline": the other way round
- "not on record": the request is older than the last 100 materializations, which are all that the registry remembers
- "value": none of these: offline and online disagree, which is a fault
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plait.artifacts import load_artifact
from plait.errors import DataError, RegistryError
from plait.eventlog import roll
from plait.models import ModelRegistry
from plait.offline.build import REQUEST_TIME, point_in_time
from plait.service import ServiceSpec, open_store, resolve_service
from plait.settings import Home
from plait.stores.engine import RUNS_ON_RECORD

if TYPE_CHECKING:
    from feast import FeatureStore

FLOAT_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureAudit:
    """One feature: compared rows, differing rows, and how many of those each reason explains."""

    name: str
    n_rows: int
    n_different: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAudit:
    """One model version: its features, and how far its scores move between served and rebuilt features."""

    model: str
    service: str
    n_rows: int
    features: tuple[FeatureAudit, ...]
    score_moved_max: float
    score_moved_mean: float
    logged_score_off_max: float  # score from the logged features against the score that was logged
    notes: tuple[str, ...] = field(default=())

    @property
    def n_different(self) -> int:
        return sum(feature.n_different for feature in self.features)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def audit(home: Home, *, since: datetime | None = None, max_rows: int = 10_000) -> list[ModelAudit]:
    """Audit the newest `max_rows` logged impressions of every model version (since a time).

    Raises DataError if no impression with served features is logged.
    """
    roll(home)
    shown = _logged(home, since, max_rows)
    if not shown.num_rows:
        raise DataError("no logged impression carries served features yet; send predictions first (`plait simulate`)")
    store = open_store(home)
    registry = ModelRegistry(home)
    pairs = sorted(
        {(row["model"], row["model_version"]) for row in shown.select(["model", "model_version"]).to_pylist()}
    )
    return [_audit_model(home, store, registry, model, version, shown) for model, version in pairs]


def _logged(home: Home, since: datetime | None, max_rows: int) -> pa.Table:
    parts = sorted((home.events / "impressions").glob("log-*.parquet"))
    if not parts:
        return pa.table({"model": pa.array([], pa.string())})
    query = """
        SELECT user_id, item_id, timestamp AS event_timestamp, model, model_version, score, features
        FROM read_parquet($parts)
        WHERE features IS NOT NULL AND model IS NOT NULL AND ($since IS NULL OR timestamp >= $since::TIMESTAMPTZ)
        WINDOW newest AS (PARTITION BY model, model_version ORDER BY timestamp DESC, request_id, position)
        QUALIFY row_number() OVER newest <= $n
        ORDER BY event_timestamp, request_id, position
    """
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        values = {"parts": [str(part) for part in parts], "since": since, "n": max_rows}
        return db.execute(query, values).to_arrow_table()


def _audit_model(
    home: Home, store: FeatureStore, registry: ModelRegistry, model: str, version: str, shown: pa.Table
) -> ModelAudit:
    try:
        registered = registry.get(model, version)
    except RegistryError as error:
        raise DataError(f"the log names {model}:{version}, which is not registered: {error}") from error
    spec = resolve_service(store, registered.manifest["feature_service"])
    mine = pc.and_(pc.equal(shown["model"], model), pc.equal(shown["model_version"], version))
    rows = shown.filter(mine)
    rows = rows.append_column("sample_id", pa.array(np.arange(rows.num_rows)))
    served, notes = _served(rows, spec)
    rebuilt = point_in_time(store, spec, _samples(rows, rows["event_timestamp"]))
    earlier, forgotten = _as_materialized(store, spec, rows)
    stale_transform = {
        output
        for transform in spec.transforms
        if registered.manifest["transforms"].get(transform.reference, transform.sha) != transform.sha
        for output in transform.outputs
    }
    features = tuple(
        _audit_feature(
            name, served[name], rebuilt[name], earlier[name] if earlier else None, forgotten, name in stale_transform
        )
        for name in served.column_names
    )
    artifact = load_artifact(registered.path)
    keys = {name: rows[name] for name in ("user_id", "item_id")}
    from_served = artifact.score_rows(_with(keys, _complete(served, spec)))
    moved = np.abs(from_served - artifact.score_rows(_with(keys, rebuilt)))
    logged = rows["score"].to_numpy()
    return ModelAudit(
        model=str(registered),
        service=spec.name,
        n_rows=rows.num_rows,
        features=features,
        score_moved_max=float(moved.max()),
        score_moved_mean=float(moved.mean()),
        logged_score_off_max=float(np.abs(from_served - logged).max()),
        notes=tuple(notes),
    )


def _samples(rows: pa.Table, when: pa.ChunkedArray | pa.Array) -> pa.Table:
    return pa.table(
        {name: rows[name] for name in ("sample_id", "user_id", "item_id")}
        | {"event_timestamp": when.cast(pa.timestamp("us", tz="UTC"))}
    )


def _served(rows: pa.Table, spec: ServiceSpec) -> tuple[pa.Table, list[str]]:
    """The logged feature values as typed columns; features that no row logged are left out and noted."""
    logged = [json.loads(text) for text in rows["features"].to_pylist()]
    names = {name for record in logged for name in record}
    missing = [feature.name for feature in spec.features if feature.name not in names]
    columns = {}
    for feature in spec.features:
        if feature.name in names:
            columns[feature.name] = typed([record.get(feature.name) for record in logged], feature.dtype)
    notes = [f"not logged: {', '.join(missing)}"] if missing else []
    return pa.table(columns), notes


def typed(values: list[Any], dtype: pa.DataType) -> pa.Array:
    """Logged feature values, as JSON gives them back, as a column of their type."""
    if pa.types.is_timestamp(dtype):
        values = [None if value is None else datetime.fromisoformat(value).astimezone(UTC) for value in values]
    return pa.array(values, dtype)


def _complete(served: pa.Table, spec: ServiceSpec) -> pa.Table:
    return pa.table(
        {
            feature.name: served[feature.name]
            if feature.name in served.column_names
            else pa.nulls(served.num_rows, feature.dtype)
            for feature in spec.features
        }
    )


def _with(keys: Mapping[str, Any], table: pa.Table) -> pa.Table:
    return pa.table(dict(keys) | {name: table[name] for name in table.column_names if name not in keys})


def _as_materialized(store: FeatureStore, spec: ServiceSpec, rows: pa.Table) -> tuple[pa.Table | None, list[bool]]:
    """Features as of each view's last materialization before the request, or None if the registry knows of none; and
    which requests are older than what it remembers of them."""
    requested = rows["event_timestamp"].cast(pa.timestamp("us", tz="UTC")).to_pylist()
    runs = {view.name: _runs(store, view.name) for view in spec.views}
    stored: pa.Table | None = None
    for ends in filter(None, sorted(set(runs.values()))):
        marks = [max((end for end in ends if end <= when), default=when) for when in requested]
        found = point_in_time(store, spec, _samples(rows, pa.array(marks, pa.timestamp("us", tz="UTC"))))
        stored = found if stored is None else stored
        for feature in spec.features:
            if runs.get(feature.view) == ends:
                stored = stored.set_column(stored.column_names.index(feature.name), feature.name, found[feature.name])
    begins = [ends[0] for ends in runs.values() if len(ends) >= RUNS_ON_RECORD]
    forgotten = [any(when < begin for begin in begins) for when in requested]
    return (None if stored is None else _transform_again(stored, spec, rows)), forgotten


def _runs(store: FeatureStore, view: str) -> tuple[datetime, ...]:
    """When the view's materializations that are on record ended."""
    intervals = store.get_feature_view(view).materialization_intervals
    return tuple(sorted({end if end.tzinfo else end.replace(tzinfo=UTC) for _, end in intervals}))


def _transform_again(stored: pa.Table, spec: ServiceSpec, rows: pa.Table) -> pa.Table:
    """`stored` with its on-demand features computed at the time of the request, as the server did."""
    seconds = pc.floor_temporal(rows["event_timestamp"], unit="second").cast(pa.timestamp("s", tz="UTC"))
    request_timestamp = seconds.cast(pa.int64())
    for transform in spec.transforms:
        if not set(transform.inputs) <= {*stored.column_names, REQUEST_TIME}:
            continue  # an input is not itself a feature of the service, so it is not at hand here
        inputs = {name: request_timestamp if name == REQUEST_TIME else stored[name] for name in transform.inputs}
        outputs = transform.function(pa.table(inputs).to_pandas())
        for name in transform.outputs:
            if name in stored.column_names:
                at = stored.column_names.index(name)
                column = pa.array(outputs[name], from_pandas=True).cast(stored.schema.field(name).type)
                stored = stored.set_column(at, name, column)
    return stored


def _audit_feature(
    name: str,
    served: pa.ChunkedArray,
    rebuilt: pa.ChunkedArray,
    earlier: pa.ChunkedArray | None,
    forgotten: Sequence[bool],
    stale: bool,
) -> FeatureAudit:
    ours, truth = served.to_pylist(), rebuilt.to_pylist()
    before: Sequence[Any] = earlier.to_pylist() if earlier is not None else truth
    reasons: Counter[str] = Counter()
    for mine, right, then, unknown in zip(ours, truth, before, forgotten, strict=True):
        if not same(mine, right):
            reasons["not on record" if unknown and not stale else _reason(mine, right, then, stale)] += 1
    return FeatureAudit(name=name, n_rows=len(ours), n_different=reasons.total(), reasons=dict(reasons))


def _reason(served: Any, rebuilt: Any, as_materialized: Any, stale_transform: bool) -> str:
    if stale_transform:
        return "transform version"
    if same(served, as_materialized):
        return "not materialized"
    if served is None:
        return "missing online"
    if rebuilt is None:
        return "missing offline"
    return "value"


def same(a: Any, b: Any) -> bool:
    """Equal, floats to 1e-6 relative (JSON and float32 columns round), NaN equal to NaN, lists element by element."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return bool(a == b or (a != a and b != b) or abs(a - b) <= FLOAT_TOLERANCE * max(abs(a), abs(b)))
    return bool(a == b)
