"""The live configuration behind the API: kills, ramps, a clock or a database that misbehaves, ids of any kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.live import LiveConfig
from experiments.store import ConfigStore
from plait.settings import Home
from tests.serving.conftest import make_world
from tests.serving.test_units import arms, configuration

USERS = range(1, 30)


@contextmanager
def live_world(folder: Path, **changes: Any) -> Iterator[tuple[ConfigStore, LiveConfig, Any]]:
    """A server that follows a real store, polled every 10 ms."""
    store = ConfigStore.at(Home(project=folder, root=folder / ".plait").create())
    store.apply({**configuration().document, **changes}, author="anna")
    with LiveConfig(ConfigStore.at(store.home), poll_s=0.01) as live, make_world(experiments=live) as world:
        yield store, live, world


def served(world: Any, users: Any = USERS) -> dict[int, dict[str, str]]:
    """User → experiment → arm; every answer is a ranking."""
    found = {}
    for user in users:
        answer = world.predict(entities={"user_id": user}, candidate_ids=[10, 11])
        assert answer.status_code == 200 and len(answer.get_json()["ranking"]) > 0
        found[user] = arms(answer)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_a_kill_and_a_rollback_reach_the_answers(tmp_path: Path) -> None:
    with live_world(tmp_path) as (store, live, world):
        before = served(world)
        store.kill("ranker", author="anna")
        wait_for(lambda: live.snapshot.version == 2)
        assert served(world) == {user: {"seen": got["seen"]} for user, got in before.items()}
        store.kill(None, author="anna")
        wait_for(lambda: live.snapshot.version == 3)
        assert served(world) == {user: {} for user in USERS}
        answer = world.predict()
        assert answer.headers["X-Config-Version"] == "3" and answer.get_json()["model"]["name"] == "deepfm"
        store.rollback(1, author="anna")
        wait_for(lambda: live.snapshot.version == 4)
        assert served(world) == before


def test_with_the_database_gone_the_last_good_configuration_serves(tmp_path: Path) -> None:
    """And of a sticky experiment the hashed arms, each counted; when it is back, all is as before."""
    document = configuration().document
    document["experiments"]["ranker"]["sticky"] = True
    with live_world(tmp_path, experiments=document["experiments"]) as (store, live, world):
        before = served(world, range(1, 10))
        assert live._sticky.flush()
        store.home.root.rename(tmp_path / "away")
        live._store.engine.dispose()  # an open connection would go on reading the file that was moved
        wait_for(lambda: live.error is not None)
        expected = served_by_hash(USERS)
        assert served(world) == expected
        assert {user: expected[user] for user in before} == before
        unknown = len(USERS) - len(before)  # the others' arms are remembered
        assert world.metric("plait_assignment_errors_total", code="sticky_unavailable") == unknown
        assert world.metric("plait_degraded_total", reason="experiment_errors") == unknown
        (tmp_path / "away").rename(store.home.root)
        wait_for(lambda: live.error is None)
        assert served(world) == expected
        assert world.metric("plait_assignment_errors_total", code="sticky_unavailable") == unknown


def served_by_hash(users: Any) -> dict[int, dict[str, str]]:
    found = {}
    for user in users:
        assignment = configuration().assign({"user": str(user)})
        found[user] = {ref.experiment: ref.arm for ref in assignment.arms}
    return found


def test_a_clock_that_jumps_back_over_a_ramp_gives_what_that_moment_gave_and_exposes_nobody_twice(
    tmp_path: Path,
) -> None:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    document = configuration().document
    document["experiments"]["ranker"]["ramp"] = [
        {"at": start.isoformat(), "traffic": 20},
        {"at": (start + timedelta(days=1)).isoformat(), "traffic": 80},
    ]
    with live_world(tmp_path, experiments=document["experiments"]) as (_, _, world):
        seen = {}
        for hours in (-1, 1, 25, 1, -1, 25, -100_000):
            world.parts.clock.now = lambda hours=hours: start + timedelta(hours=hours)
            found = served(world)
            assert seen.setdefault(max(hours, -1), found) == found
        n_in = {hours: sum("ranker" in got for got in found.values()) for hours, found in seen.items()}
        assert n_in[-1] == 0 < n_in[1] < n_in[25]
        exposed = [r["unit"] for r in world.log.records["exposure"] if r["experiment"] == "ranker"]
        assert len(exposed) == len(set(exposed)) == n_in[25]


@pytest.mark.parametrize("text", ["\\ud800", "\\udfff\\ud800", "a\\udc00b"])
@pytest.mark.parametrize("field", ["session_id", "device_id"])
def test_half_a_surrogate_pair_is_refused_as_broken_json(field: str, text: str) -> None:
    body = f'{{"scene": "home", "entities": {{"user_id": 1}}, "candidate_ids": [1], "{field}": "{text}"}}'
    with make_world(snapshot=configuration("session")) as world:
        answer = world.client.post("/v1/predict", data=body.encode(), content_type="application/json")
        assert answer.status_code == 400 and answer.get_json()["title"] == "Broken JSON"


@pytest.fixture(scope="module")
def session_world() -> Iterator[Any]:
    with make_world(snapshot=configuration("session")) as world:
        yield world


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(session=json_values, device=json_values)
@settings(max_examples=100, deadline=None)
def test_whatever_ids_come_the_answer_is_a_ranking_or_a_clear_refusal(
    session_world: Any, session: Any, device: Any
) -> None:
    body = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1], "session_id": session}
    body["device_id"] = device
    n_before = len(session_world.log.records["request"])
    answer = session_world.client.post("/v1/predict", json=body)
    fine = all(value is None or (isinstance(value, str) and 0 < len(value) <= 200) for value in (session, device))
    assert answer.status_code == (200 if fine else 422), answer.text
    assert len(session_world.log.records["request"]) - n_before == fine
    if fine:
        logged = session_world.log.records["request"][-1]
        assert (logged["session_id"], logged["device_id"]) == (session, device)
        assert ("ranker" in arms(answer)) == (session is not None)
    else:
        assert answer.get_json()["pointer"] in ("#/session_id", "#/device_id")
