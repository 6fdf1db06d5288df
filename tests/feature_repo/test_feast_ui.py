"""`feast ui` shows the project from its root."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

pytestmark = pytest.mark.slow
FEAST = str(Path(sys.executable).with_name("feast"))


def test_feast_ui_serves_the_registered_views(project, find_port):
    subprocess.run([FEAST, "apply"], cwd=project, check=True, capture_output=True)
    port = find_port()
    server = subprocess.Popen(
        [FEAST, "ui", "--host", "127.0.0.1", "--port", str(port)],
        cwd=project,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    try:
        page = _get(f"http://127.0.0.1:{port}/", server)
        assert "<html" in page.text
        views = _get(f"http://127.0.0.1:{port}/api/v1/feature_views?project=plait", server).json()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=20)
    assert "user_stats" in str(views)


def _get(url, server, *, patience_s=120):
    deadline = time.monotonic() + patience_s
    while True:
        assert server.poll() is None, "feast ui stopped"
        try:
            answer = requests.get(url, timeout=10)
            answer.raise_for_status()
            return answer
        except requests.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
