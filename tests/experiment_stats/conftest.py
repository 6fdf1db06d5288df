"""Event tables small enough to check by hand, written as the server and the roll write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.eventlog import EXPOSURES, FEEDBACK, IMPRESSIONS
from plait.settings import Home

START = datetime(2026, 3, 1, tzinfo=UTC)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def us(moment: datetime) -> int:
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))


@dataclass
class Log:
    """Writes exposures, impressions and feedback of one home; times are hours after START."""

    home: Home
    until: datetime = START + timedelta(days=30)
    _parts: dict[str, int] = field(default_factory=dict)

    def exposures(
        self,
        units: Sequence[Any] | npt.NDArray[Any],
        arms: Sequence[str] | npt.NDArray[Any],
        hours: Any = 0.0,
        *,
        experiment: str = "test",
        layer: str = "rank",
        unit_kind: str = "user",
        config_version: int = 1,
        forced: bool = False,
        counterfactual: bool = False,
        propensity: float | None = None,
        request_ids: Sequence[str] | None = None,
    ) -> Log:
        n = len(units)
        table = {
            "timestamp": self._times(hours, n),
            "request_id": list(request_ids) if request_ids is not None else [f"r{u}" for u in units],
            "unit_kind": [unit_kind] * n,
            "unit": [str(u) for u in units],
            "layer": [layer] * n,
            "experiment": [experiment] * n,
            "arm": list(arms),
            "config_version": [config_version] * n,
            "forced": [forced] * n,
            "counterfactual": [counterfactual] * n,
            "propensity": [propensity] * n,
        }
        return self._write("exposures", table, EXPOSURES)

    def feedback(
        self,
        users: Sequence[int] | npt.NDArray[Any],
        hours: Any = 1.0,
        *,
        type: str = "click",  # noqa: A002
        value: Any = None,
        items: Sequence[int] | None = None,
        request_ids: Sequence[str | None] | None = None,
        **ids: Sequence[str | None],
    ) -> Log:
        n = len(users)
        times = self._times(hours, n)
        part = self._parts.get("feedback", 0)
        table = {
            "event_id": [f"e{part}-{i}" for i in range(n)],
            "type": [type] * n,
            "request_id": list(request_ids) if request_ids is not None else [f"r{u}" for u in users],
            "user_id": list(users),
            "item_id": list(items) if items is not None else [1] * n,
            "timestamp": times,
            "value": np.broadcast_to(np.asarray(value, dtype=float), n) if value is not None else [None] * n,
            "created": times,
            **ids,
        }
        return self._write("feedback", table, FEEDBACK)

    def impressions(
        self,
        users: Sequence[int] | npt.NDArray[Any],
        hours: Any = 0.5,
        *,
        items: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        request_ids: Sequence[str] | None = None,
        **ids: Sequence[str | None],
    ) -> Log:
        n = len(users)
        times = self._times(hours, n)
        table: dict[str, Any] = {name: [None] * n for name in IMPRESSIONS.names}
        table |= {
            "request_id": list(request_ids) if request_ids is not None else [f"r{u}" for u in users],
            "timestamp": times,
            "scene": ["home"] * n,
            "user_id": list(users),
            "item_id": list(items) if items is not None else [1] * n,
            "position": list(positions) if positions is not None else [1] * n,
            "created": times,
            **ids,
        }
        return self._write("impressions", table, IMPRESSIONS)

    def users(self, ids: Sequence[int], **attributes: Sequence[Any]) -> Log:
        times = pa.array([us(START - timedelta(days=365))] * len(ids)).cast(pa.timestamp("us", tz="UTC"))
        table = pa.table(
            {"user_id": pa.array(ids, pa.int64()), "event_timestamp": times, "created": times, **attributes}
        )
        folder = self.home.events / "users"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "part-0.parquet")
        return self

    def _times(self, hours: Any, n: int) -> pa.Array:
        values = np.broadcast_to(np.asarray(hours, dtype=np.float64), n)
        moments = us(START) + np.round(values * 3_600_000_000).astype(np.int64)
        return pa.array(moments).cast(pa.timestamp("us", tz="UTC"))

    def _write(self, name: str, table: dict[str, Any], schema: pa.Schema) -> Log:
        folder = self.home.events / name
        folder.mkdir(parents=True, exist_ok=True)
        part = self._parts[name] = self._parts.get(name, 0) + 1
        n = len(table["timestamp"])
        arrays = [pa.array(table.get(field.name, [None] * n), field.type) for field in schema]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / f"part-{part}.parquet")
        return self


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """An empty home's log."""
    (tmp_path / "feature_store.yaml").write_text("project: test\n")
    return Log(Home(project=tmp_path, root=tmp_path / ".plait").create())


@pytest.fixture
def shared_data():
    """The folder of a data set that lies beside the repository; skips the test where it is absent."""

    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.is_dir():
            pytest.skip(f"no data set {name} in {SHARED}")
        return path

    return folder
