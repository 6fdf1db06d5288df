"""What the online store benchmarks share: one project on stock Feast or on Plait's plug-ins, over SQLite or Redis."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CASES = [(kind, impl) for kind in ("sqlite", "redis") for impl in ("stock", "plait")]


@contextmanager
def redis_server(folder: Path) -> Iterator[int | None]:
    """A real Redis on a free loopback port, without persistence; None where no redis-server is installed."""
    if not shutil.which("redis-server"):
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


def open_store(kind: str, impl: str, folder: Path, port: int | None) -> Any:
    """A FeatureStore of its own folder: everything stock, or Plait's online store, offline store and engine."""
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    online: dict[str, dict[str, Any]] = {
        "sqlite-stock": {"type": "sqlite", "path": str(folder / "online.db")},
        "sqlite-plait": {
            "type": "plait.stores.sqlite.PackedSQLiteOnlineStore",
            "path": str(folder / "online.db"),
        },
        "redis-stock": {"type": "redis", "connection_string": f"localhost:{port}"},
        "redis-plait": {
            "type": "plait.stores.redis.PackedRedisOnlineStore",
            "url": f"redis://localhost:{port}/0",
        },
    }
    plait = {
        "offline_store": {"type": "plait.stores.offline.AsofDuckDBOfflineStore"},
        "batch_engine": {"type": "plait.stores.engine.ColumnarComputeEngine"},
    }
    config = RepoConfig(
        project=f"bench_{impl}",
        provider="plait.stores.provider.ColumnarProvider" if impl == "plait" else "local",
        registry={"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db", "cache_ttl_seconds": 3600},
        online_store=online[f"{kind}-{impl}"],
        entity_key_serialization_version=3,
        **(plait if impl == "plait" else {"offline_store": {"type": "duckdb"}}),
    )
    config.repo_path = folder
    return FeatureStore(config=config)


def without_torch() -> None:
    """Feast imports torch where it is installed, which only blurs the memory of both sides."""
    sys.modules["torch"] = None  # type: ignore[assignment]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def quiet() -> Iterator[None]:
    """Feast prints and draws bars; a benchmark's output is its table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run_cases(script: str, arguments: list[str], cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Run `script --case KIND IMPL …` for each case, one after the other, each in a process of its own."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="plait-bench-") as name, redis_server(Path(name)) as port:
        for kind, impl in cases:
            if kind == "redis" and port is None:
                print("redis-server is not installed: its cases are left out")
                break
            folder = Path(name) / f"{kind}-{impl}"
            folder.mkdir()
            command = [sys.executable, "-W", "ignore", script, "--case", kind, impl, str(folder), str(port), *arguments]
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, check=False
            )
            if done.returncode:
                raise SystemExit(f"{kind} {impl} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            results[kind, impl] = json.loads(done.stdout.splitlines()[-1])
    return results
