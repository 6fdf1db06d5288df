"""A training set by Feast's own Spark offline store is that of Plait's, and is read back from Feast's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from plait.aggregates import table_source
from plait.offline.build import build_dataset
from plait.offline.dataset import Dataset
from plait.offline.samples import build_samples
from plait.offline.saved import saved_name
from plait.offline.spec import SampleSpec
from tests.dataset.conftest import STORES, make_project

pytestmark = [
    pytest.mark.spark,
    pytest.mark.usefixtures("spark"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning"),
]
SPARK = "spark\n  spark_conf: {spark.sql.session.timeZone: UTC, spark.sql.shuffle.partitions: '2'}"


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    table = pa.concat_tables([dataset.split(part).to_table() for part in ("train", "valid", "test")])
    return table.sort_by("sample_id").to_pylist()


def in_order(found: pd.DataFrame) -> pd.DataFrame:
    """What a saved dataset keeps: keys, time and features; lists as lists, times as UTC."""
    times = pd.to_datetime(found["event_timestamp"], utc=True).astype("datetime64[us, UTC]")
    recent = [None if value is None else list(value) for value in found["recent"]]
    found = found.assign(event_timestamp=times, recent=recent).sort_values(["event_timestamp", "item_id"])
    kept = ["user_id", "item_id", "event_timestamp", "mean_7d", "recent", "primary_genre", "n_shown", "n_genre"]
    return found[kept].reset_index(drop=True)


def test_spark_s_training_set_is_plait_s_row_for_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three views, one keyed by a feature of another, a list, ids, texts and floats."""
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    found = {}
    for name, offline in (("plait", STORES["plait"]), ("spark", SPARK)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / name / "feature_store.yaml").write_text(f"project: tiny\noffline_store:\n  type: {offline}\n")
        project = make_project(tmp_path / name, offline, lambda name, folder: table_source(name, str(folder)))
        build_samples(project.home, SampleSpec())
        dataset = build_dataset(project.home, "tiny_clicks", store=project.store)
        found[name] = (dataset.schema, rows(dataset))
        read = project.store.get_saved_dataset(saved_name(dataset)).to_df()
        pd.testing.assert_frame_equal(in_order(read), in_order(pd.DataFrame(found[name][1])), check_dtype=False)
    assert found["spark"] == found["plait"]
    assert len(found["spark"][1]) == 400
