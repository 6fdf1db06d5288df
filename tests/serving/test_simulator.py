"""The simulator: users who click what they are known to like, and a count of what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from plait.errors import DataError
from serving.commands import simulate, summary
from serving.simulator import KnownTastes, Plan, RatingTastes, Simulator

USERS = np.array([1, 1, 1, 2, 2, 7])
ITEMS = np.array([1, 2, 3, 4, 5, 9])
STARS = np.array([5.0, 3.0, 4.0, 2.0, 4.0, 5.0])


def tastes() -> RatingTastes:
    return RatingTastes(USERS, ITEMS, STARS, np.arange(1, 200), others=0.5)


class AppHttp:
    """Posts to the fake server without a port."""

    def __init__(self, world: Any) -> None:
        self._client = world.app.test_client()

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        response = self._client.post(path, json=body)
        return response.status_code, response.get_json()


def run(world: Any, **plan: Any) -> Any:
    settings = {"url": "", "n_users": 10, "slate": 5, "n_candidates": 20, "position_bias": 0.0, **plan}
    return Simulator(Plan(**settings), tastes(), lambda: AppHttp(world)).run()


def test_users_who_look_at_everything_click_exactly_their_four_and_five_stars(world: Any) -> None:
    outcome = run(world, slate=200, n_candidates=200)
    feedback = world.log.records["feedback"]
    expected = {(u, i) for u, i, s in zip(USERS.tolist(), ITEMS.tolist(), STARS.tolist(), strict=True) if s >= 4}
    assert {(e["user_id"], e["item_id"]) for e in feedback if e["type"] == "click"} == expected
    assert {(e["user_id"], e["item_id"]): e["value"] for e in feedback if e["type"] == "rating"} == {
        (u, i): s for u, i, s in zip(USERS.tolist(), ITEMS.tolist(), STARS.tolist(), strict=True)
    }
    assert outcome.events == {"click": 4, "rating": 6} and outcome.n_errors == 0


def test_without_others_a_user_is_asked_about_own_ratings_alone() -> None:
    alone = RatingTastes(USERS, ITEMS, STARS, np.arange(1, 200))
    asked = alone.candidates(1, 20, np.random.default_rng(0))
    assert sorted(asked.tolist()) == [1, 2, 3]


def test_feedback_names_the_request_it_came_from(world: Any) -> None:
    run(world, slate=200, n_candidates=200)
    shown = {r["request_id"]: (r["user_id"], set(r["items"])) for r in world.log.records["request"]}
    for event in world.log.records["feedback"]:
        user, items = shown[event["request_id"]]
        assert event["user_id"] == user and event["item_id"] in items


def test_a_visit_is_a_session_and_a_user_has_one_device(world: Any) -> None:
    for _ in range(2):
        run(world, slate=200, n_candidates=200, seed=3)
    requests = world.log.records["request"]
    assert len({r["session_id"] for r in requests}) == len(requests) == 6, "also not those of a run before"
    assert {(r["user_id"], r["device_id"]) for r in requests} == {(u, f"device-{u}") for u in (1, 2, 7)}
    visit = {r["request_id"]: (r["session_id"], r["device_id"]) for r in requests}
    assert world.log.records["feedback"]
    for event in world.log.records["feedback"]:
        assert (event["session_id"], event["device_id"]) == visit[event["request_id"]]


def test_the_same_seed_asks_the_same_questions(world: Any) -> None:
    for _ in range(2):
        run(world, seed=3)
    asked = [(r["user_id"], r["items"]) for r in world.log.records["request"]]
    half = len(asked) // 2
    assert sorted(asked[:half]) == sorted(asked[half:])
    run(world, seed=4)
    assert sorted((r["user_id"], r["items"]) for r in world.log.records["request"][-half:]) != sorted(asked[:half])


def test_the_arms_add_up_to_the_requests_and_clicks(world: Any) -> None:
    outcome = run(world, slate=200, n_candidates=200)
    ranker = {arm: count for (_, experiment, arm), count in outcome.arms.items() if experiment == "ranker"}
    assert sum(count.n_requests for count in ranker.values()) == outcome.n_requests == 3
    assert ranker["lightgbm"].n_clicks == 1 and ranker["deepfm"].n_clicks == 3, "users 2 | 1 and 7"
    assert outcome.models == {"deepfm:1": 2, "lightgbm:1": 1}


def test_what_a_user_rated_once_is_not_clicked_again(world: Any) -> None:
    outcome = run(world, slate=200, n_candidates=200, n_visits=5)
    assert outcome.events["rating"] == 6
    assert outcome.n_requests == 3, "a user with nothing left stays away"


def test_position_bias_hides_the_bottom_of_the_slate(world: Any) -> None:
    always = KnownTastes(np.arange(1, 90), np.arange(1, 100), lambda u, i: np.array(1.0), position_bias=1.0)
    plan = Plan(url="", n_users=80, n_visits=20, slate=10, n_candidates=10, concurrency=1)
    Simulator(plan, always, lambda: AppHttp(world)).run()
    position = {
        (r["request_id"], item): p for r in world.log.records["request"] for p, item in enumerate(r["items"], start=1)
    }
    looked = np.bincount([position[e["request_id"], e["item_id"]] for e in world.log.records["feedback"]])
    assert looked[1] == 1600
    assert looked[2:] / 1600 == pytest.approx(1 / np.arange(2, 11), abs=0.05)


def test_known_tastes_click_with_the_given_chance() -> None:
    some = KnownTastes(np.arange(5), np.arange(5), lambda u, i: np.array(0.3), position_bias=0.0)
    rng = np.random.default_rng(0)
    clicks = sum(bool(some.reaction(1, 1, rng)) for _ in range(4000))
    assert clicks / 4000 == pytest.approx(0.3, abs=0.03)


def test_candidates_are_the_user_s_own_among_others_they_never_rated() -> None:
    drawn = tastes().candidates(1, 20, np.random.default_rng(0)).tolist()
    assert len(drawn) == len(set(drawn)) == 20
    assert {1, 2, 3} <= set(drawn)


def test_failures_are_counted_by_route_and_status(world: Any) -> None:
    world.log.fail = True
    outcome = run(world, slate=200, n_candidates=200)
    assert outcome.errors == {"/v1/events: 503": 3} and outcome.events == {}
    nobody = run(world, scene="nope")
    assert nobody.errors == {"/v1/predict: 404": 3} and nobody.latency_ms(0.5) is None
    assert "p50 - ms" in summary(nobody.to_json()) and "3 errors" in summary(nobody.to_json())


def test_the_summary_shows_latency_and_clicks_per_arm(world: Any) -> None:
    text = summary(run(world, slate=200, n_candidates=200).to_json())
    assert "p50" in text and "4 clicks" in text and "6 ratings" in text
    assert any(line.split()[:3] == ["rank", "ranker", "lightgbm"] for line in text.splitlines())


def test_no_held_out_ratings_are_an_error_that_says_what_to_run() -> None:
    empty = np.array([], np.int64)
    with pytest.raises(DataError, match="plait data prepare"):
        RatingTastes(empty, empty, empty.astype(float), np.arange(3))


def test_simulate_without_data_or_server_says_so(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, find_port: Any
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "feature_store.yaml").write_text("project: x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    with pytest.raises(DataError, match="plait data prepare"):
        CliRunner().invoke(simulate, [], catch_exceptions=False)
    for folder, columns in (
        ("holdout/feedback", {"user_id": [1], "item_id": [2], "value": [5.0], "type": ["rating"], "timestamp": [1]}),
        ("events/items", {"item_id": [1, 2, 3]}),
    ):
        (tmp_path / ".plait" / folder).mkdir(parents=True)
        pq.write_table(pa.table(columns), tmp_path / ".plait" / folder / "part.parquet")
    with pytest.raises(DataError, match="plait serve"):
        CliRunner().invoke(simulate, ["--url", f"http://127.0.0.1:{find_port()}"], catch_exceptions=False)
