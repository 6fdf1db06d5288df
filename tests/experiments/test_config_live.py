"""The live configuration: swapped whole within two seconds, and never worse than the last good one."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from experiments.live import LiveConfig
from experiments.store import ConfigStore
from experiments.tables import config_versions
from plait.settings import Home


def document(weight: float = 50) -> dict[str, Any]:
    """One experiment over everyone; both arms set both parameters to the same number, so a half swap would show."""
    arms = {
        name: {"weight": w, "values": {"p.x": i, "p.y": i}} for name, w, i in (("a", weight, 1), ("b", 100 - weight, 2))
    }
    return {
        "parameters": {"p.x": {"type": "int", "default": 0}, "p.y": {"type": "int", "default": 0}},
        "layers": {"p": {"unit": "user", "parameters": ["p.*"]}},
        "experiments": {"e": {"layer": "p", "state": "running", "buckets": "all", "arms": arms}},
    }


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


def live_at(home: Home, **options: Any) -> LiveConfig:
    return LiveConfig(ConfigStore.at(home), **options)


def wait_for(condition: Any, timeout_s: float = 5.0) -> float:
    """Seconds until `condition()` held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "it never happened"
        time.sleep(0.01)
    return time.monotonic() - started


def test_every_process_swaps_to_a_new_version_within_two_seconds(home):
    ConfigStore.at(home).apply(document(), author="anna")
    seen: list[int] = []
    with live_at(home) as one, live_at(home, on_change=lambda s: seen.append(s.version)) as two:
        assert (one.snapshot.version, one.source) == (1, "store")
        ConfigStore.at(home).apply(document(10), author="anna")
        assert wait_for(lambda: one.snapshot.version == 2 and two.snapshot.version == 2) < 2.0
    assert seen == [1, 2]


def test_a_request_sees_one_version_or_the_other_never_a_mixture(home):
    """Writers swap versions in which p.x and p.y are always equal; readers never see them differ."""
    store = ConfigStore.at(home)
    store.apply(document(), author="anna")
    live = live_at(home, poll_s=0.005)
    stop, mixed = threading.Event(), []

    def read() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            assignment = live.snapshot.assign({"user": str(i)})
            if assignment["p.x"] != assignment["p.y"] or not assignment.arms:
                mixed.append(dict(assignment.values))

    with live:
        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for i in range(12):
            made = store.apply(document(i + 1), author="anna")
            wait_for(lambda version=made.version: live.snapshot.version == version)
        stop.set()
        for reader in readers:
            reader.join()
    assert mixed == []
    assert live.counts.adopted == 13


def write_row(home: Home, version: int, text: str) -> None:
    """A version as another release, or a hand, might have written it: unchecked."""
    engine = sa.create_engine(f"sqlite:///{home.plait_db}")
    row = {
        "version": version,
        "author": "x",
        "origin": "api",
        "note": "",
        "digest": str(version),
        "diff": "",
        "document": text,
    }
    with engine.begin() as db:
        db.execute(config_versions.insert().values(**row, created=sa.func.current_timestamp()))
    engine.dispose()


@pytest.mark.parametrize("text", ['{"layers": {"p": {}}}', '{"layers": {"p"', "", "[]", '{"later": 1}'])
def test_a_version_that_cannot_be_used_leaves_the_last_good_serving(home, text):
    ConfigStore.at(home).apply(document(), author="anna")
    live = live_at(home)
    good = live.snapshot
    write_row(home, 2, text)
    assert live.poll() is False
    assert live.snapshot is good
    assert live.error
    assert live.counts.failed == 1
    write_row(home, 3, json.dumps(document(20)))
    assert live.poll() is True
    assert (live.snapshot.version, live.error) == (3, None)


def test_a_restart_with_an_unusable_version_serves_the_last_good_from_disk(home):
    ConfigStore.at(home).apply(document(), author="anna")
    live_at(home).close()
    write_row(home, 2, "{")
    live = live_at(home)
    assert (live.snapshot.version, live.source) == (1, "disk")
    assert live.snapshot.assign({"user": "1"}).arms


