"""Starting and stopping: clear refusals, a drain that loses nothing, metrics over processes, and no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from plait.errors import SettingsError
from plait.settings import Home
from serving.launcher import check_ready_to_serve, claim_port

ROOT = Path(__file__).parents[2]
BODY = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1, 2, 3]}


@contextmanager
def fake_server(
    port: int, workers: int, slow_s: float = 0.0, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, str(Path(__file__).with_name("fake_server.py")), str(port), str(workers)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "SLOW_S": str(slow_s), **environment},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if requests.get(f"{url}/healthz", timeout=5).status_code == 200:
                    break
            except requests.ConnectionError:
                assert process.poll() is None and time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.1)
        yield process, url
    finally:
        with suppress(ProcessLookupError):  # the workers too, which outlive a killed parent
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_taken_port_is_refused_before_anything_is_loaded(find_port: Any) -> None:
    port = find_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(SettingsError, match=f"port {port}: another process.*--port"):
            claim_port("127.0.0.1", port)


def test_port_0_is_any_free_port() -> None:
    assert claim_port("127.0.0.1", 0) > 0


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on 203\.0\.113\.1"):
        claim_port("203.0.113.1", 0)


def test_serving_without_a_feature_store_or_a_model_names_the_command_to_run(project: Path) -> None:
    import sqlite3

    home = Home(project=project, root=project / ".plait").create()
    with pytest.raises(SettingsError, match="feast apply"):
        check_ready_to_serve(home)
    with sqlite3.connect(home.root / "registry.db") as db:
        db.execute("CREATE TABLE feature_services (name TEXT)")
        db.execute("INSERT INTO feature_services VALUES ('click_deepfm')")
    db.close()
    with pytest.raises(SettingsError, match="plait train"):
        check_ready_to_serve(home)


def test_sigterm_answers_what_is_in_flight_and_ends_with_0(find_port: Any) -> None:
    statuses: list[int] = []
    with fake_server(find_port(), workers=1, slow_s=0.15) as (process, url):
        clients = [
            threading.Thread(target=lambda: statuses.append(requests.post(f"{url}/v1/predict", json=BODY).status_code))
            for _ in range(4)
        ]
        for client in clients:
            client.start()
        time.sleep(0.08)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join()
        assert process.wait(timeout=20) == 0
    assert statuses == [200] * 4


def test_any_worker_answers_metrics_for_all_of_them(find_port: Any) -> None:
    with fake_server(find_port(), workers=2) as (_, url):
        for _ in range(40):  # a new connection each, so that both workers get some
            assert requests.post(f"{url}/v1/predict", json=BODY).status_code == 200
        lines = requests.get(f"{url}/metrics").text.splitlines()
        total = sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("plait_requests_total{") and '"/v1/predict"' in line
        )
        assert total == 40
        assert any(line.startswith("plait_model_loaded{") and line.endswith(" 2.0") for line in lines), "one a worker"


def test_the_serving_process_does_not_load_torch() -> None:
    code = (
        "from serving.lean import go_lean; go_lean()\n"
        "import sys, feast, serving.build\n"
        "from feast import FeatureStore\n"
        "assert sys.modules['torch'] is None\n"
        "loaded = [name for name in sys.modules if name.startswith(('torch.', 'trainers', 'lightgbm', 'sklearn'))]\n"
        "assert not loaded, loaded\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
