"""The shared online store: packed rows in Redis, one string a (view, entity).

All views of a read are one MGET. A write is a Lua script over many keys that compares the timestamps in the stored and
the new row and sets or leaves each, so that the order in which rows win is that of SQLite and a row is never seen half.
One Redis (or a primary with replicas behind one address); not Redis Cluster, whose MGET cannot span slots.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import quote, urlsplit

import numpy as np
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from pydantic import Field, StrictStr

from plait.errors import SettingsError, StoreError
from plait.settings import find_home
from plait.stores.keys import Key, StoredView
from plait.stores.online_base import PackedOnlineStore

if TYPE_CHECKING:
    from redis import Redis

ROWS_PER_SCRIPT = 1_000  # Redis serves nobody else while a script runs: about 2 ms
SCRIPTS_IN_FLIGHT = 8
KEYS_PER_READ = 10_000
POLL_S = 100e-6
LATE_ANSWERS = 8
# KEYS: where views and schemas are kept, then the rows' keys. ARGV: the view and how it is keyed, the schema's
# fingerprint and JSON, the time to live in seconds ('0': none), then the rows. Bytes 9 to 24 of a row are its event and
# created timestamps; Lua's numbers are doubles, so each is compared as a signed high and an unsigned low half.
_PUT = """
local function older(a, at, b, bt)
  for place = 0, 8, 8 do
    local high_a, high_b = struct.unpack('<i4', a, at + place + 4), struct.unpack('<i4', b, bt + place + 4)
    if high_a ~= high_b then return high_a < high_b end
    local low_a, low_b = struct.unpack('<I4', a, at + place), struct.unpack('<I4', b, bt + place)
    if low_a ~= low_b then return low_a < low_b end
  end
  return false
end
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
local keyed = redis.call('HGET', KEYS[1], ARGV[1])
if keyed ~= ARGV[2] then return keyed end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
local ttl = ARGV[5]
for i = 3, #KEYS do
  local row = ARGV[i + 3]
  local stored = redis.call('GETRANGE', KEYS[i], 8, 23)
  if #stored ~= 16 or not older(row, 9, stored, 1) then
    if ttl == '0' then redis.call('SET', KEYS[i], row) else redis.call('SET', KEYS[i], row, 'EX', ttl) end
  end
end
return false
"""


class PackedRedisOnlineStoreConfig(FeastConfigBaseModel):
    """`online_store:` of feature_store.yaml."""

    type: Literal["plait.stores.redis.PackedRedisOnlineStore"] = "plait.stores.redis.PackedRedisOnlineStore"
    url: StrictStr = "redis://localhost:6379/0"
    """redis://, rediss:// (TLS) or unix://; user and password in it, best from an environment variable."""
    connect_timeout_s: float = Field(default=1.0, gt=0)
    timeout_s: float = Field(default=5.0, gt=0)
    """How long one answer may take."""
    key_ttl_seconds: int = Field(default=0, ge=0)
    """Forget rows not written for this long; 0 keeps them. A view's own ttl is enforced on read without this."""


