"""The point-in-time match in memory, for a view with one integer key: sort (key, time) as one number, then search.

DuckDB's ASOF join sorts composite keys as text of variable length. Where the rows fit in memory and the pairs in 62
bits, sorting integers finds the same rows in half the CPU time: 1M entity rows and 1M rows of a view in 0.3 s instead
of 0.6 s. Whatever does not fit, or has two rows of a key at one time, is left to the ASOF join.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa

from plait.stores.asof_engine import quote
from plait.stores.asof_entities import BoundEntities
from plait.stores.asof_sql import AT, ROW, ViewPlan, ranges_query, time_filter, ttl_micros

SEARCHED_ROWS = 4_000_000  # of a view and of the entity frame: some 200 MB a view outside DuckDB's memory limit
_INTEGERS = frozenset({"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"})


def search(db: duckdb.DuckDBPyConnection, bound: BoundEntities, view: ViewPlan) -> pa.Array | None:
    """For each entity row, in order, the number of the view's row that it sees (null: none); None if it cannot tell."""
    pairs = _pairs(db, bound, view)
    if pairs is None:
        return None
    ((key, column),) = view.join_keys.items()
    own = view.relation.column(key, what="a join key")
    numbers, seen = _columns(
        db,
        f"SELECT {view.relation.row}, {pairs.sql(own, view.event)} FROM {view.relation.sql} "
        f"WHERE {time_filter(view, bound.bounds)}",
    )
    by_pair = np.argsort(seen)
    seen = seen[by_pair]
    if bool((seen[1:] == seen[:-1]).any()):
        return None
    rows, asked = _columns(db, f"SELECT {ROW}, {pairs.sql(quote(column), AT)} FROM {bound.sql}")
    # Questions in order walk the sorted pairs from front to back, in cache.
    by_asked = np.argsort(asked)
    asked = asked[by_asked]
    newest = np.searchsorted(seen, asked, side="right") - 1
    found = seen[newest]  # of -1, none at or before, the last: its pair is greater
    missing = (newest < 0) | (found // pairs.span != asked // pairs.span)
    if view.ttl:
        missing |= asked - found > ttl_micros(view.ttl)
    return _in_order(rows[by_asked], numbers[by_pair[newest]], missing)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """(key, time) as key x span + time, both from the view's first."""

    first_key: int
    last_key: int
    first: int
    span: int

    def sql(self, key: str, at: str) -> str:
        """The pair as SQL; -1, below all of the view's, for a key or a time that none of its rows can match."""
        pair = f"({key}::BIGINT - {self.first_key}) * {self.span} + ({at} - {self.first})"
        can_match = f"{key} BETWEEN {self.first_key} AND {self.last_key} AND {at} >= {self.first}"
        return f"CASE WHEN {can_match} THEN {pair} ELSE -1 END"


def _pairs(db: duckdb.DuckDBPyConnection, bound: BoundEntities, view: ViewPlan) -> _Pairs | None:
    if view.cutoff or len(view.join_keys) != 1 or bound.bounds.last is None:
        return None
    if any(n_rows is None or n_rows > SEARCHED_ROWS for n_rows in (view.relation.n_rows, bound.n_rows)):
        return None
    ((key, column),) = view.join_keys.items()
    if view.relation.type_of(key) not in _INTEGERS or bound.columns[column] not in _INTEGERS:
        return None
    first_key, last_key, first = db.execute(ranges_query(view, bound.bounds)).fetchall()[0]
    if first is None:
        return None
    span = bound.bounds.last - first + 1
    if (last_key - first_key + 1) * span >= 2**62:
        return None
    return _Pairs(first_key=first_key, last_key=last_key, first=first, span=span)


def _columns(db: duckdb.DuckDBPyConnection, query: str) -> tuple[np.ndarray, np.ndarray]:
    """The two columns of a query, neither with nulls."""
    table = db.execute(query).to_arrow_table()
    return table.column(0).to_numpy(), table.column(1).to_numpy()


def _in_order(rows: np.ndarray, values: np.ndarray, missing: np.ndarray) -> pa.Array:
    """The values in the order of `rows`, numbers that are unique but may have gaps."""
    if len(rows) and rows.max() >= len(rows):
        rows = np.argsort(np.argsort(rows))
    ordered, mask = np.empty_like(values), np.empty_like(missing)
    ordered[rows], mask[rows] = values, missing
    return pa.array(ordered, mask=mask)
