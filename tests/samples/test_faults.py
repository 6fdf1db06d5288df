"""Faults while samples are built: each ends in a clear error or a complete result, never half."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from plait.errors import DataError, StoreError
from plait.offline import parts
from plait.offline.parts import file_sha256
from plait.offline.samples import SampleManifest, build_samples, read_manifest
from plait.offline.spec import AttributionSpec, NegativeSpec, SampleSpec
from plait.settings import Home

NOW = datetime(2024, 5, 25, tzinfo=UTC)


def whole(home: Home) -> SampleManifest:
    """The manifest of samples/default, after a check of every byte it speaks of."""
    folder = home.samples / "default"
    manifest = read_manifest(folder)
    for part in manifest.parts:
        assert file_sha256(folder / part.path) == part.sha256
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *(part.path for part in manifest.parts)]
    return manifest


def test_a_disk_that_fills_up_leaves_the_old_samples(
    make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home()
    before = build_samples(home, SampleSpec(), now=NOW)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    opened = parts.PartWriter.__init__

    def small(self: parts.PartWriter, *args, **kwargs) -> None:
        opened(self, *args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))  # the kernel refuses what goes beyond

    monkeypatch.setattr(parts.PartWriter, "__init__", small)
    try:
        with pytest.raises(StoreError, match=r"cannot write .*samples/default: File too large .*make room"):
            build_samples(home, SampleSpec(seed=2), now=NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert whole(home) == before
    assert [path.name for path in home.samples.iterdir()] == ["default"]
    assert build_samples(home, SampleSpec(seed=2), now=NOW) == whole(home)


def test_a_disk_without_room_for_intermediate_results_is_said(make_home: Callable[..., Home]) -> None:
    home = make_home()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(StoreError, match=r"spill into .*File too large.*make room"):
            build_samples(home, SampleSpec(), now=NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(home.samples.iterdir()) == []


KILLED = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
from plait.offline import parts
from plait.offline.samples import build_samples
from plait.offline.spec import SampleSpec
from plait.settings import Home

written = parts.PartWriter.close

def close(self):
    written(self)  # every row is there, and the manifest is not
    os.kill(os.getpid(), signal.SIGKILL)

parts.PartWriter.close = close
home = Home(project=Path(sys.argv[1]), root=Path(sys.argv[1]) / ".plait")
build_samples(home, SampleSpec(seed=2), now=datetime.fromisoformat(sys.argv[2]))
"""


def test_a_build_killed_in_mid_write_leaves_the_old_samples_and_the_next_one_completes(
    make_home: Callable[..., Home],
) -> None:
    home = make_home()
    before = build_samples(home, SampleSpec(), now=NOW)
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(home.project), NOW.isoformat()]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert whole(home) == before
    assert len(list(home.samples.iterdir())) == 2  # what the dead one left
    after = build_samples(home, SampleSpec(seed=3), now=NOW)
    assert whole(home) == after
    assert [path.name for path in home.samples.iterdir()] == ["default"]


