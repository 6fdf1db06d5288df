"""A training set with a learnable truth, as `plait dataset build` writes them, and the service it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings

from plait.offline.dataset import Dataset, DatasetManifest, FeatureColumn
from plait.offline.parts import PartWriter, content_hash
from plait.service import FeatureSpec, ServiceSpec

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

FEATURES = (
    FeatureSpec(name="age", view="user_profile", dtype=pa.int64(), side="request"),
    FeatureSpec(name="gender", view="user_profile", dtype=pa.string(), side="request"),
    FeatureSpec(name="user_rate", view="user_stats", dtype=pa.float64(), side="request"),
    FeatureSpec(name="history", view="user_history", dtype=pa.list_(pa.int64()), side="request"),
    FeatureSpec(name="genres", view="movie_profile", dtype=pa.list_(pa.string()), side="candidate"),
    FeatureSpec(name="genre", view="movie_profile", dtype=pa.string(), side="candidate"),
    FeatureSpec(name="movie_rate", view="movie_stats", dtype=pa.float64(), side="candidate"),
    FeatureSpec(name="movie_ratings", view="movie_stats", dtype=pa.int64(), side="candidate"),
)
GENRES = np.array(["drama", "comedy", "war", "film-noir"])


def clicks(n: int, seed: int, *, n_users: int = 80, n_items: int = 60) -> pa.Table:
    """Rows in slates of 5, whose click probability depends on the user, the movie, and gender with genre."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99)
    user_taste, item_quality = truth.normal(0, 0.6, n_users), truth.normal(0, 0.9, n_items)
    item_genre, user_gender = truth.integers(0, 4, n_items), truth.integers(0, 2, n_users)
    users, items = np.repeat(rng.integers(0, n_users, n // 5), 5), rng.integers(0, n_items, n)
    pair = np.where((item_genre[items] % 2) == user_gender[users], 1.2, -1.2)
    probability = 1 / (1 + np.exp(-(user_taste[users] + item_quality[items] + pair - 0.3)))
    rate = np.round(1 / (1 + np.exp(-item_quality[items] + rng.normal(0, 0.3, n))), 2)
    return pa.table(
        {
            "sample_id": pa.array(np.arange(n)),
            "request_id": pa.array([f"r{i // 5}" for i in range(n)]),
            "user_id": pa.array(users),
            "item_id": pa.array(items),
            "click": pa.array((rng.random(n) < probability).astype(np.int8)),
            "weight": pa.array(np.ones(n, np.float32)),
            "age": pa.array(18 + users % 50, mask=rng.random(n) < 0.05),
            "gender": pa.array(np.array(["F", "M"])[user_gender[users]].tolist()),
            "user_rate": pa.array(np.round(1 / (1 + np.exp(-user_taste[users])), 3), mask=rng.random(n) < 0.1),
            "history": pa.array(
                [None if r < 0.1 else rng.integers(0, n_items, int(8 * r)).tolist() for r in rng.random(n)],
                pa.list_(pa.int64()),
            ),
            "genres": pa.array([[GENRES[g], GENRES[(g + 1) % 4]] for g in item_genre[items]], pa.list_(pa.string())),
            "genre": pa.array(GENRES[item_genre[items]].tolist()),
            "movie_rate": pa.array(rate, mask=rng.random(n) < 0.05),
            "movie_ratings": pa.array(rng.poisson(20, n)),
        }
    )


def write_dataset(folder: Path, splits: dict[str, pa.Table]) -> Dataset:
    parts = []
    for name, rows in splits.items():
        writer = PartWriter(folder / name, rows.schema, root=folder)
        writer.write(rows)
        parts += writer.close()
    manifest = DatasetManifest(
        key="k",
        data_hash=content_hash(parts),
        feature_service="click_test",
        features=tuple(FeatureColumn(name=f.name, view=f.view, dtype=str(f.dtype), side=f.side) for f in FEATURES),
        transforms={},
        derived_keys={},
        label="click",
        labels=("click",),
        samples="default",
        samples_hash="h",
        split={},
        rows={name: len(rows) for name, rows in splits.items()},
        positives={},
        schema={},
        parts=tuple(parts),
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return Dataset.open(folder)


@pytest.fixture(scope="session")
def service() -> ServiceSpec:
    return ServiceSpec(
        name="click_test", features=FEATURES, views=(), transforms=(), derived_keys={}, request_fields={}
    )


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    splits = {name: clicks(n, seed) for name, n, seed in (("train", 6000, 1), ("valid", 1500, 2), ("test", 2000, 3))}
    return write_dataset(tmp_path_factory.mktemp("dataset"), splits)


@pytest.fixture(scope="session")
def make_clicks():
    return clicks


@pytest.fixture(scope="session")
def make_dataset():
    return write_dataset
