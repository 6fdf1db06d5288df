"""The embedded online store: packed rows in one SQLite file.

One table a view, one row an entity: the key, the two timestamps that decide which row wins, and the packed row. The
file is in WAL mode: any number of processes read while one writes, and a process killed in a write leaves nothing of
it. Every thread has a connection of its own, and a forked child opens new ones.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from pydantic import StrictStr

from plait.errors import StoreError
from plait.stores.keys import Key, StoredView
from plait.stores.online_base import PackedOnlineStore

BULK_KEYS = 8_192  # keys in one statement; SQLite allows 32,766 variables
_TABLES = (
    "plait_schemas (fingerprint BLOB PRIMARY KEY, features TEXT)",
    "plait_views (name TEXT PRIMARY KEY, keys TEXT)",
    "plait_batches (view TEXT, digest BLOB, PRIMARY KEY (view, digest))",
)
_ORPHANS: list[Connection] = []  # connections inherited over a fork: neither used nor closed, as SQLite demands


class PackedSQLiteOnlineStoreConfig(FeastConfigBaseModel):
    """`online_store:` of feature_store.yaml."""

    type: Literal["plait.stores.sqlite.PackedSQLiteOnlineStore"] = "plait.stores.sqlite.PackedSQLiteOnlineStore"
    path: StrictStr = ".plait/online.db"
    """The file; relative to the project, `.plait/…` in the home."""
    timeout_s: float = 30.0
    """How long a writer waits for another."""
    synchronous: Literal["normal", "full"] = "normal"
    """full: every write survives a power cut. normal: the last may be lost then, never torn; a crash loses none."""
    mmap_mb: int = 1024
    """How much of the file is mapped into memory, shared by all processes."""


class Connection:
    """A SQLite connection of one thread of one process."""

    def __init__(self, path: Path, config: PackedSQLiteOnlineStoreConfig, *, create: bool) -> None:
        self.pid = os.getpid()
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        mode = "rwc" if create else "rw"
        # autocommit, with explicit transactions; closed by the garbage collector of whatever thread
        self.db = sqlite3.connect(
            f"{path.as_uri()}?mode={mode}",
            uri=True,
            timeout=config.timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
        )
        self.db.execute(f"PRAGMA synchronous = {config.synchronous}")
        self.db.execute(f"PRAGMA mmap_size = {config.mmap_mb << 20}")
        if create and self.db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            self.db.execute("PRAGMA journal_mode = wal")
        if create:
            for table in _TABLES:
                self.db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        self.inode = _inode(path)

    def __del__(self, _getpid: Callable[[], int] = os.getpid) -> None:  # at exit the module's own names are gone
        if getattr(self, "db", None) is not None and self.pid == _getpid():
            self.db.close()


class PackedSQLiteOnlineStore(PackedOnlineStore):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()

    def fetch(
        self, config: RepoConfig, wanted: Sequence[tuple[StoredView, list[Key | None]]]
    ) -> list[list[bytes | None]]:
        with self._errors(config):
            db = self._connection(config).db
            if len(wanted) == 1 and len(wanted[0][1]) <= BULK_KEYS:
                return [_select(db, *wanted[0])]
            db.execute("BEGIN")  # one snapshot for all statements
            try:
                return [_select(db, view, keys) for view, keys in wanted]
            finally:
                db.execute("COMMIT")

    def put(
        self,
        config: RepoConfig,
        view: StoredView,
        keys: Sequence[Key],
        event_us: np.ndarray,
        created_us: np.ndarray,
        rows: Sequence[bytes],
    ) -> None:
        table = _quoted(view.table)
        upsert = (
            f"INSERT INTO {table} VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET event_us = excluded.event_us, created_us = excluded.created_us, row = excluded.row "
            f"WHERE (excluded.event_us, excluded.created_us) >= ({table}.event_us, {table}.created_us)"
        )
        with self._transaction(config) as db:
            _create(db, view)
            db.execute("INSERT OR IGNORE INTO plait_schemas VALUES (?, ?)", (view.schema.fingerprint, view.schema.text))
            db.executemany(upsert, zip(keys, event_us.tolist(), created_us.tolist(), rows, strict=True))

    def load_schemas(self, config: RepoConfig) -> dict[bytes, str]:
        with self._errors(config):
            return dict(self._connection(config).db.execute("SELECT fingerprint, features FROM plait_schemas"))

    def ensure(self, config: RepoConfig, views: Sequence[StoredView]) -> None:
        with self._transaction(config) as db:
            known = dict(db.execute("SELECT name, keys FROM plait_views"))
            for view in views:
                if known.get(view.table, view.key_signature) != view.key_signature:
                    _drop(db, view.table)
                _create(db, view)

    def drop(self, config: RepoConfig, tables: Sequence[str]) -> None:
        if not tables:
            return
        with self._transaction(config) as db:
            for table in tables:
                _drop(db, table)

    def finished_batches(self, config: RepoConfig, view: StoredView) -> set[bytes]:
        with self._transaction(config) as db:
            noted = db.execute("SELECT digest FROM plait_batches WHERE view = ?", (view.table,))
            return {digest for (digest,) in noted}

    def note_batch(self, config: RepoConfig, view: StoredView, digest: bytes) -> None:
        with self._transaction(config) as db:
            db.execute("INSERT OR IGNORE INTO plait_batches VALUES (?, ?)", (view.table, digest))

    def forget_batches(self, config: RepoConfig, view: StoredView) -> None:
        with self._transaction(config) as db:
            db.execute("DELETE FROM plait_batches WHERE view = ?", (view.table,))

    def home(self, config: RepoConfig) -> Path:
        return self.path(config).parent

    def path(self, config: RepoConfig) -> Path:
        """The database file, absolute."""
        return _resolve(config.online_store.path, str(config.repo_path or ""))

    @contextmanager
    def _transaction(self, config: RepoConfig) -> Iterator[sqlite3.Connection]:
        """All or nothing, one writer at a time."""
        with self._errors(config):
            db = self._connection(config, create=True).db
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _connection(self, config: RepoConfig, *, create: bool = False) -> Connection:
        path = self.path(config)
        held: Connection | None = getattr(self._local, "connection", None)
        if held is not None:
            if held.pid != os.getpid():
                _ORPHANS.append(held)
            elif held.inode == _inode(path) is not None:
                return held
            self._local.connection = None
        if not create and not path.exists():
            raise StoreError(f"there is no online store at {path}; run `feast apply`, then `feast materialize`")
        self._local.connection = Connection(path, config.online_store, create=create)
        return self._local.connection

    @contextmanager
    def _errors(self, config: RepoConfig) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "run `feast apply`" if "no such table" in str(error) else "nothing of this call was stored"
            raise StoreError(f"online store {self.path(config)}: {error}; {hint}") from error


@lru_cache
def _resolve(path: str, repo_path: str) -> Path:
    plain, home = Path(path), os.environ.get("PLAIT_HOME")
    if plain.is_absolute():
        return plain
    project = Path(repo_path).absolute()
    if home and plain.parts[0] == ".plait":
        return project / home / Path(*plain.parts[1:])
    return project / plain


def _inode(path: Path) -> tuple[int, int] | None:
    """Tells whether a path still is the file that was opened: another process may have put a new one there."""
    try:
        stat = os.stat(path)  # noqa: PTH116, in every read: Path.stat costs three times as much
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _create(db: sqlite3.Connection, view: StoredView) -> None:
    key = "INTEGER" if view.integer_key else "BLOB"
    tail = "" if view.integer_key else " WITHOUT ROWID"
    db.execute(
        f"CREATE TABLE IF NOT EXISTS {_quoted(view.table)} (key {key} PRIMARY KEY NOT NULL, "
        f"event_us INTEGER NOT NULL, created_us INTEGER NOT NULL, row BLOB NOT NULL){tail}"
    )
    db.execute("INSERT OR IGNORE INTO plait_views VALUES (?, ?)", (view.table, view.key_signature))
    ((keys,),) = db.execute("SELECT keys FROM plait_views WHERE name = ?", (view.table,))
    if keys != view.key_signature:
        raise StoreError(
            f"view {view.name} is stored by join keys {keys} and came with {view.key_signature}; run `feast apply`, "
            "then materialize it again"
        )


def _drop(db: sqlite3.Connection, table: str) -> None:
    db.execute(f"DROP TABLE IF EXISTS {_quoted(table)}")
    db.execute("DELETE FROM plait_views WHERE name = ?", (table,))
    db.execute("DELETE FROM plait_batches WHERE view = ?", (table,))


def _select(db: sqlite3.Connection, view: StoredView, keys: list[Key | None]) -> list[bytes | None]:
    table = _quoted(view.table)
    if len(keys) == 1:
        row = db.execute(f"SELECT row FROM {table} WHERE key = ?", keys).fetchone()
        return [row[0] if row else None]
    unique = list(dict.fromkeys(keys))
    found: dict[Key | None, bytes] = {}
    for start in range(0, len(unique), BULK_KEYS):
        part = unique[start : start + BULK_KEYS]
        # Statements of a few sizes only, so that SQLite prepares each once; the last key stands in for the rest.
        size = 1 << (len(part) - 1).bit_length()
        part += [part[-1]] * (size - len(part))
        found.update(db.execute(f"SELECT key, row FROM {table} WHERE key IN ({_marks(size)})", part))
    return [found.get(key) for key in keys]


def _marks(size: int) -> str:
    return ",".join("?" * size)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
