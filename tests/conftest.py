"""What tests of several folders share."""

import os
import shutil
import socket
import sys
import warnings
from pathlib import Path

# Before any test imports Feast, which turns on Prometheus' multiprocess mode for the whole process: counters of one
# test would then go on where another's stopped.
import prometheus_client  # noqa: F401
import pytest

ROOT = Path(__file__).parents[1]
PROJECT_FILES = ("feature_store.yaml", ".feastignore", "feature_repo", "experiments", "trainers/configs", "serving")


def copy_project(target: Path) -> Path:
    """A project of its own: what a user edits, without the data."""
    (target / ".plait").mkdir(parents=True, exist_ok=True)
    for name in PROJECT_FILES:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.py") if name != "feature_repo" else None
            shutil.copytree(source, target / name, ignore=skip or shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


@pytest.fixture(scope="session")
def make_project():
    """Copies this project's declarations into a folder, for tests that share one between them."""
    return copy_project


@pytest.fixture
def project(tmp_path):
    """A fresh project folder, a copy of this one's declarations."""
    return copy_project(tmp_path / "project")


@pytest.fixture(scope="session")
def find_port():
    """Finds a free loopback port."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def shared_data():
    """Real data sets that may not be redistributed: `shared/data` beside the repository, where somebody put them."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def spark():
    """One Spark for the whole run: engines that tests open join it, each with a session of its own."""
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java 17, and there is no java here")
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyspark.sql import SparkSession

        running = SparkSession.getActiveSession()
        settings = {
            "spark.driver.memory": "1g",
            "spark.driver.host": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.sql.shuffle.partitions": "2",
            # Compiling a stage takes longer than interpreting it, for as few rows as tests have.
            "spark.sql.codegen.wholeStage": "false",
            "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        }
        session = SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
        yield session
        if running is None:
            session.stop()
