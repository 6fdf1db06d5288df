"""A tiny project with Feast's stock DuckDB store: two users' worth of features, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.settings import Home

if TYPE_CHECKING:
    from feast.data_source import DataSource

MICROS = pa.timestamp("us", tz="UTC")
START = datetime(2024, 1, 1, tzinfo=UTC)
N_USERS, N_ITEMS, N_DAYS = 12, 9, 20
GENRES = ("drama", "comedy", "war")

YAML = """\
project: tiny
provider: local
registry:
  registry_type: sql
  path: sqlite:///.plait/registry.db
offline_store:
  type: {offline}
online_store:
  type: sqlite
  path: .plait/online.db
entity_key_serialization_version: 3
"""


def write(folder: Path, table: pa.Table, name: str = "part-0.parquet") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name)


def at(day: float) -> datetime:
    return START + timedelta(days=day)


def event_tables(seed: int, n: int = 400) -> dict[str, pa.Table]:
    """Random impressions over N_DAYS and a click on about a third of them, within the hour."""
    rng = np.random.default_rng(seed)
    days = np.sort(rng.uniform(1, N_DAYS, n))
    stamps = [at(float(day)) for day in days]
    users, items = rng.integers(1, N_USERS + 1, n), rng.integers(1, N_ITEMS + 1, n)
    ids = [f"r{i:05d}" for i in range(n)]
    hit = rng.random(n) < 0.35
    impressions = pa.table(
        {
            "request_id": ids,
            "timestamp": pa.array(stamps, MICROS),
            "scene": ["home"] * n,
            "user_id": pa.array(users, pa.int64()),
            "item_id": pa.array(items, pa.int64()),
            "position": pa.array(rng.integers(1, 6, n), pa.int32()),
            "propensity": pa.array(rng.uniform(0.05, 1, n), pa.float64()),
            "created": pa.array(stamps, MICROS),
        }
    )
    told = [stamp + timedelta(minutes=float(m)) for stamp, m in zip(stamps, rng.uniform(0, 60, n), strict=True)]
    feedback = pa.table(
        {
            "event_id": [f"e{i}" for i in range(n)],
            "type": ["click"] * n,
            "request_id": ids,
            "user_id": impressions["user_id"],
            "item_id": impressions["item_id"],
            "timestamp": pa.array(told, MICROS),
            "value": pa.array([None] * n, pa.float64()),
            "created": pa.array(told, MICROS),
        }
    ).filter(pa.array(hit))
    return {"impressions": impressions, "feedback": feedback}


def feature_tables(seed: int) -> dict[str, pa.Table]:
    """Histories at random times: user (one float, one list), item (genre), user x genre (one count)."""
    rng = np.random.default_rng(seed)

    def times(n: int) -> pa.Array:
        # Whole multiples of a second, distinct per row, so that no key has two rows of one time.
        return pa.array([at(float(day)) for day in rng.permutation(N_DAYS * 1000)[:n] / 1000], MICROS)

    n_user, n_item, n_cross = 80, 40, 200
    user_times, item_times, cross_times = times(n_user), times(n_item), times(n_cross)
    users = pa.table(
        {
            "user_id": pa.array(rng.integers(1, N_USERS + 1, n_user), pa.int64()),
            "event_timestamp": user_times,
            "created": user_times,
            "mean_7d": pa.array(rng.normal(size=n_user), pa.float32()),
            "recent": pa.array(
                [rng.integers(1, 9, rng.integers(0, 4)).tolist() for _ in range(n_user)], pa.list_(pa.int64())
            ),
        }
    )
    items = pa.table(
        {
            "item_id": pa.array(rng.integers(1, N_ITEMS + 1, n_item), pa.int64()),
            "event_timestamp": item_times,
            "created": item_times,
            "primary_genre": pa.array(rng.choice(GENRES, n_item)),
            "n_shown": pa.array(rng.integers(0, 99, n_item), pa.int64()),
        }
    )
    cross = pa.table(
        {
            "user_id": pa.array(rng.integers(1, N_USERS + 1, n_cross), pa.int64()),
            "genre": pa.array(rng.choice(GENRES, n_cross)),
            "event_timestamp": cross_times,
            "created": cross_times,
            "n_genre": pa.array(rng.integers(0, 99, n_cross), pa.int64()),
        }
    )
    return {"user_stats": users, "item_profile": items, "user_genre": cross}


def file_source(name: str, folder: Path) -> DataSource:
    from feast import FileSource

    path = str(folder / "part-0.parquet")
    return FileSource(name=name, path=path, timestamp_field="event_timestamp", created_timestamp_column="created")


def definitions(features: Path, source: Callable[[str, Path], DataSource] = file_source) -> list:
    from feast import Entity, FeatureService, FeatureView, Field, ValueType
    from feast.types import Array, Float32, Int64, String

    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    movie = Entity(name="movie", join_keys=["item_id"], value_type=ValueType.INT64)
    genre = Entity(name="genre", join_keys=["genre"], value_type=ValueType.STRING)

    def view(name: str, entities: list, fields: list, ttl_days: float | None) -> FeatureView:
        return FeatureView(
            name=name,
            entities=entities,
            ttl=timedelta(days=ttl_days) if ttl_days else timedelta(0),
            schema=[*(Field(name=e.join_key, dtype=String if e is genre else Int64) for e in entities), *fields],
            source=source(f"{name}_source", features / name),
        )

    user_stats = view(
        "user_stats", [user], [Field(name="mean_7d", dtype=Float32), Field(name="recent", dtype=Array(Int64))], 5
    )
    item_profile = view(
        "item_profile", [movie], [Field(name="primary_genre", dtype=String), Field(name="n_shown", dtype=Int64)], None
    )
    user_genre = view("user_genre", [user, genre], [Field(name="n_genre", dtype=Int64)], None)
    tags = {"plait.derived_keys": "genre=item_profile:primary_genre"}
    return [
        user,
        movie,
        genre,
        user_stats,
        item_profile,
        user_genre,
        FeatureService(name="tiny_clicks", features=[user_stats, item_profile, user_genre], tags=tags),
        FeatureService(name="tiny_same", features=[user_stats, item_profile, user_genre], tags=tags),
        FeatureService(name="tiny_users", features=[user_stats[["mean_7d"]]]),
    ]


STORES = {"stock": "duckdb", "plait": "plait.stores.offline.AsofDuckDBOfflineStore"}


@pytest.fixture(params=STORES)
def project(tmp_path: Path, request: pytest.FixtureRequest) -> SimpleNamespace:
    """Events, features, an applied registry and a model configuration, on Feast's DuckDB store and on Plait's."""
    made = make_project(tmp_path, STORES[request.param])
    made.offline = request.param
    return made


def make_project(
    folder: Path, offline: str, source: Callable[[str, Path], DataSource] = file_source
) -> SimpleNamespace:
    from plait.service import open_store

    home = Home(project=folder, root=folder / ".plait").create()
    (folder / "feature_store.yaml").write_text(YAML.format(offline=offline))
    configs = folder / "trainers" / "configs"
    configs.mkdir(parents=True)
    (configs / "tiny.yaml").write_text("name: tiny\nfeature_service: tiny_clicks\nlabel: click\n")
    events = event_tables(seed=5)
    for kind, table in events.items():
        write(home.events / kind, table)
    features = feature_tables(seed=6)
    for name, table in features.items():
        write(home.features / name, table)
    store = open_store(home)
    store.apply(definitions(home.features, source))
    return SimpleNamespace(home=home, store=store, events=events, features=features)
