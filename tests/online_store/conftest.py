"""Both online stores behind one fixture, and small feature views to fill them with."""

import shutil
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from feast import Entity, FeatureView, Field, FileSource
from feast.infra.online_stores.helpers import get_online_store_from_config
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from feast.types import Float64, Int64
from feast.value_type import ValueType

T0 = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass
class Backend:
    """A store of one kind, and the configuration of a project of its own in it."""

    kind: str
    config: RepoConfig
    store: Any

    def other_process(self) -> Any:
        """A second store object over the same data, as another process would have."""
        return get_online_store_from_config(self.config.online_store)


class RedisServer:
    """A real Redis on a free loopback port; kill and start model a machine that goes away and comes back."""

    def __init__(self, folder: Path, port: int, *, durable: bool = False) -> None:
        self.folder, self.port, self.durable = folder, port, durable
        self.url = f"redis://127.0.0.1:{port}/0"
        self.start()

    def start(self) -> None:
        durable = ["--appendonly", "yes", "--appendfsync", "always"] if self.durable else ["--appendonly", "no"]
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *durable],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        import redis

        for _ in range(200):
            try:
                with redis.Redis(port=self.port) as client:
                    client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.02)
        raise RuntimeError("redis-server did not come up within 4 s")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _needs_redis() -> None:
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server binary: install Redis to test the Redis online store")
    pytest.importorskip("redis")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory, find_port):
    _needs_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"), find_port())
    yield server
    server.kill()


@pytest.fixture
def durable_redis(tmp_path, find_port):
    """A Redis that writes every command to disk before it answers."""
    _needs_redis()
    server = RedisServer(tmp_path, find_port(), durable=True)
    yield server
    server.kill()


def repo_config(folder: Path, online_store: dict[str, Any], **more: Any) -> RepoConfig:
    settings: dict[str, Any] = {
        "project": f"p{uuid.uuid4().hex[:8]}",
        "provider": "plait.stores.provider.ColumnarProvider",
        "registry": {"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
        "offline_store": {"type": "plait.stores.offline.AsofDuckDBOfflineStore"},
        "batch_engine": {"type": "plait.stores.engine.ColumnarComputeEngine"},
        "entity_key_serialization_version": 3,
    }
    config = RepoConfig(**{**settings, "online_store": online_store, **more})
    config.repo_path = folder
    return config


def online_settings(kind: str, folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    if kind == "redis":
        url = request.getfixturevalue("redis_server").url
        return {"type": "plait.stores.redis.PackedRedisOnlineStore", "url": url, "timeout_s": 20}
    return {"type": "plait.stores.sqlite.PackedSQLiteOnlineStore", "path": str(folder / "online.db")}


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def backend(request, tmp_path):
    """Each of Plait's online stores in turn, empty."""
    config = repo_config(tmp_path, online_settings(request.param, tmp_path, request))
    return Backend(request.param, config, get_online_store_from_config(config.online_store))


def make_view(
    fields: dict[str, Any] | None = None,
    *,
    name: str = "stats",
    keys: dict[str, Any] | None = None,
    ttl: timedelta | None = None,
    path: str = "unused.parquet",
) -> FeatureView:
    """A feature view; by default of one float feature `x`, keyed by the integer user_id."""
    keys = keys or {"user_id": Int64}
    types = {key: ValueType[dtype.to_value_type().name] for key, dtype in keys.items()}
    return FeatureView(
        name=name,
        entities=[Entity(name=key, join_keys=[key], value_type=types[key]) for key in keys],
        ttl=ttl,
        schema=[Field(name=n, dtype=t) for n, t in {**keys, **(fields or {"x": Float64})}.items()],
        source=FileSource(path=path, timestamp_field="event_timestamp", created_timestamp_column="created"),
    )


def make_rows(columns: dict[str, Any], *, at: Any = T0, created: Any = None) -> pa.Table:
    """Rows to store; `at` and `created` are one moment for all or one each."""
    n_rows = len(next(iter(columns.values())))
    moment = pa.timestamp("us", tz="UTC")
    table = pa.table(columns)
    for name, value in (("event_timestamp", at), ("created", created)):
        moments = value if isinstance(value, list) else [value] * n_rows
        table = table.append_column(name, pa.array(moments, moment))
    return table


def entity_key(**values: int | str) -> EntityKey:
    """Feast's key of an entity, by its join keys."""
    protos = [Value(string_val=v) if isinstance(v, str) else Value(int64_val=v) for v in values.values()]
    return EntityKey(join_keys=list(values), entity_values=protos)


@pytest.fixture(scope="session")
def stores():
    """What test modules need of this file: tests do not import one another."""
    return type(
        "Stores",
        (),
        {
            "view": staticmethod(make_view),
            "rows": staticmethod(make_rows),
            "config": staticmethod(repo_config),
            "settings": staticmethod(online_settings),
        },
    )
