"""Whether two rows of a key share an event time: where none do, the join is spared a decision per row."""

from __future__ import annotations

from dataclasses import replace

import duckdb
import numpy as np

from plait.stores.asof_sql import TimeRange, ViewPlan, hashes_query, ties_query

HASHED_ROWS = 4_000_000  # 32 MB


def settle_ties(db: duckdb.DuckDBPyConnection, plan: ViewPlan, bounds: TimeRange) -> ViewPlan:
    """The plan, which decides between rows of one key and time only if there are such; a cutoff decides by itself."""
    return plan if plan.cutoff else replace(plan, has_ties=_may_tie(db, plan, bounds))


def _may_tie(db: duckdb.DuckDBPyConnection, plan: ViewPlan, bounds: TimeRange) -> bool:
    """Never False if two rows tie; True in vain does no harm."""
    n_rows = plan.relation.n_rows
    if n_rows is None or n_rows > HASHED_ROWS:
        return db.execute(ties_query(plan, bounds)).fetchone() is not None
    # A third of what the grouping costs, for 8 bytes a row outside DuckDB's memory limit.
    hashes = np.sort(db.execute(hashes_query(plan, bounds)).to_arrow_table()["h"].to_numpy())
    return bool((hashes[1:] == hashes[:-1]).any())
