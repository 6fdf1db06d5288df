"""A DuckDB connection per question: bounded, private, and its failures in plain words.

Nothing here is shared: Feast's own DuckDB store keeps one process-wide ibis connection that all threads use and whose
views are never dropped. A connection costs about 10 ms, a retrieval seconds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from plait.errors import StoreError

_SPILL_PREFIX = "plait-spill-"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """What one query may use: `memory_limit` as DuckDB writes it ("2GB"), CPU threads, the folder to spill into."""

    memory_limit: str | None = None
    threads: int | None = None
    temp_directory: Path | None = None

    def __str__(self) -> str:
        return (
            f"memory_limit={self.memory_limit or 'default (80 % of the machine)'}, "
            f"threads={self.threads or 'all'}, temp_directory={self.temp_directory or tempfile.gettempdir()}"
        )


def quote(name: str) -> str:
    """A column or table name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string as SQL."""
    return "'" + text.replace("'", "''") + "'"


def one_line(error: Exception) -> str:
    """DuckDB's message without the drawing of where in the query it is."""
    return " ".join(str(error).split("\nLINE ")[0].split())


@contextmanager
def connect(limits: EngineLimits, *, search_path: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A fresh in-memory database in UTC, closed and its spill folder removed at the end.

    `search_path` is where SQL given by the user looks for relative files. Raises StoreError if the limits make no
    sense to DuckDB or the spill folder cannot be made.
    """
    with _spill_folder(limits.temp_directory) as spill:
        config: dict[str, str | bool | int | float | list[str]] = {"temp_directory": str(spill)}
        if limits.memory_limit:
            config["memory_limit"] = limits.memory_limit
        if limits.threads:
            config["threads"] = limits.threads
        try:
            db = duckdb.connect(":memory:", config=config)
        except duckdb.Error as error:
            raise StoreError(
                f"DuckDB did not take the offline store's settings ({limits}): {one_line(error)}. "
                "Correct memory_limit, threads or temp_directory under offline_store in feature_store.yaml"
            ) from error
        try:
            # Global, so that cursors (further connections to the same database) have them too.
            db.execute("SET GLOBAL TimeZone = 'UTC'")
            # An Arrow table has no row count for the planner: it then takes the side for tiny and chooses a nested
            # loop, which made 1M x 1M rows take 365 s instead of 4.
            db.execute("SET GLOBAL asof_loop_join_threshold = 0")
            db.execute("SET enable_progress_bar = false")
            if search_path is not None:
                db.execute(f"SET GLOBAL file_search_path = {literal(str(search_path))}")
            yield db
        finally:
            db.close()


@contextmanager
def _spill_folder(base: Path | None) -> Iterator[Path]:
    """A private folder below `base`, since two DuckDB instances must not share one; removes what killed ones left.

    A living owner holds a lock on its folder, so that a left-over is told from one in use across processes.
    """
    parent = base or Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent):  # nobody takes a folder for a left-over before its owner has locked it
            _remove_left_overs(parent)
            folder = Path(tempfile.mkdtemp(prefix=_SPILL_PREFIX, dir=parent))
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise StoreError(
            f"the offline store cannot spill to {parent}: {error}; set offline_store.temp_directory to a folder "
            "that can be written"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_left_overs(parent: Path) -> None:
    for other in parent.glob(f"{_SPILL_PREFIX}*"):
        # Gone already, another user's, or in use: each is a reason to leave it alone.
        with suppress(OSError):
            handle = os.open(other, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
            finally:
                os.close(handle)


@contextmanager
def plain_errors(limits: EngineLimits, *, doing: str, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn DuckDB's errors into StoreError that says what was being done and what to do next.

    `files` are the parquet files it reads (the list may still grow): those that turn out corrupt are named.
    """
    try:
        yield
    except duckdb.Error as error:
        text = one_line(error)
        if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory" in text:
            raise StoreError(
                f"{doing}: out of memory under {limits}. Raise offline_store.memory_limit, lower threads, "
                f"or give temp_directory more room ({text})"
            ) from error
        if not isinstance(error, duckdb.ProgrammingError) and (broken := broken_parts(files)):
            raise StoreError(f"{doing}: corrupt parquet: {broken}. Remove or rewrite it, then run again") from error
        raise StoreError(f"{doing}: {text} (under {limits})") from error


def broken_parts(files: Sequence[str]) -> str:
    """The files that cannot be read to their end, each with the reason; "" if all can."""
    broken = []
    for file in files:
        try:
            with pq.ParquetFile(file) as part:
                for group in range(part.num_row_groups):
                    part.read_row_group(group)
        except (OSError, pa.ArrowException, ValueError) as reason:
            broken.append(f"{file} ({one_line(reason)})")
    return "; ".join(broken)
