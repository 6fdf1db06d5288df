"""What tests of several folders share."""

import shutil
import socket
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
