"""Counts add up: requests, impressions, exposures and metrics, over a full queue, a full disk, workers and restarts."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import requests

from experiments.metrics import parse_metrics
from experiments.report import build_report
from plait.eventlog import EventLog, log_folder, roll
from plait.settings import Home
from tests.serving.conftest import NOW, make_world
from tests.serving.test_launcher import fake_server
from tests.serving.test_units import arms, configuration


@contextmanager
def real_log(folder: Any):
    home = Home(project=folder, root=folder / ".plait").create()
    log = EventLog(log_folder(home), "test")
    try:
        yield home, log
    finally:
        log.close()


def table(home: Home, name: str) -> list[dict[str, Any]]:
    parts = str(home.events / name / "*.parquet")
    with duckdb.connect() as db:
        return db.execute("SELECT * FROM read_parquet(?)", [parts]).to_arrow_table().to_pylist()


def test_exposures_and_requests_in_the_tables_are_what_was_answered_across_a_restart(tmp_path: Any) -> None:
    rng = np.random.default_rng(3)
    answered: dict[str, dict[str, str]] = {}
    counted = Counter()
    for _ in range(2):  # a server, and the one that follows it
        with real_log(tmp_path) as (home, log), make_world(snapshot=configuration("session"), log=log) as world:
            for _ in range(150):
                user, session = int(rng.integers(1, 30)), f"s{rng.integers(0, 40)}"
                answer = world.predict(
                    entities={"user_id": user}, session_id=session,
                    candidate_ids=[int(i) for i in rng.integers(1, 30, 5)],
                )  # fmt: skip
                body = answer.get_json()
                answered[body["request_id"]] = arms(answer)
                counted["used"] += len(body["experiments"])
            for name in ("ranker", "seen"):
                for arm in ("deepfm", "lightgbm", "false", "true"):
                    counted["logged"] += int(world.metric("plait_exposures_total", experiment=name, arm=arm))
            counted["repeated"] += int(world.metric("plait_exposures_deduped_total"))
            counted["dropped"] += int(world.metric("plait_exposures_dropped_total"))
    roll(home)
    assert {row["request_id"] for row in table(home, "impressions")} == set(answered)
    exposures = table(home, "exposures")
    assert counted["used"] == 600 == counted["logged"] + counted["repeated"] + counted["dropped"]
    assert len(exposures) == counted["logged"] and counted["dropped"] == 0
    for row in exposures:  # each names a request that was answered, and the arm it was answered with
        assert answered[row["request_id"]][row["experiment"]] == row["arm"]


def test_with_a_full_queue_what_was_dropped_is_counted_and_comes_with_the_next_use(tmp_path: Any) -> None:
    with real_log(tmp_path) as (home, log), make_world(snapshot=configuration(), log=log) as world:
        taking, refused = log.enqueue, Counter()

        def enqueue(kind: str, records: Any) -> bool:
            if full:
                refused[kind] += len(records)
                return False
            return taking(kind, records)

        log.enqueue = enqueue
        for full in (True, False, False):
            for user in range(1, 20):
                answer = world.predict(entities={"user_id": user}, candidate_ids=[10, 11])
                assert ("not_logged" in answer.get_json()["degraded"]) == full
        logged = sum(
            world.metric("plait_exposures_total", experiment=name, arm=arm)
            for name, of in (("ranker", ("deepfm", "lightgbm")), ("seen", ("false", "true")))
            for arm in of
        )
        repeated = world.metric("plait_exposures_deduped_total")
        dropped = world.metric("plait_exposures_dropped_total")
        assert (logged, repeated, dropped) == (38, 38, 38)
        assert refused == {"request": 19, "exposure": 38}
        assert world.metric("plait_log_dropped_total", kind="request") == 19
    roll(home)
    assert len(table(home, "exposures")) == 38
    assert len({row["request_id"] for row in table(home, "impressions")}) == 38


def test_what_the_disk_refuses_is_counted_as_lost_and_logged_at_the_next_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with real_log(tmp_path) as (home, log), make_world(snapshot=configuration(), log=log) as world:
        log.on_lost = world.parts.predictor.log_lost
        for broken in (False, True, False):
            with monkeypatch.context() as patch:
                if broken:
                    patch.setattr(os, "fsync", full)
                for user in range(1, 20) if not broken else range(20, 30):
                    assert world.predict(entities={"user_id": user}, candidate_ids=[10, 11]).status_code == 200
                log.flush()
        logged, repeated, dropped = exposure_counts(world.client.get("/metrics").text)
        lost = world.metric("plait_log_lost_total", kind="exposure")
        assert world.metric("plait_log_lost_total", kind="request") == 10
        assert (repeated, dropped, lost) == (0, 0, 20), "forgotten, so the third round logs all of the first again"
        for user in range(20, 30):
            world.predict(entities={"user_id": user}, candidate_ids=[10, 11])
        logged, repeated, dropped = exposure_counts(world.client.get("/metrics").text)
        assert logged + repeated + dropped == 2 * (19 + 10 + 19 + 10)
    roll(home)
    assert len(table(home, "exposures")) == logged - lost == 96
    assert {row["unit"] for row in table(home, "exposures")} == {str(user) for user in range(1, 30)}


def exposure_counts(exposition: str) -> tuple[int, int, int]:
    """(logged, repeated, dropped) of /metrics."""
    return tuple(
        int(sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", exposition, re.MULTILINE)))
        for name in ("plait_exposures_total", "plait_exposures_deduped_total", "plait_exposures_dropped_total")
    )  # type: ignore[return-value]


def ask(url: str, seed: int, answers: list[Any]) -> None:
    """60 requests over 15 users and 20 sessions, a new connection each, so that both workers get some."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        body = {
            "scene": "home",
            "entities": {"user_id": int(rng.integers(1, 16))},
            "session_id": f"s{rng.integers(0, 20)}",
            "candidate_ids": [1, 2, 3, 4],
        }
        answers.append(requests.post(f"{url}/v1/predict", json=body, timeout=30).json())


