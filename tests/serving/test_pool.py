"""The model pool: what it loads, when it swaps, and that a swap fails no request."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np
import pytest

from plait.errors import ArtifactError, RegistryError
from serving.metrics import Metrics
from serving.parts import ServingModel
from serving.pool import MAX_ON_DEMAND, ModelPool


class Time:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Shelf:
    """A registry and a loader: names with champions; versions in `broken` do not load."""

    def __init__(self) -> None:
        self.champions = {"a": "1", "b": "1"}
        self.broken: set[str] = set()
        self.loads: list[str] = []

    def resolve(self, ref: str) -> Any:
        name, _, version = ref.partition(":")
        if name not in self.champions:
            raise RegistryError(f"no model {name!r}")
        return type("V", (), {"name": name, "version": version or self.champions[name]})()

    def load(self, version: Any) -> ServingModel:
        ref = f"{version.name}:{version.version}"
        self.loads.append(ref)
        if ref in self.broken:
            raise ArtifactError(f"{ref} is corrupt")
        return ServingModel(name=version.name, version=version.version, scorer=Constant(), reader=None, features=())


class Constant:
    inputs = outputs = ()

    def score(self, request: Any, candidates: Any) -> np.ndarray:
        return np.full(candidates.num_rows, 0.5, np.float32)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def make_pool(shelf: Shelf, wanted: list[str], **kwargs: Any) -> ModelPool:
    return ModelPool(shelf, shelf.load, lambda: wanted, Metrics(), **kwargs)


def test_a_new_champion_takes_the_old_one_s_place_at_the_next_poll(shelf: Shelf) -> None:
    pool = make_pool(shelf, ["a"])
    pool.refresh()
    in_flight = pool.loaded("a")
    shelf.champions["a"] = "2"
    pool.refresh()
    assert (in_flight.version, pool.loaded("a").version) == ("1", "2")


def test_nothing_is_loaded_again_while_the_champion_stays(shelf: Shelf) -> None:
    pool = make_pool(shelf, ["a", "b"])
    for _ in range(3):
        pool.refresh()
    assert shelf.loads == ["a:1", "b:1"]


def test_a_rollback_is_followed_like_any_other_move(shelf: Shelf) -> None:
    pool = make_pool(shelf, ["a"])
    for version in ("1", "2", "1"):
        shelf.champions["a"] = version
        pool.refresh()
    assert pool.loaded("a").version == "1"


def test_a_champion_and_the_same_version_by_number_share_one_load(shelf: Shelf) -> None:
    pool = make_pool(shelf, ["a", "a:1"])
    pool.refresh()
    assert pool.loaded("a") is pool.loaded("a:1") and shelf.loads == ["a:1"]


def test_a_version_that_does_not_load_leaves_the_old_one_serving(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Time()
    pool = make_pool(shelf, ["a"], monotonic=clock)
    pool.refresh()
    shelf.champions["a"], shelf.broken = "2", {"a:2"}
    with caplog.at_level(logging.INFO, "serving"):
        for _ in range(5):
            pool.refresh()
    assert pool.loaded("a").version == "1"
    assert pool.status()["failed"] == [{"ref": "a", "error": "a:2 is corrupt"}]
    assert shelf.loads.count("a:2") == 1, "not tried again at once"
    assert caplog.text.count("keeping version 1") == 1, "and said once"
    clock.now = 2.5
    shelf.broken.clear()
    pool.refresh()
    assert pool.loaded("a").version == "2" and pool.status()["failed"] == []


def test_retries_of_a_broken_version_grow_rare(shelf: Shelf) -> None:
    clock = Time()
    shelf.broken = {"a:1"}
    pool = make_pool(shelf, ["a"], monotonic=clock)
    for second in range(300):
        clock.now = float(second)
        pool.refresh()
    assert 5 <= len(shelf.loads) <= 12
    assert pool.missing() == ["a"]


def test_a_model_that_cannot_score_is_not_put_in_service(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Constant, "score", lambda *_: np.array([np.nan, 2.0], np.float32))
    pool = make_pool(shelf, ["a"])
    pool.refresh()
    assert pool.loaded("a") is None
    assert "two probabilities were expected" in pool.status()["failed"][0]["error"]


def test_models_that_only_requests_name_are_loaded_when_asked_for_and_kept_few(shelf: Shelf) -> None:
    pool = make_pool(shelf, ["a"])
    pool.refresh()
    for version in range(2, 2 + 2 * MAX_ON_DEMAND):
        assert pool.get(f"a:{version}").version == str(version)
        pool.get("a:2")
    assert len(pool.models) == 1 + MAX_ON_DEMAND
    assert {"a", "a:2"} <= set(pool.models), "wanted ones and those just used stay"
    with pytest.raises(RegistryError, match="no model 'c'"):
        pool.get("c")
    assert pool.status()["failed"] == [], "what a stranger asked for is not remembered"


def test_a_model_asked_for_that_does_not_load_is_an_error_of_its_own(shelf: Shelf) -> None:
    shelf.broken = {"a:2"}
    pool = make_pool(shelf, [])
    for _ in range(3):
        with pytest.raises(ArtifactError, match="corrupt"):
            pool.get("a:2")
    assert shelf.loads == ["a:2"], "loading it again and again would be work for nothing"


def test_a_model_no_longer_wanted_is_let_go(shelf: Shelf) -> None:
    wanted = ["a", "b"]
    pool = make_pool(shelf, wanted)
    pool.refresh()
    wanted.remove("b")
    pool.refresh()
    assert set(pool.models) == {"a"}


def test_a_registry_that_is_away_for_a_moment_costs_no_model(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(shelf, ["a"], poll_s=0.01)
    pool.start()
    with caplog.at_level(logging.ERROR, "serving"), monkeypatch.context() as patch:
        patch.setattr(shelf, "resolve", lambda ref: 1 / 0)
        time.sleep(0.1)
    assert pool.loaded("a").version == "1" and "could not poll" in caplog.text
    shelf.champions["a"] = "2"
    deadline = time.monotonic() + 5
    while pool.loaded("a").version == "1" and time.monotonic() < deadline:
        time.sleep(0.01)
    pool.close()
    assert pool.loaded("a").version == "2"


def test_champions_move_under_load_without_a_failed_request(world: Any) -> None:
    """Four clients ask while the champion changes again and again; each answer is of one version, none fails."""
    stop, statuses, versions = threading.Event(), [], set()

    def ask() -> None:
        client = world.app.test_client()
        body = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1, 2, 3]}
        while not stop.is_set():
            response = client.post("/v1/predict", json=body)
            statuses.append(response.status_code)
            versions.add(response.get_json()["model"]["version"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(30):
        world.registry.champions["deepfm"] = str(1 + i % 2)
        world.pool.refresh()
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200} and len(statuses) > 50
    assert versions == {"1", "2"}
