"""Sticky experiments: a unit's first arm stays, whatever the weights and the traffic become."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from experiments.live import LiveConfig
from experiments.snapshot import Snapshot
from experiments.sticky import StickyStore
from experiments.store import ConfigStore
from plait.errors import StoreError
from plait.settings import Home

USERS = [f"u{i}" for i in range(150)]


def document(
    weight: float, *, traffic: float = 100, arms: tuple[str, str] = ("a", "b"), **changes: Any
) -> dict[str, Any]:
    weights = (weight, 100 - weight)
    return {
        "parameters": {"p": {"type": "string", "default": ""}},
        "layers": {"l": {"unit": "user", "parameters": ["p"]}},
        "experiments": {
            "e": {
                "layer": "l",
                "state": "running",
                "sticky": True,
                "buckets": "all",
                "traffic": traffic,
                "arms": {arm: {"weight": w, "values": {"p": arm}} for arm, w in zip(arms, weights, strict=True)},
                **changes,
            }
        },
    }


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


def values(snapshot: Snapshot) -> dict[str, str]:
    return {user: snapshot.assign({"user": user}).values["p"] for user in USERS}


def test_units_keep_their_arm_when_weights_change_and_after_a_restart(home):
    store = ConfigStore.at(home)
    store.apply(document(50), author="anna")
    live = LiveConfig(store)
    before = values(live.snapshot)
    store.apply(document(0), author="anna")
    assert live.poll()
    assert values(live.snapshot) == before
    assert live.snapshot.assign({"user": "new"}).values["p"] == "b"
    live.close()
    assert values(LiveConfig(ConfigStore.at(home)).snapshot) == before
    assert set(before.values()) == {"a", "b"}


def test_without_sticky_the_same_change_moves_units(home):
    assert values(Snapshot.of(document(50))) != values(Snapshot.of(document(0)))


def test_lowering_traffic_forgets_nobody_and_admits_nobody(home):
    store = ConfigStore.at(home)
    sticky = store.sticky()
    before = values(Snapshot.of(document(50, traffic=40), sticky=sticky))
    inside = {user for user, arm in before.items() if arm}
    assert 0 < len(inside) < len(USERS)
    assert values(Snapshot.of(document(50, traffic=0), sticky=sticky)) == before
    after = values(Snapshot.of(document(10, traffic=100), sticky=sticky))
    assert {user: after[user] for user in inside} == {user: before[user] for user in inside}


def test_an_arm_that_no_longer_exists_is_decided_anew(home):
    sticky = ConfigStore.at(home).sticky()
    values(Snapshot.of(document(100), sticky=sticky))
    assert set(values(Snapshot.of(document(100, arms=("c", "b")), sticky=sticky)).values()) == {"c"}


def test_conditions_are_tested_each_time(home):
    sticky = ConfigStore.at(home).sticky()
    snapshot = Snapshot.of(document(50, where={"attribute": "country", "equals": "SE"}), sticky=sticky)
    first = snapshot.assign({"user": "u1"}, {"country": "SE"}).values["p"]
    assert first
    assert snapshot.assign({"user": "u1"}, {"country": "NO"}).values["p"] == ""
    assert snapshot.assign({"user": "u1"}, {"country": "SE"}).values["p"] == first


def test_the_first_writer_wins_in_every_process(home):
    one, other = ConfigStore.at(home).sticky(), ConfigStore.at(home).sticky()
    one.keep("e", "user", "u1", "a")
    assert one.flush()
    other.keep("e", "user", "u1", "b")
    assert other.flush()
    assert (one.get("e", "user", "u1"), other.get("e", "user", "u1")) == ("a", "a")


@pytest.mark.parametrize("unit", ["0", "Åsa", "u" * 512, "\ud800", "U1"])
def test_any_unit_is_stored_as_itself(home, unit):
    store = ConfigStore.at(home).sticky()
    store.keep("e", "user", unit, "0")
    store.keep("e", "user", "u1", "1")
    assert store.flush()
    assert ConfigStore.at(home).sticky().get("e", "user", unit) == "0"


def test_a_database_that_is_gone_gives_the_hashed_arm_and_a_reason(home):
    home.plait_db.mkdir()
    sticky = ConfigStore.at(home).sticky()
    assignment = Snapshot.of(document(50), sticky=sticky).assign({"user": "u1"})
    assert assignment.values["p"] == Snapshot.of(document(50)).assign({"user": "u1"}).values["p"]
    assert [error.code for error in assignment.errors] == ["sticky_unavailable"]


def test_a_database_that_hangs_is_waited_for_once_and_then_left_alone_for_a_while(home, monkeypatch):
    now, released, asked = [0.0], threading.Event(), []
    sticky = StickyStore(ConfigStore.at(home).engine, patience_s=0.05, monotonic=lambda: now[0])
    sticky.keep("e", "user", "u1", "a")
    sticky.flush()
    sticky = StickyStore(ConfigStore.at(home).engine, patience_s=0.05, monotonic=lambda: now[0])
    read = StickyStore._read

    def hang(self, key):
        asked.append(key)
        released.wait()
        return read(self, key)

    monkeypatch.setattr(StickyStore, "_read", hang)
    snapshot = Snapshot.of(document(50), sticky=sticky)
    for _ in range(20):
        assignment = snapshot.assign({"user": "u1"})
        assert assignment.values["p"] == Snapshot.of(document(50)).assign({"user": "u1"}).values["p"]
        assert [error.code for error in assignment.errors] == ["sticky_unavailable"]
    assert len(asked) == 1
    released.set()
    sticky._patience_s = 60
    now[0] += 10
    assert sticky.get("e", "user", "u1") == "a"


def test_what_could_not_be_stored_is_tried_again_at_the_next_use(home):
    home.plait_db.mkdir()
    sticky = ConfigStore.at(home).sticky()
    sticky.keep("e", "user", "u1", "a")
    assert sticky.flush()
    with pytest.raises(StoreError):
        sticky.get("e", "user", "u1")
    home.plait_db.rmdir()
    assert sticky.get("e", "user", "u1") is None
    sticky.keep("e", "user", "u1", "a")
    assert sticky.flush()
    assert ConfigStore.at(home).sticky().get("e", "user", "u1") == "a"


def test_many_at_once_and_explain_see_stored_arms_and_store_none(home):
    store = ConfigStore.at(home)
    sticky = store.sticky()
    first = values(Snapshot.of(document(50), sticky=sticky))
    sticky.flush()
    snapshot = Snapshot.of(document(0, traffic=0), sticky=store.sticky())
    assert snapshot.assign_many({"user": [*USERS, "new"]}).values("p").tolist() == [*first.values(), ""]
    explained = snapshot.explain("u1").layers[0]
    assert (explained.arm, "kept (sticky)" in explained.why) == (first["u1"], True)
    assert "does not reach it" in snapshot.explain("new").layers[0].why
    assert store.sticky().get("e", "user", "new") is None
