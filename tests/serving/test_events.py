"""POST /v1/events: on disk before the 202, and each event once."""

from __future__ import annotations

from typing import Any

NOW_US = 892209600_000000


def test_events_are_kept_with_the_server_s_time_when_they_carry_none(world: Any) -> None:
    event = {"event_id": "e1", "type": "click", "request_id": "r1", "user_id": 1, "item_id": 2}
    response = world.client.post("/v1/events", json={"events": [event]})
    assert response.status_code == 202 and response.get_json() == {"accepted": 1, "duplicates": 0}
    assert world.log.records["feedback"] == [
        {**event, "session_id": None, "device_id": None, "timestamp": NOW_US, "created": NOW_US, "value": None}
    ]


def test_times_are_read_exactly_in_either_form(world: Any) -> None:
    times = ["1998-04-10T13:00:00.000001+02:00", 892206000_000001, "1998-04-10T11:00:00.000001Z"]
    events = [{"event_id": str(i), "type": "click", "user_id": 1, "timestamp": at} for i, at in enumerate(times)]
    assert world.client.post("/v1/events", json={"events": events}).status_code == 202
    assert {record["timestamp"] for record in world.log.records["feedback"]} == {892206000_000001}


def test_the_same_event_id_twice_in_one_request_counts_once(world: Any) -> None:
    events = [{"event_id": "e1", "type": "rating", "user_id": 1, "item_id": 2, "value": v} for v in (4, 5)]
    response = world.client.post("/v1/events", json={"events": events})
    assert response.get_json() == {"accepted": 1, "duplicates": 1}
    assert [record["value"] for record in world.log.records["feedback"]] == [4.0]


def test_events_that_cannot_be_stored_are_a_503_and_may_be_sent_again(world: Any) -> None:
    world.log.fail = True
    body = {"events": [{"event_id": "e1", "type": "click", "user_id": 1, "item_id": 2}]}
    response = world.client.post("/v1/events", json=body)
    assert response.status_code == 503 and response.headers["Retry-After"] == "1"
    assert "the disk is full" in response.get_json()["detail"]
    world.log.fail = False
    assert world.client.post("/v1/events", json=body).status_code == 202
