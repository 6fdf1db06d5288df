"""The point-in-time join as an ibis expression: for each asked moment, the newest row of its key that was known then.

One expression for DuckDB and for Spark, which has no ASOF join. Per view: rows are ranked by newness within their
key; the ranks and the moments asked about go into one column of time, where a running maximum over the key's past gives
each moment the rank of its row; an equi-join on (key, rank) fetches the features. That is two sorts by key and an
equi-join, however deep a key's history is. A range join (Feast's way on Spark) forms every pair of a moment and an
older row of its key instead, so its cost is the product of the two.

The running maximum of newness is the definition itself, so that the created cutoff needs nothing more: a row enters at
max(event, created) instead of at its event, and one that a newer row overtook before it was known never is the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import ibis

from plait.offline.engine import stack

if TYPE_CHECKING:
    import ibis.expr.types as ir

ROW, TIME = "_row", "_time"
EVENT, CREATED = "_event", "_created"
_RANK, _AT, _ASKED = "_rank", "_at", "_asked"


@dataclass(frozen=True, kw_only=True)
class AsofView:
    """One view's history.

    rows: the keys and features by name, EVENT and (if `created`) CREATED as int64 microseconds, and the `written`
    columns, which rise in the order rows were written. keys: named the same in the frame that asks.
    """

    rows: ir.Table
    keys: tuple[str, ...]
    features: tuple[str, ...]
    written: tuple[str, ...] = ()
    created: bool = True
    ttl_us: int | None = None
    cutoff: bool = False


def features_as_of(frame: ir.Table, views: Sequence[AsofView]) -> ir.Table:
    """ROW and the features of all views as of TIME, null where there is none; every row of `frame` once, unordered.

    frame: ROW (int64, unique), TIME (int64 microseconds) and the keys. Each view is joined to the narrow frame alone
    and the results meet on ROW, so no row is shuffled with the features of the views before it.
    """
    joined = frame.select(ROW)
    for i, view in enumerate(views):
        other = f"{ROW}{i}"
        found = latest_as_of(frame, view).rename({other: ROW}).drop(EVENT, *([CREATED] if view.created else []))
        joined = joined.left_join(found, joined[ROW] == found[other]).drop(other)
    return joined


def latest_as_of(frame: ir.Table, view: AsofView) -> ir.Table:
    """ROW, EVENT, CREATED (if the view has it) and the features, for those rows of `frame` that see a value.

    Same event time: the newer created wins, a null created is the oldest; the same created too: the row written last.
    A null key or time sees nothing. With ttl, EVENT + ttl >= TIME. With the cutoff, a null created is never known.
    """
    ranked = _ranked(view, frame)
    keys = list(view.keys)
    at = ibis.greatest(ranked[EVENT], ranked[CREATED]) if view.cutoff and view.created else ranked[EVENT]
    asking = frame.filter(_all_known(frame, [TIME, *keys]))
    nothing = ibis.null("int64")
    asks = asking.select(*keys, **{_AT: asking[TIME], _ASKED: _int(1), _RANK: nothing, ROW: asking[ROW]})
    known = ranked.select(*keys, **{_AT: at, _ASKED: _int(0), _RANK: ranked[_RANK], ROW: nothing})
    both = stack(asks, known)
    # Rows come before the moments that equal them: event time <= asked time.
    past = ibis.window(group_by=keys or None, order_by=[_AT, _ASKED], preceding=None, following=0)
    best = both.mutate(_best=both[_RANK].max().over(past))
    best = best.filter((best[_ASKED] == 1) & best["_best"].notnull())
    best = best.select(**{f"_k{i}": best[key] for i, key in enumerate(keys)}, _best="_best", _asked_at=_AT, _by=ROW)
    on = [best[f"_k{i}"] == ranked[key] for i, key in enumerate(keys)]
    found = best.inner_join(ranked, [*on, best["_best"] == ranked[_RANK]])
    if view.ttl_us is not None:
        found = found.filter(found[EVENT] >= found["_asked_at"] - view.ttl_us)
    created = {CREATED: found[CREATED]} if view.created else {}
    return found.select(*view.features, **{ROW: found["_by"], EVENT: found[EVENT]}, **created)


def late_rows(view: AsofView) -> ir.IntegerScalar:
    """How many rows became known after they happened, or nobody knows when: without any, the cutoff changes nothing."""
    rows = view.rows
    return (rows[CREATED].isnull() | (rows[CREATED] > rows[EVENT])).ifelse(1, 0).sum().coalesce(0)


def withheld(frame: ir.Table, view: AsofView) -> ir.Table:
    """What the cutoff took away, as one row: `older`, asked moments that got an older value, and `none`, no value."""
    bare = replace(view, features=())
    newest, seen = latest_as_of(frame, replace(bare, cutoff=False)), latest_as_of(frame, replace(bare, cutoff=True))
    seen = seen.select(_row2=seen[ROW], _event2=seen[EVENT], _created2=seen[CREATED])
    both = newest.left_join(seen, newest[ROW] == seen["_row2"])
    none = both["_event2"].isnull()
    older = (both["_event2"] < both[EVENT]) | ((both["_event2"] == both[EVENT]) & (both["_created2"] < both[CREATED]))
    return both.aggregate(
        older=(~none & older.fill_null(False)).ifelse(1, 0).sum().coalesce(0), none=none.ifelse(1, 0).sum().coalesce(0)
    )


def _ranked(view: AsofView, frame: ir.Table) -> ir.Table:
    """The rows that can be seen, with their rank in newness within the key; keys in the frame's types."""
    rows = view.rows
    rows = rows.mutate(**{key: rows[key].cast(frame[key].type()) for key in view.keys})
    hidden = [CREATED] if view.cutoff and view.created else []
    rows = rows.filter(_all_known(rows, [EVENT, *hidden, *view.keys]))
    newness = [rows[EVENT], *([rows[CREATED].asc(nulls_first=True)] if view.created else [])]
    newness += [rows[name] for name in view.written]
    rank = ibis.row_number().over(ibis.window(group_by=list(view.keys) or None, order_by=newness))
    return rows.mutate(**{_RANK: rank.cast("int64")})


def _all_known(table: ir.Table, columns: Sequence[str]) -> ir.BooleanValue:
    return reduce(lambda all_, name: all_ & table[name].notnull(), columns[1:], table[columns[0]].notnull())


def _int(value: int) -> ir.IntegerScalar:
    return ibis.literal(value, "int64")
