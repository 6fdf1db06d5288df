"""MovieLens as event tables: a rating is an impression with a "rating" event; 4 or 5 stars are a "click" too.

Counting ratings of 4 and 5 as clicks is the usual click-prediction task on this data (Song et al., AutoInt, CIKM 2019).
Licence: GroupLens allows research use and forbids redistribution, so Plait downloads it and never ships it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plait.data.tables import SCHEMAS, TIMESTAMP, Prepared, event_writer
from plait.errors import DataError
from plait.progress import Progress, silent, stepwise
from plait.settings import Home

WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_IN_WHEEL = "recbole/dataset_example/ml-100k/"
_FILES_100K = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")
CLICK_FROM = 4  # stars
# As `progress` tells them. Finding the files may be downloading them.
STEPS = (
    "find files",
    "read ratings",
    "read users",
    "read items",
    "write impressions",
    "write feedback",
    "write users",
    "write items",
)
_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True, slots=True)
class _Ratings:
    user_id: np.ndarray  # int64, shape (n,)
    item_id: np.ndarray
    stars: np.ndarray  # float64
    seconds: np.ndarray  # int64, unix


def prepare_100k(home: Home, *, path: Path | None, holdout: float, progress: Progress = silent) -> Prepared:
    """MovieLens-100K from `path` (a folder with the three ml-100k.* files), by default downloaded into the home."""
    begin = stepwise(progress, STEPS)
    begin("find files")
    folder = path or _download_100k(home)
    _require(folder, _FILES_100K)
    begin("read ratings")
    ratings = _ratings(_rows(folder / "ml-100k.inter", "\t", 4, _rating, header=True))
    begin("read users")
    users = list(_rows(folder / "ml-100k.user", "\t", 5, _user_100k, header=True))
    begin("read items")
    items = list(_rows(folder / "ml-100k.item", "\t", 4, _item_100k, header=True))
    return _prepare(home, "movielens-100k", ratings, users, items, holdout, begin)


def prepare_1m(home: Home, *, path: Path | None, holdout: float, progress: Progress = silent) -> Prepared:
    """MovieLens-1M from `path`: users.dat, movies.dat and ratings.dat (or ratings.parquet with the same columns)."""
    if path is None:
        raise DataError(
            "movielens-1m is not downloaded: give --path DIR with GroupLens' users.dat, movies.dat and ratings.dat"
        )
    begin = stepwise(progress, STEPS)
    begin("find files")
    _require(path, ("users.dat", "movies.dat"))
    begin("read ratings")
    if (path / "ratings.dat").exists():
        ratings = _ratings(_rows(path / "ratings.dat", "::", 4, _rating, encoding="latin-1"))
    elif (path / "ratings.parquet").exists():
        ratings = _ratings_parquet(path / "ratings.parquet")
    else:
        raise DataError(f"{path} holds neither ratings.dat nor ratings.parquet")
    begin("read users")
    users = list(_rows(path / "users.dat", "::", 5, _user_1m, encoding="latin-1"))
    begin("read items")
    items = list(_rows(path / "movies.dat", "::", 3, _item_1m, encoding="latin-1"))
    return _prepare(home, "movielens-1m", ratings, users, items, holdout, begin)


def _prepare(
    home: Home,
    source: str,
    ratings: _Ratings,
    users: list[dict],
    items: list[dict],
    holdout: float,
    begin: Callable[[str], None],
) -> Prepared:
    if not len(ratings.seconds):
        raise DataError(f"{source}: the ratings file holds no rating")
    begin("write impressions")
    order = np.lexsort((ratings.item_id, ratings.user_id, ratings.seconds))
    user_id, item_id = ratings.user_id[order], ratings.item_id[order]
    stars, seconds = ratings.stars[order], ratings.seconds[order]
    n = len(order)
    # The boundary is a moment, not a row: all ratings of that second are on one side.
    cutoff = datetime.fromtimestamp(int(seconds[min(n - 1, int(n * (1 - holdout)))]), UTC)
    if holdout == 0:
        cutoff = datetime.fromtimestamp(int(seconds[-1]) + 1, UTC)
    known_from = datetime.fromtimestamp(int(seconds[0]), UTC) - timedelta(days=1)
    timestamp = pa.array(seconds * 1_000_000, pa.int64()).cast(TIMESTAMP)
    requests = pa.array([f"{source}-{i}" for i in range(n)])
    shared = {"request_id": requests, "timestamp": timestamp, "user_id": user_id, "item_id": item_id}
    impressions = pa.table(
        shared
        | {
            "scene": pa.repeat(pa.scalar("movielens"), n),
            "position": pa.repeat(pa.scalar(1, pa.int32()), n),
            "created": timestamp,
        }
    )
    rating = pa.table(
        shared
        | {
            "event_id": pa.array([f"{source}-rating-{i}" for i in range(n)]),
            "type": pa.repeat(pa.scalar("rating"), n),
            "value": stars,
            "created": timestamp,
        }
    )
    liked = pa.array(stars >= CLICK_FROM)
    clicks = rating.filter(liked)
    clicks = clicks.set_column(
        clicks.column_names.index("event_id"),
        "event_id",
        pa.array([f"{source}-click-{i}" for i in np.flatnonzero(stars >= CLICK_FROM)]),
    )
    clicks = clicks.set_column(
        clicks.column_names.index("type"), "type", pa.repeat(pa.scalar("click"), clicks.num_rows)
    ).drop_columns(["value"])
    for row in (*users, *items):
        row["event_timestamp"] = row["created"] = known_from
    with event_writer(home, source, cutoff, replay=holdout > 0) as writer:
        writer.write("impressions", impressions)
        begin("write feedback")
        writer.write("feedback", rating)
        writer.write("feedback", clicks)
        begin("write users")
        writer.write("users", pa.Table.from_pylist(users).cast(_schema_of("users", users)))
        begin("write items")
        writer.write("items", pa.Table.from_pylist(items).cast(_schema_of("items", items)))
    return writer.done(source)


def _schema_of(name: str, rows: list[dict]) -> pa.Schema:
    return pa.schema([SCHEMAS[name].field(column) for column in rows[0]])


def _rating(parts: list[str]) -> tuple[int, int, float, int]:
    stars = float(parts[2])
    if not 0 < stars <= 5:
        raise ValueError(f"a rating lies between 0.5 and 5, not {parts[2]}")
    return int(parts[0]), int(parts[1]), stars, int(float(parts[3]))


def _user_100k(parts: list[str]) -> dict[str, Any]:
    return {
        "user_id": int(parts[0]),
        "age": int(parts[1]),
        "gender": parts[2],
        "occupation": parts[3],
        "zip_area": parts[4][:2],
    }


def _user_1m(parts: list[str]) -> dict[str, Any]:
    return {
        "user_id": int(parts[0]),
        "gender": parts[1],
        "age": int(parts[2]),
        "occupation": parts[3],
        "zip_area": parts[4][:2],
    }


def _item_100k(parts: list[str]) -> dict[str, Any]:
    return _item(int(parts[0]), parts[1], int(parts[2]) if parts[2].isdigit() else None, parts[3].split())


def _item_1m(parts: list[str]) -> dict[str, Any]:
    year = _YEAR.search(parts[1])
    return _item(
        int(parts[0]), _YEAR.sub("", parts[1]).strip(), int(year[1]) if year else None, parts[2].strip().split("|")
    )


def _item(item_id: int, title: str, year: int | None, genres: list[str]) -> dict[str, Any]:
    genres = genres or ["unknown"]
    return {"item_id": item_id, "title": title, "release_year": year, "genres": genres, "primary_genre": genres[0]}


def _ratings(rows: Iterator[tuple[int, int, float, int]]) -> _Ratings:
    table = np.array(list(rows), dtype=np.float64).reshape(-1, 4)
    return _Ratings(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], table[:, 3].astype(int))


def _ratings_parquet(path: Path) -> _Ratings:
    columns = ["user_id", "movie_id", "rating", "timestamp"]
    try:
        table = pq.read_table(path)
        users, items, stars, seconds = (table[column].to_numpy() for column in columns)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DataError(f"{path} is not a ratings table ({error}); it needs columns {', '.join(columns)}") from error
    return _Ratings(users.astype(np.int64), items.astype(np.int64), stars.astype(float), seconds.astype(np.int64))


def _rows(
    path: Path,
    separator: str,
    n_columns: int,
    parse: Callable[[list[str]], Any],
    *,
    header: bool = False,
    encoding: str = "utf-8",
) -> Iterator[Any]:
    """Parsed lines of a text file; DataError with file, line number and text for the first that is not as it should."""
    with path.open(encoding=encoding, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if (header and number == 1) or not line.strip():
                continue
            parts = line.rstrip("\r\n").split(separator)
            try:
                if len(parts) != n_columns:
                    raise ValueError(f"expected {n_columns} columns separated by {separator!r}, got {len(parts)}")
                yield parse(parts)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}: {line.strip()[:80]!r}") from error


def _require(folder: Path, names: tuple[str, ...]) -> None:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; --path takes the folder that holds {', '.join(names)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder} lacks {', '.join(missing)}; it must hold {', '.join(names)}")


def _download_100k(home: Home) -> Path:
    """The three data files out of a wheel on the package index, checked by SHA-256; nothing is installed."""
    target = home.root / "raw" / "ml-100k"
    if all((target / name).is_file() for name in _FILES_100K):
        return target
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if run.returncode or len(wheels) != 1:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"pip could not download {WHEEL} ({last}); with a copy on disk, give --path DIR")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise DataError(f"{wheels[0].name} has SHA-256 {digest}, not {WHEEL_SHA256}; give a copy by --path DIR")
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in _FILES_100K:
                (target / name).write_bytes(wheel.read(_IN_WHEEL + name))
    return target
