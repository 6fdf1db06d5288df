"""What every data set becomes: impressions, feedback, users and items, cut into the past and a held-out future."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.clock import replay_from
from plait.errors import DataError
from plait.eventlog import FEEDBACK, IMPRESSIONS
from plait.files import fsync_folder, write_atomically
from plait.settings import Home

TIMESTAMP = pa.timestamp("us", tz="UTC")
USERS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("event_timestamp", TIMESTAMP),
        ("created", TIMESTAMP),
        ("age", pa.int64()),
        ("gender", pa.string()),
        ("occupation", pa.string()),
        ("zip_area", pa.string()),
    ]
)
ITEMS = pa.schema(
    [
        ("item_id", pa.int64()),
        ("event_timestamp", TIMESTAMP),
        ("created", TIMESTAMP),
        ("title", pa.string()),
        ("release_year", pa.int64()),
        ("genres", pa.list_(pa.string())),
        ("primary_genre", pa.string()),
    ]
)
SCHEMAS = {"impressions": IMPRESSIONS, "feedback": FEEDBACK, "users": USERS, "items": ITEMS}
_TIME = {"impressions": "timestamp", "feedback": "timestamp", "users": "event_timestamp", "items": "event_timestamp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What `prepare` wrote: rows per table in the past and in the holdout, and where the past ends."""

    source: str
    cutoff: datetime
    rows: dict[str, int]
    holdout_rows: dict[str, int]
    reused: bool = False


def prepared(home: Home) -> Prepared | None:
    """What lies in the home already, if a preparation was finished there."""
    marker = home.events / "source.json"
    if not marker.exists():
        return None
    found = json.loads(marker.read_text())
    return Prepared(
        source=found["source"],
        cutoff=datetime.fromisoformat(found["cutoff"]),
        rows=found["rows"],
        holdout_rows=found["holdout_rows"],
        reused=True,
    )


class EventWriter:
    """Writes event tables in parts, each row to the past or to the holdout by its time."""

    def __init__(self, folder: Path, cutoff: datetime) -> None:
        self.folder, self.cutoff = folder, cutoff
        self.rows = dict.fromkeys(SCHEMAS, 0)
        self.holdout_rows = dict.fromkeys(SCHEMAS, 0)
        for side in ("events", "holdout"):
            for name in SCHEMAS:
                (folder / side / name).mkdir(parents=True)

    def write(self, name: str, table: pa.Table) -> None:
        """Append rows to a table; columns that the schema has and `table` lacks become null."""
        table = conform(table, SCHEMAS[name], name)
        past = pc.less(table[_TIME[name]], pa.scalar(self.cutoff, TIMESTAMP))
        for side, counts, rows in (
            ("events", self.rows, table.filter(past)),
            ("holdout", self.holdout_rows, table.filter(pc.invert(past))),
        ):
            if rows.num_rows:
                part = f"prepared-{counts[name]:012d}.parquet"
                pq.write_table(rows, self.folder / side / name / part)
                counts[name] += rows.num_rows

    def done(self, source: str) -> Prepared:
        return Prepared(source=source, cutoff=self.cutoff, rows=self.rows, holdout_rows=self.holdout_rows)


def conform(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """`table` in `schema`: columns in order and cast, missing ones null, others refused.

    Raises DataError that names the column, what it was and what it must be.
    """
    if extra := [column for column in table.column_names if column not in schema.names]:
        raise DataError(f"{name}: no place for column {', '.join(extra)}; the table has {', '.join(schema.names)}")
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            columns.append(table[field.name].cast(field.type))
        except pa.ArrowInvalid as error:
            given = table.schema.field(field.name).type
            raise DataError(f"{name}.{field.name} is {given} and cannot become {field.type}: {error}") from error
    return pa.table(columns, schema=schema)


@contextmanager
def event_writer(
    home: Home, source: str, cutoff: datetime, *, replay: bool, extra_files: Iterable[str] = ()
) -> Iterator[EventWriter]:
    """Write a data set into the home, all or nothing; with `replay` the home's clock then stands at the cutoff.

    extra_files: names of further files that the block leaves in `writer.folder / "holdout"`.
    """
    home.create()
    aside = home.root / ".prepare.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        writer = EventWriter(aside, cutoff)
        yield writer
        if not writer.rows["impressions"]:
            raise DataError(f"{source}: no impression lies before the holdout; is the data empty?")
        (home.events / "source.json").unlink(missing_ok=True)
        holdout = home.root / "holdout"
        for name in SCHEMAS:
            _move(aside / "events" / name, home.events / name)
            _move(aside / "holdout" / name, holdout / name)
        for name in extra_files:
            (aside / "holdout" / name).rename(holdout / name)
        fsync_folder(home.events)
        if replay:
            replay_from(home, cutoff)
        else:
            home.clock_file.unlink(missing_ok=True)
        marker = {
            "source": source,
            "cutoff": cutoff.isoformat(),
            "rows": writer.rows,
            "holdout_rows": writer.holdout_rows,
        }
        write_atomically(home.events / "source.json", json.dumps(marker, indent=2).encode())
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def clear(home: Home) -> None:
    """Forget the home's events and all that was derived from them; registered models stay."""
    for folder in (home.events, home.root / "holdout", home.features, home.samples, home.datasets):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("online.db", "online.db-wal", "online.db-shm", "registry.db"):
        (home.root / name).unlink(missing_ok=True)
    home.clock_file.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
