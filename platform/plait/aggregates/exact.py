"""Aggregates exactly as of given moments, straight from the events: no tiles, no running sums.

For a few rows this is the quickest way to a value; for all others it is the witness against which the tables are held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ibis

from plait.aggregates.events import ENTER, FULL, ID, TIME
from plait.aggregates.plan import FOREVER, US_PER_S, Plan
from plait.aggregates.spec import ALL_TIME

if TYPE_CHECKING:
    import ibis.expr.types as ir


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
        columns = _lists(plan, met)
        values = met.group_by([*keys, "_at"]).aggregate(**columns)
        values = values.mutate(**{f.name: _last(values[f.name], f.n) for f in plan.lists})
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


def _lists(plan: Plan, met: ir.Table) -> dict[str, ir.Value]:
    order = [met[ENTER], met[TIME], met[ID], met["_l0"]]
    return {feature.name: met[f"_l{i}"].collect(order_by=order) for i, feature in enumerate(plan.lists)}


def _last(values: ir.ArrayValue, n: int) -> ir.ArrayValue:
    return ibis.ifelse(values.length() > n, values[values.length() - n :], values)
