"""Bad input: the right status, a problem document that says what came and what to do, and nothing logged."""

from __future__ import annotations

from typing import Any

import pytest

GOOD = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1, 2]}
EVENT = {"event_id": "e1", "type": "click", "user_id": 1, "item_id": 2}

BAD_PREDICT = [
    ({"scene": "hme"}, 404, "did you mean 'home'"),
    ({"scene": ...}, 422, "missing"),
    ({"scene": 3}, 422, "3 came"),
    ({"entities": ...}, 422, "entities must be a JSON object"),
    ({"entities": {}}, 422, "user_id"),
    ({"entities": {"user_id": "42"}}, 422, "whole number, not '42'"),
    ({"entities": {"user_id": None}}, 422, "whole number, not null"),
    ({"entities": {"user_id": "4" * 10_000}}, 422, "whole number, not '444"),
    ({"entities": {"user_id": 4.2}}, 422, "4.2"),
    ({"entities": {"user_id": True}}, 422, "true"),
    ({"entities": {"user_id": 2**64}}, 422, "user_id"),
    ({"entities": {"user_id": 1, "uesr": 2}}, 422, "uesr"),
    ({"candidate_ids": []}, 422, "empty"),
    ({"candidate_ids": ...}, 422, "neither came"),
    ({"candidates": [{"item_id": 1}]}, 422, "both came"),
    ({"candidate_ids": "1,2"}, 422, "must be a list"),
    ({"candidate_ids": [1, None]}, 422, "null"),
    ({"candidate_ids": [1, 2.5]}, 422, "2.5"),
    ({"candidate_ids": list(range(10_000))}, 413, "at most 1000"),
    ({"candidate_ids": ..., "candidates": [{"id": 1}]}, 422, "no item_id"),
    ({"candidate_ids": ..., "candidates": [1]}, 422, "must be a JSON object"),
    ({"top_k": 0}, 422, "at least 1"),
    ({"top_k": "10"}, 422, "whole number"),
    ({"context": [1]}, 422, "context"),
    ({"context": {"temperature": "warm"}}, 422, "'temperature' must be double"),
    ({"model": 3}, 422, "model must be a name"),
    ({"session_id": ""}, 422, "session_id must be a string of 1 to 200 characters"),
    ({"session_id": 12}, 422, "not 12"),
    ({"device_id": "d" * 10_000}, 422, "not one of 10000"),
    ({"device_id": ["d"]}, 422, "a list of 1"),
    ({"sesion_id": "s"}, 422, "did you mean 'session_id'"),
    ({"modle": "deepfm"}, 422, "did you mean 'model'"),
]


@pytest.mark.parametrize(("change", "status", "words"), BAD_PREDICT, ids=[str(c)[:40] for c, _, _ in BAD_PREDICT])
def test_a_wrong_predict_request_is_refused_with_a_reason(
    world: Any, change: dict[str, Any], status: int, words: str
) -> None:
    body = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    response = world.client.post("/v1/predict", json=body)
    problem = response.get_json()
    assert response.status_code == problem["status"] == status
    assert response.content_type == "application/problem+json"
    assert words in problem["detail"]
    assert problem["pointer"].startswith("#")
    assert problem["request_id"] == response.headers["X-Request-Id"]
    assert world.log.records["request"] == []


@pytest.mark.parametrize("body", [b"", b"{", b'{"scene": home}', b"\xff\xfe", b'{"scene":"home"} x'])
def test_broken_json_is_a_400(world: Any, body: bytes) -> None:
    for path in ("/v1/predict", "/v1/events", "/v2/models/deepfm/infer"):
        response = world.client.post(path, data=body, content_type="application/json")
        assert response.status_code == 400
        assert response.get_json()["title"] == "Broken JSON"


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"'])
def test_json_that_is_no_object_is_refused(world: Any, body: bytes) -> None:
    assert world.client.post("/v1/predict", data=body, content_type="application/json").status_code == 422


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_another_content_type_is_a_415(world: Any, content_type: str | None) -> None:
    response = world.client.post("/v1/predict", data=b"{}", content_type=content_type)
    assert response.status_code == 415
    assert "application/json" in response.get_json()["detail"]


def test_a_body_over_the_limit_is_a_413(world: Any) -> None:
    response = world.client.post("/v1/predict", data=b" " * (5 << 20), content_type="application/json")
    assert response.status_code == 413
    assert "4194304 bytes" in response.get_json()["detail"]


def test_an_unknown_route_and_a_wrong_method_are_problems_too(world: Any) -> None:
    missing = world.client.get("/v1/predicts")
    assert missing.status_code == 404 and "/v1/predict" in missing.get_json()["detail"]
    wrong = world.client.get("/v1/predict")
    assert wrong.status_code == 405 and wrong.headers["Allow"] == "OPTIONS, POST"


def test_an_error_of_our_own_is_a_500_that_tells_nothing_of_the_inside(world: Any) -> None:
    def boom() -> None:
        raise ZeroDivisionError("secret")

    world.pool.status = boom
    response = world.client.get("/v1/models")
    assert response.status_code == 500
    assert "secret" not in response.text and response.get_json()["request_id"]


BAD_EVENTS = [
    ({}, "events must be a list"),
    ({"events": []}, "empty"),
    ({"events": [3]}, "must be a JSON object"),
    ({"events": [{**EVENT, "event_id": ""}]}, "event_id"),
    ({"events": [{**EVENT, "event_id": 7}]}, "event_id"),
    ({"events": [{**EVENT, "type": "Click!"}]}, "lower-case"),
    ({"events": [{**EVENT, "user_id": None}]}, "user_id"),
    ({"events": [{k: v for k, v in EVENT.items() if k != "user_id"}]}, "user_id"),
    ({"events": [{**EVENT, "item_id": "2"}]}, "item_id"),
    ({"events": [{**EVENT, "session_id": ""}]}, "session_id must be a string"),
    ({"events": [{**EVENT, "device_id": "d" * 201}]}, "one of 201"),
    ({"events": [{**EVENT, "value": "4"}]}, "value"),
    ({"events": [{**EVENT, "value": True}]}, "value"),
    ({"events": [{**EVENT, "timestamp": "yesterday"}]}, "not a time"),
    ({"events": [{**EVENT, "timestamp": "1998-04-10T11:00:00"}]}, "no zone"),
    ({"events": [{**EVENT, "timestamp": "2030-01-01T00:00:00Z"}]}, "ten minutes"),
    ({"events": [{**EVENT, "timestamp": -5}]}, "1970"),
    ({"events": [{**EVENT, "tpye": 1}]}, "did you mean 'type'"),
]


@pytest.mark.parametrize(("body", "words"), BAD_EVENTS, ids=[w for _, w in BAD_EVENTS])
def test_wrong_events_are_refused_and_none_is_kept(world: Any, body: dict[str, Any], words: str) -> None:
    if body.get("events"):
        body = {"events": [EVENT, *body["events"]]}  # a right one beside it is not taken either
    response = world.client.post("/v1/events", json=body)
    assert response.status_code == 422
    assert words in response.get_json()["detail"]
    assert world.log.records["feedback"] == []


def test_too_many_events_are_a_413(world: Any) -> None:
    events = [{**EVENT, "event_id": str(i)} for i in range(1001)]
    assert world.client.post("/v1/events", json={"events": events}).status_code == 413
