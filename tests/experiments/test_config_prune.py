"""Sticky arms are forgotten only when their experiment has been over for long enough."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

import experiments.prune
from experiments.commands import experiments as command
from experiments.live import LiveConfig
from experiments.prune import prunable, prune
from experiments.store import ConfigStore
from experiments.tables import sticky_arms
from plait.settings import Home

T0 = datetime(2026, 3, 1, tzinfo=UTC)
MONTH = timedelta(days=30)


def document(**changes: dict[str, Any]) -> dict[str, Any]:
    """Sticky experiments, each in a layer of its own."""
    return {
        "parameters": {f"p.{name}": {"type": "int", "default": 0} for name in changes},
        "layers": {name: {"unit": "user", "parameters": [f"p.{name}"]} for name in changes},
        "experiments": {
            name: {
                "layer": name, "state": "running", "sticky": True, "buckets": "all",
                "arms": {"a": {"weight": 50}, "b": {"weight": 50, "values": {f"p.{name}": 1}}}, **change,
            }
            for name, change in changes.items()
        },
    }  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.fixture
def times() -> list[datetime]:
    return [T0]


@pytest.fixture
def store(home: Home, database: str, times: list[datetime]) -> Any:
    store = ConfigStore.at(home)
    store._now = lambda: times[0]
    yield store
    store.close()


def keep(store: ConfigStore, n_units: int, *names: str) -> None:
    sticky = store.sticky()
    for name in names:
        for i in range(n_units):
            sticky.keep(name, "user", str(i), "a")
    assert sticky.flush(20)


def rows(store: ConfigStore) -> dict[str, int]:
    query = sa.select(sticky_arms.c.experiment, sa.func.count()).group_by(sticky_arms.c.experiment)
    with store.engine.connect() as db:
        return {row[0]: row[1] for row in db.execute(query)}


def names(store: ConfigStore, now: datetime) -> dict[str, datetime | None]:
    return {each.experiment: each.over_since for each in prunable(store, older_than=MONTH, now=now)}


def test_what_runs_or_may_run_is_kept_however_old(store):
    store.apply(document(running={}, draft={"state": "draft"}, later={"start": "2030-01-01"}), author="anna")
    keep(store, 3, "running", "draft", "later")
    assert names(store, T0 + 100 * MONTH) == {}


@pytest.mark.parametrize("how", ["stopped", "killed", "removed"])
def test_what_is_over_is_kept_for_a_month_and_then_forgotten(store, times, how):
    store.apply(document(gone={}, stays={}), author="anna")
    keep(store, 3, "gone", "stays")
    over = times[0] = T0 + timedelta(days=10)
    if how == "killed":
        store.kill("gone", author="anna")
    else:
        after = document(gone={"state": "stopped"}, stays={}) if how == "stopped" else document(stays={})
        store.apply(after, author="anna")
    times[0] = over + timedelta(days=20)
    store.apply(document(stays={"traffic": 50}), author="anna")  # later versions do not count anew
    assert names(store, over + MONTH - timedelta(seconds=1)) == {}
    assert names(store, over + MONTH) == {"gone": over}
    found = prunable(store, older_than=MONTH, now=over + MONTH)
    assert prune(store, found) == 3
    assert rows(store) == {"stays": 3}
    assert prune(store, found) == 0


def test_a_rollback_within_the_time_keeps_everybodys_arm(store, times):
    store.apply(document(e={}), author="anna")
    keep(store, 3, "e")
    times[0] = T0 + timedelta(days=1)
    store.kill("e", author="anna")
    times[0] = T0 + timedelta(days=2)
    store.rollback(1, author="anna")
    assert names(store, T0 + 50 * MONTH) == {}


def test_an_experiment_with_an_end_is_over_then(store):
    store.apply(document(e={"end": "2026-03-05"}), author="anna")
    keep(store, 2, "e")
    end = datetime(2026, 3, 5, tzinfo=UTC)
    assert names(store, end + MONTH - timedelta(seconds=1)) == {}
    assert names(store, end + MONTH) == {"e": end}


def test_an_end_is_read_by_the_clock_that_experiments_run_by(store):
    store.apply(document(e={"end": "1998-05-01"}), author="anna")
    keep(store, 2, "e")
    replay = datetime(1998, 4, 1, tzinfo=UTC) - T0
    assert prunable(store, older_than=MONTH, now=T0 + timedelta(days=29), replay=replay) == []
    later = T0 + timedelta(days=30) + MONTH
    assert [each.experiment for each in prunable(store, older_than=MONTH, now=later, replay=replay)] == ["e"]


def test_a_process_does_not_remember_what_was_forgotten(home):
    """An experiment that comes back after its rows were pruned starts anew, in processes that ran all along too."""
    store = ConfigStore.at(home)
    store.apply(document(e={}, f={}), author="anna")
    live = LiveConfig(store)
    live.snapshot.assign({"user": "1"})
    assert live._sticky.flush(20) and rows(store) == {"e": 1, "f": 1}
    store.kill("e", author="anna")
    assert live.poll()
    assert {key[0] for key in live._sticky._known} == {"f"}
    live.close()


def test_rows_that_no_version_explains_are_forgotten(store):
    store.apply(document(e={}), author="anna")
    keep(store, 2, "older-than-history")
    assert names(store, T0) == {"older-than-history": None}


def test_many_rows_and_versions_are_taken_in_pieces(store, times, monkeypatch):
    monkeypatch.setattr(experiments.prune, "_BATCH", 7)
    monkeypatch.setattr(experiments.prune, "_PAGE", 2)
    store.apply(document(gone={}, stays={}), author="anna")
    keep(store, 20, "gone", "stays")
    for i in range(7):
        times[0] = T0 + timedelta(days=i + 1)
        store.apply(document(stays={"traffic": i}), author="anna")
    found = prunable(store, older_than=MONTH, now=T0 + 3 * MONTH)
    assert [(each.experiment, each.n_rows, each.over_since) for each in found] == [("gone", 20, T0 + timedelta(days=1))]
    assert prune(store, found) == 20
    assert rows(store) == {"stays": 20}


def test_the_command_tells_and_forgets(home, monkeypatch):
    (home.project / "feature_store.yaml").write_text("project: p\n")
    monkeypatch.chdir(home.project)
    for variable in ("PLAIT_HOME", "PLAIT_DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    store = ConfigStore.at(home)
    store.apply(document(e={}), author="anna")
    keep(store, 4, "e")
    store.kill("e", author="anna")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(command, ["prune", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert run() == "0 sticky arms forgotten\n"
    assert run("--older-than", "0", "--dry-run").startswith("e: 4 units, over since 20")
    assert rows(store) == {"e": 4}
    assert run("--older-than", "0").endswith("4 sticky arms forgotten\n")
    assert rows(store) == {}
