"""The training set: what get_historical_features gives, checked against loops over rows."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pyarrow as pa

from plait.offline.build import build_dataset
from plait.offline.samples import build_samples
from plait.offline.spec import SampleSpec


def naive_value(history: list[dict], keys: dict, moment, ttl: timedelta | None, feature: str):
    """The newest value at or before `moment`, if it is not older than ttl; else None."""
    rows = [row for row in history if all(row[k] == v for k, v in keys.items()) and row["event_timestamp"] <= moment]
    if not rows or any(value is None for value in keys.values()):
        return None
    newest = max(rows, key=lambda row: (row["event_timestamp"], row["created"]))
    if ttl is not None and newest["event_timestamp"] + ttl < moment:
        return None
    return newest[feature]


def test_every_feature_is_the_one_known_at_the_samples_time(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    dataset = build_dataset(project.home, "tiny_clicks", store=project.store, chunk_rows=150)
    users, items, cross = (project.features[n].to_pylist() for n in ("user_stats", "item_profile", "user_genre"))
    n = 0
    for part in ("train", "valid", "test"):
        for row in dataset.split(part).to_table().to_pylist():
            moment, user = row["event_timestamp"], {"user_id": row["user_id"]}
            assert row["mean_7d"] == naive_value(users, user, moment, timedelta(days=5), "mean_7d")
            assert row["recent"] == naive_value(users, user, moment, timedelta(days=5), "recent")
            genre = naive_value(items, {"item_id": row["item_id"]}, moment, None, "primary_genre")
            assert row["primary_genre"] == genre
            assert row["n_genre"] == naive_value(cross, {**user, "genre": genre}, moment, None, "n_genre")
            assert row["split"] == part
            n += 1
    assert n == len(project.events["impressions"]) == sum(dataset.manifest.rows.values())
    assert dataset.features == ("mean_7d", "recent", "primary_genre", "n_shown", "n_genre")
    assert dataset.schema.field("recent").type == pa.list_(pa.int64())
