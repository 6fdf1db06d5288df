"""Training sets joined by Plait's own expression, on DuckDB and on Spark: the bytes that the offline store gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import StoreError, UnknownNameError
from plait.offline.asof import CREATED, EVENT, ROW, TIME, AsofView, features_as_of, withheld
from plait.offline.build import build_dataset
from plait.offline.dataset import Dataset
from plait.offline.engine import Engine, open_engine
from plait.offline.samples import build_samples
from plait.offline.spec import SampleSpec
from tests.dataset.conftest import MICROS, N_DAYS, N_USERS, at, write

SPARK = [
    pytest.mark.slow,
    pytest.mark.spark,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:pyspark", "ignore::ResourceWarning", "ignore::UserWarning:pyspark"
    ),
]
KEYS = {"case": pa.int64(), "user": pa.int64(), "genre": pa.string()}


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=SPARK)])
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine; Spark runs by then."""
    if request.param == "spark":
        request.getfixturevalue("spark")
    return request.param


# Few keys and few moments, so that ties, gaps, late rows and nulls all happen.
MOMENT = st.one_of(st.none(), st.integers(0, 9))
KEY = st.tuples(st.one_of(st.none(), st.integers(0, 1)), st.one_of(st.none(), st.sampled_from("ab")))
HISTORY = st.lists(st.tuples(KEY, MOMENT, MOMENT, st.one_of(st.none(), st.integers(0, 99))), max_size=14)
ASKED = st.lists(st.tuples(KEY, st.one_of(st.none(), st.integers(-1, 12))), min_size=1, max_size=8)
CASE = st.tuples(HISTORY, ASKED)


def seen(history: list, key: tuple, moment: int | None, ttl: int | None, cutoff: bool) -> int | None:
    """The index of the row of `history` that a moment sees, by the definition."""
    if moment is None or None in key:
        return None
    best: tuple | None = None
    for i, (of, event, created, _) in enumerate(history):
        if of != key or event is None or event > moment:
            continue
        if cutoff and (created is None or created > moment):
            continue
        newness = (event, -1 if created is None else created, i)
        best = newness if best is None else max(best, newness)
    if best is None or (ttl is not None and best[0] + ttl < moment):
        return None
    return best[2]


def as_tables(cases: list) -> tuple[pa.Table, pa.Table]:
    """(asked moments, histories) of all cases, told apart by a key more, the number of the case."""
    asked = [(case, *key, moment) for case, (_, rows) in enumerate(cases) for key, moment in rows]
    told = [(case, i, *row) for case, (rows, _) in enumerate(cases) for i, row in enumerate(rows)]
    frame = {name: pa.array([row[i] for row in asked], dtype) for i, (name, dtype) in enumerate(KEYS.items())}
    frame |= {TIME: pa.array([row[3] for row in asked], pa.int64()), ROW: pa.array(range(len(asked)), pa.int64())}
    history = {
        "case": pa.array([row[0] for row in told], pa.int64()),
        "user": pa.array([row[2][0] for row in told], pa.int32()),  # the frame's is 64 bits wide
        "genre": pa.array([row[2][1] for row in told], pa.string()),
        EVENT: pa.array([row[3] for row in told], pa.int64()),
        CREATED: pa.array([row[4] for row in told], pa.int64()),
        "written": pa.array([row[1] for row in told], pa.int64()),
        "value": pa.array([row[5] for row in told], pa.int64()),
        "list": pa.array([[row[1]] for row in told], pa.list_(pa.int64())),
    }
    order = np.random.default_rng(0).permutation(len(told))  # the order of the rows says nothing, `written` does
    return pa.table(frame), pa.table(history).take(pa.array(order, pa.int64()))


