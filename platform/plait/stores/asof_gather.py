"""The whole result in memory: first which row of each source an entity row sees, then the values of those rows.

An ASOF join sorts all that it carries, once for each view. Carrying one row number for a view instead of its features
(or searching sorted integers, where the keys allow it), and taking the features from Arrow columns at the end, in the
entity rows' order, gives the same result for less: for 1M rows x 3 views x 10 features 1.6 s of CPU instead of 4. It
needs the values of the rows that are seen in memory, never more rows than the result has; what must not be in memory at
once is streamed by the one query that carries everything.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from plait.errors import StoreError
from plait.stores.asof_engine import quote
from plait.stores.asof_entities import BoundEntities
from plait.stores.asof_search import search
from plait.stores.asof_sql import ROW, ViewPlan, join_query
from plait.stores.asof_ties import settle_ties

_MATCHED = "__matched"


def gather(db: duckdb.DuckDBPyConnection, bound: BoundEntities, views: Sequence[ViewPlan]) -> pa.Table:
    """The entity rows in order, with the features of `views`, whose cutoffs are settled.

    Raises StoreError if a file is rewritten meanwhile: its row numbers would then mean other rows.
    """
    files = [*bound.files, *(file for view in views for file in view.relation.files)]
    stamps = {file: _stamp(file) for file in files}
    (n_threads,) = db.execute("SELECT current_setting('threads')").fetchall()[0]
    columns: dict[str, pa.ChunkedArray | pa.Array] = {}
    # Much of the work runs in one thread, so views are worked on side by side. A table that is registered (no file) is
    # known to `db` alone: such views wait for their turn.
    with ThreadPoolExecutor(n_threads) as pool:
        cursors = {view.name: bound.cursor(db) for view in views if view.relation.files}
        apart = {
            view.name: pool.submit(_features, cursors[view.name], bound, view) for view in views if view.name in cursors
        }
        try:
            columns.update(_own_columns(db, bound))
            for view in views:
                columns.update(apart[view.name].result() if view.name in apart else _features(db, bound, view))
        except BaseException:
            _end(cursors.values(), apart.values())
            raise
    changed = sorted(file for file, stamp in stamps.items() if _stamp(file) != stamp)
    if changed:
        raise StoreError(f"{changed[0]} was rewritten while it was read; run again")
    return pa.table(columns)


def _end(cursors: Collection[duckdb.DuckDBPyConnection], futures: Collection[Future[Any]]) -> None:
    """Stop work that nobody waits for any more."""
    for future in futures:
        future.cancel()
    # Again and again: an interrupt does not reach a query that has not begun.
    while wait(futures, timeout=0.05).not_done:
        for cursor in cursors:
            cursor.interrupt()


def _features(db: duckdb.DuckDBPyConnection, bound: BoundEntities, view: ViewPlan) -> dict[str, pa.ChunkedArray]:
    """The view's features for the entity rows, in their order, under their names in the result."""
    rows = _matched_rows(db, bound, view)
    features = ", ".join(f"{column} AS f{i}" for i, column in enumerate(view.payload))
    source = f"(SELECT {view.relation.row} AS r{features and ', '}{features} FROM {view.relation.sql})"
    if view.relation.n_rows is None or view.relation.n_rows > len(rows):
        # Only the rows that are seen, or a small frame would read a whole large source.
        db.register(_MATCHED, pa.table({"r": rows}))
        source += f" WHERE r IN (SELECT r FROM {_MATCHED})"
    read = db.execute(f"SELECT * FROM {source}").to_arrow_table().combine_chunks()
    positions = _positions(read["r"].to_numpy(), rows)
    return {result: read[f"f{i}"].take(positions) for i, result in enumerate(view.results)}


def _matched_rows(db: duckdb.DuckDBPyConnection, bound: BoundEntities, view: ViewPlan) -> pa.Array:
    """For each entity row, in order, the number of the source's row that it sees; null where it sees none."""
    found = search(db, bound, view)
    if found is not None:
        return found
    narrow = settle_ties(db, replace(view, row_only=True), bound.bounds)
    matched = db.execute(join_query(bound.sql, [], [narrow], bound.bounds, ordered=False)).to_arrow_table()
    return matched[1].combine_chunks().take(_inverse(matched[ROW].to_numpy()))


def _own_columns(db: duckdb.DuckDBPyConnection, bound: BoundEntities) -> dict[str, pa.ChunkedArray]:
    """The frame's own columns, in order and in the types that the streamed result has (large strings are strings)."""
    names = ", ".join(quote(name) for name in bound.columns)
    if bound.table is not None:
        schema = db.execute(f"SELECT {names} FROM {bound.sql} LIMIT 0").to_arrow_table().schema
        if schema.types == bound.table.schema.types:
            return dict(zip(bound.table.column_names, bound.table.columns, strict=True))
    table = db.execute(f"SELECT {names} FROM {bound.sql} ORDER BY {ROW}").to_arrow_table()
    return dict(zip(table.column_names, table.columns, strict=True))


def _positions(numbers: np.ndarray, rows: pa.Array) -> pa.Array:
    """Where in `numbers` (unique, any order) each of `rows` is; null where it is null."""
    missing = rows.is_null().to_numpy(zero_copy_only=False)
    wanted = rows.fill_null(numbers[0] if len(numbers) else 0).to_numpy()
    if len(numbers) and (numbers[0], numbers[-1]) == (0, len(numbers) - 1) and bool((np.diff(numbers) == 1).all()):
        found = wanted  # one file, read whole
    else:
        by_number = np.argsort(numbers, kind="stable")
        found = by_number[np.searchsorted(numbers, wanted, sorter=by_number)] if len(numbers) else wanted
    return pa.array(found, mask=missing)


def _inverse(permutation: np.ndarray) -> pa.Array:
    """Indices that bring rows with these numbers (unique, perhaps with gaps) into their order."""
    if len(permutation) and permutation.max() == len(permutation) - 1:
        inverse = np.empty(len(permutation), np.int64)
        inverse[permutation] = np.arange(len(permutation))
        return pa.array(inverse)
    return pa.array(np.argsort(permutation, kind="stable"))


def _stamp(file: str) -> tuple[int, int, int]:
    """Changes when the file is replaced or written to."""
    try:
        status = os.stat(file)  # noqa: PTH116
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)
