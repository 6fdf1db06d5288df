"""Reads holdout/, the future that only the simulator may see."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np

from plait.clock import Clock
from plait.data.synthetic import TRUTH_FILE, Truth
from plait.errors import DataError
from plait.settings import Home
from serving.simulator import KnownTastes, RatingTastes, Tastes


def read_tastes(home: Home, *, others: float = 0.0) -> Tastes:
    """The held-out users of a home; `others`: see RatingTastes. Raises DataError if nothing is held out."""
    folder = home.root / "holdout"
    if not (folder / "feedback").is_dir():
        raise DataError(f"{folder} holds no feedback; run `plait data prepare movielens-100k` (or another set) first")
    if (folder / TRUTH_FILE).exists():
        return _synthetic(home, folder)
    ratings = _columns(
        folder / "feedback",
        "SELECT user_id, item_id, value FROM {parts} WHERE type = 'rating' AND item_id IS NOT NULL ORDER BY timestamp",
    )
    pool = _columns(home.events / "items", "SELECT DISTINCT item_id FROM {parts}")
    return RatingTastes(ratings["user_id"], ratings["item_id"], ratings["value"], pool["item_id"], others=others)


def _synthetic(home: Home, folder: Path) -> Tastes:
    truth = Truth.load(home)
    now_s = Clock.of(home).now().timestamp()
    users = _columns(folder / "impressions", "SELECT DISTINCT user_id FROM {parts}")["user_id"]
    return KnownTastes(
        users[truth.user_arrival[users - 1] <= now_s],
        np.flatnonzero(truth.item_arrival <= now_s) + 1,
        lambda user_id, item_id: truth.appeal(user_id, item_id, np.array(now_s)),
        truth.position_bias,
    )


def _columns(folder: Path, query: str) -> dict[str, np.ndarray]:
    if not any(folder.glob("*.parquet")):
        raise DataError(f"{folder} holds no parquet file; run `plait data prepare` again")
    with duckdb.connect() as db:
        parts = f"read_parquet('{str(folder / '*.parquet').replace(chr(39), chr(39) * 2)}')"
        columns = db.sql(query.format(parts=parts)).fetchnumpy()
    return {name: np.asarray(values) for name, values in columns.items()}