def check(engine: Engine, cases: list, ttl: int | None, cutoff: bool) -> int:
    """Compare every asked moment of every case with the loop; how many saw a value."""
    frame, history = (engine.from_arrow(table) for table in as_tables(cases))
    view = AsofView(
        rows=history, keys=tuple(KEYS), features=("value", "list"), written=("written",), ttl_us=ttl, cutoff=cutoff
    )
    found = {row[ROW]: row for row in engine.to_arrow(features_as_of(frame, [view])).to_pylist()}
    asked = [(history, key, moment) for history, rows in cases for key, moment in rows]
    assert sorted(found) == list(range(len(asked)))
    n_seen = older = none = 0
    for i, (rows, key, moment) in enumerate(asked):
        index = seen(rows, key, moment, ttl, cutoff)
        assert found[i]["list"] == (None if index is None else [index]), (rows, key, moment)
        assert found[i]["value"] == (None if index is None else rows[index][3])
        n_seen += index is not None
        newest = seen(rows, key, moment, ttl, False)
        if cutoff and newest is not None and newest != index:
            none += index is None
            pair = [None if at_ is None else (rows[at_][1], rows[at_][2]) for at_ in (index, newest)]
            older += index is not None and pair[0] != pair[1]
    if cutoff:
        counted = engine.to_arrow(withheld(frame, view)).to_pylist()[0]
        assert (counted["older"], counted["none"]) == (older, none)
    return n_seen


@settings(max_examples=25, deadline=None)
@given(case=CASE, ttl=st.one_of(st.none(), st.integers(1, 5)), cutoff=st.booleans())
def test_the_join_agrees_with_the_loop(case: Any, ttl: int | None, cutoff: bool) -> None:
    with open_engine("duckdb") as engine:
        check(engine, [case], ttl, cutoff)


def random_cases(n: int) -> list:
    """Cases like those hypothesis makes, many at once: an engine that takes a second a query gets them in one."""
    rng = np.random.default_rng(8)

    def key() -> tuple:
        return (rng.choice([None, 0, 1], p=[0.1, 0.45, 0.45]), rng.choice([None, "a", "b"], p=[0.1, 0.45, 0.45]))

    def moment(low: int, high: int) -> int | None:
        return None if rng.random() < 0.08 else int(rng.integers(low, high))

    return [
        (
            [(key(), moment(0, 10), moment(0, 10), moment(0, 99)) for _ in range(rng.integers(0, 15))],
            [(key(), moment(-1, 13)) for _ in range(rng.integers(1, 9))],
        )
        for _ in range(n)
    ]


def test_the_join_agrees_with_the_loop_on_hundreds_of_cases(engine: str) -> None:
    with open_engine(engine) as running:
        for ttl, cutoff in ((None, False), (4, True)):
            assert check(running, random_cases(300), ttl, cutoff) > 200


