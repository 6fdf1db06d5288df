"""POST /v1/predict: the ranking, its log, and how it degrades."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import StoreError


def ids(answer: dict[str, Any]) -> list[int]:
    return [row["item_id"] for row in answer["ranking"]]


def naive_ranking(items: list[int], top_k: int) -> list[int]:
    """Distinct items by falling score (item % 10, or 0.5 for an unknown item), then by id, cut at top_k."""
    score = {item: item % 10 if item <= 999 else 0.5 for item in items}
    return sorted(score, key=lambda item: (-score[item], item))[:top_k]


def test_a_ranking_is_sorted_by_score_and_equal_scores_go_to_the_lower_item(world: Any) -> None:
    answer = world.predict(candidate_ids=[11, 5, 1, 25, 9]).get_json()
    assert ids(answer) == [9, 5, 25, 1, 11]
    assert [round(r["score"], 4) for r in answer["ranking"]] == [0.9, 0.5, 0.5, 0.1, 0.1]


def test_the_answer_has_the_contract_s_fields_and_no_others(world: Any) -> None:
    answer = world.predict().get_json()
    assert list(answer) == ["request_id", "scene", "model", "experiments", "ranking", "degraded", "timings_ms"]
    assert answer["model"] == {"name": "deepfm", "version": "1"}
    assert {"layer": "rank", "experiment": "ranker", "arm": "deepfm"} in answer["experiments"]
    assert answer["degraded"] == []
    assert set(answer["timings_ms"]) == {"parse", "assign", "features", "score", "log", "total"}


@given(items=st.lists(st.integers(1, 2000), min_size=1, max_size=60), top_k=st.integers(1, 70), user=st.integers(1, 99))
def test_any_ranking_is_what_a_naive_sort_gives(shared_world: Any, items: list[int], top_k: int, user: int) -> None:
    answer = shared_world.predict(candidate_ids=items, top_k=top_k, entities={"user_id": user}).get_json()
    assert ids(answer) == naive_ranking(items, top_k)


def test_candidates_as_objects_rank_as_their_ids_do(world: Any) -> None:
    rows = world.predict(candidate_ids=..., candidates=[{"item_id": 4}, {"item_id": 8}]).get_json()
    assert ids(rows) == ids(world.predict(candidate_ids=[4, 8]).get_json()) == [8, 4]


def test_the_arm_s_model_serves_unless_the_request_names_another(world: Any) -> None:
    assert world.predict(entities={"user_id": 2}).get_json()["model"]["name"] == "lightgbm"
    override = world.predict(entities={"user_id": 2}, model="deepfm:2").get_json()
    assert override["model"] == {"name": "deepfm", "version": "2"}
    assert [e["experiment"] for e in override["experiments"]] == ["exclude_seen"], "the model's experiment took no part"


def test_an_unknown_model_is_a_404_that_suggests_the_nearest(world: Any) -> None:
    response = world.predict(model="depfm")
    assert response.status_code == 404
    assert "did you mean 'deepfm'" in response.get_json()["detail"]


def test_an_unknown_candidate_is_scored_with_defaults_and_marked(world: Any) -> None:
    answer = world.predict(candidate_ids=[1, 5000, 2]).get_json()
    assert {r["item_id"]: r.get("known") for r in answer["ranking"]} == {1: None, 2: None, 5000: False}
    assert answer["degraded"] == []


def test_an_unknown_user_is_served_and_said(world: Any) -> None:
    answer = world.predict(entities={"user_id": 4242}).get_json()
    assert answer["degraded"] == ["unknown_user"] and len(answer["ranking"]) == 3


def test_a_duplicate_candidate_is_ranked_once_and_said(world: Any) -> None:
    answer = world.predict(candidate_ids=[3, 1, 3, 3]).get_json()
    assert ids(answer) == [3, 1] and answer["degraded"] == ["duplicate_candidates"]


def test_exclude_seen_drops_the_user_s_history(world: Any) -> None:
    world.snapshot.values["recall.exclude_seen"] = True
    assert ids(world.predict(entities={"user_id": 7}, candidate_ids=[1, 2, 4, 3, 5]).get_json()) == [5, 4]
    nothing_left = world.predict(entities={"user_id": 7}, candidate_ids=[1, 2]).get_json()
    assert nothing_left["ranking"] == [] and nothing_left["degraded"] == []


def test_max_candidates_keeps_the_first_that_came_after_the_seen_are_gone(world: Any) -> None:
    world.snapshot.values.update({"recall.max_candidates": 2})
    assert ids(world.predict(entities={"user_id": 7}, candidate_ids=[1, 4, 9, 5]).get_json()) == [4, 1]
    world.snapshot.values.update({"recall.exclude_seen": True})
    assert ids(world.predict(entities={"user_id": 7}, candidate_ids=[1, 4, 9, 5]).get_json()) == [9, 4]


def test_every_returned_impression_is_logged_with_arms_version_and_served_features(world: Any) -> None:
    answer = world.predict(candidate_ids=[1, 2, 3, 4], top_k=2).get_json()
    (record,) = world.log.records["request"]
    assert record["items"] == ids(answer) == [4, 3]
    assert record["positions"] == [1, 2] and record["propensities"] == [1.0, 1.0]
    assert (record["model"], record["model_version"], record["config_version"]) == ("deepfm", "1", 3)
    assert record["timestamp"] == 892209600_000000 and record["request_id"] == answer["request_id"]
    assert record["features_request"] == {"user_age": 1, "user_last_movies": []}
    assert record["features_candidates"] == {"movie_mean": [4.0, 3.0]}
    assert record["arms"] == [{**arm, "propensity": None} for arm in answer["experiments"]]


def test_an_exposure_is_logged_once_per_unit_experiment_arm_and_configuration(world: Any) -> None:
    for _ in range(3):
        world.predict()
    world.predict(entities={"user_id": 3})
    exposures = world.log.records["exposure"]
    assert sorted((e["unit"], e["experiment"]) for e in exposures) == [
        ("1", "exclude_seen"), ("1", "ranker"), ("3", "exclude_seen"), ("3", "ranker"),
    ]  # fmt: skip
    assert world.metric("plait_exposures_deduped_total") == 4


def test_an_exposure_the_log_dropped_is_logged_by_the_next_request(world: Any) -> None:
    world.log.fail = True
    assert world.predict().get_json()["degraded"] == ["not_logged"]
    world.log.fail = False
    world.predict()
    assert [e["experiment"] for e in world.log.records["exposure"]] == ["exclude_seen", "ranker"]
    assert world.metric("plait_log_dropped_total", kind="request") == 1


def test_a_failing_store_serves_defaults_and_says_so(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    world.reader.error = StoreError("the online store is away")
    with caplog.at_level(logging.ERROR, "serving"):
        response = world.predict()
    assert response.status_code == 200
    assert response.get_json()["degraded"] == ["features_unavailable"]
    assert ids(response.get_json()) == [1, 2, 3], "equal scores: by item id"
    assert "the online store is away" in caplog.text
    assert world.metric("plait_degraded_total", reason="features_unavailable") == 1


def test_a_hanging_store_costs_its_deadline_and_no_more(world: Any) -> None:
    released = threading.Event()
    world.reader.before = lambda: released.wait(10)
    started = time.perf_counter()
    answer = world.predict().get_json()
    seconds = time.perf_counter() - started
    released.set()
    assert answer["degraded"] == ["features_unavailable"]
    assert 0.2 <= seconds < 2


def test_a_failing_model_falls_back_to_the_scene_s_own(world: Any) -> None:
    world.scorers["lightgbm:1"].error = RuntimeError("broken graph")
    answer = world.predict(entities={"user_id": 2}).get_json()
    assert answer["model"]["name"] == "deepfm" and answer["degraded"] == ["model_failed", "model_fallback"]


def test_when_every_model_fails_the_candidates_keep_their_order(world: Any) -> None:
    for scorer in world.scorers.values():
        scorer.error = RuntimeError("broken graph")
    answer = world.predict(candidate_ids=[3, 1, 2]).get_json()
    assert ids(answer) == [3, 1, 2] and answer["model"] is None and answer["degraded"] == ["model_failed"]
    assert world.log.records["request"][0]["scores"] is None


def test_an_arm_whose_model_is_not_loaded_is_served_by_the_default(world: Any) -> None:
    world.snapshot.values["rank.model"] = "retired"
    answer = world.predict().get_json()
    assert answer["model"]["name"] == "deepfm" and answer["degraded"] == ["model_fallback"]


def test_failing_experiments_serve_defaults(world: Any) -> None:
    world.snapshot.error = RuntimeError("no configuration")
    answer = world.predict(entities={"user_id": 2}).get_json()
    assert answer["model"]["name"] == "deepfm" and answer["experiments"] == []
    assert answer["degraded"] == ["experiments_unavailable"]


def test_request_id_and_trace_are_taken_over_and_echoed(world: Any) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    body = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1]}
    response = world.client.post("/v1/predict", json=body, headers={"X-Request-Id": "r-1", "traceparent": trace})
    assert response.headers["X-Request-Id"] == response.get_json()["request_id"] == "r-1"
    version, trace_id, span_id, flags = response.headers["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", "4bf92f3577b34da6a3ce929d0e0e4736", "01")
    assert span_id != "00f067aa0ba902b7"


@pytest.mark.parametrize("header", ["x" * 200, "a b", "ünicode", ""])
def test_an_unfit_request_id_is_replaced(world: Any, header: str) -> None:
    response = world.client.get("/healthz", headers={"X-Request-Id": header.encode().decode("latin-1")})
    assert len(response.headers["X-Request-Id"]) == 32


@pytest.mark.parametrize(
    "header", ["junk", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "ff-" + "a" * 32 + "-" + "b" * 16 + "-01"]
)
def test_a_malformed_trace_begins_a_new_one(world: Any, header: str) -> None:
    trace_id = world.client.get("/healthz", headers={"traceparent": header}).headers["traceparent"].split("-")[1]
    assert len(trace_id) == 32 and trace_id not in header
