"""Faults while a dataset is built: each ends in a clear error or a complete result, never half."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.errors import DataError, PlaitError, StoreError
from plait.offline import parts
from plait.offline.build import build_dataset
from plait.offline.dataset import Dataset
from plait.offline.samples import build_samples
from plait.offline.spec import SampleSpec, SplitSpec

ours = pytest.mark.parametrize("project", ["plait"], indirect=True)


def whole(project: SimpleNamespace) -> list[Dataset]:
    """Every dataset folder, each checked to the last byte; nothing else lies beside them."""
    folders = sorted(project.home.datasets.iterdir())
    return [Dataset.open(folder, verify=True) for folder in folders]


@ours
@pytest.mark.parametrize("engine", [None, "duckdb"])
def test_a_disk_that_fills_up_leaves_no_dataset_and_the_next_build_completes(
    project: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, engine: str | None
) -> None:
    build_samples(project.home, SampleSpec())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    opened = parts.PartWriter.__init__

    def small(self: parts.PartWriter, *args, **kwargs) -> None:
        opened(self, *args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))  # the kernel refuses what goes beyond

    monkeypatch.setattr(parts.PartWriter, "__init__", small)
    try:
        with pytest.raises(StoreError, match="File too large"):
            build_dataset(project.home, "tiny_clicks", store=project.store, engine=engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert list(project.home.datasets.iterdir()) == []
    built = build_dataset(project.home, "tiny_clicks", store=project.store, engine=engine)
    assert whole(project) == [built]


KILLED = """
import os, signal, sys
from pathlib import Path
from plait.offline import parts
from plait.offline.build import build_dataset
from plait.settings import Home

written = parts.PartWriter.close

def close(self):
    written(self)  # a part is there, and the manifest is not
    os.kill(os.getpid(), signal.SIGKILL)

parts.PartWriter.close = close
build_dataset(Home(project=Path(sys.argv[1]), root=Path(sys.argv[1]) / ".plait"), "tiny_clicks")
"""


@ours
def test_a_build_killed_in_mid_write_leaves_the_datasets_and_the_next_one_completes(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    before = build_dataset(project.home, "tiny_clicks", store=project.store)
    build_samples(project.home, SampleSpec(split=SplitSpec(kind="user")))
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(project.home.project)]
    assert subprocess.run(command, check=False, cwd=project.home.project).returncode == -signal.SIGKILL
    assert len(list(project.home.datasets.iterdir())) == 2  # and what the dead one left
    assert Dataset.open(before.folder, verify=True) == before
    after = build_dataset(project.home, "tiny_clicks", store=project.store)
    assert sorted(each.folder for each in whole(project)) == sorted([before.folder, after.folder])


@ours
def test_of_two_builds_of_one_dataset_at_once_both_give_it_whole(project: SimpleNamespace) -> None:
    from plait.service import open_store

    build_samples(project.home, SampleSpec())
    stores = [open_store(project.home) for _ in range(2)]
    made: list[Dataset | BaseException] = []

    def build(store: object) -> None:
        try:
            made.append(build_dataset(project.home, "tiny_clicks", store=store))
        except BaseException as error:
            made.append(error)

    builders = [threading.Thread(target=build, args=(store,)) for store in stores]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    (found,) = whole(project)
    assert [getattr(each, "manifest", each) and each.manifest.data_hash for each in made] == [
        found.manifest.data_hash
    ] * 2


def test_a_corrupt_part_of_the_samples_is_named(project: SimpleNamespace) -> None:
    manifest = build_samples(project.home, SampleSpec())
    part = project.home.samples / "default" / manifest.parts[0].path
    content = part.read_bytes()
    for damaged in (content[:-9], bytes(400) + content[400:], b""):
        part.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{part} cannot be read .*run `plait samples build` again"):
            build_dataset(project.home, "tiny_users", store=project.store)
        assert list(project.home.datasets.iterdir()) == []
    part.unlink()
    with pytest.raises(DataError, match=f"{part}"):
        build_dataset(project.home, "tiny_users", store=project.store)


@ours
@pytest.mark.parametrize("engine", [None, "duckdb"])
def test_a_corrupt_part_of_a_feature_table_is_named(project: SimpleNamespace, engine: str | None) -> None:
    build_samples(project.home, SampleSpec())
    part = project.home.features / "user_stats" / "part-0.parquet"
    content = part.read_bytes()
    for damaged in (content[:-9], content[:4] + bytes(400) + content[404:]):
        part.write_bytes(damaged)
        with pytest.raises(PlaitError, match=re.escape(str(part))):
            build_dataset(project.home, "tiny_users", store=project.store, engine=engine)
        assert list(project.home.datasets.iterdir()) == []


def alter(project: SimpleNamespace, view: str, change: Callable[[pa.Table], pa.Table]) -> Path:
    part = project.home.features / view / "part-0.parquet"
    pq.write_table(change(pq.read_table(part)), part)
    return part


def as_type(name: str, dtype: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, table[name].cast(dtype))


def test_a_feature_that_its_table_no_longer_holds_is_named(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    part = alter(project, "user_stats", lambda table: table.rename_columns({"mean_7d": "mean_7days"}))
    message = (
        rf"feature 'mean_7d' of user_stats: no column 'mean_7d' in {part} \(expected float\); did you mean 'mean_7da"
    )
    with pytest.raises(DataError, match=message):
        build_dataset(project.home, "tiny_users", store=project.store)
    assert list(project.home.datasets.iterdir()) == []


@pytest.mark.parametrize(
    ("view", "name", "dtype", "expected"),
    [
        ("user_stats", "mean_7d", pa.string(), "float"),
        ("item_profile", "n_shown", pa.string(), "int64"),
        ("user_stats", "recent", pa.list_(pa.string()), r"list<.*int64>"),
    ],
)
def test_a_feature_of_another_type_is_named_with_both_types(
    project: SimpleNamespace, view: str, name: str, dtype: pa.DataType, expected: str
) -> None:
    build_samples(project.home, SampleSpec())
    part = alter(project, view, as_type(name, dtype))
    found = re.escape(str(pq.read_schema(part).field(name).type))
    message = rf"feature '{name}' of {view}: {part} holds {found}, expected {expected}; run `plait features build`"
    with pytest.raises(DataError, match=message):
        build_dataset(project.home, "tiny_clicks", store=project.store)
    assert list(project.home.datasets.iterdir()) == []


def test_numbers_may_be_stored_wider_or_narrower_than_declared(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    first = build_dataset(project.home, "tiny_clicks", store=project.store)
    alter(project, "user_stats", as_type("mean_7d", pa.float64()))
    alter(project, "item_profile", as_type("n_shown", pa.int16()))
    alter(project, "user_genre", as_type("n_genre", pa.float64()))
    second = build_dataset(project.home, "tiny_clicks", store=project.store)
    assert second.folder != first.folder
    assert second.manifest.data_hash == first.manifest.data_hash
    # A table without a view's features, of which the service reads none, is nobody's business.
    alter(project, "item_profile", lambda table: table.drop_columns(["n_shown"]))
    assert build_dataset(project.home, "tiny_users", store=project.store).manifest.rows == first.manifest.rows