class PackedRedisOnlineStore(PackedOnlineStore):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._clients: dict[str, tuple[Redis, str]] = {}
        self._local = threading.local()

    def fetch(
        self, config: RepoConfig, wanted: Sequence[tuple[StoredView, list[Key | None]]]
    ) -> list[list[bytes | None]]:
        if len(wanted) == 1 and len(wanted[0][1]) == 1:  # a single read costs by the step
            (view, (key,)) = wanted[0]
            if key is None:
                return [[None]]
            with self._errors(config):
                return [self._mget(self._client(config)[0], [_namer(view)(key)])]
        places: dict[bytes, None] = {}
        asked: list[list[bytes | None]] = []
        for view, keys in wanted:
            name = _namer(view)
            names = [None if key is None else name(key) for key in keys]
            asked.append(names)
            places.update(dict.fromkeys(name for name in names if name is not None))
        unique = list(places)
        found: list[bytes | None] = []
        with self._errors(config):
            client, _ = self._client(config)
            for start in range(0, len(unique), KEYS_PER_READ):
                found += self._mget(client, unique[start : start + KEYS_PER_READ])
        rows = dict(zip(unique, found, strict=True))
        return [[None if name is None else rows[name] for name in names] for names in asked]

    def put(
        self,
        config: RepoConfig,
        view: StoredView,
        keys: Sequence[Key],
        event_us: np.ndarray,
        created_us: np.ndarray,
        rows: Sequence[bytes],
    ) -> None:
        name = _namer(view)
        about = (
            view.table,
            view.key_signature,
            view.schema.fingerprint,
            view.schema.text,
            config.online_store.key_ttl_seconds,
        )
        with self._errors(config):
            client, script = self._client(config)
            for first in range(0, len(rows), ROWS_PER_SCRIPT * SCRIPTS_IN_FLIGHT):
                commands = []
                for start in range(first, min(first + ROWS_PER_SCRIPT * SCRIPTS_IN_FLIGHT, len(rows)), ROWS_PER_SCRIPT):
                    part = slice(start, start + ROWS_PER_SCRIPT)
                    names = [_meta("views"), _meta("schemas"), *map(name, keys[part])]
                    commands.append((script, len(names), *names, *about, *rows[part]))
                for keyed in _run(client, commands):
                    if keyed is not None:
                        raise StoreError(
                            f"view {view.name} is stored by join keys {keyed.decode()} and came with "
                            f"{view.key_signature}; run `feast apply`, then materialize it again"
                        )

    def _mget(self, client: Redis, names: Sequence[bytes]) -> list[bytes | None]:
        """MGET over this thread's own connection, in half the time of the client's general way."""
        owner = (os.getpid(), client)  # a forked child, or another Redis, needs a connection of its own
        if getattr(self._local, "owner", None) != owner:
            self._local.owner, self._local.connection = owner, client.connection_pool.make_connection()
            self._local.n_late = 0
        connection = self._local.connection
        command = [b"*%d\r\n$4\r\nMGET\r\n" % (len(names) + 1)]
        command += [b"$%d\r\n%b\r\n" % (len(name), name) for name in names]
        packed = b"".join(command)
        for attempt in (1, 2):
            try:
                connection.send_packed_command([packed])
                if len(names) == 1:
                    self._poll(connection)
                return cast(list[bytes | None], connection.read_response())
            except BaseException as error:
                from redis.exceptions import ConnectionError as Gone

                connection.disconnect()  # half an answer may be on its way: nothing else may read it
                # Redis was restarted, or closed a connection that idled: a read may be asked again, once.
                if attempt == 2 or not isinstance(error, Gone):
                    raise
        raise AssertionError("the loop returns or raises")

    def _poll(self, connection: Any) -> None:
        """Look for the answer for a moment before sleeping on it: to be woken takes longer than a near Redis needs.

        A Redis that was late some times in a row (far away, or on the only core) is polled once in a hundred reads.
        """
        local = self._local
        if local.n_late < LATE_ANSWERS or local.n_late % 100 == 0:
            until = time.perf_counter() + POLL_S
            while time.perf_counter() < until:
                if connection.can_read(timeout=0):
                    local.n_late = 0
                    return
        local.n_late += 1

    def load_schemas(self, config: RepoConfig) -> dict[bytes, str]:
        with self._errors(config):
            stored = cast(dict[bytes, bytes], self._client(config)[0].hgetall(_meta("schemas")))
        return {fingerprint: text.decode() for fingerprint, text in stored.items()}

    def ensure(self, config: RepoConfig, views: Sequence[StoredView]) -> None:
        with self._errors(config):
            client, _ = self._client(config)
            known = cast(dict[bytes, bytes], client.hgetall(_meta("views")))
            for view in views:
                signature = known.get(view.table.encode())
                if signature is not None and signature.decode() != view.key_signature:
                    self._drop(client, view.table)
                client.hset(_meta("views"), view.table, view.key_signature)

    def drop(self, config: RepoConfig, tables: Sequence[str]) -> None:
        with self._errors(config):
            for table in tables:
                self._drop(self._client(config)[0], table)

    def finished_batches(self, config: RepoConfig, view: StoredView) -> set[bytes]:
        with self._errors(config):
            return cast(set[bytes], self._client(config)[0].smembers(_meta(f"batches:{view.table}")))

    def note_batch(self, config: RepoConfig, view: StoredView, digest: bytes) -> None:
        name, ttl = _meta(f"batches:{view.table}"), config.online_store.key_ttl_seconds
        with self._errors(config):
            client, _ = self._client(config)
            client.sadd(name, digest)  # type: ignore[arg-type]
            if ttl and cast(int, client.ttl(name)) < 0:  # from the first batch on: no note may outlive its rows
                client.expire(name, ttl)

    def forget_batches(self, config: RepoConfig, view: StoredView) -> None:
        with self._errors(config):
            self._client(config)[0].delete(_meta(f"batches:{view.table}"))

    def home(self, config: RepoConfig) -> Path | None:
        if config.repo_path is None:
            return None
        with suppress(SettingsError):  # a store without a project, as in a test, runs on the wall's clock
            return find_home(Path(config.repo_path)).root
        return None

    def _drop(self, client: Redis, table: str) -> None:
        batch: list[bytes] = []
        for name in client.scan_iter(match=_prefix(table) + b"*", count=5_000):
            batch.append(name)
            if len(batch) == 5_000:
                client.unlink(*batch)
                batch.clear()
        if batch:
            client.unlink(*batch)
        client.delete(_meta(f"batches:{table}"))
        client.hdel(_meta("views"), table)

    def _client(self, config: RepoConfig) -> tuple[Redis, str]:
        """The client (its pool is safe over threads and forks) and the digest by which Redis knows the script."""
        url = config.online_store.url
        held = self._clients.get(url)
        if held is not None:
            return held
        with self._lock:
            if url not in self._clients:
                self._clients[url] = _connect(config.online_store)
        return self._clients[url]

    @contextmanager
    def _errors(self, config: RepoConfig) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            from redis.exceptions import RedisError

            if not isinstance(error, RedisError):
                raise
            address = urlsplit(config.online_store.url)
            place = address.path if address.scheme == "unix" else f"{address.hostname}:{address.port or 6379}"
            raise StoreError(
                f"online store Redis at {place}: {error}; every row is stored whole or not at all: "
                "once Redis answers again, repeat the call"
            ) from error


