"""An engine per module, and a home with random events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from plait.offline.engine import Engine, open_engine
from plait.settings import Home
from tests.aggregates.witness import ITEM_ROWS, ItemRow, items_table, to_table


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine("duckdb", threads=1) as running:
        yield running


@pytest.fixture
def make_home(tmp_path: Path) -> Callable[..., Home]:
    """Makes a home whose feedback table holds these parts of events, and whose items have genres."""

    def make(*parts: Sequence[Mapping[str, Any]], name: str = "home") -> Home:
        home = Home(project=tmp_path / name, root=tmp_path / name / ".plait").create()
        (home.events / "items").mkdir()
        add_items(home, "items", ITEM_ROWS)
        for i, events in enumerate(parts):
            add_part(home, f"part{i}", events)
        return home

    return make


def add_part(home: Home, name: str, events: Sequence[Mapping[str, Any]]) -> None:
    folder = home.events / "feedback"
    folder.mkdir(exist_ok=True)
    pq.write_table(to_table(events), folder / f"{name}.parquet")


def add_items(home: Home, name: str, rows: Sequence[ItemRow]) -> None:
    pq.write_table(items_table(rows), home.events / "items" / f"{name}.parquet")
