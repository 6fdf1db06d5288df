"""`plait features stream` into a real online store: what it serves is what the feature table says, and soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore
from feast.value_type import ValueType

from plait.aggregates import Count, LastN, Mean, aggregate_view, feedback
from plait.cli import cli
from plait.eventlog import FEEDBACK
from plait.settings import Home

NOW = datetime.now(UTC)
SETTINGS = """
project: streamed
provider: plait.stores.provider.ColumnarProvider
registry: {registry_type: sql, path: "sqlite:///.plait/registry.db"}
offline_store: {type: plait.stores.offline.AsofDuckDBOfflineStore}
online_store: {type: plait.stores.sqlite.PackedSQLiteOnlineStore, path: .plait/online.db}
batch_engine: {type: plait.stores.engine.ColumnarComputeEngine}
entity_key_serialization_version: 3
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A project with two views of ratings, applied; no events yet but one of another user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    (tmp_path / "feature_store.yaml").write_text(SETTINGS)
    home = Home(project=tmp_path, root=tmp_path / ".plait").create()
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    (home.events / "feedback").mkdir(parents=True)
    write(home.events / "feedback" / "old.parquet", [rating("old", 9, 3.0, NOW - timedelta(days=9))])
    ratings = {"entities": [user], "events": feedback("rating"), "cadence": "event"}
    views = [
        aggregate_view(name="stats", windows=("1d", "all"), features=(Count("n"), Mean("mean", of="value")), **ratings),
        aggregate_view(name="last", windows=(), features=(LastN("items", of="item_id", n=2),), **ratings),
    ]
    FeatureStore(repo_path=str(tmp_path)).apply([user, *views])
    repo = tmp_path / "feature_repo"
    repo.mkdir()
    (repo / "streamed_views.py").write_text(DECLARED)
    return home


DECLARED = """
from feast import Entity
from feast.value_type import ValueType

from plait.aggregates import Count, LastN, Mean, aggregate_view, feedback

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
ratings = {"entities": [user], "events": feedback("rating"), "cadence": "event"}
stats = aggregate_view(name="stats", windows=("1d", "all"), features=(Count("n"), Mean("mean", of="value")), **ratings)
last = aggregate_view(name="last", windows=(), features=(LastN("items", of="item_id", n=2),), **ratings)
"""


def rating(name: str, user: int, value: float, at: datetime) -> dict[str, Any]:
    item = 10 + len(name)
    return {"event_id": name, "type": "rating", "user_id": user, "item_id": item, "timestamp": at, "value": value}


def write(path: Path, events: list[dict[str, Any]]) -> None:
    rows = [{name: {"created": event["timestamp"], **event}.get(name) for name in FEEDBACK.names} for event in events]
    aside = path.with_name(f".{path.name}")
    pq.write_table(pa.Table.from_pylist(rows, FEEDBACK), aside)
    aside.rename(path)


FEATURES = ["stats:n_1d", "stats:n_all", "stats:mean_all", "last:items"]


def served(home: Home, *users: int) -> dict[str, list[Any]]:
    store = FeatureStore(repo_path=str(home.project))
    return store.get_online_features(FEATURES, [{"user_id": user} for user in users]).to_dict()


def plait(*words: str) -> None:
    cli.main(list(words), standalone_mode=False)


def materialize(home: Home) -> None:
    FeatureStore(repo_path=str(home.project)).materialize(NOW - timedelta(days=30), datetime.now(UTC))


def test_streamed_rows_are_those_of_a_build_and_a_late_file_corrects_them(home: Home, tmp_path: Path) -> None:
    hours = [NOW - timedelta(hours=hour) for hour in (30, 5, 4, 3)]
    events = [rating(f"e{'x' * i}", 1 + i % 2, float(i), at) for i, at in enumerate(hours)]
    live = tmp_path / "live"
    live.mkdir()
    write(live / "a.parquet", events[:2])
    write(live / "b.parquet", events[2:])
    plait("features", "stream", "--from", str(live))
    streamed = served(home, 1, 2, 3)
    assert streamed["n_all"] == [2, 2, None] and streamed["n_1d"] == [1, 2, None]
    assert streamed["items"] == [[11, 13], [12, 14], None]

    write(home.events / "feedback" / "live.parquet", events)
    plait("features", "build")
    materialize(home)
    assert served(home, 1, 2, 3) == streamed
    # Late, and not through the stream: the table is put right where it had told of the moment already.
    write(home.events / "feedback" / "late.parquet", [rating("late", 1, 8.0, hours[2] - timedelta(minutes=1))])
    plait("features", "build")
    materialize(home)
    corrected = served(home, 1, 2)
    assert corrected["n_all"] == [3, 2] and corrected["mean_all"] == [pytest.approx(10 / 3), 2.0]


def test_a_followed_folder_changes_what_is_served_within_seconds(home: Home, tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    command = [sys.executable, "-m", "plait", "features", "stream", "--from", str(live), "--follow", "--poll", "0.1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, cwd=home.project, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        write(live / "a.parquet", [rating("first", 1, 4.0, NOW - timedelta(hours=1))])
        wait_for(lambda: served(home, 1)["n_all"] == [1], seconds=60)  # Python and Feast start up
        write(live / "b.parquet", [rating("second", 1, 2.0, datetime.now(UTC))])
        # About 0.2 s on an idle machine; the bound is for a busy one.
        wait_for(lambda: served(home, 1)["n_all"] == [2], seconds=10)
        assert served(home, 1)["mean_all"] == [3.0]
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "pushed 4 rows in all" in output


def wait_for(condition: Any, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.1)
