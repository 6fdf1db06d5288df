"""The store keeps every version; one of two writers wins; a database that is gone is an answer, not a crash."""

from __future__ import annotations

import copy
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from experiments.diff import diff_documents
from experiments.problems import ConfigError
from experiments.source import read_text
from experiments.store import ConfigStore, ConflictError
from plait.database import database_url
from plait.errors import SpecError, StoreError, UnknownNameError
from plait.settings import Home

DOCUMENT: dict[str, Any] = {
    "parameters": {"rank.model": {"type": "model", "default": "deepfm"}},
    "layers": {"rank": {"unit": "user", "parameters": ["rank.*"]}},
    "experiments": {
        "e": {
            "layer": "rank",
            "state": "running",
            "buckets": "all",
            "traffic": 10,
            "arms": {"a": {"weight": 50}, "b": {"weight": 50, "values": {"rank.model": "trees"}}},
        }
    },
}


def with_traffic(traffic: float) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    document["experiments"]["e"]["traffic"] = traffic
    return document


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.fixture
def store(home: Home, database: str):
    store = ConfigStore.at(home)
    yield store
    store.close()


def test_versions_keep_author_time_note_and_diff(store):
    assert store.head() is None
    first = store.apply(DOCUMENT, author="anna", note="start")
    second = store.apply(with_traffic(25), author="bert", expected=1, note="more", origin="api")
    assert [v.version for v in store.history()] == [2, 1]
    assert (second.author, second.note, second.origin) == ("bert", "more", "api")
    assert second.diff == ("~ experiments.e.traffic: 10 → 25",)
    assert first.diff[0].startswith("+ parameters.rank.model: ")
    assert abs(datetime.now(UTC) - second.created) < timedelta(minutes=1)
    assert store.get(1).document == DOCUMENT
    assert store.head() == second


def test_applying_what_is_live_writes_nothing(store):
    store.apply(DOCUMENT, author="anna")
    reordered = dict(reversed(DOCUMENT.items()))
    assert store.apply(reordered, author="bert").version == 1


def test_a_faulty_document_changes_nothing(store):
    store.apply(DOCUMENT, author="anna")
    with pytest.raises(ConfigError, match="traffic"):
        store.apply(with_traffic(101), author="anna")
    with pytest.raises(ConfigError, match="no model 'trees' in the registry"):
        store.apply(with_traffic(20), author="anna", models={"deepfm"})
    with pytest.raises(ConfigError, match=r"e.yaml:2: layers.rank: needs 'unit', 'parameters'"):
        store.apply(read_text("layers:\n  rank: {}\n", file="e.yaml"), author="anna")
    with pytest.raises(SpecError, match="needs an author"):
        store.apply(with_traffic(20), author=" ")
    assert [v.version for v in store.history()] == [1]


def test_a_writer_whose_base_is_old_is_told_whose_version_is_live(store):
    store.apply(DOCUMENT, author="anna", expected=0)
    store.apply(with_traffic(20), author="bert", expected=1)
    with pytest.raises(ConflictError, match="based on version 1, but version 2 by bert is live"):
        store.apply(with_traffic(30), author="anna", expected=1)
    assert store.head().document == with_traffic(20)


def test_of_many_writers_at_once_exactly_one_wins(home, database):
    """Each thread has its own connections, as each process would; all read version 1 before any writes."""
    ConfigStore.at(home).apply(DOCUMENT, author="anna")
    barrier, results = threading.Barrier(6), []

    class Slow(ConfigStore):
        def latest(self):
            found = super().latest()
            if not barrier.broken and found.version == 1:
                barrier.wait(timeout=20)
            return found

    def write(i: int) -> None:
        store = Slow.at(home)
        try:
            results.append(store.apply(with_traffic(20 + i), author=f"w{i}", expected=1).version)
        except ConflictError as error:
            results.append(str(error))
        store.close()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results.count(2) == 1
    assert sum("was written at the same moment" in str(r) for r in results) == 5
    assert [v.version for v in ConfigStore.at(home).history()] == [2, 1]


def test_rolling_back_writes_the_old_document_as_a_new_version(store):
    store.apply(DOCUMENT, author="anna")
    store.apply(with_traffic(50), author="anna")
    back = store.rollback(1, author="bert")
    assert (back.version, back.document, back.origin, back.note) == (3, DOCUMENT, "rollback", "back to version 1")
    with pytest.raises(StoreError, match="no version 9 of the experiments' configuration; there are 1 to 3"):
        store.rollback(9, author="bert")


def test_a_rollback_to_what_is_no_longer_valid_is_refused(store):
    store.apply(DOCUMENT, author="anna")
    store.apply(with_traffic(50), author="anna")
    with pytest.raises(ConfigError, match="no model 'trees'"):
        store.rollback(1, author="anna", models={"deepfm"})
    assert store.head().version == 2


