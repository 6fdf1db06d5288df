"""What tests of several folders share."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
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
            # The same goes for Java's optimising compiler, which takes the cores that Spark plans its queries on.
            "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        }
        session = SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
        yield session
        if running is None:
            session.stop()


@pytest.fixture(scope="session")
def postgres(find_port):
    """A PostgreSQL server of this test run; a test that stops it starts it again."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("no postgres binary on PATH or in /usr/lib/postgresql: install PostgreSQL to test the stores on it")
    pytest.importorskip("psycopg", reason="psycopg is not installed; it comes with the extra `test`")
    server = PostgresServer(binaries, find_port())
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request, monkeypatch):
    """Runs a test on SQLite in the home, and again with PLAIT_DATABASE_URL naming a fresh PostgreSQL database."""
    monkeypatch.delenv("PLAIT_DATABASE_URL", raising=False)
    if request.param == "postgresql":
        monkeypatch.setenv("PLAIT_DATABASE_URL", request.getfixturevalue("postgres").new_database())
    return request.param


def find_postgres() -> Path | None:
    """The folder with initdb and postgres: PATH, else where Debian puts them."""
    found = shutil.which("postgres")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


class PostgresServer:
    """A throw-away cluster in a folder of its own. It refuses to run as root, so root runs it as user postgres."""

    def __init__(self, binaries: Path, port: int) -> None:
        self._binaries, self.port = binaries, port
        self._folder = Path(tempfile.mkdtemp(prefix="plait-postgres-", dir="/tmp"))
        self._as = {"user": "postgres", "group": "postgres", "extra_groups": ()} if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(self._folder, "postgres", "postgres")
        self._environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        self._process: subprocess.Popen[bytes] | None = None
        initdb = [str(binaries / "initdb"), "-D", "data", "-U", "plait", "-A", "trust", "-E", "UTF8", "--no-sync"]
        done = subprocess.run(
            initdb, cwd=self._folder, env=self._environment, capture_output=True, text=True, **self._as
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._process is not None:
            return
        settings = ("fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories=", "timezone=Asia/Kolkata")
        command = [str(self._binaries / "postgres"), "-D", "data", "-p", str(self.port)]
        for setting in settings:  # not UTC: a time that is not read as UTC then shows
            command += ["-c", setting]
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(
            command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, **self._as
        )
        log.close()
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it at once, breaking every connection."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=20)
            self._process = None

    def new_database(self) -> str:
        """The URL of a fresh, empty database."""
        name = f"t{uuid.uuid4().hex[:12]}"
        with self._connect() as db:
            db.execute(f"CREATE DATABASE {name}")
        return f"postgresql://plait@127.0.0.1:{self.port}/{name}"

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _connect(self):
        import psycopg

        return psycopg.connect(f"postgresql://plait@127.0.0.1:{self.port}/postgres", autocommit=True)

    def _answers(self) -> bool:
        import psycopg

        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True