def test_two_workers_a_full_queue_and_a_restart_add_up(tmp_path: Path, find_port: Any) -> None:
    """Real processes: what clients were told, what /metrics says and what the tables hold are the same numbers."""
    home = Home(project=tmp_path, root=tmp_path / ".plait").create()
    answered: dict[str, dict[str, str]] = {}
    not_logged: set[str] = set()
    totals: Counter[str] = Counter()
    for run, environment in enumerate(({"MAX_QUEUE": "3", "SLOW_DISK_S": "0.02"}, {})):
        answers: list[Any] = []
        with fake_server(find_port(), workers=2, LOG_HOME=str(tmp_path), **environment) as (process, url):
            clients = [threading.Thread(target=ask, args=(url, 10 * run + i, answers)) for i in range(4)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            exposition = requests.get(f"{url}/metrics", timeout=30).text
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        assert len(answers) == 240
        for body in answers:
            answered[body["request_id"]] = {arm["experiment"]: arm["arm"] for arm in body["experiments"]}
            if "not_logged" in body["degraded"]:
                not_logged.add(body["request_id"])
        logged, repeated, dropped = exposure_counts(exposition)
        assert logged + repeated + dropped == sum(len(body["experiments"]) for body in answers) == 480
        (requests_dropped,) = re.findall(r'^plait_log_dropped_total{kind="request"} (\S+)$', exposition, re.M) or ["0"]
        totals += Counter(logged=logged, dropped=dropped, requests_dropped=int(float(requests_dropped)))
        assert (dropped > 0) == (run == 0) and logged > 0 and repeated > 0
    roll(home)
    exposures = table(home, "exposures")
    assert len(exposures) == totals["logged"]
    assert {row["request_id"] for row in table(home, "impressions")} == answered.keys() - not_logged
    assert len(not_logged) == totals["requests_dropped"] > 0
    for row in exposures:
        assert answered[row["request_id"]][row["experiment"]] == row["arm"]


def test_a_triggered_report_of_what_the_server_marked_has_the_whole_effect(tmp_path: Path) -> None:
    """From requests to report: a tenth of the users has seen some candidates, and only they can be affected.

    Whoever gets no seen movie clicks once more; everybody clicks once anyway. Over all users that is an effect of 0.1,
    among those for whom the arms differ it is 1.
    """
    with real_log(tmp_path) as (home, log), make_world(snapshot=configuration(), log=log) as world:
        read = world.reader.read

        def with_history(request: Any, candidates: Any, **rest: Any) -> Any:
            rows = read(request, candidates, **rest)
            seen = pa.array([[2, 3] if request["user_id"] % 10 == 0 else []], pa.list_(pa.int64()))
            return replace(rows, request=rows.request.set_column(1, "user_last_movies", seen))

        world.reader.read = with_history
        events = []
        for user in range(1000, 1400):
            answer = world.predict(entities={"user_id": user}, candidate_ids=[1, 2, 3, 4])
            request_id = answer.get_json()["request_id"]
            n_clicks = 1 + (user % 10 == 0 and arms(answer)["seen"] == "true")
            click = {"type": "click", "user_id": user, "request_id": request_id}
            events += [{**click, "event_id": f"{user}-{i}"} for i in range(n_clicks)]
        assert world.client.post("/v1/events", json={"events": events}).status_code == 202
    roll(home)
    clicks = parse_metrics(
        {"metrics": [{"name": "clicks", "type": "count", "event": "click", "role": "primary", "cuped": False}]}
    )
    effects = {}
    for triggered in (False, True):
        result = build_report(home, "seen", metrics=clicks, until=NOW + timedelta(days=1), triggered=triggered)
        effects[triggered] = result.metrics[0].comparisons[0].absolute
        assert sum(result.counts.units.values()) == (40 if triggered else 400)
        assert min(result.counts.units.values()) > (10 if triggered else 150)
    assert effects[True].estimate == 1.0
    assert effects[False].estimate == pytest.approx(0.1, abs=0.05)
