"""`aggregate_view`: a Feast feature view on the table that `plait features build` computes from a declaration."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import pyarrow as pa

from plait.aggregates.feast_sources import home_path, table_source
from plait.aggregates.features import Feature, LastN
from plait.aggregates.spec import TAG, AggregateSpec, EventSource
from plait.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    from feast import Entity, FeatureView
    from feast.types import FeastType


def aggregate_view(
    *,
    name: str,
    entities: Sequence[Entity],
    events: EventSource,
    features: Sequence[Feature],
    windows: Sequence[str] = (),
    cadence: str = "event",
    ttl: timedelta | None = None,
    description: str = "",
    tags: dict[str, str] | None = None,
) -> FeatureView:
    """Windowed aggregates of events per entity, as a feature view.

    windows: "1d", "12h", …, "all"; each feature becomes a column per window, `user_ratings_7d`.
    cadence: "event": values change right after an event; "hour", "day": at the end of its tile.
    ttl: None keeps the last value for ever, which is right here: rows are written when events leave a window too.
    Raises SpecError if the declaration cannot be.
    """
    from feast import FeatureView, Field
    from feast.types import from_value_type

    keys = tuple(entity.join_key for entity in entities)
    spec = AggregateSpec(
        name=name, keys=keys, events=events, windows=tuple(windows), cadence=cadence, features=tuple(features)
    )
    fields = [Field(name=entity.join_key, dtype=from_value_type(entity.value_type)) for entity in entities]
    for feature in spec.features:
        dtype = _dtype(spec, feature)
        for column in [f"{feature.name}_{window}" for window in spec.windows] if feature.windowed else [feature.name]:
            fields.append(Field(name=column, dtype=dtype, description=_describe(spec, feature, column)))
    return FeatureView(
        name=name,
        entities=list(entities),
        schema=fields,
        source=table_source(f"{name}_table", home_path("features", name)),
        ttl=ttl or timedelta(0),
        online=True,
        description=description,
        tags={**(tags or {}), TAG: spec.to_json()},
    )


def spec_of(view: FeatureView) -> AggregateSpec | None:
    """The declaration that a view (from the repository or the registry) carries, if it is an aggregate."""
    text = (view.tags or {}).get(TAG)
    return AggregateSpec.from_json(text) if text else None


def _dtype(spec: AggregateSpec, feature: Feature) -> FeastType:
    from feast.types import Array, Float64, Int64, String

    if isinstance(feature, LastN):
        column = column_type(spec.events, feature.of)
        for arrow, feast_type in ((pa.types.is_integer, Int64), (pa.types.is_floating, Float64)):
            if arrow(column):
                return Array(feast_type)
        if pa.types.is_string(column):
            return Array(String)
        raise SpecError(f"{spec.name}: list {feature.name!r} is of {column} values; lists hold numbers or strings")
    return Int64 if feature.kind in ("count", "distinct", "last_time") else Float64


def column_type(source: EventSource, column: str) -> pa.DataType:
    """Arrow type of an event column, from the event tables' schemas. Raises UnknownNameError."""
    from plait.data.tables import SCHEMAS

    reference = source.attributes.get(column)
    table, name = reference.split(".") if reference else (source.table, column)
    if table not in SCHEMAS:
        raise SpecError(f"lists are of columns of {', '.join(SCHEMAS)}; {table!r} has no schema known here")
    schema = SCHEMAS[table]
    if name not in schema.names:
        raise UnknownNameError("column", name, schema.names, where=f"events/{table}")
    found = schema.field(name).type
    return found.value_type if pa.types.is_list(found) else found


def _describe(spec: AggregateSpec, feature: Feature, column: str) -> str:
    what = {
        "count": "number of events",
        "distinct": "number of different values",
        "rate": "share of events",
        "last_time": "unix seconds of the latest event",
        "last_n": "latest values, oldest first",
    }.get(feature.kind, feature.kind)
    of = f" of {feature.of}" if hasattr(feature, "of") else ""
    where = f" where {feature.where}" if feature.where else ""
    window = column.removeprefix(f"{feature.name}_") if feature.windowed else ""
    over = " over all time" if window == "all" else f" over {window}" if window else ""
    kinds = "/".join(spec.events.types) or spec.events.table
    return f"{what}{of}{where}{over} ({kinds})"
