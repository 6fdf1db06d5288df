"""The point-in-time join as SQL: one ASOF join per view, all of them in one query.

Times are compared as microseconds since 1970 (BIGINT, UTC): cheaper than timestamps with a zone, and a naive timestamp
means UTC whatever the session thinks. Per view, a row counts from the moment `at`:
  cutoff off: at = event time;
  cutoff on:  at = known = max(event, created). A row that became known when a newer one was known already is never the
              newest of anything, so what remains after dropping those rises in event time as it rises in `known`, and
              the last one at or before t is exactly the newest of all that were known at t.
Two rows with the same event time: the newer created wins; the same created too: the one written last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from plait.stores.asof_engine import quote
from plait.stores.asof_sources import Relation

ROW, AT, EVENT = "__row", "__at", "__event"


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPlan:
    """What is read of one feature view. Names in `join_keys` and `features` are (Feast's name → name in the result)."""

    name: str
    relation: Relation
    join_keys: Mapping[str, str]  # the source's key → the entity frame's column
    features: Mapping[str, str]  # the source's feature → the result's column
    timestamp_field: str
    created_field: str | None
    ttl: timedelta | None
    cutoff: bool = False
    has_ties: bool = True  # two rows of a key share an event time: decide between them
    row_only: bool = False  # carry the number of the source's row instead of its features, as one column

    @property
    def event(self) -> str:
        return self._micros(self.timestamp_field, what="the event timestamp")

    @property
    def created(self) -> str | None:
        if self.created_field is None:
            return None
        return self._micros(self.created_field, what="the created timestamp")

    @property
    def payload(self) -> list[str]:
        """What the join carries, as SQL over the source: the features, or the row's number."""
        if self.row_only:
            return [self.relation.row]
        what = f"a feature of view {self.name!r}"
        return [self.relation.column(feature, what=what) for feature in self.features]

    @property
    def results(self) -> list[str]:
        """The names in the result of what the join carries."""
        return [f"{ROW}_{self.name}"] if self.row_only else list(self.features.values())

    def _micros(self, name: str, *, what: str) -> str:
        column = self.relation.column(name, what=what)
        return micros(column, self.relation.type_of(name))

    @property
    def keys(self) -> list[str]:
        return [self.relation.column(key, what=f"a join key of view {self.name!r}") for key in self.join_keys]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeRange:
    """The entity frame's first and last time, microseconds; None where it has none."""

    first: int | None
    last: int | None


def micros(column: str, type_: str) -> str:
    """Microseconds since 1970 UTC of a column; without a zone it is UTC already, text is parsed, null stays null."""
    return f"epoch_us({column})" if type_.startswith(("TIMESTAMP", "DATE")) else f"epoch_us({column}::TIMESTAMPTZ)"


def time_bounds(column: str, type_: str, within: TimeRange) -> list[str]:
    """Conditions that keep `column` in the range, both ends included.

    The column itself is compared, uncast, so that parquet statistics can skip row groups.
    """
    is_naive = type_.startswith(("TIMESTAMP", "DATE")) and "WITH TIME ZONE" not in type_
    moment = "make_timestamp" if is_naive else "make_timestamptz"
    bounds = [] if within.first is None else [f"{column} >= {moment}({within.first})"]
    # Nanoseconds within the last microsecond are cut off, so they belong to it.
    return bounds if within.last is None else [*bounds, f"{column} < {moment}({within.last + 1})"]


def time_filter(view: ViewPlan, bounds: TimeRange) -> str:
    """Rows that any entity row could see."""
    column = view.relation.column(view.timestamp_field, what="the event timestamp")
    first = bounds.first - ttl_micros(view.ttl) if bounds.first is not None and view.ttl else None
    within = time_bounds(column, view.relation.type_of(view.timestamp_field), TimeRange(first=first, last=bounds.last))
    return " AND ".join([f"{column} IS NOT NULL", *(f"{key} IS NOT NULL" for key in view.keys), *within])


def ttl_micros(ttl: timedelta) -> int:
    return ttl // timedelta(microseconds=1)


def late_query(view: ViewPlan, bounds: TimeRange) -> str:
    """One row if some row became known after it happened (or nobody knows when), else none."""
    if view.created is None:
        return "SELECT 1 LIMIT 0"
    late = f"({view.created} > {view.event} OR {view.created} IS NULL)"
    return f"SELECT 1 FROM {view.relation.sql} WHERE {time_filter(view, bounds)} AND {late} LIMIT 1"


def ties_query(view: ViewPlan, bounds: TimeRange) -> str:
    """One row if two rows of one key share an event time, else none."""
    groups = ", ".join([*view.keys, view.event])
    return (
        f"SELECT 1 FROM {view.relation.sql} WHERE {time_filter(view, bounds)} "
        f"GROUP BY {groups} HAVING count(*) > 1 LIMIT 1"
    )


def ranges_query(view: ViewPlan, bounds: TimeRange) -> str:
    """First and last key (the view has one), and the first event time, of the rows that any entity row could see."""
    (key,) = view.keys
    return (
        f"SELECT min({key}), max({key}), min({view.event}) FROM {view.relation.sql} WHERE {time_filter(view, bounds)}"
    )


def hashes_query(view: ViewPlan, bounds: TimeRange) -> str:
    """One hash (h) of key and event time for each row: two that are equal are probably a tie."""
    return (
        f"SELECT hash({', '.join([*view.keys, view.event])}) AS h FROM {view.relation.sql} "
        f"WHERE {time_filter(view, bounds)}"
    )


def view_query(view: ViewPlan, bounds: TimeRange) -> str:
    """The view's rows ready for the ASOF join: keys k0.., __at, __event, features f0.. (or the row's number)."""
    keys = [f"{key} AS k{i}" for i, key in enumerate(view.keys)]
    features = [f"{column} AS f{i}" for i, column in enumerate(view.payload)]
    source = f"FROM {view.relation.sql} WHERE {time_filter(view, bounds)}"
    if view.cutoff and view.created is not None:
        return _known_query(view, keys, features, source)
    select = ", ".join([*keys, f"{view.event} AS {AT}", f"{view.event} AS {EVENT}", *features])
    if not view.has_ties:
        return f"SELECT {select} {source}"
    partition = ", ".join([*view.keys, view.event])
    latest = [f"{column} DESC" for column in view.relation.order]
    if view.created is not None:
        latest.insert(0, f"{view.created} DESC NULLS LAST")
    rank = f"row_number() OVER (PARTITION BY {partition} ORDER BY {', '.join(latest)})"
    return f"SELECT {select} {source} QUALIFY {rank} = 1"


def _known_query(view: ViewPlan, keys: list[str], features: list[str], source: str) -> str:
    """Rows in order of `known` that raise the running maximum of (event, created), one per key and `known`."""
    known = f"greatest({view.event}, {view.created})"
    # (event, created) as one number that sorts like the pair.
    newness = f"({view.event}::HUGEINT * 18446744073709551616 + {view.created})"
    partition = f"PARTITION BY {', '.join(view.keys)} " if view.keys else ""
    window = f"({partition}ORDER BY {', '.join([known, newness, *view.relation.order])}"
    inner = ", ".join(
        [
            *keys,
            f"{known} AS {AT}",
            f"{view.event} AS {EVENT}",
            *features,
            f"{newness} AS __newness",
            f"max({newness}) OVER {window} ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS __before",
            f"lead({known}) OVER {window}) AS __next",
        ]
    )
    names = ", ".join([*(f"k{i}" for i in range(len(keys))), AT, EVENT, *(f"f{i}" for i in range(len(features)))])
    return (
        f"SELECT {names} FROM (SELECT {inner} {source} AND {view.created} IS NOT NULL) "
        "WHERE (__before IS NULL OR __newness >= __before) AND (__next IS NULL OR __next > __at)"
    )


def join_query(
    entity: str, columns: Sequence[str], views: Sequence[ViewPlan], bounds: TimeRange, *, ordered: bool = True
) -> str:
    """The whole retrieval. `entity` is a relation with `columns`, its time as __at and its row number as __row.

    In the entity rows' order; or, if not `ordered`, in any, with __row as the first column.
    """
    names = [f"v{i}" for i in range(len(views))]
    with_ = ",\n".join(f"{name} AS ({view_query(view, bounds)})" for name, view in zip(names, views, strict=True))
    joins, outputs = [], [f"e.{quote(column)}" for column in columns]
    for name, view in zip(names, views, strict=True):
        on = [f"e.{quote(column)} = {name}.k{i}" for i, column in enumerate(view.join_keys.values())]
        joins.append(f"ASOF LEFT JOIN {name} ON {' AND '.join([*on, f'e.{AT} >= {name}.{AT}'])}")
        for i, result in enumerate(view.results):
            value = f"{name}.f{i}"
            if view.ttl:
                value = f"CASE WHEN {name}.{EVENT} >= e.{AT} - {ttl_micros(view.ttl)} THEN {value} END"
            outputs.append(f"{value} AS {quote(result)}")
    head = f"WITH {with_}\n" if with_ else ""
    if not ordered:
        outputs.insert(0, f"e.{ROW}")
    order = f"\nORDER BY e.{ROW}" if ordered else ""
    return f"{head}SELECT {', '.join(outputs)}\nFROM {entity} e\n" + "\n".join(joins) + order


def withheld_query(entity: str, view: ViewPlan, bounds: TimeRange) -> str:
    """What the cutoff took away: entity rows that got an older value because of it, and those that got none.

    Compares the newest row (o) with the newest that was known (s), both within the ttl, by event time and then by
    created, so that a correction that came later counts too.
    """
    bare = replace(view, features={view.created_field or view.timestamp_field: "created"}, has_ties=True)
    on = [f"e.{quote(column)} = {{0}}.k{i}" for i, column in enumerate(view.join_keys.values())]
    match = " AND ".join([*on, f"e.{AT} >= {{0}}.{AT}"])
    alive, seen = "TRUE", f"s.{EVENT} IS NOT NULL"
    if view.ttl:
        alive = f"o.{EVENT} >= e.{AT} - {ttl_micros(view.ttl)}"
        seen += f" AND s.{EVENT} >= e.{AT} - {ttl_micros(view.ttl)}"
    older = f"(s.{EVENT} < o.{EVENT} OR (s.{EVENT} = o.{EVENT} AND s.f0 < o.f0))"
    return (
        f"WITH o AS ({view_query(replace(bare, cutoff=False), bounds)}), "
        f"s AS ({view_query(replace(bare, cutoff=True), bounds)}) "
        f"SELECT count(*) FILTER ({seen} AND {older}), count(*) FILTER (NOT coalesce({seen}, FALSE)) "
        f"FROM {entity} e ASOF JOIN o ON {match.format('o')} ASOF LEFT JOIN s ON {match.format('s')} WHERE {alive}"
    )