def test_a_restart_while_the_database_is_gone_serves_the_last_good_from_disk(home):
    ConfigStore.at(home).apply(document(), author="anna")
    live_at(home).close()
    for path in home.root.glob("plait.db*"):
        path.unlink()
    home.plait_db.mkdir()
    live = live_at(home)
    assert (live.snapshot.version, live.source) == (1, "disk")
    assert "does not answer" in str(live.error)


def test_a_database_that_goes_away_and_comes_back_is_followed_again(home):
    store = ConfigStore.at(home)
    store.apply(document(), author="anna")
    live = live_at(home)
    live._store.engine.dispose()
    store.close()
    aside = home.root / "aside.db"
    home.plait_db.rename(aside)
    home.plait_db.mkdir()
    assert live.poll() is False
    assert live.snapshot.version == 1
    home.plait_db.rmdir()
    aside.rename(home.plait_db)
    store.apply(document(30), author="anna")
    assert live.poll() is True
    assert live.snapshot.version == 2


def test_an_emptied_table_leaves_the_last_good_serving(home):
    store = ConfigStore.at(home)
    store.apply(document(), author="anna")
    live = live_at(home)
    with store.engine.begin() as db:
        db.execute(config_versions.delete())
    assert live.poll() is False
    assert live.snapshot.version == 1
    assert live_at(home).source == "disk"


def test_a_restored_backup_with_a_lower_version_is_followed(home):
    store = ConfigStore.at(home)
    for weight in (10, 20, 30):
        store.apply(document(weight), author="anna")
    live = live_at(home)
    with store.engine.begin() as db:
        db.execute(config_versions.delete().where(config_versions.c.version > 1))
    assert live.poll() is True
    assert live.snapshot.version == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "document": {"layers": 3}}'])
def test_a_damaged_last_good_falls_to_the_projects_files(home, text):
    folder = home.project / "experiments"
    folder.mkdir()
    (folder / "x.yaml").write_text("parameters:\n  mine: {type: int, default: 3}\n")
    last_good = home.root / "experiments" / "last-good.json"
    last_good.parent.mkdir()
    last_good.write_text(text)
    live = live_at(home)
    assert (live.source, live.snapshot.version) == ("files", 0)
    assert live.snapshot.assign({"user": "1"})["mine"] == 3


def test_without_store_disk_or_project_files_the_shipped_configuration_serves(home):
    live = live_at(home)
    assert (live.source, live.snapshot.version, live.error) == ("files", 0, None)
    assert live.snapshot.assign({"user": "1"})["rank.model"] in ("deepfm", "lightgbm")


def test_broken_project_files_fall_to_the_shipped_configuration(home):
    folder = home.project / "experiments"
    folder.mkdir()
    (folder / "x.yaml").write_text("layers: [\n")
    live = live_at(home)
    assert "rank.model" in live.snapshot.assign({"user": "1"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_disk_that_refuses_the_last_good_does_not_stop_the_swap(home):
    ConfigStore.at(home).apply(document(), author="anna")
    folder = home.root / "experiments"
    folder.mkdir(mode=0o500)
    assert live_at(home).snapshot.version == 1


def test_a_last_good_that_cannot_be_written_does_not_stop_the_swap(home):
    ConfigStore.at(home).apply(document(), author="anna")
    (home.root / "file").write_text("")
    live = live_at(home, last_good=home.root / "file" / "last-good.json")
    assert (live.snapshot.version, live.source) == (1, "store")


def test_polling_an_unchanged_store_changes_nothing(home):
    ConfigStore.at(home).apply(document(), author="anna")
    live = live_at(home)
    snapshot = live.snapshot
    for _ in range(3):
        assert live.poll() is True
    assert live.snapshot is snapshot
    assert (live.counts.unchanged, live.counts.adopted, live.counts.failed) == (3, 1, 0)


def test_a_database_that_was_replaced_by_another_file_is_followed_after_a_failure(home, tmp_path):
    """An open connection goes on reading the file it has; after a failure none is kept."""
    store = ConfigStore.at(home)
    store.apply(document(), author="anna")
    home.plait_db.rename(tmp_path / "good.db")
    live = live_at(home)  # makes an empty file
    live._key = (1, "gone")
    assert not live.poll()
    (tmp_path / "good.db").rename(home.plait_db)
    assert live.poll()
    assert (live.snapshot.version, live.source) == (1, "store")
