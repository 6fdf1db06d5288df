"""Aggregates exactly as of given moments, straight from the events: no tiles, no running sums.

For a few rows this is the quickest way to a value; for all others it is the witness against which the tables are held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import ibis
import pyarrow as pa

from plait.aggregates.events import ENTER, FULL, ID, TIME, normalised, raw_events
from plait.aggregates.moments import to_us
from plait.aggregates.plan import FOREVER, US_PER_S, Plan
from plait.aggregates.sources import check_sources, corrupt_part_named
from plait.aggregates.spec import ALL_TIME, AggregateSpec
from plait.errors import DataError, UnknownNameError
from plait.offline.engine import open_engine

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from plait.settings import Home


def exact_values(
    home: Home, spec: AggregateSpec, samples: pa.Table, *, engine: str = "duckdb", memory: str | None = None
) -> pa.Table:
    """`samples` with the features of `spec` exactly as of each one: every event before it, and never its own.

    samples: the spec's keys and `event_timestamp` (with a zone), any columns else; they come back in their order. The
    spec's cadence is not used: an event at t counts from t + 1 us (or from when it became known). Costs a pass over
    the events and, per sample, over those of its key. Raises UnknownNameError for a missing column, DataError for
    times without a zone or missing, and for events that are missing or corrupt.
    """
    plan = Plan(replace(spec, cadence="event"))
    for name in (*spec.keys, "event_timestamp"):
        if name not in samples.column_names:
            raise UnknownNameError("column", name, samples.column_names, where="samples")
    at = samples["event_timestamp"]
    if not pa.types.is_timestamp(at.type) or at.type.tz is None:
        raise DataError(f"samples: event_timestamp is {at.type}; give timestamps with a time zone")
    if at.null_count:
        raise DataError(
            f"samples: {at.null_count} of {len(at)} have no event_timestamp; fill them in or leave them out"
        )
    asked = samples.select(list(spec.keys)).append_column("_moment", at.cast(pa.timestamp("us", tz="UTC"), safe=False))
    asked = asked.append_column("_row", pa.array(range(samples.num_rows), pa.int64()))
    check_sources(home, spec)
    with corrupt_part_named(home, spec), open_engine(engine, memory=memory) as running:
        raw = raw_events(running, plan, running.read_parquet(home.events / spec.events.table))
        attributes = {name: running.read_parquet(home.events / name) for name in spec.events.attribute_tables}
        table = running.from_arrow(asked)
        rows = table.select(*spec.keys, "_row", _at=to_us(running, table["_moment"]))
        values = as_of(plan, normalised(running, plan, raw, attributes), rows)
        values = values.rename({f"_of_{name}": name for name in (*spec.keys, "_at")})
        on = [rows[name] == values[f"_of_{name}"] for name in (*spec.keys, "_at")]
        found = running.to_arrow(rows.left_join(values, on).order_by("_row").select(*spec.columns))
    for name in spec.columns:
        samples = samples.append_column(name, found[name])
    return samples


def as_of(plan: Plan, events: ir.Table, rows: ir.Table) -> ir.Table:
    """`rows` (keys and `_at` in us, any others ignored; each pair once) with the features at that moment.

    A row whose key has no event that counts by then has null in every feature, as in a join with the feature table.
    """
    keys = list(plan.spec.keys)
    names = {key: f"_key{i}" for i, key in enumerate(keys)}
    renamed = events.rename({names[key]: key for key in keys})
    wanted = rows.select(*keys, "_at").distinct()
    met = wanted.inner_join(
        renamed, [*(wanted[key] == renamed[names[key]] for key in keys), renamed[ENTER] <= wanted["_at"]]
    )
    if plan.lists:
        values = _lists(plan, met)
    else:
        parts = met.group_by([*keys, "_at"]).aggregate(**_aggregates(plan, met))
        values = parts.select(*keys, "_at", **_features(plan, parts))
    found = values.rename({**{names[key]: key for key in keys}, "_found": "_at"})
    joined = wanted.left_join(
        found, [*(wanted[key] == found[names[key]] for key in keys), wanted["_at"] == found["_found"]]
    )
    return joined.select(*keys, "_at", *plan.spec.columns)


def _aggregates(plan: Plan, met: ir.Table) -> dict[str, ir.Value]:
    columns: dict[str, ir.Value] = {}
    lengths = dict(zip(plan.spec.windows, [*plan.spec.bounded_us, FOREVER // 2], strict=False))
    for window, length in (lengths | {ALL_TIME: FOREVER // 2}).items():
        inside = met["_at"] < met[FULL] + length
        for i in range(len(plan.measures)):
            columns[f"_m{i}_{window}"] = met[f"_m{i}"].sum(where=inside).fill_null(0).cast("int64")
        for i in range(len(plan.distincts)):
            columns[f"_d{i}_{window}"] = met[f"_d{i}"].nunique(where=inside)
        for i, extreme in enumerate(plan.extremes):
            column = met[f"_x{i}"]
            columns[f"_x{i}_{window}"] = column.min(where=inside) if extreme.op == "least" else column.max(where=inside)
    return columns


def _features(plan: Plan, parts: ir.Table) -> dict[str, ir.Value]:
    def if_else(condition: ir.BooleanValue, then: object, otherwise: None) -> ir.Value:
        value = then()  # type: ignore[operator]
        return ibis.ifelse(condition, value, ibis.null(value.type()))

    values = plan.features(lambda name: parts[name], if_else, lambda value: value.cast("float64"))
    for feature in plan.spec.features:
        if feature.kind == "last_time":
            value = values[feature.name]
            values[feature.name] = ((value - ((value % US_PER_S) + US_PER_S) % US_PER_S) / US_PER_S).cast("int64")
    return values


def _lists(plan: Plan, met: ir.Table) -> ir.Table:
    """The newest values per key and moment, oldest first; by windows, as ibis cannot collect in order on Spark."""
    group = [*plan.spec.keys, "_at"]
    newest_first = [ibis.desc(met[name]) for name in (ENTER, TIME, ID, "_l0")]
    ranked = met.mutate(_rank=ibis.row_number().over(group_by=group, order_by=newest_first))
    ranked = ranked.filter(ranked["_rank"] < max(feature.n for feature in plan.lists))
    columns = {}
    for i, feature in enumerate(plan.lists):
        last = ibis.window(group_by=group, order_by=ibis.desc("_rank"), preceding=feature.n - 1, following=0)
        columns[feature.name] = ranked[f"_l{i}"].collect().over(last)
    lists = ranked.mutate(**columns)
    return lists.filter(lists["_rank"] == 0).select(*group, *columns)
