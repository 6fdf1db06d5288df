"""Learned policies in the store, and in running processes: taken up within two seconds, last good kept."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from experiments import policy_store
from experiments.live import LiveConfig
from experiments.policy_store import PolicyStore
from experiments.store import ConfigStore
from experiments.tables import policy_versions
from plait.errors import StoreError
from plait.settings import Home

AT = datetime(2026, 3, 1, tzinfo=UTC)


def document(**bandit: Any) -> dict[str, Any]:
    arms = {name: {"weight": 50, "values": {"p.x": i}} for i, name in enumerate("ab")}
    experiment = {"layer": "p", "state": "running", "buckets": "all", "arms": arms}
    return {
        "parameters": {"p.x": {"type": "int", "default": 0}},
        "layers": {"p": {"unit": "user", "parameters": ["p.*"]}},
        "experiments": {"e": experiment | {"bandit": {"method": "thompson", **bandit}}},
    }


def learned(a: float, reward: str = "click") -> dict[str, Any]:
    return {"method": "thompson", "reward": reward, "arms": {"a": {"best": a}, "b": {"best": 1 - a}}}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(project=tmp_path, root=tmp_path / ".plait").create()
    ConfigStore.at(home).apply(document(), author="anna")
    return home


def store(home: Home) -> PolicyStore:
    return PolicyStore(ConfigStore.at(home).engine)


def put(home: Home, document: dict[str, Any]) -> int:
    return store(home).put("e", document, author="anna", at=AT)[0]


def share(live: LiveConfig) -> float:
    """Of arm a, now."""
    return live.snapshot.explain({"user": "u"}).layers[0].shares["a"]


def test_versions_count_up_and_an_equal_policy_writes_none(home):
    policies = store(home)
    assert policies.get("e") is None
    assert policies.put("e", learned(0.6), author="anna", at=AT) == (1, True)
    assert policies.put("e", learned(0.6), author="ben", at=AT) == (1, False)
    assert policies.put("e", learned(0.7), author="anna", at=AT) == (2, True)
    assert policies.put("f", learned(0.7), author="anna", at=AT) == (1, True)
    assert [each.version for each in policies.history("e")] == [2, 1]
    assert policies.get("e", 1).document == learned(0.6)
    assert (policies.get("e").created, policies.get("e").author) == (AT, "anna")
    assert [key[:2] for key in policies.keys(["e", "f", "g"])] == [("e", 2), ("f", 1)]


def test_of_two_learners_at_once_one_writes_and_the_other_is_told(home, monkeypatch):
    put(home, learned(0.6))
    slow = store(home)
    seen = slow.keys(["e"])
    put(home, learned(0.7))
    monkeypatch.setattr(slow, "keys", lambda _: seen)  # what it read before the other wrote
    with pytest.raises(StoreError, match="another learner"):
        slow.put("e", learned(0.8), author="ben", at=AT)
    assert store(home).get("e").document == learned(0.7)


def test_old_versions_are_dropped_in_the_end(home, monkeypatch):
    monkeypatch.setattr(policy_store, "KEPT", 3)
    for i in range(6):
        put(home, learned(i / 10))
    assert [each.version for each in store(home).history("e")] == [6, 5, 4]


def test_a_policy_with_numbers_that_json_lacks_is_not_written(home):
    with pytest.raises(ValueError, match="not JSON compliant"):
        put(home, learned(float("nan")))


def test_a_store_that_is_away_is_an_error(tmp_path):
    away = PolicyStore(sa.create_engine(f"sqlite:///{tmp_path}/no/such/folder/x.db"))
    with pytest.raises(StoreError, match="does not answer"):
        away.get("e")


def test_running_processes_take_up_a_new_policy_within_two_seconds(home):
    told: list[str] = []
    with LiveConfig(ConfigStore.at(home), on_policies=told.append) as live:
        assert share(live) == 0.5
        before = live.snapshot
        put(home, learned(0.9))
        started = time.monotonic()
        while share(live) == 0.5:
            assert time.monotonic() - started < 2.0
            time.sleep(0.01)
        assert share(live) == pytest.approx(0.9)
        assert before.explain({"user": "u"}).layers[0].shares["a"] == 0.5  # the old snapshot is what it was
    assert told == ["adopted"]


def test_a_new_configuration_keeps_the_policy_and_its_floor_counts_at_once(home):
    put(home, learned(0.99))
    live = LiveConfig(ConfigStore.at(home))
    assert share(live) == pytest.approx(0.98)
    ConfigStore.at(home).apply(document(floor=20), author="anna")
    live.poll()
    assert share(live) == pytest.approx(0.8)
    ConfigStore.at(home).apply(document(floor=20, reward="buy"), author="anna")
    live.poll()
    assert share(live) == 0.5  # learned for clicks: says nothing about purchases
    put(home, learned(0.7, "buy"))
    live.poll()
    assert share(live) == pytest.approx(0.7)


@pytest.mark.parametrize("damage", ["not json", '["a"]', '{"method": "thompson"}'])
def test_a_damaged_policy_leaves_the_last_good_one(home, damage, caplog):
    put(home, learned(0.9))
    told: list[str] = []
    live = LiveConfig(ConfigStore.at(home), on_policies=told.append)
    put(home, learned(0.1))
    with ConfigStore.at(home).engine.begin() as db:
        db.execute(policy_versions.update().where(policy_versions.c.version == 2).values(document=damage))
    assert live.poll()
    assert share(live) == pytest.approx(0.9)
    assert "learn again" in live.policies.error
    assert told == ["adopted", "failed"]
    put(home, learned(0.2))
    live.poll()
    assert (share(live), live.policies.error) == (pytest.approx(0.2), None)


def test_without_a_store_the_last_good_policy_comes_from_disk(home):
    put(home, learned(0.9))
    LiveConfig(ConfigStore.at(home)).close()
    home.plait_db.rename(home.root / "gone")
    home.plait_db.mkdir()  # a database that cannot be opened
    live = LiveConfig(ConfigStore.at(home))
    assert live.source == "disk"
    assert share(live) == pytest.approx(0.9)
    (home.root / "experiments" / "last-good-policies.json").write_text("{")
    assert share(LiveConfig(ConfigStore.at(home))) == 0.5


def test_without_bandits_the_policies_are_never_asked_for(home, monkeypatch):
    plain = document()
    del plain["experiments"]["e"]["bandit"]
    ConfigStore.at(home).apply(plain, author="anna")
    monkeypatch.setattr(PolicyStore, "keys", lambda *_: pytest.fail("asked"))
    assert LiveConfig(ConfigStore.at(home)).poll()