def test_of_two_builds_at_once_the_last_to_end_stays_whole(make_home: Callable[..., Home]) -> None:
    home = make_home()
    specs = [SampleSpec(seed=seed, negatives=NegativeSpec(kind="uniform", per_positive=seed)) for seed in (1, 2)]
    made: list[SampleManifest] = []
    builders = [
        threading.Thread(target=lambda spec=spec: made.append(build_samples(home, spec, now=NOW))) for spec in specs
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(made) == 2
    assert whole(home) in made
    assert [path.name for path in home.samples.iterdir()] == ["default"]


@pytest.mark.parametrize("spec", [SampleSpec(), SampleSpec(negatives=NegativeSpec(kind="popularity"))])
def test_events_told_twice_and_in_any_order_give_the_same_bytes(make_home: Callable[..., Home], spec) -> None:
    home = make_home()
    clean = build_samples(home, spec, now=NOW)
    rng = np.random.default_rng(5)
    for kind in ("impressions", "feedback"):
        table = pads.dataset(home.events / kind).to_table()
        shutil.rmtree(home.events / kind)
        (home.events / kind).mkdir()
        rows = np.concatenate([rng.permutation(table.num_rows), rng.integers(0, table.num_rows, table.num_rows // 2)])
        for i, some in enumerate(np.array_split(rng.permutation(rows), 5)):
            pq.write_table(table.take(pa.array(some)), home.events / kind / f"{i}.parquet")
    again = build_samples(home, spec, now=NOW)
    assert again.data_hash == clean.data_hash
    read = {step.table: step.rows for step in again.steps if step.step == "read"}
    assert read["feedback"] > {step.table: step.rows for step in clean.steps if step.step == "read"}["feedback"]


def test_feedback_from_before_its_impression_counts_within_the_skew_and_is_counted_beyond(
    make_home: Callable[..., Home],
) -> None:
    moments = [datetime(2024, 5, 2, 12, tzinfo=UTC) + timedelta(hours=i) for i in range(40)]
    early_s = [-5, 5, 60, 7_200]  # seconds by which the feedback's clock is behind; below 0 it is not
    shown = pa.table(
        {
            "request_id": [f"r{i}" for i in range(40)],
            "timestamp": pa.array(moments, pa.timestamp("us", tz="UTC")),
            "user_id": list(range(40)),
            "item_id": [1] * 40,
        }
    )
    told = pa.table(
        {
            "event_id": [f"e{i}" for i in range(4)],
            "type": ["click"] * 4,
            "request_id": [f"r{i}" for i in range(4)],
            "user_id": list(range(4)),
            "item_id": [1] * 4,
            "timestamp": pa.array(
                [moments[i] - timedelta(seconds=early_s[i]) for i in range(4)], pa.timestamp("us", tz="UTC")
            ),
        }
    )
    home = make_home(impressions=shown, feedback=told)
    for skew, credited in ((0, 1), (10, 2), (120, 3)):
        spec = SampleSpec(attribution=AttributionSpec(skew=timedelta(seconds=skew)))
        manifest = build_samples(home, spec, now=NOW)
        assert sum(manifest.positives["click"].values()) == credited
        steps = {step.step: step.rows for step in manifest.steps if step.table == "feedback"}
        assert steps["credited to an impression"] == credited
        assert steps["left out: before its impression, by more than the skew"] == 4 - credited


def change(home: Home, kind: str, alter: Callable[[pa.Table], pa.Table], part: str = "b.parquet") -> Path:
    file = home.events / kind / part
    pq.write_table(alter(pq.read_table(file)), file)
    return file


def as_type(name: str, dtype: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, table[name].cast(dtype))


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "message"),
    [
        ("impressions", "user_id", pa.string(), r"column 'user_id' is string, expected int64"),
        ("impressions", "timestamp", pa.int64(), r"column 'timestamp' is int64, expected timestamp\[us, tz=UTC\]"),
        ("impressions", "position", pa.float64(), r"column 'position' is double, expected int32"),
        ("feedback", "item_id", pa.float64(), r"column 'item_id' is double, expected int64"),
        ("feedback", "value", pa.string(), r"column 'value' is string, expected double"),
    ],
)
def test_an_event_column_of_another_type_is_named_with_its_part(
    make_home: Callable[..., Home], kind: str, name: str, dtype: pa.DataType, message: str
) -> None:
    home = make_home()
    file = change(home, kind, as_type(name, dtype))
    with pytest.raises(DataError, match=rf"{file}: {message}.*plait data import"):
        build_samples(home, SampleSpec(), now=NOW)
    assert list(home.samples.iterdir()) == []


def test_a_part_that_lacks_a_required_column_is_named(make_home: Callable[..., Home]) -> None:
    home = make_home()
    file = change(home, "feedback", lambda table: table.drop_columns(["event_id"]))
    with pytest.raises(DataError, match=rf"{file} lacks event_id; its columns are created, "):
        build_samples(home, SampleSpec(), now=NOW)


def test_parts_written_otherwise_but_meaning_the_same_give_the_same_rows(make_home: Callable[..., Home]) -> None:
    """Shorter integers, other time units, dictionaries, an open type where all is null, a column of later releases."""
    home = make_home()
    clean = build_samples(home, SampleSpec(), now=NOW)
    change(home, "impressions", as_type("user_id", pa.int16()))
    change(home, "impressions", as_type("scene", pa.dictionary(pa.int32(), pa.string())))
    change(home, "impressions", as_type("timestamp", pa.timestamp("ns", tz="UTC")))
    change(home, "impressions", lambda table: table.append_column("device_id", pa.nulls(table.num_rows)))
    assert build_samples(home, SampleSpec(), now=NOW).data_hash == clean.data_hash


@pytest.mark.parametrize("kind", ["impressions", "feedback", "items"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "text"])
def test_a_corrupt_part_of_any_event_table_is_named(make_home: Callable[..., Home], kind: str, damage: str) -> None:
    home = make_home(items=pa.table({"item_id": list(range(1, 40))}))
    file = home.events / kind / "b.parquet"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-20], "emptied": b"", "text": b"item_id\n1\n2\n"}[damage])
    with pytest.raises(DataError, match=rf"{file} is not a readable parquet file"):
        build_samples(home, SampleSpec(negatives=NegativeSpec(kind="uniform")), now=NOW)
    assert list(home.samples.iterdir()) == []


def test_items_of_the_items_table_are_drawn_only_after_they_were_created(make_home: Callable[..., Home]) -> None:
    late = datetime(2024, 5, 12, tzinfo=UTC)
    stamp = pa.timestamp("us", tz="UTC")
    items = pa.table(
        {
            "item_id": [101, 102, 103, 104],
            "event_timestamp": pa.array([late, late, None, None], stamp),
            "created": pa.array([late, late - timedelta(days=5), late, None], stamp),
        }
    )
    home = make_home(items=items)
    build_samples(home, SampleSpec(negatives=NegativeSpec(kind="uniform", per_positive=20)), now=NOW)
    rows = pads.dataset(sorted((home.samples / "default").glob("*.parquet"))).to_table().to_pylist()
    first = {}
    for row in rows:
        if row["origin"] == "uniform":
            first.setdefault(row["item_id"], row["event_timestamp"])
    begin = rows[0]["event_timestamp"]
    assert late <= first[101] < late + timedelta(days=1)
    assert late - timedelta(days=5) <= first[102] < late - timedelta(days=4)  # the earlier of both times
    assert late <= first[103] < late + timedelta(days=1)
    assert first[104] < begin + timedelta(days=1)  # nobody knows since when: always
