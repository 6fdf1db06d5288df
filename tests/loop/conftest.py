"""One small run of the demo, shared by the tests of this folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run_plait(project, *arguments, timeout=600):
    return subprocess.run(
        [str(BIN / "plait"), *arguments], cwd=project, capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def demo(tmp_path_factory, make_project, find_port):
    project = make_project(tmp_path_factory.mktemp("demo") / "project")
    port = find_port()
    run = run_plait(
        project, "demo", "--data", "synthetic", "--data-option=--users=300", "--data-option=--items=80",
        "--data-option=--requests=3000", "--users", "60", "--models", "deepfm,lightgbm,xgboost,logistic",
        "--port", str(port),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return project, run


@pytest.fixture(scope="session")
def plait():
    """Runs a plait command in a project."""
    return run_plait
