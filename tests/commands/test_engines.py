"""`--engine spark` of the commands writes what DuckDB writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from plait.cli import cli
from plait.offline.samples import read_manifest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.spark,
    pytest.mark.usefixtures("spark"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning"),
]
DECLARED = """
from feast import Entity
from feast.value_type import ValueType

from plait.aggregates import Count, LastN, Mean, aggregate_view, feedback

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
genre = Entity(name="genre", join_keys=["genre"], value_type=ValueType.STRING)
clicks = aggregate_view(
    name="clicks", entities=[user], events=feedback("click"), windows=("7d", "all"), cadence="day",
    features=(Count("n"), Mean("mean", of="value")),
)
genres = aggregate_view(
    name="genres", entities=[user, genre], events=feedback("click", genre="items.genres"), windows=("all",),
    cadence="hour", features=(Count("n"),),
)
"""


def test_samples_and_features_are_the_same_from_either_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    (tmp_path / "feature_store.yaml").write_text("")
    (tmp_path / "feature_repo").mkdir()
    # A name of its own: modules of a process are imported once.
    (tmp_path / "feature_repo" / "both_engines.py").write_text(DECLARED)
    size = ["--users", "30", "--items", "25", "--requests", "200"]
    cli.main(["data", "prepare", "synthetic", *size], standalone_mode=False)
    home, found = tmp_path / ".plait", {}
    for engine in ("duckdb", "spark"):
        cli.main(["samples", "build", "--engine", engine], standalone_mode=False)
        cli.main(["features", "build", "--engine", engine], standalone_mode=False)
        tables = [pads.dataset(home / place).to_table() for place in ("features/clicks", "features/genres")]
        samples = read_manifest(home / "samples" / "default")
        found[engine] = (samples.data_hash, samples.rows, samples.positives, [in_order(table) for table in tables])
        shutil.rmtree(home / "samples")
        shutil.rmtree(home / "features")
    assert found["duckdb"] == found["spark"]
    assert all(table for table in found["spark"][3])


def in_order(table: pa.Table) -> list[dict]:
    keys = [name for name in ("user_id", "genre", "event_timestamp") if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in keys]).to_pylist()
