"""Real server processes, several workers each: changes reach all of them, and a database that goes stops none."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from plait.keys import KeyStore
from plait.settings import Home
from tests.serving.test_launcher import BODY, fake_server

SWAP_S = 2.0
DOCUMENT: dict[str, Any] = {
    "parameters": {
        "rank.model": {"type": "model", "default": "deepfm"},
        "recall.exclude_seen": {"type": "bool", "default": False},
        "recall.max_candidates": {"type": "int", "default": 500},
    },
    "layers": {"rank": {"unit": "user", "parameters": ["rank.*"]}},
    "experiments": {
        "trees": {
            "layer": "rank",
            "state": "running",
            "buckets": "all",
            "arms": {"on": {"weight": 100, "values": {"rank.model": "lightgbm"}}},
        }
    },
}


def with_note(text: str) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    document["experiments"]["trees"]["description"] = text
    return document


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


class Client:
    """Every request on a new connection, so that all workers are met."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.headers = url, {"X-API-Key": token}

    def __call__(self, method: str, path: str, **more: Any) -> requests.Response:
        headers = {**self.headers, **more.pop("headers", {})}
        return requests.request(method, self.url + path, headers=headers, timeout=20, **more)

    def served(self) -> tuple[int, int]:
        """(worker, configuration version) of whoever answers."""
        content = self("GET", "/console?format=json").json()
        return content["worker"], content["experiments"]["config_version"]

    def workers(self, n: int) -> set[int]:
        found: set[int] = set()
        deadline = time.monotonic() + 30
        while len(found) < n:
            found.add(self.served()[0])
            assert time.monotonic() < deadline, "not every worker answers"
        return found

    def swapped(self, workers: set[int], version: int) -> float:
        """Seconds until each of these workers serves the version."""
        started, waiting = time.monotonic(), set(workers)
        while waiting:
            worker, served = self.served()
            if served == version:
                waiting.discard(worker)
            assert time.monotonic() - started < 20, f"{waiting} never served version {version}"
        return time.monotonic() - started


def test_a_change_is_live_in_every_worker_and_a_revoked_key_dead_within_two_seconds(home, database, find_port):
    keys = KeyStore(home)
    _, token = keys.create("anna", ["admin", "predict"], author="root")
    with fake_server(find_port(), workers=3, ADMIN_HOME=str(home.project)) as (process, url):
        client = Client(url, token)
        workers = client.workers(3)
        assert client("PUT", "/v1/experiments", json=DOCUMENT, headers={"If-Match": '"0"'}).status_code == 200
        assert client.swapped(workers, 1) < SWAP_S
        assert client("POST", "/v1/predict", json=BODY).json()["model"]["name"] == "lightgbm"
        assert client("POST", "/v1/experiments/kill", json={"experiment": "trees"}).status_code == 200
        assert client.swapped(workers, 2) < SWAP_S
        assert client("POST", "/v1/predict", json=BODY).json()["model"]["name"] == "deepfm"
        assert client.workers(3) == workers, "nobody was restarted"

        keys.revoke("anna")
        time.sleep(SWAP_S)
        assert {client("POST", "/v1/predict", json=BODY).status_code for _ in range(20)} == {401}
        assert process.poll() is None
    keys.close()


def test_of_writers_in_different_processes_one_wins(home, database, find_port):
    _, token = KeyStore(home).create("anna", ["admin"], author="root")
    with fake_server(find_port(), workers=3, ADMIN_HOME=str(home.project)) as (_, url):
        client = Client(url, token)
        client.workers(3)
        tag = client("PUT", "/v1/experiments", json=DOCUMENT, headers={"If-Match": '"0"'}).headers["ETag"]
        barrier, answers = threading.Barrier(8), []

        def write(i: int) -> None:
            barrier.wait(timeout=20)
            answer = client("PUT", "/v1/experiments", json=with_note(f"w{i}"), headers={"If-Match": tag})
            answers.append((answer.status_code, i))

        threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert sorted(status for status, _ in answers) == [200] + [412] * 7
        winner = next(i for status, i in answers if status == 200)
        live = client("GET", "/v1/experiments").json()
        assert live["version"] == 2 and live["document"] == with_note(f"w{winner}")


@pytest.mark.slow
@pytest.mark.postgres
def test_a_postgres_that_stops_stops_no_prediction_nor_a_restart(home, postgres, monkeypatch, find_port):
    monkeypatch.setenv("PLAIT_DATABASE_URL", postgres.new_database())
    _, token = KeyStore(home).create("anna", ["admin", "predict"], author="root")
    lightgbm, environment = {"name": "lightgbm", "version": "1"}, {"ADMIN_HOME": str(home.project)}
    try:
        with fake_server(find_port(), workers=2, **environment) as (_, url):
            client = Client(url, token)
            assert client("PUT", "/v1/experiments", json=DOCUMENT, headers={"If-Match": '"0"'}).status_code == 200
            client.swapped(client.workers(2), 1)
            postgres.stop()
            time.sleep(1.5)  # every worker has polled in vain
            for _ in range(20):
                answer = client("POST", "/v1/predict", json=BODY)
                assert (answer.status_code, answer.headers["X-Config-Version"]) == (200, "1")
                assert answer.json()["model"] == lightgbm
            for method, path in (("PUT", "/v1/experiments"), ("GET", "/v1/experiments/versions")):
                gone = client(method, path, json=with_note("x"), headers={"If-Match": "*"})
                assert gone.status_code == 503 and "does not answer" in gone.json()["detail"]
        with fake_server(find_port(), workers=2, **environment) as (_, url):
            client = Client(url, token)
            workers = client.workers(2)
            assert client("POST", "/v1/predict", json=BODY).json()["model"] == lightgbm, "from disk, keys too"
            page = client("GET", "/console/experiments?format=json").json()
            assert page["serving"]["source"] == "disk" and "does not answer" in page["trouble"]
            postgres.start()
            put = client("PUT", "/v1/experiments", json=with_note("y"), headers={"If-Match": "*"})
            assert put.status_code == 200, put.text
            assert client.swapped(workers, 2) < SWAP_S
    finally:
        postgres.start()
