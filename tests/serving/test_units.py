"""Units of every kind through the API: who is assigned by what, what is logged, and that the counts add up."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest

from experiments.snapshot import Snapshot
from tests.serving.conftest import NOW, make_world

MODEL, EXCLUDE = "rank.model", "recall.exclude_seen"


def experiment(parameter: str, values: list[Any], layer: str) -> dict[str, Any]:
    arms = {str(value).lower(): {"weight": 50, "values": {parameter: value}} for value in values}
    return {"layer": layer, "state": "running", "buckets": "all", "arms": arms}


def configuration(unit: str = "user", **changes: Any) -> Snapshot:
    """Two layers: the ranker by `unit`, what was seen by user."""
    document: dict[str, Any] = {
        "parameters": {
            MODEL: {"type": "string", "default": "deepfm"},
            EXCLUDE: {"type": "bool", "default": False},
            "recall.max_candidates": {"type": "int", "default": 500},
        },
        "layers": {
            "rank": {"unit": unit, "parameters": ["rank.*"]},
            "recall": {"unit": "user", "parameters": ["recall.*"]},
        },
        "experiments": {
            "ranker": experiment(MODEL, ["deepfm", "lightgbm"], "rank"),
            "seen": experiment(EXCLUDE, [False, True], "recall"),
        },
    }
    return Snapshot.of(document | changes, version=5)


def arms(answer: Any) -> dict[str, str]:
    return {arm["experiment"]: arm["arm"] for arm in answer.get_json()["experiments"]}


@pytest.mark.parametrize(("kind", "field"), [("session", "session_id"), ("device", "device_id")])
def test_an_experiment_by_session_or_device_follows_the_id_that_was_sent(kind: str, field: str) -> None:
    snapshot = configuration(kind)
    with make_world(snapshot=snapshot) as world:
        served = Counter()
        for i in range(40):
            unit = f"{kind} Ω{i}"
            expected = snapshot.assign({kind: unit}, {}, NOW).values[MODEL]
            for user in (1, 2, 3):  # whoever the user is
                answer = world.predict(entities={"user_id": user}, **{field: unit})
                assert arms(answer)["ranker"] == expected
                assert answer.get_json()["model"]["name"] == expected
            served[expected] += 1
        assert min(served.values()) >= 10
        exposures = [e for e in world.log.records["exposure"] if e["experiment"] == "ranker"]
        assert [(e["unit_kind"], e["unit"]) for e in exposures] == [(kind, f"{kind} Ω{i}") for i in range(40)]
        assert {r[field] for r in world.log.records["request"]} == {f"{kind} Ω{i}" for i in range(40)}


@pytest.mark.parametrize("kind", ["session", "device"])
def test_without_the_id_the_default_serves_and_nothing_is_exposed(kind: str) -> None:
    with make_world(snapshot=configuration(kind)) as world:
        for user in range(1, 20):
            answer = world.predict(entities={"user_id": user}, session_id=None)
            assert "ranker" not in arms(answer) and answer.get_json()["model"]["name"] == "deepfm"
            assert answer.get_json()["degraded"] == []
        assert {e["experiment"] for e in world.log.records["exposure"]} == {"seen"}
        assert world.metric("plait_unit_missing_total", unit_kind=kind) == 19
        assert world.metric("plait_unit_missing_total", unit_kind="user") == 0


@pytest.mark.parametrize(
    ("kind", "field"), [("session", "session_id"), ("device", "device_id"), ("request", "request_id")]
)
def test_assignments_are_explained_by_every_unit_that_is_given(kind: str, field: str) -> None:
    snapshot = configuration(kind)
    with make_world(snapshot=snapshot) as world:
        alone = world.client.get("/v1/assignments?unit=1").get_json()
        (layer,) = [layer for layer in alone["layers"] if layer["layer"] == "rank"]
        assert (layer["arm"], layer["unit_kind"]) == (None, kind) and kind in layer["why"]
        answer = world.client.get(f"/v1/assignments?unit=1&{field}=x-7").get_json()
        assert answer["units"] == {"user": "1", kind: "x-7"}
        assert answer["parameters"] == snapshot.assign({"user": "1", kind: "x-7"}, {}, NOW).values
        refused = world.client.get(f"/v1/assignments?unit=1&{field}=")
        assert refused.status_code == 422 and f"?{field}=ID" in refused.get_json()["detail"]
        assert world.log.records["exposure"] == []


@pytest.mark.parametrize("field", ["session_id", "device_id"])
@pytest.mark.parametrize("value", ["", "x" * 201, "x" * 10_000, 7, True, ["a"], {"a": 1}])
def test_ids_that_cannot_be_are_refused_with_what_may(field: str, value: Any) -> None:
    with make_world(snapshot=configuration()) as world:
        event = {"event_id": "e", "type": "click", "user_id": 1, field: value}
        for answer, pointer in (
            (world.predict(**{field: value}), f"#/{field}"),
            (world.client.post("/v1/events", json={"events": [event]}), f"#/events/0/{field}"),
        ):
            problem = answer.get_json()
            assert answer.status_code == 422 and problem["pointer"] == pointer
            assert "string of 1 to 200 characters" in problem["detail"]


@pytest.mark.parametrize("unit", ["🦊" * 100, "\u0000", "a\nb", "ß\u0301", "𓀀", " "])
def test_any_text_is_a_unit(unit: str) -> None:
    snapshot = configuration("device")
    with make_world(snapshot=snapshot) as world:
        answer = world.predict(device_id=unit)
        assert arms(answer)["ranker"] == snapshot.assign({"device": unit}, {}, NOW).values[MODEL]


def test_events_keep_their_session_and_device() -> None:
    with make_world() as world:
        event = {"event_id": "e1", "type": "click", "user_id": 1, "session_id": "s", "device_id": "d"}
        assert world.client.post("/v1/events", json={"events": [event]}).status_code == 202
        (record,) = world.log.records["feedback"]
        assert (record["session_id"], record["device_id"]) == ("s", "d")


def test_a_configuration_that_fails_serves_defaults_and_is_counted() -> None:
    class Broken:
        version = 9

        def assign(self, *_: Any) -> None:
            raise OSError("the database is gone")

        def model_references(self) -> list[str]:
            return []

    with make_world(snapshot=Broken()) as world:
        answer = world.predict()
        assert answer.status_code == 200 and answer.get_json()["degraded"] == ["experiments_unavailable"]
        assert world.metric("plait_degraded_total", reason="experiments_unavailable") == 1
        assert world.metric("plait_assignment_errors_total", code="unavailable") == 1


def test_a_sticky_store_that_is_gone_serves_the_hashed_arm_and_is_counted() -> None:
    class Gone:
        def get(self, *_: Any) -> str:
            raise OSError("the database is gone")

        keep = get

    document = configuration().document
    document["experiments"]["ranker"]["sticky"] = True
    plain = configuration()
    with make_world(snapshot=Snapshot.of(document, version=5, sticky=Gone())) as world:
        for user in range(1, 20):
            answer = world.predict(entities={"user_id": user})
            assert arms(answer)["ranker"] == plain.assign({"user": str(user)}, {}, NOW).values[MODEL]
            assert answer.get_json()["degraded"] == ["experiment_errors"]
        assert world.metric("plait_degraded_total", reason="experiment_errors") == 19
        assert world.metric("plait_assignment_errors_total", code="sticky_unavailable") == 19


def test_a_clock_that_jumps_back_moves_nobody() -> None:
    snapshot = configuration()
    with make_world(snapshot=snapshot) as world:
        before = [arms(world.predict(entities={"user_id": user})) for user in range(1, 30)]
        world.parts.clock.now = lambda: datetime(1970, 1, 2, tzinfo=UTC)
        assert [arms(world.predict(entities={"user_id": user})) for user in range(1, 30)] == before


# -- counterfactuals ------------------------------------------------------------------------------------------------


def seen_exposures(world: Any) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for record in world.log.records["exposure"]:
        if record["experiment"] == "seen":
            found.setdefault(record["arm"], []).append(record["counterfactual"])
    return found


@pytest.mark.parametrize("excluded", [False, True])
def test_an_answer_that_the_other_arm_would_change_is_marked_in_both_arms(excluded: bool) -> None:
    """User 7 has seen items 1, 2 and 3."""
    document = configuration().document
    document["experiments"]["seen"]["arms"][str(excluded).lower()]["testers"] = ["7", "8"]
    arm = str(excluded).lower()
    with make_world(snapshot=Snapshot.of(document, version=5)) as world:
        world.predict(entities={"user_id": 8}, candidate_ids=[1, 2, 3, 4])
        assert seen_exposures(world) == {arm: [False]}  # this user has seen nothing
        world.predict(entities={"user_id": 7}, candidate_ids=[4, 5])
        assert seen_exposures(world) == {arm: [False, False]}  # nor are these candidates seen
        answer = world.predict(entities={"user_id": 7}, candidate_ids=[3, 4, 5])
        assert seen_exposures(world) == {arm: [False, False, True]}
        assert {row["item_id"] for row in answer.get_json()["ranking"]} == ({4, 5} if excluded else {3, 4, 5})


def test_candidates_beyond_the_limit_change_nothing_and_are_not_marked() -> None:
    document = configuration().document
    document["parameters"]["recall.max_candidates"]["default"] = 2
    with make_world(snapshot=Snapshot.of(document, version=5)) as world:
        world.predict(entities={"user_id": 7}, candidate_ids=[4, 5, 1])  # 1 is seen, but third of two
        assert list(seen_exposures(world).values()) == [[False]]
        world.predict(entities={"user_id": 7}, candidate_ids=[4, 1, 5])
        assert list(seen_exposures(world).values()) == [[False, True]]


def test_a_limit_under_experiment_is_marked_where_it_cuts() -> None:
    document = configuration().document
    document["experiments"]["seen"] = experiment("recall.max_candidates", [2, 500], "recall")
    with make_world(snapshot=Snapshot.of(document, version=5)) as world:
        for user in range(1, 30):
            world.predict(entities={"user_id": user}, candidate_ids=[4, 5])  # every arm shows both
            world.predict(entities={"user_id": user}, candidate_ids=[4, 5, 6])  # one arm would cut, whichever serves
        found = seen_exposures(world)
        assert set(found) == {"2", "500"}
        for marks in found.values():
            assert marks == [False, True] * (len(marks) // 2)