OWN_SPARK = """
import sys
from pathlib import Path

from plait.offline.engine import open_engine
from tests.dataset.test_engines import check, random_cases

with open_engine("spark", memory="1GB", threads=2, scratch=Path(sys.argv[1])) as engine:
    from pyspark.sql import SparkSession

    assert check(engine, random_cases(60), 4, True) > 40
    names = ("spark.master", "spark.driver.memory", "spark.sql.shuffle.partitions", "spark.sql.codegen.wholeStage")
    print("settings:", *(engine.spark.conf.get(name) for name in names))
print("running:", SparkSession.getActiveSession())
"""


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.skipif(shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="no Java: Spark cannot run")
def test_where_no_spark_runs_an_engine_starts_one_and_stops_it(tmp_path: Path) -> None:
    """In a process of its own, as a command's is: all other tests share one Spark, without code generation."""
    unwanted = ("PLAIT_SPARK_MASTER", "PLAIT_MEMORY")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    ran = subprocess.run(
        [sys.executable, "-c", OWN_SPARK, tmp_path],
        cwd=Path(__file__).parents[2],
        env={**environment, "PLAIT_SPARK_PARTITIONS": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines() == ["settings: local[2] 1g 3 true", "running: None"]
    assert not list(tmp_path.iterdir())


def rebuilt(project: SimpleNamespace, service: str, **options: Any) -> tuple[Dataset, list[str]]:
    """The dataset built anew, though one of its key may be there; and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = build_dataset(project.home, service, **options)
    told = sorted(str(warning.message) for warning in caught if "created_cutoff" in str(warning.message))
    for part in dataset.manifest.parts:  # read before the folder goes
        assert (dataset.folder / part.path).exists()
    shutil.rmtree(dataset.folder)
    return dataset, told


def spoil(project: SimpleNamespace) -> None:
    """Rows told late, told twice, of equal times in two parts, and without a time of telling."""
    rng = np.random.default_rng(4)
    for name in ("user_stats", "user_genre"):
        table = project.features[name]
        late = [
            None if rng.random() < 0.1 else moment + timedelta(hours=float(rng.choice([0, 0, 30, 200])))
            for moment in table["event_timestamp"].to_pylist()
        ]
        table = table.set_column(table.schema.get_field_index("created"), "created", pa.array(late, MICROS))
        write(project.home.features / name, table)
        again = table.take(pa.array(rng.permutation(table.num_rows)[: table.num_rows // 2]))
        value = table.column_names[-1]
        other = pa.nulls(again.num_rows, again[value].type) if value == "recent" else pa.array(
            rng.integers(0, 99, again.num_rows), again[value].type
        )  # fmt: skip
        write(
            project.home.features / name,
            again.set_column(again.schema.get_field_index(value), value, other),
            "part-1.parquet",
        )


def set_up(project: SimpleNamespace, *, cutoff: bool = False) -> None:
    """Sources that are folders, a view with an on-demand transform on it, samples."""
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
    from feast.types import Float64, Int64

    from feature_repo.transforms import request_context as compute
    from plait.service import open_store
    from plait.transforms import on_demand_view

    config = project.home.project / "feature_store.yaml"
    if cutoff:
        config.write_text(config.read_text().replace("online_store:", "  created_cutoff: on\nonline_store:"))
    project.store = open_store(project.home)
    for view in project.store.list_feature_views():
        path = project.home.features / view.name
        view.batch_source = FileSource(
            name=f"{view.name}_source",
            path=str(path),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )
        project.store.apply([view])
    rng = np.random.default_rng(7)
    seen_at = [at(float(day)) for day in np.sort(rng.uniform(0, N_DAYS, 60))]
    last = [None if rng.random() < 0.2 else int(moment.timestamp()) for moment in seen_at]
    table = pa.table(
        {
            "user_id": pa.array(rng.integers(1, N_USERS, 60), pa.int64()),
            "moment": pa.array(seen_at, MICROS),
            "last": pa.array(last, pa.int64()),
            # Not what Feast calls so: the mapping gives the name to the column above.
            "user_last_event_at": pa.array(range(60), pa.int64()),
        }
    )
    write(project.home.features / "last_seen", table)
    source = FileSource(
        name="last_seen_source",
        path=str(project.home.features / "last_seen"),
        timestamp_field="moment",
        field_mapping={"last": "user_last_event_at"},
    )
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    last_seen = FeatureView(
        name="last_seen",
        entities=[user],
        schema=[Field(name="user_id", dtype=Int64), Field(name="user_last_event_at", dtype=Int64)],
        source=source,
        ttl=timedelta(days=9),
    )
    context = on_demand_view(
        name="request_context",
        sources=[
            last_seen,
            RequestSource(name="request", schema=[Field(name="request_timestamp", dtype=Int64)]),
        ],
        schema=[
            Field(name="hour", dtype=Int64),
            Field(name="weekday", dtype=Int64),
            Field(name="days_since_last_event", dtype=Float64),
        ],
        function=compute,
    )
    views = [project.store.get_feature_view(name) for name in ("user_stats", "item_profile", "user_genre")]
    service = FeatureService(
        name="all_of_it", features=[*views, context], tags={"plait.derived_keys": "genre=item_profile:primary_genre"}
    )
    project.store.apply([user, last_seen, context, service])
    build_samples(project.home, SampleSpec())


@pytest.mark.parametrize("project", ["plait"], indirect=True)
@pytest.mark.parametrize("cutoff", [False, True])
def test_an_engine_writes_the_bytes_of_the_offline_store(project: SimpleNamespace, engine: str, cutoff: bool) -> None:
    set_up(project, cutoff=cutoff)
    spoil(project)
    stored, told = rebuilt(project, "all_of_it", store=project.store)
    joined, told_here = rebuilt(project, "all_of_it", store=project.store, engine=engine, memory="1GB")
    assert joined.manifest.parts == stored.manifest.parts
    assert joined.manifest.key == stored.manifest.key
    assert told_here == told
    assert len(told) == (2 if cutoff else 0)
    assert joined.features[-3:] == ("hour", "weekday", "days_since_last_event")


@pytest.mark.parametrize("project", ["stock"], indirect=True)
def test_an_engine_joins_whatever_the_offline_store_is(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    stored, _ = rebuilt(project, "tiny_clicks", store=project.store)
    joined, _ = rebuilt(project, "tiny_clicks", store=project.store, engine="duckdb")
    assert joined.manifest.data_hash == stored.manifest.data_hash
    assert joined.manifest.key != stored.manifest.key


@pytest.mark.parametrize("project", ["plait"], indirect=True)
def test_a_dataset_is_reused_whichever_engine_made_it(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    first = build_dataset(project.home, "tiny_users", store=project.store, engine="duckdb")
    again = build_dataset(project.home, "tiny_users", store=project.store)
    assert again.folder == first.folder and again.manifest.created == first.manifest.created
    assert not list(first.folder.rglob(".work"))


@pytest.mark.parametrize("project", ["plait"], indirect=True)
def test_what_an_engine_cannot_read_is_said_and_leaves_nothing(project: SimpleNamespace) -> None:
    from feast import FileSource
    from feast.data_format import DeltaFormat

    build_samples(project.home, SampleSpec())
    with pytest.raises(UnknownNameError, match="did you mean 'duckdb'"):
        build_dataset(project.home, "tiny_users", store=project.store, engine="duckd")
    view = project.store.get_feature_view("user_stats")
    path = view.batch_source.path
    cases = {
        "no column 'made'; did you mean|no column 'made'": {"path": path, "created_timestamp_column": "made"},
        r"source 'odd' \(FileSource\) is not readable by --engine duckdb": {"path": path, "file_format": DeltaFormat()},
        "nothing at": {"path": path + "x"},
    }
    for message, options in cases.items():
        view.batch_source = FileSource(name="odd", timestamp_field="event_timestamp", **options)
        project.store.apply([view])
        with pytest.raises(StoreError, match=message):
            build_dataset(project.home, "tiny_users", store=project.store, engine="duckdb")
    assert list(project.home.datasets.iterdir()) == []


@pytest.mark.parametrize("project", ["plait"], indirect=True)
def test_the_command_takes_an_engine_and_its_memory(project: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.cli import cli

    monkeypatch.chdir(project.home.project)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    build_samples(project.home, SampleSpec())
    run = CliRunner().invoke(cli, ["dataset", "build", "tiny", "--engine", "duckdb", "--memory", "500MB", "--no-card"])
    assert run.exit_code == 0, run.output
    assert "built " in run.output
    alone = CliRunner().invoke(cli, ["dataset", "build", "tiny", "--memory", "500MB"])
    assert alone.exit_code == 2
    assert "--memory is for --engine" in alone.output
    odd = CliRunner().invoke(
        cli, ["dataset", "build", "--service", "tiny_users", "--engine", "duckdb", "--memory", "x"]
    )
    assert odd.exit_code == 2
    assert "memory limit 'x' is not a size" in odd.output


def test_without_java_spark_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from plait.errors import SettingsError

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(SettingsError, match="needs Java 17"), open_engine("spark"):
        pass
