"""Rolling: the log's segments become the event tables that samples, aggregates, audit and experiments read.

Only new frames are read (an offset per segment is kept), while the server goes on writing. A part's name holds the
segment and the offset it starts at, so a roll that died after writing the part and before noting the offset writes
the same part again: no row is lost and none doubled.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from plait.errors import StoreError
from plait.eventlog.segments import CLOSED, OPEN, is_final, read_segment
from plait.files import atomic_file, write_atomically
from plait.settings import Home

TIMESTAMP = pa.timestamp("us", tz="UTC")
ARM = pa.struct(
    [("layer", pa.string()), ("experiment", pa.string()), ("arm", pa.string()), ("propensity", pa.float64())]
)
IMPRESSIONS = pa.schema(
    [
        ("request_id", pa.string()),
        ("timestamp", TIMESTAMP),
        ("scene", pa.string()),
        ("user_id", pa.int64()),
        ("session_id", pa.string()),
        ("device_id", pa.string()),
        ("item_id", pa.int64()),
        ("position", pa.int32()),
        ("score", pa.float64()),
        ("propensity", pa.float64()),
        ("team", pa.string()),  # of an interleaved list: the ranker that put the item there, "a" or "b"
        ("model", pa.string()),
        ("model_version", pa.string()),
        ("arms", pa.list_(ARM)),
        ("config_version", pa.int64()),
        ("features", pa.string()),
        ("created", TIMESTAMP),
    ]
)
FEEDBACK = pa.schema(
    [
        ("event_id", pa.string()),
        ("type", pa.string()),
        ("request_id", pa.string()),
        ("user_id", pa.int64()),
        ("session_id", pa.string()),
        ("device_id", pa.string()),
        ("item_id", pa.int64()),
        ("timestamp", TIMESTAMP),
        ("value", pa.float64()),
        ("created", TIMESTAMP),
    ]
)
EXPOSURES = pa.schema(
    [
        ("timestamp", TIMESTAMP),
        ("request_id", pa.string()),
        ("unit_kind", pa.string()),
        ("unit", pa.string()),
        ("layer", pa.string()),
        ("experiment", pa.string()),
        ("arm", pa.string()),
        ("config_version", pa.int64()),
        ("forced", pa.bool_()),
        ("counterfactual", pa.bool_()),
        ("propensity", pa.float64()),  # of the arm, where a bandit drew it; null where a fixed split did
        ("context", pa.string()),  # JSON of what a contextual bandit looked at
    ]
)
# Columns that tables written by earlier releases lack; they read as null.
LATER_COLUMNS = frozenset({"session_id", "device_id", "team", "propensity", "context"})


@dataclass(frozen=True, kw_only=True, slots=True)
class RollReport:
    """Rows that this roll added to each table, and feedback rows left out because their event_id was known."""

    impressions: int = 0
    feedback: int = 0
    exposures: int = 0
    duplicates: int = 0


def log_folder(home: Home) -> Path:
    return home.events / "log"


def roll(home: Home) -> RollReport:
    """Move every frame that is not yet in the event tables into them; one roll at a time per home.

    Raises StoreError if another roll holds the lock for a minute.
    """
    folder = log_folder(home)
    if not folder.exists():
        return RollReport()
    with _exclusive(folder / "roll.lock"):
        offsets = _read_offsets(folder)
        known = _known_event_ids(home)
        totals = {"impressions": 0, "feedback": 0, "exposures": 0, "duplicates": 0}
        for segment in sorted([*folder.glob(f"*{CLOSED}"), *folder.glob(f"*{OPEN}")]):
            name = segment.name.removesuffix(OPEN).removesuffix(CLOSED)
            start = offsets.get(name, 0)
            try:
                final = is_final(segment)
                end, tables, n_duplicates = _collect(segment, start, known)
            except FileNotFoundError:
                continue  # its writer closed, and so renamed it just now: the next roll reads it
            for table, rows in tables.items():
                if rows.num_rows:
                    with atomic_file(home.events / table / f"log-{name}-{start}.parquet") as aside:
                        pq.write_table(rows, aside)
                    totals[table] += rows.num_rows
            totals["duplicates"] += n_duplicates
            offsets[name] = end
            _write_offsets(folder, offsets)
            if final:
                segment.unlink()
                del offsets[name]
                _write_offsets(folder, offsets)
        return RollReport(**totals)


def unrolled(home: Home) -> dict[str, pa.Table]:
    """The feedback and exposures that no roll has moved yet. Nothing is written.

    Read it before the event tables: after a roll meanwhile rows are in both (the reader counts them once), never in
    neither.
    """
    folder = log_folder(home)
    feedback: list[dict[str, Any]] = []
    exposures: list[dict[str, Any]] = []
    offsets = _read_offsets(folder)
    for segment in sorted([*folder.glob(f"*{CLOSED}"), *folder.glob(f"*{OPEN}")]):
        start = offsets.get(segment.name.removesuffix(OPEN).removesuffix(CLOSED), 0)
        try:
            for _, kind, records in read_segment(segment, start):
                if kind == "exposure":
                    exposures.extend(records)
                elif kind == "feedback":
                    feedback.extend({"created": record["timestamp"], **record} for record in records)
        except FileNotFoundError:
            continue  # closed, or rolled away, just now: it is found in the tables, or next time
    return {
        "feedback": pa.Table.from_pylist(feedback, schema=FEEDBACK),
        "exposures": pa.Table.from_pylist(exposures, schema=EXPOSURES),
    }


def _collect(segment: Path, start: int, known: set[str]) -> tuple[int, dict[str, pa.Table], int]:
    impressions: list[dict[str, Any]] = []
    feedback: list[dict[str, Any]] = []
    exposures: list[dict[str, Any]] = []
    n_duplicates = 0
    end = start
    for offset, kind, records in read_segment(segment, start):
        end = offset
        if kind == "request":
            for record in records:
                impressions.extend(impression_rows(record))
        elif kind == "exposure":
            exposures.extend(records)
        else:
            for record in records:
                if record["event_id"] in known:
                    n_duplicates += 1
                    continue
                known.add(record["event_id"])
                feedback.append({"created": record["timestamp"], **record})
    tables = {
        "impressions": pa.Table.from_pylist(impressions, schema=IMPRESSIONS),
        "feedback": pa.Table.from_pylist(feedback, schema=FEEDBACK),
        "exposures": pa.Table.from_pylist(exposures, schema=EXPOSURES),
    }
    return end, tables, n_duplicates


def impression_rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A logged request as one row per item shown; positions count from 1."""
    items = record["items"]
    request_features = record.get("features_request") or {}
    candidate_features = record.get("features_candidates") or {}
    shared = {
        "request_id": record["request_id"],
        "timestamp": record["timestamp"],
        "scene": record["scene"],
        "user_id": record["user_id"],
        "session_id": record.get("session_id"),
        "device_id": record.get("device_id"),
        "model": record.get("model"),
        "model_version": record.get("model_version"),
        "arms": record.get("arms") or [],
        "config_version": record.get("config_version"),
        "created": record["timestamp"],
    }
    columns = {
        "position": record.get("positions") or range(1, len(items) + 1),
        "score": record.get("scores") or [None] * len(items),
        "propensity": record.get("propensities") or [None] * len(items),
        "team": record.get("teams") or [None] * len(items),
    }
    for i, item in enumerate(items):
        features = request_features | {name: values[i] for name, values in candidate_features.items()}
        row = shared | {name: values[i] for name, values in columns.items()}
        yield row | {"item_id": item, "features": orjson.dumps(features).decode() if features else None}


def _known_event_ids(home: Home) -> set[str]:
    """Event ids already rolled from the log; ids of prepared data never meet those."""
    parts = sorted((home.events / "feedback").glob("log-*.parquet"))
    if not parts:
        return set()
    with duckdb.connect() as db:
        rows = db.execute("SELECT event_id FROM read_parquet(?)", [[str(part) for part in parts]]).fetchall()
    return {event_id for (event_id,) in rows}


def _read_offsets(folder: Path) -> dict[str, int]:
    path = folder / "rolled.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write_offsets(folder: Path, offsets: Mapping[str, int]) -> None:
    write_atomically(folder / "rolled.json", json.dumps(dict(offsets)).encode())


@contextmanager
def _exclusive(path: Path, *, timeout_s: float = 60.0) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as busy:
                if time.monotonic() > deadline:
                    raise StoreError(f"another roll has held {path} for {timeout_s:g} s; try again later") from busy
                time.sleep(0.05)
        yield
