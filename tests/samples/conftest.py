"""One DuckDB engine for a test module, and a project with small random events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.offline.engine import Engine, open_engine
from plait.settings import Home

MICROS = pa.timestamp("us", tz="UTC")
START = datetime(2024, 5, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine("duckdb", threads=2) as running:
        yield running


def random_events(seed: int, n_requests: int = 150) -> dict[str, pa.Table]:
    """Slates of three, clicks and purchases minutes later, ratings and dwell pieces, some rows twice, some broken."""
    rng = np.random.default_rng(seed)
    shown, told = [], []
    for request in range(n_requests):
        moment = START + timedelta(seconds=int(rng.integers(0, 20 * 86_400)), microseconds=int(rng.integers(0, 10**6)))
        user = int(rng.integers(1, 15))
        for position, item in enumerate(rng.permutation(np.arange(1, 21))[:3], start=1):
            row = {
                "request_id": f"r{request}",
                "timestamp": moment,
                "scene": "home" if request % 7 else "mail",
                "user_id": user,
                "item_id": int(item),
                "position": position,
                "propensity": float(rng.uniform(0.02, 1)) if rng.random() < 0.9 else None,
                "created": moment + timedelta(seconds=1),
            }
            shown.append(row)
            if rng.random() < 0.05:
                shown.append({**row, "created": moment + timedelta(seconds=2), "position": 9})
            for kind, chance in (("click", 0.4), ("purchase", 0.1), ("rating", 0.2), ("dwell", 0.3)):
                if rng.random() < chance:
                    when = moment + timedelta(seconds=float(rng.exponential(30_000)))
                    told.append(
                        {
                            "event_id": f"e{len(told)}",
                            "type": kind,
                            "request_id": f"r{request}" if rng.random() < 0.7 else None,
                            "user_id": user,
                            "item_id": int(item),
                            "timestamp": when,
                            "value": float(rng.integers(1, 6)) if kind in ("rating", "dwell") else None,
                            "created": when,
                        }
                    )
                    if rng.random() < 0.1:
                        told.append({**told[-1], "created": when + timedelta(hours=1), "value": 99.0})
    shown.append({**shown[0], "request_id": None})
    told.append({**told[0], "event_id": "incomplete", "item_id": None})
    shown_schema = pa.schema(
        [
            ("request_id", pa.string()),
            ("timestamp", MICROS),
            ("scene", pa.string()),
            ("user_id", pa.int64()),
            ("item_id", pa.int64()),
            ("position", pa.int32()),
            ("propensity", pa.float64()),
            ("created", MICROS),
        ]
    )
    told_schema = pa.schema(
        [
            ("event_id", pa.string()),
            ("type", pa.string()),
            ("request_id", pa.string()),
            ("user_id", pa.int64()),
            ("item_id", pa.int64()),
            ("timestamp", MICROS),
            ("value", pa.float64()),
            ("created", MICROS),
        ]
    )
    return {
        "impressions": pa.Table.from_pylist(shown, schema=shown_schema),
        "feedback": pa.Table.from_pylist(told, schema=told_schema),
    }


@pytest.fixture
def make_home(tmp_path: Path) -> Callable[..., Home]:
    """make_home(seed) writes a project with random events, in two parts each, and returns its home."""

    def make(seed: int = 1, **tables: pa.Table) -> Home:
        home = Home(project=tmp_path, root=tmp_path / ".plait").create()
        (tmp_path / "feature_store.yaml").write_text("project: tiny\n")
        for kind, table in {**random_events(seed), **tables}.items():
            folder = home.events / kind
            folder.mkdir(parents=True, exist_ok=True)
            half = table.num_rows // 2
            pq.write_table(table.slice(0, half), folder / "a.parquet")
            pq.write_table(table.slice(half), folder / "b.parquet")
        return home

    return make
