"""From normalised events to the rows of a feature table, as one ibis expression for DuckDB and for Spark.

Each event becomes a row that adds it (at `_enter`) and, per window, a row that takes it away (when it leaves). Running
sums of both, per key in order of time, give the windows' values at every moment at which one of them changes.
Distinct values are counted the same way, over the merged stretches in which a value is present. Least and greatest
cannot be taken away from, so they look back over a frame of the window's length.

An increment is the same expression with a start: `base` holds each key's sums at `since`, and only events that are
new, or can still leave a window, are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.operations as ops
import sqlglot

from plait.aggregates.events import ENTER, FULL, ID, TIME, leave_at
from plait.aggregates.plan import FOREVER, US_PER_S, Plan
from plait.aggregates.spec import ALL_TIME

if TYPE_CHECKING:
    import ibis.expr.types as ir

AT = "_at"
# Kinds of row: an event that enters; 1 + i: leaves window i; the rest touch no running sum of measures.
_ENTERS, _BASE, _REMEMBERED, _DISTINCT = 0, -1, -2, -3


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an increment starts from: sums per key (or, for lists, the last events), and distinct values seen."""

    sums: ir.Table
    seen: tuple[ir.Table, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Span:
    """The stretch (since, until] of int64 microseconds for which rows are made."""

    since: int = -FOREVER
    until: int


def feature_rows(plan: Plan, events: ir.Table, span: Span, *, base: Base | None = None, late: bool = True) -> ir.Table:
    """Keys, `_at` (us) and the feature columns: one row per key and moment in the span at which its values change.

    late: whether an event may have entered after its tile's end; False spares sums, and a join for least and greatest.
    """
    if plan.lists:
        return _list_rows(plan, events, span, base)
    running = _running(plan, changes(plan, events, span, base), late)
    running = running.filter((running[AT] > span.since) & (running[AT] <= span.until))
    if late and plan.spec.bounded_us and any(extreme.of is not None for extreme in plan.extremes):
        running = _with_late(plan, running, events)
    values = plan.features(lambda name: running[name], _if_else, lambda value: value.cast("float64"))
    for name, value in values.items():
        if plan.spec.columns and isinstance(value, ibis.Value) and name in _last_times(plan):
            values[name] = ((value - _positive_modulo(value)) / US_PER_S).cast("int64")
    return running.select(*plan.spec.keys, AT, **values)


def _if_else(condition: Any, then: Any, otherwise: None) -> Any:
    value = then()
    return ibis.ifelse(condition, value, ibis.null(value.type()))


def _last_times(plan: Plan) -> set[str]:
    return {feature.name for feature in plan.spec.features if feature.kind == "last_time"}


def _positive_modulo(value: ir.IntegerValue) -> ir.IntegerValue:
    return ((value % US_PER_S) + US_PER_S) % US_PER_S


def changes(plan: Plan, events: ir.Table, span: Span, base: Base | None) -> ir.Table:
    """Every change to a running value: keys, `_at`, `_kind`, `_gone` and the columns that change."""
    spec = plan.spec
    events = events.filter(events[ENTER] <= span.until)
    tiles = _tiles(plan, events)
    gone = reduce(
        lambda total, length: total + (tiles[FULL] + length <= tiles[ENTER]).cast("int64"),
        spec.bounded_us,
        ibis.literal(0, "int64"),
    )
    measures = {f"_m{i}": tiles[f"_m{i}"] for i in range(len(plan.measures))}
    on_time = tiles[ENTER] == tiles[FULL]
    frames = {
        f"_x{i}": ibis.ifelse(on_time, tiles[f"_x{i}"], ibis.null(tiles[f"_x{i}"].type()))
        for i in range(len(plan.extremes))
    }
    ever = {f"_a{i}": tiles[f"_x{i}"] for i in range(len(plan.extremes))}
    shape = _Shape(plan, tiles, base is not None)
    fresh = tiles.filter(tiles[ENTER] > span.since)
    parts = [shape.rows(fresh, fresh[ENTER], _ENTERS, measures | frames | ever | {"_gone": gone})]
    if base is not None and plan.extremes and spec.bounded_us:
        # They entered before the span, but a frame that ends inside the span still sees them.
        old = tiles.filter(tiles[ENTER] <= span.since)
        parts.append(shape.rows(old, tiles[ENTER], _REMEMBERED, frames))
    for i, length in enumerate(spec.bounded_us):
        at = tiles[FULL] + length
        leaving = tiles.filter((at > span.since) & (at <= span.until) & (tiles[ENTER] < at))
        parts.append(shape.rows(leaving, at, 1 + i, measures))
    for i in range(len(plan.distincts)):
        seen = base.seen[i] if base is not None and base.seen else None
        for j, window in enumerate(spec.windows):
            lasts_us = None if window == ALL_TIME else spec.bounded_us[j]
            code = i * len(spec.windows) + j
            parts += _distinct_changes(plan, shape, events, i, lasts_us, code, span, seen)
    if base is not None:
        parts.append(shape.base(base.sums, span.since))
    return ibis.union(*parts) if len(parts) > 1 else parts[0]


class _Shape:
    """Makes rows of one schema, whatever part of it a kind of change fills."""

    def __init__(self, plan: Plan, tiles: ir.Table, with_base: bool) -> None:
        self.plan = plan
        self.columns: dict[str, ir.Value] = {"_gone": ibis.literal(0, "int64")}
        for i in range(len(plan.measures)):
            self.columns[f"_m{i}"] = ibis.literal(0, "int64")
        for i in range(len(plan.extremes)):
            self.columns[f"_x{i}"] = self.columns[f"_a{i}"] = ibis.null(tiles[f"_x{i}"].type())
        if plan.distincts:
            self.columns |= {"_code": ibis.literal(-1, "int64"), "_delta": ibis.literal(0, "int64")}
        if with_base:
            self.columns |= {name: ibis.literal(0, "int64") for name in sum_columns(plan)}

    def rows(self, table: ir.Table, at: ir.Value, kind: int, filled: dict[str, ir.Value]) -> ir.Table:
        keys = {key: table[key] for key in self.plan.spec.keys}
        head = {AT: at, "_kind": ibis.literal(kind, "int64")}
        return table.select(**keys, **head, **(self.columns | filled))

    def base(self, sums: ir.Table, since: int) -> ir.Table:
        filled = {name: sums[name] for name in sum_columns(self.plan)}
        filled |= {f"_a{i}": sums[f"_a{i}"] for i in range(len(self.plan.extremes))}
        return self.rows(sums, ibis.literal(since, "int64"), _BASE, filled)


def sum_columns(plan: Plan) -> list[str]:
    """The running sums that a base holds, per window."""
    names = [f"_m{i}" for i in range(len(plan.measures))] + [f"_d{i}" for i in range(len(plan.distincts))]
    return [f"{name}_{window}" for name in names for window in plan.spec.windows]


def base_at_end(plan: Plan, changed: ir.Table) -> ir.Table:
    """The sums per key after all of `changes`: the base of the next increment."""
    sums = {name: _total(plan, changed, name).sum().cast("int64") for name in sum_columns(plan)}
    for i, extreme in enumerate(plan.extremes):
        column = changed[f"_a{i}"]
        sums[f"_a{i}"] = column.min() if extreme.op == "least" else column.max()
    return changed.group_by(list(plan.spec.keys)).aggregate(**sums)


def list_base_at_end(plan: Plan, events: ir.Table, span: Span, base: Base | None) -> ir.Table:
    """The last events per key, as many as the longest list holds."""
    rows = _list_events(plan, events, span, base)
    order = [ibis.desc(name) for name in _list_order(rows)]
    ranked = rows.mutate(_rank=ibis.row_number().over(group_by=list(plan.spec.keys), order_by=order))
    return ranked.filter(ranked["_rank"] < max(feature.n for feature in plan.lists)).drop("_rank")


def seen_at_end(plan: Plan, events: ir.Table, span: Span, base: Base | None) -> list[ir.Table]:
    """Per distinct feature, the (key, value) pairs that entered by the end of the span."""
    tables = []
    for i in range(len(plan.distincts)):
        rows = events.filter((events[ENTER] <= span.until) & events[f"_d{i}"].notnull())
        pairs = rows.select(*plan.spec.keys, _value=rows[f"_d{i}"])
        if base is not None and base.seen:
            pairs = pairs.union(base.seen[i])
        tables.append(pairs.distinct())
    return tables


def _tiles(plan: Plan, events: ir.Table) -> ir.Table:
    """At coarser cadence, the events of a key that count from the same moment on become one."""
    if plan.spec.cadence == "event":
        return events
    sums = {f"_m{i}": events[f"_m{i}"].sum().cast("int64") for i in range(len(plan.measures))}
    for i, extreme in enumerate(plan.extremes):
        column = events[f"_x{i}"]
        sums[f"_x{i}"] = column.min() if extreme.op == "least" else column.max()
    return events.group_by([*plan.spec.keys, FULL, ENTER]).aggregate(_n=events.count(), **sums).drop("_n")


def _distinct_changes(
    plan: Plan,
    shape: _Shape,
    events: ir.Table,
    i: int,
    length: int | None,
    code: int,
    span: Span,
    seen: ir.Table | None,
) -> list[ir.Table]:
    """+1 where a value becomes present in the window, -1 where it is gone: the ends of its merged stretches."""
    keys = list(plan.spec.keys)
    leave = leave_at(events, length)
    rows = events.filter(events[f"_d{i}"].notnull() & (events[ENTER] < leave) & (leave > span.since))
    rows = rows.select(*keys, _value=rows[f"_d{i}"], _start=rows[ENTER], _end=leave_at(rows, length)).distinct()
    if length is None and seen is not None:
        forever = ibis.literal(FOREVER, "int64")
        rows = rows.union(seen.select(*keys, "_value", _start=ibis.literal(span.since, "int64"), _end=forever))
    order = ["_start", "_end"]
    by_value = ibis.window(group_by=[*keys, "_value"], order_by=order, preceding=None, following=0)
    rows = rows.mutate(_until=rows["_end"].max().over(by_value))
    neighbours = ibis.window(group_by=[*keys, "_value"], order_by=order)
    before = rows["_until"].lag().over(neighbours)
    after = rows["_start"].lead().over(neighbours)
    rows = rows.mutate(_before=before, _after=after)
    starts = rows.filter(
        (rows["_before"].isnull() | (rows["_start"] > rows["_before"])) & (rows["_start"] > span.since)
    )
    ends = rows.filter(
        (rows["_after"].isnull() | (rows["_after"] > rows["_until"]))
        & (rows["_until"] > span.since)
        & (rows["_until"] <= span.until)
    )
    filled = {"_code": ibis.literal(code, "int64")}
    return [
        shape.rows(starts, starts["_start"], _DISTINCT, filled | {"_delta": ibis.literal(1, "int64")}),
        shape.rows(ends, ends["_until"], _DISTINCT, filled | {"_delta": ibis.literal(-1, "int64")}),
    ]


def _total(plan: Plan, changed: ir.Table, name: str) -> ir.IntegerValue:
    """What a row of `changes` adds to the sum `name` (`_m<i>_<window>` or `_d<i>_<window>`)."""
    stem, _, window = name.rpartition("_")
    j = plan.spec.windows.index(window)
    zero = ibis.literal(0, "int64")
    if stem.startswith("_d"):
        code = int(stem[2:]) * len(plan.spec.windows) + j
        value = ibis.ifelse(changed["_code"] == code, changed["_delta"], zero)
    else:
        column = changed[stem]
        enters = changed["_kind"] == _ENTERS
        if window == ALL_TIME:
            value = ibis.ifelse(enters, column, zero)
        else:
            enters = enters & (changed["_gone"] <= j)
            value = ibis.ifelse(enters, column, ibis.ifelse(changed["_kind"] == 1 + j, -column, zero))
    return value + changed[name] if name in changed.columns else value


def _running(plan: Plan, changed: ir.Table, late: bool) -> ir.Table:
    """The values after each moment: `_m<i>_<window>`, `_d<i>_<window>`, `_x<i>_<window>`.

    A window's sum is what entered so far less what left it so far. Either is summed over its own kind of row alone, and
    carried forward to the rows of the other kinds: a carried value costs a quarter of a running sum.
    """
    keys = list(plan.spec.keys)
    so_far = ibis.range_window(group_by=keys, order_by=AT, preceding=None, following=0)
    columns: dict[str, ir.Value] = _sums_by_kind(plan, changed, late)
    for i, extreme in enumerate(plan.extremes):
        for window, length in zip(plan.spec.windows, [*plan.spec.bounded_us, None], strict=False):
            if length is not None and extreme.of is not None:
                frame = ibis.range_window(group_by=keys, order_by=AT, preceding=length - 1, following=0)
                columns[f"_x{i}_{window}"] = _extreme(extreme.op, changed[f"_x{i}"]).over(frame)
        columns[f"_x{i}_{ALL_TIME}"] = _extreme(extreme.op, changed[f"_a{i}"]).over(so_far)
    kept = [name for name in changed.columns if not name.startswith(("_x", "_a")) or name == AT]
    terms = {name: _terms(plan, name, name in changed.columns, late) for name in sum_columns(plan)}
    carried = _carried(keys, changed.select(*kept, **columns), {part[1:] for parts in terms.values() for part in parts})
    sums = {
        name: reduce(lambda total, part: total + part, (sign * carried[_carry(*of)] for sign, *of in parts))
        for name, parts in terms.items()
    }
    # Rows of one moment are told apart by nothing; the last of them has seen all and speaks for all.
    last = carried["_next"].isnull() | (carried["_next"] > carried[AT])
    extremes = [name for name in columns if name.startswith("_x")]
    return carried.select(*keys, AT, *extremes, _last=last, **sums).filter(ibis._["_last"]).drop("_last")


def _sums_by_kind(plan: Plan, changed: ir.Table, late: bool) -> dict[str, ir.Value]:
    """Sums over the rows so far of the same key and kind: `_p<i>` of measures, `_q` of distinct values.

    late: an event may have entered after it left window j; `_p<i>_<j>` then leaves it out.
    """
    same = [*plan.spec.keys, "_kind", *(["_code"] if plan.distincts else [])]
    so_far = ibis.range_window(group_by=same, order_by=AT, preceding=None, following=0)
    sums = {f"_p{i}": changed[f"_m{i}"].sum().over(so_far) for i in range(len(plan.measures))}
    if late:
        zero = ibis.literal(0, "int64")
        for j in range(len(plan.spec.bounded_us)):
            for i in range(len(plan.measures)):
                value = ibis.ifelse(changed["_gone"] <= j, changed[f"_m{i}"], zero)
                sums[f"_p{i}_{j}"] = value.sum().over(so_far)
    if plan.distincts:
        sums["_q"] = changed["_delta"].sum().over(so_far)
    return sums


def _terms(plan: Plan, name: str, based: bool, late: bool) -> list[tuple[int, str, str]]:
    """What the running sum `name` is made of: sign, the rows that hold a part of it, and their column."""
    stem, _, window = name.rpartition("_")
    j = plan.spec.windows.index(window)
    terms = [(1, f"_kind = {_BASE}", name)] if based else []
    if stem.startswith("_d"):
        code = int(stem[2:]) * len(plan.spec.windows) + j
        return [*terms, (1, f"_kind = {_DISTINCT} AND _code = {code}", "_q")]
    column = stem.replace("_m", "_p")
    bounded = window != ALL_TIME
    terms.append((1, f"_kind = {_ENTERS}", f"{column}_{j}" if late and bounded else column))
    return [*terms, (-1, f"_kind = {1 + j}", column)] if bounded else terms


def _carry(where: str, column: str) -> str:
    """Name of `column` as it was in the latest row that satisfies `where`."""
    return f"{column} at {where}"


def _carried(keys: list[str], rows: ir.Table, wanted: set[tuple[str, str]]) -> ir.Table:
    """The rows with `_carry(where, column)` of all wanted, 0 before the first, and `_next`, the next row's moment.

    In SQL, because ibis leaves IGNORE NULLS out on DuckDB; and in one SELECT, so that all of it sees the rows of one
    moment in the same order. Its schema is told: ibis would compile everything below once more to find it.
    """
    order = f"PARTITION BY {', '.join(map(_quoted, keys))} ORDER BY {AT}"
    given = [name for name in rows.columns if (name in keys or name == AT or name.startswith("_x"))]
    columns = [
        *map(_quoted, given),
        *(
            f"COALESCE(LAST_VALUE(CASE WHEN {where} THEN CAST({_quoted(column)} AS BIGINT) END IGNORE NULLS) OVER w, 0)"
            f" AS {_quoted(_carry(where, column))}"
            for where, column in sorted(wanted)
        ),
        f"LEAD({AT}) OVER o AS _next",
    ]
    query = (
        f"SELECT {', '.join(columns)} FROM changed"
        f" WINDOW w AS ({order} ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW), o AS ({order})"
    )
    backend = rows.get_backend()
    if backend.name != "duckdb":
        (query,) = sqlglot.transpile(query, read="duckdb", write=backend.dialect)
    schema = {name: rows[name].type() for name in given}
    schema |= {_carry(*of): dt.int64 for of in sorted(wanted)} | {"_next": dt.int64}
    return ops.SQLStringView(parent=rows.alias("changed").op(), query=query, schema=ibis.schema(schema)).to_expr()


def _quoted(name: str) -> str:
    return f'"{name}"'


def _extreme(op: str, column: ir.Value) -> ir.Value:
    return column.min() if op == "least" else column.max()


def _with_late(plan: Plan, running: ir.Table, events: ir.Table) -> ir.Table:
    """Least and greatest, with the events that entered late and so escape the frames."""
    keys = list(plan.spec.keys)
    late = events.filter((events[ENTER] > events[FULL]) & (events[ENTER] < events[FULL] + plan.longest_us))
    names = {key: f"_key{i}" for i, key in enumerate(keys)}
    values = {f"_late{i}": late[f"_x{i}"] for i in range(len(plan.extremes))}
    late = late.select(**{names[key]: late[key] for key in keys}, _from=late[ENTER], _full=late[FULL], **values)
    points = running.select(*keys, AT)
    on = [points[key] == late[names[key]] for key in keys]
    on += [late["_from"] <= points[AT], points[AT] < late["_full"] + plan.longest_us]
    met = points.inner_join(late, on)
    columns = {}
    for i, extreme in enumerate(plan.extremes):
        if extreme.of is None:
            continue
        for window, length in zip(plan.spec.windows, plan.spec.bounded_us, strict=False):
            inside = met[AT] < met["_full"] + length
            value = ibis.ifelse(inside, met[f"_late{i}"], ibis.null(met[f"_late{i}"].type()))
            columns[f"_late_x{i}_{window}"] = _extreme(extreme.op, value)
    per_point = met.group_by([*keys, AT]).aggregate(**columns)
    per_point = per_point.rename({**{names[key]: key for key in keys}, "_point": AT})
    on = [running[key] == per_point[names[key]] for key in keys] + [running[AT] == per_point["_point"]]
    joined = running.left_join(per_point, on)
    merged = {}
    for i, extreme in enumerate(plan.extremes):
        if extreme.of is not None:
            merge = ibis.least if extreme.op == "least" else ibis.greatest
            for window in plan.spec.windows[: len(plan.spec.bounded_us)]:
                name = f"_x{i}_{window}"
                merged[name] = merge(joined[name], joined[f"_late{name}"])
    return joined.mutate(**merged).select(*running.columns)


def _list_events(plan: Plan, events: ir.Table, span: Span, base: Base | None) -> ir.Table:
    columns = [*plan.spec.keys, ID, TIME, ENTER, *(f"_l{i}" for i in range(len(plan.lists)))]
    new = events.filter((events[ENTER] > span.since) & (events[ENTER] <= span.until)).select(*columns)
    return new if base is None else new.union(base.sums.select(*columns))


def _list_order(rows: ir.Table) -> list[ir.Value]:
    return [rows[ENTER], rows[TIME], rows[ID], rows["_l0"]]


def _list_rows(plan: Plan, events: ir.Table, span: Span, base: Base | None) -> ir.Table:
    keys = list(plan.spec.keys)
    rows = _list_events(plan, events, span, base)
    columns: dict[str, ir.Value] = {}
    for i, feature in enumerate(plan.lists):
        window = ibis.window(group_by=keys, order_by=_list_order(rows), preceding=feature.n - 1, following=0)
        columns[feature.name] = rows[f"_l{i}"].collect().over(window)
    following = rows[ENTER].lead().over(ibis.window(group_by=keys, order_by=_list_order(rows)))
    lists = rows.select(*keys, **{AT: rows[ENTER]}, _next=following, **columns)
    last = lists["_next"].isnull() | (lists["_next"] > lists[AT])
    return lists.filter(last & (lists[AT] > span.since)).drop("_next")
