"""Event tables as the aggregates read them: each event once, per key, with the moment from which it counts.

Times are int64 microseconds. `_time` is when it happened. `_enter` is the moment from which it counts: the end of its
tile (1 us after it at cadence "event"), or, if it became known only later, then. From `_full` = end of tile on, a
window of length W holds it for W: it leaves at `_full` + W, whenever it entered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ibis

from plait.aggregates.attributes import with_attributes
from plait.aggregates.moments import to_us
from plait.aggregates.plan import FOREVER, LIMIT, SCALE, Measure, Plan
from plait.aggregates.where import holds
from plait.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from plait.offline.engine import Engine

ID, TIME, FULL, ENTER = "_id", "_time", "_full", "_enter"


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The raw tables behind a spec: its events, and the items or users whose attributes it takes."""

    events: ir.Table
    attributes: Mapping[str, ir.Table]


def raw_events(engine: Engine, plan: Plan, table: ir.Table) -> ir.Table:
    """The source's events with `_time` and `_known` (both us), types and null keys sorted out; duplicates still in."""
    source = plan.spec.events
    if missing := {source.time, *source.id} - set(table.columns):
        raise UnknownNameError("column", sorted(missing)[0], table.columns, where=f"events/{source.table}")
    if source.types:
        table = table.filter(table["type"].isin(source.types))
    time = to_us(engine, table[source.time])
    known = to_us(engine, table["created"]) if "created" in table.columns else time
    table = table.mutate(_time=time, _known=ibis.coalesce(known, time))
    keys = [key for key in plan.spec.keys if key in table.columns]
    return table.filter([table[column].notnull() for column in (TIME, *keys)])


def once(plan: Plan, raw: ir.Table) -> ir.Table:
    """Each event once: the copy that was known first, happened first, is of the least key. Without an id: all kept."""
    ids = list(plan.spec.events.id)
    rank = ibis.row_number().over(group_by=ids, order_by=copy_order(plan, raw))
    ranked = raw.mutate(_rank=rank)
    return ranked.filter((ranked["_rank"] == 0) | ranked[ids[0]].isnull()).drop("_rank")


def event_id(plan: Plan, events: ir.Table) -> ir.StringValue:
    """What all copies of an event share, as one text; null where the event has no id."""
    first, *more = (events[name].cast("string") for name in plan.spec.events.id)
    for part in more:
        first = first + "\x1f" + part.fill_null("")
    return first


def copy_order(plan: Plan, raw: ir.Table) -> list[str]:
    """The columns in whose order the first copy of an event is the one that counts."""
    return ["_known", TIME, *(key for key in plan.spec.keys if key in raw.columns)]


def has_copies(engine: Engine, plan: Plan, raw: ir.Table) -> bool:
    """Whether any event is there twice: to know costs a tenth of sorting copies out."""
    counts = raw.group_by(list(plan.spec.events.id)).aggregate(_n=raw.count())
    return bool(engine.count(counts.filter(counts["_n"] > 1).limit(1)))


def normalised(
    engine: Engine, plan: Plan, raw: ir.Table, attributes: Mapping[str, ir.Table], *, copies: bool = True
) -> ir.Table:
    """Keys, `_id`, times, and the plan's columns: `_m<i>` int64, `_x<i>` and list values as they are, `_d<i>`.

    copies: False if every event is known to be there once.
    """
    spec = plan.spec
    events = with_attributes(engine, spec.events, once(plan, raw) if copies else raw, attributes)
    floats = [name for name in events.columns if events[name].type().is_floating()]
    # NaN counts as missing from here on: in a condition SQL would hold it greater than every number.
    events = events.mutate(**{name: _finite(events[name]) for name in floats})
    if spec.events.where is not None:
        events = events.filter(holds(spec.events.where, events))
    for column in sorted(spec.source_columns):
        if column not in events.columns:
            shown = [name for name in events.columns if not name.startswith("_")]
            raise UnknownNameError("column", column, shown, where=f"{spec.name}: events/{spec.events.table}")
    events = events.filter([events[key].notnull() for key in spec.keys])
    period = spec.period_us
    full = events[TIME] - _modulo(events[TIME], period) + period
    known = events["_known"]
    if period > 1:
        known = known + _modulo(-known, period)  # the first tile end at which it is known
    columns: dict[str, ir.Value] = {key: events[key] for key in spec.keys}
    columns[ID] = event_id(plan, events)
    columns |= {TIME: events[TIME], FULL: full, ENTER: ibis.greatest(full, known)}
    for i, measure in enumerate(plan.measures):
        columns[f"_m{i}"] = _measure(measure, events)
    for i, extreme in enumerate(plan.extremes):
        value = events[TIME] if extreme.of is None else _finite(events[extreme.of])
        columns[f"_x{i}"] = _only(value, extreme.where, events)
    for i, distinct in enumerate(plan.distincts):
        columns[f"_d{i}"] = _only(events[distinct.of].cast("string"), distinct.where, events)
    for i, feature in enumerate(plan.lists):
        columns[f"_l{i}"] = events[feature.of]
    table = events.select(**columns)
    for i in range(len(plan.lists)):
        table = table.filter(table[f"_l{i}"].notnull())
    return table


def check_magnitudes(engine: Engine, plan: Plan, raw: ir.Table) -> None:
    """Raises DataError if a value that is summed is too large to be kept exactly."""
    for column in sorted({measure.of for measure in plan.measures if measure.kind == "sum" and measure.of}):
        if column not in raw.columns:
            continue  # an attribute; its name is checked where it is joined
        value = _finite(raw[column]).abs().max().execute()
        if value is not None and value > LIMIT:
            raise DataError(
                f"events/{plan.spec.events.table}: {column} holds {value:g}; sums and means keep values up to "
                f"{LIMIT:g} exactly: write that column in a larger unit (thousands, say)"
            )


def leave_at(events: ir.Table, length_us: int | None) -> ir.IntegerValue:
    """The moment at which an event leaves a window of this length (never: None)."""
    return ibis.literal(FOREVER, "int64") if length_us is None else events[FULL] + length_us


def _measure(measure: Measure, events: ir.Table) -> ir.IntegerValue:
    if measure.of is None:
        value = ibis.literal(1, "int64")
    elif measure.kind == "valid":
        value = _finite(events[measure.of]).notnull().cast("int64")
    else:
        # floor(x + 0.5) rather than round(): the engines round halves differently.
        scaled = (_finite(events[measure.of]).fill_null(0.0) * float(SCALE) + 0.5).floor()
        value = scaled.cast("int64")
    zero = ibis.literal(0, "int64")
    return value if measure.where is None else ibis.ifelse(holds(measure.where, events), value, zero)


def _only(value: ir.Value, where: str | None, events: ir.Table) -> ir.Value:
    return value if where is None else ibis.ifelse(holds(where, events), value, ibis.null(value.type()))


def _finite(column: ir.Value) -> ir.FloatingValue:
    """The column as float64; NaN and infinities count as missing."""
    value = column.cast("float64")
    return ibis.ifelse(value.abs() < float("1e300"), value, ibis.null("float64"))


def _modulo(value: ir.IntegerValue, period: int) -> ir.IntegerValue:
    """Remainder in [0, period), also for times before 1970."""
    return ((value % period) + period) % period
