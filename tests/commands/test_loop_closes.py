"""What a server logged is part of the next samples and features without another command."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from plait.cli import cli
from plait.clock import Clock
from plait.eventlog import EventLog, log_folder
from plait.settings import Home

DECLARED = """
from plait.aggregates import Count, aggregate_view, feedback
from feast import Entity
from feast.value_type import ValueType

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
clicks = aggregate_view(
    name="clicks", entities=[user], events=feedback("click"), windows=("all",), cadence="event", features=(Count("n"),)
)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    (tmp_path / "feature_store.yaml").write_text("")
    size = ["--users", "40", "--items", "30", "--requests", "300"]
    cli.main(["data", "prepare", "synthetic", *size], standalone_mode=False)
    return Home(project=tmp_path, root=tmp_path / ".plait")


def log_a_click(home: Home, user: int) -> None:
    at_us = round((Clock.of(home).now() - timedelta(seconds=5)).timestamp() * 1_000_000)
    log = EventLog(log_folder(home), "test")
    shown = {"request_id": f"r{user}", "timestamp": at_us, "scene": "home", "user_id": user, "items": [1]}
    log.append("request", [shown])
    click = {"event_id": f"e{user}", "type": "click", "request_id": f"r{user}", "user_id": user, "item_id": 1}
    log.append("feedback", [{**click, "timestamp": at_us + 1_000_000, "value": None}])
    log.close()


def read_counts(text: str) -> dict[str, int]:
    """Rows read of each event table, from what `samples build` prints."""
    lines = [line.split() for line in text.splitlines()]
    return {words[0]: int(words[1].replace(",", "")) for words in lines if words[2:] == ["read"]}


def test_samples_are_built_of_what_was_logged_too(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    cli.main(["samples", "build"], standalone_mode=False)
    before = read_counts(capsys.readouterr().out)
    log_a_click(home, 7)
    cli.main(["samples", "build"], standalone_mode=False)
    after = read_counts(capsys.readouterr().out)
    assert {table: after[table] - before[table] for table in after} == {"impressions": 1, "feedback": 1}


def test_features_are_built_of_what_was_logged_too(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    (home.project / "feature_repo").mkdir()
    (home.project / "feature_repo" / "clicks.py").write_text(DECLARED)
    newcomer = 4_000_000
    log_a_click(home, newcomer)
    cli.main(["features", "build"], standalone_mode=False)
    table = pq.read_table(home.features / "clicks")
    assert [row["n_all"] for row in table.to_pylist() if row["user_id"] == newcomer] == [1]