def _connect(settings: PackedRedisOnlineStoreConfig) -> tuple[Redis, str]:
    try:
        from redis import Redis
        from redis.backoff import ExponentialBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise SettingsError("the Redis online store needs the redis package: pip install 'plait[redis]'") from error
    try:
        client = Redis.from_url(
            settings.url,
            socket_timeout=settings.timeout_s,
            socket_connect_timeout=settings.connect_timeout_s,
            retry=Retry(ExponentialBackoff(cap=0.1, base=0.01), retries=2),
        )
    except ValueError as error:
        raise SettingsError(f"online_store.url is not a Redis address: {error}") from error
    return client, client.register_script(_PUT).sha


def _run(client: Redis, commands: Sequence[tuple[Any, ...]]) -> list[bytes | None]:
    """Answers to EVALSHA commands, all on their way at once; a Redis that has forgotten the script is told it again."""
    from redis.exceptions import NoScriptError

    try:
        if len(commands) == 1:  # a push: a pipeline would cost as much again
            return [cast(bytes | None, client.evalsha(*commands[0]))]
        pipe = client.pipeline(transaction=False)
        for command in commands:
            pipe.evalsha(*command)
        return pipe.execute()
    except NoScriptError:
        client.script_load(_PUT)
        return _run(client, commands)


@lru_cache(maxsize=10_000)
def _prefix(table: str) -> bytes:
    """Quoted, so that no view's name can hold a colon or a wildcard of Redis's patterns."""
    return b"plait:%b:" % quote(table, safe="").encode()


def _namer(view: StoredView) -> Callable[[Any], bytes]:
    """Makes the Redis key of a row from the view's key."""
    prefix = _prefix(view.table)
    if view.integer_key:
        return lambda key: b"%b%d" % (prefix, key)
    return lambda key: prefix + key


def _meta(what: str) -> str:
    """What the store remembers beside rows; no row's key begins like this."""
    return f"plait-meta:{what}"