def test_a_kill_stops_one_experiment_and_what_requires_it(store):
    document = copy.deepcopy(DOCUMENT)
    document["parameters"]["page.x"] = {"type": "int", "default": 0}
    document["layers"]["page"] = {"unit": "user", "parameters": ["page.x"]}
    document["experiments"]["on-top"] = {
        "layer": "page",
        "state": "running",
        "buckets": "all",
        "requires": [{"experiment": "e"}],
        "arms": {"a": {"weight": 100, "values": {"page.x": 1}}},
    }
    store.apply(document, author="anna")
    killed = store.kill("e", author="bert", note="clicks fell")
    assert {name: raw["state"] for name, raw in killed.document["experiments"].items()} == {
        "e": "stopped",
        "on-top": "stopped",
    }
    assert (killed.origin, killed.note) == ("kill", "clicks fell")
    assert store.snapshot().assign({"user": "1"}).arms == ()


def test_a_kill_of_everything_keeps_the_configuration_but_switches_it_off(store):
    store.apply(DOCUMENT, author="anna")
    assert store.kill(None, author="bert").diff == ("~ enabled: True → False",)
    assert store.snapshot().assign({"user": "1"}).arms == ()
    with pytest.raises(UnknownNameError, match="no experiment 'f'"):
        store.kill("f", author="bert")


def test_a_kill_without_any_version_says_what_to_do(store):
    with pytest.raises(StoreError, match="plait experiments apply"):
        store.kill("e", author="anna")


def test_a_good_version_can_follow_a_damaged_one(store):
    store.apply(DOCUMENT, author="anna")
    with store.engine.begin() as db:
        db.exec_driver_sql("UPDATE experiment_config_versions SET document = '{', digest = 'x'")
    with pytest.raises(StoreError, match="version 1 of the experiments' configuration cannot be read"):
        store.head()
    assert [dict(v.document) for v in store.history()] == [{}]
    assert store.apply(DOCUMENT, author="bert", expected=1).version == 2
    assert store.rollback(2, author="bert").version == 2


def test_history_does_not_run_backwards_when_the_clock_does(home, database):
    times = iter([datetime(2026, 5, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)])
    store = ConfigStore(database_url(home), home=home, now=lambda: next(times))
    versions = [store.apply(with_traffic(t), author="anna") for t in (1, 2, 3)]
    assert [v.version for v in versions] == [1, 2, 3]
    assert [v.created.year for v in versions] == [2026, 2026, 2026]
    assert versions[1].created == versions[0].created < versions[2].created


@pytest.mark.parametrize("damage", ["not a database", "a folder", "no such host"])
def test_a_database_that_is_gone_is_a_clear_answer(home, damage):
    url = f"sqlite:///{home.plait_db}"
    if damage == "not a database":
        home.plait_db.write_bytes(b"this is not SQLite" * 100)
    elif damage == "a folder":
        home.plait_db.mkdir()
    else:
        url = f"sqlite:///{home.root}/missing/plait.db"
    store = ConfigStore(url)
    for call in (store.head, store.history, lambda: store.get(1), lambda: store.apply(DOCUMENT, author="anna")):
        with pytest.raises(StoreError, match="does not answer"):
            call()


def test_a_database_locked_by_somebody_else_is_a_clear_answer(home):
    store = ConfigStore(f"sqlite:///{home.plait_db}?timeout=0.1")
    store.apply(DOCUMENT, author="anna")
    other = sa.create_engine(f"sqlite:///{home.plait_db}")
    with other.connect() as db:
        db.exec_driver_sql("BEGIN EXCLUSIVE")
        store.engine.dispose()
        impatient = ConfigStore(f"sqlite:///{home.plait_db}")
        impatient.engine = sa.create_engine(f"sqlite:///{home.plait_db}", connect_args={"timeout": 0.1})
        with pytest.raises(StoreError, match="locked"):
            impatient.apply(with_traffic(3), author="anna")
    assert store.head().version == 1


def test_the_diff_lists_values_entries_and_changes_of_type():
    old = {
        "enabled": True,
        "layers": {"a": {"unit": "user", "parameters": ["x"]}},
        "experiments": {"e": {"traffic": 1}},
    }
    new = {"layers": {"a": {"unit": "user", "parameters": ["x", "y"]}, "b": {}}, "experiments": {}}
    assert diff_documents(old, new) == [
        "~ layers.a.parameters: ['x'] → ['x', 'y']",
        "+ layers.b: {}",
        '- experiments.e: {"traffic": 1}',
    ]
    assert diff_documents({"experiments": {"e": {"traffic": 1}}}, {"experiments": {"e": {"traffic": True}}}) == [
        "~ experiments.e.traffic: 1 → True"
    ]
