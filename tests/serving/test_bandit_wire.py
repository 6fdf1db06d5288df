"""A bandit through the server: what is drawn is served, counted, and logged with its propensity and context."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from typing import Any

import pyarrow.parquet as pq
import pytest

from experiments.learn_commands import run_once
from experiments.live import LiveConfig
from experiments.policy_store import PolicyStore
from experiments.snapshot import Snapshot
from experiments.store import ConfigStore
from plait.eventlog import EventLog, log_folder, roll
from plait.settings import Home
from tests.serving.conftest import NOW, make_world

MODEL = "rank.model"


def configuration(**bandit: Any) -> Snapshot:
    arms = {name: {"weight": 50, "values": {MODEL: name}} for name in ("deepfm", "lightgbm")}
    experiment = {"layer": "rank", "state": "running", "buckets": "all", "arms": arms}
    return Snapshot.of(
        {
            "parameters": {MODEL: {"type": "string", "default": "deepfm"}},
            "layers": {"rank": {"unit": "user", "parameters": ["rank.*"]}},
            "experiments": {"ranker": experiment | {"bandit": {"method": "thompson", "floor": 5, **bandit}}},
        },
        version=5,
    )


def thompson(deepfm: float) -> dict[str, Any]:
    arms = {"deepfm": {"best": deepfm}, "lightgbm": {"best": 1 - deepfm}}
    return {"method": "thompson", "reward": "click", "arms": arms}


def test_a_learned_policy_moves_the_traffic_and_the_log_says_by_which_chance():
    snapshot = configuration().with_policies({"ranker": (2, thompson(0.1))})
    with make_world(snapshot=snapshot) as world:
        served = Counter()
        for _ in range(300):
            answer = world.predict(entities={"user_id": 7}).get_json()
            served[answer["model"]["name"]] += 1
            assert "experiment_errors" not in answer["degraded"]
        assert 240 < served["lightgbm"] < 295
        exposures = world.log.records["exposure"]
        assert len(exposures) == 300  # every request of one user is a decision
        shares = {"deepfm": 0.1, "lightgbm": 0.9}
        assert all(e["propensity"] == pytest.approx(shares[e["arm"]]) for e in exposures)
        for record, exposure in zip(world.log.records["request"], exposures, strict=True):
            assert (record["request_id"], record["model"]) == (exposure["request_id"], exposure["arm"])
            assert record["arms"][0]["propensity"] == exposure["propensity"]
        assert world.metric("plait_bandit_choices_total", experiment="ranker", chosen_by="policy") == 300


def test_contexts_come_from_the_request_and_a_missing_one_is_counted(tmp_path):
    """Through the log and the roll, into the tables that learning reads."""
    context = {"temperature": {"scale": 10, "center": 15}, "scene": {"categories": ["home"]}}
    snapshot = configuration(method="linear", context=context)
    home = Home(project=tmp_path, root=tmp_path / ".plait").create()
    with make_world(snapshot=snapshot) as world:
        assert world.predict(context={"temperature": 20.0}).status_code == 200
        assert world.predict(context={}).status_code == 200
        assert world.predict(context={"temperature": None}).status_code == 200
        for chosen_by, n in (("weights", 1), ("no_context", 2)):
            assert world.metric("plait_bandit_choices_total", experiment="ranker", chosen_by=chosen_by) == n
        log = EventLog(log_folder(home), "serve")
        for kind in ("request", "exposure"):
            assert log.enqueue(kind, world.log.records[kind])
        log.close()
    roll(home)
    (part,) = (home.events / "exposures").glob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    assert [json.loads(row["context"]) if row["context"] else None for row in rows] == [
        {"temperature": 20.0, "scene": "home"},
        None,
        None,
    ]
    assert {row["propensity"] for row in rows} == {0.5}
    (part,) = (home.events / "impressions").glob("*.parquet")
    assert {row["arms"][0]["propensity"] for row in pq.read_table(part).to_pylist()} == {0.5}


def test_a_model_asked_for_by_name_is_no_decision_of_the_bandit():
    with make_world(snapshot=configuration()) as world:
        world.predict(model="deepfm")
        assert world.log.records["exposure"] == []


def test_the_same_request_draws_the_same_arm_in_every_worker():
    snapshot = configuration().with_policies({"ranker": (2, thompson(0.5))})
    drawn = []
    for _ in range(2):
        with make_world(snapshot=snapshot) as world:
            drawn.append(
                [
                    world.client.post(
                        "/v1/predict",
                        json={"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1, 2]},
                        headers={"X-Request-Id": f"request-{i}"},
                    ).get_json()["model"]["name"]
                    for i in range(30)
                ]
            )
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 2
    expected = [snapshot.assign({"user": "1", "request": f"request-{i}"}, {}, NOW).values[MODEL] for i in range(30)]
    assert drawn[0] == expected


def test_the_loop_closes_over_http(tmp_path):
    """Requests, feedback and learning by turns: each country ends at the model it clicks on, under traffic."""
    home = Home(project=tmp_path, root=tmp_path / ".plait").create()
    store = ConfigStore.at(home)
    context = {"country": {"categories": ["SE", "NO"]}}
    document = configuration(method="linear", context=context, floor=2, reward="buy").document
    store.apply(document, author="anna")
    live, policies = LiveConfig(store), PolicyStore(store.engine)
    likes = {"SE": "deepfm", "NO": "lightgbm"}
    with closing(EventLog(log_folder(home), "serve")) as log, make_world(experiments=live, log=log) as world:
        for turn in range(4):
            pleased, bought = 0, []
            for i in range(80):
                country = ("SE", "NO")[i % 2]
                answer = world.predict(entities={"user_id": i % 9}, context={"country": country}).get_json()
                if answer["model"]["name"] == likes[country]:
                    pleased += 1
                    event = {"event_id": f"{turn}-{i}", "type": "buy", "user_id": i % 9, "item_id": 1}
                    bought.append(event | {"request_id": answer["request_id"]})
            assert world.client.post("/v1/events", json={"events": bought}).status_code == 202
            run_once(home, live.snapshot.spec, policies, None, author="anna")
            live.poll()
    assert pleased > 70  # of 80
    assert policies.get("ranker").version == 4
    assert policies.get("ranker").document["decisions"] == 320
