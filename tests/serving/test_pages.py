"""Health, metrics, state and the console."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from plait.errors import StoreError
from serving.metrics import forget_dead_workers, quantile


def test_ready_means_that_every_loaded_model_scores(world: Any) -> None:
    assert world.client.get("/readyz").get_json() == {
        "ready": True, "models": ["deepfm", "lightgbm"], "broken": {}, "missing": [],
    }  # fmt: skip


def test_a_model_that_broke_makes_the_worker_unready_but_not_dead(world: Any) -> None:
    world.scorers["lightgbm:1"].error = RuntimeError("broken graph")
    response = world.client.get("/readyz")
    assert response.status_code == 503 and "broken graph" in response.get_json()["broken"]["lightgbm"]
    assert world.client.get("/healthz").status_code == 200


def test_metrics_count_requests_stages_arms_and_models(world: Any) -> None:
    world.predict(candidate_ids=[1, 2, 5000])
    world.predict(scene="nope")
    text = world.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families.values() for s in f.samples}
    ok = (("model", "deepfm"), ("route", "/v1/predict"), ("status", "200"), ("version", "1"))
    assert samples["plait_requests_total", ok] == 1
    assert samples["plait_rejected_total", (("reason", "404"),)] == 1
    assert samples["plait_stage_seconds_count", (("stage", "score"),)] == 1
    assert samples["plait_request_seconds_count", (("route", "/v1/predict"),)] == 2
    assert samples["plait_model_loaded", (("model", "lightgbm"), ("version", "1"))] == 1
    assert samples["plait_feature_missing_total", (("feature_service", "click_deepfm"),)] == 1
    assert samples["plait_assignments_total", (("arm", "deepfm"), ("experiment", "ranker"), ("layer", "rank"))] == 1
    assert samples["plait_inflight", ()] == 1, "the request for /metrics itself"
    assert samples["plait_config_version", ()] == 3


def test_metric_labels_never_carry_ids(world: Any) -> None:
    world.predict(entities={"user_id": 77}, candidate_ids=[123456789])
    text = world.client.get("/metrics").text
    assert "123456789" not in text and '"77"' not in text


def test_live_gauges_of_dead_workers_are_forgotten(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"gauge_livesum_{pid}.db").touch()
    (tmp_path / f"counter_{dead.pid}.db").touch()
    forget_dead_workers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"gauge_livesum_{os.getpid()}.db", f"counter_{dead.pid}.db"}


@pytest.mark.parametrize(
    ("buckets", "q", "expected"),
    [([], 0.5, None), ([(1.0, 0), (2.0, 0)], 0.5, None), ([(1.0, 4), (2.0, 4), (float("inf"), 4)], 0.5, 0.5)],
)
def test_quantiles_of_histograms(buckets: Any, q: float, expected: float | None) -> None:
    assert quantile(buckets, q) == expected


def test_models_lists_loaded_failed_and_registered(world: Any) -> None:
    answer = world.client.get("/v1/models").get_json()
    assert [(m["name"], m["version"]) for m in answer["models"]] == [("deepfm", "1"), ("lightgbm", "1")]
    assert [m["name"] for m in answer["registered"]] == ["deepfm", "lightgbm", "logistic"]
    assert answer["registered"][0]["versions"][0]["version"] == "2", "newest first"


def test_models_lists_what_is_loaded_while_the_registry_is_gone(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> list[str]:
        raise StoreError("the model registry does not answer (gone); nothing was changed")

    monkeypatch.setattr(world.registry, "names", gone)
    answer = world.client.get("/v1/models").get_json()
    assert [m["name"] for m in answer["models"]] == ["deepfm", "lightgbm"]
    assert answer["registered"] == [] and "does not answer" in answer["registry_error"]


def test_assignments_explain_a_unit_without_exposing_it(world: Any) -> None:
    answer = world.client.get("/v1/assignments?unit=2").get_json()
    (layer,) = answer["layers"]
    assert answer["parameters"]["rank.model"] == layer["arm"] and answer["config_version"] == 3
    assert layer["why"] and 0 <= layer["bucket"] < 10_000
    assert world.log.records["exposure"] == []


def test_the_console_shows_traffic_models_and_recent_requests(world: Any) -> None:
    for user in range(1, 5):
        world.predict(entities={"user_id": user})
    page = world.client.get("/console").text
    for words in ("deepfm version 1", "ranker", "50.0 %", "ranker=lightgbm"):
        assert words in page
    content = world.client.get("/console", headers={"Accept": "application/json"}).get_json()
    assert content["traffic"]["predictions"] == 4 and len(content["recent"]) == 4
    shares = {arm["arm"]: arm["share"] for e in content["experiments"]["experiments"] for arm in e["arms"]}
    assert shares["deepfm"] == shares["lightgbm"] == 0.5


def test_pages_load_nothing_from_outside(world: Any) -> None:
    for path in ("/", "/console"):
        response = world.client.get(path)
        assert response.status_code == 200 and "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert not re.search(r'(src|href)="(https?:)?//', response.text) and "<script" not in response.text


def test_trying_it_on_the_console_ranks_and_leaves_no_trace(world: Any) -> None:
    page = world.client.get("/console?scene=home&user_id=2&candidate_ids=4+8,+6").text
    assert page.index(">8<") < page.index(">6<") < page.index(">4<")
    assert world.log.records == {"request": [], "feedback": [], "exposure": []}


@pytest.mark.parametrize("query", ["user_id=x&candidate_ids=1&scene=home", "user_id=1&candidate_ids=&scene=<b>"])
def test_a_wrong_try_is_explained_on_the_page_and_escaped(world: Any, query: str) -> None:
    page = world.client.get(f"/console?{query}")
    assert page.status_code == 200 and 'class="bad"' in page.text and "<b>" not in page.text.split("<h2 id")[1]
