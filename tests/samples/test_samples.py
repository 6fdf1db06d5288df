"""`plait samples build` as a whole: contents, counts, both engines, bad input."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from plait.errors import DataError, PlaitError, SpecError, UnknownNameError
from plait.offline.engine import open_engine
from plait.offline.samples import STAGES, build_samples, output_schema, read_manifest, sample_rows
from plait.offline.spec import (
    AttributionSpec,
    FilterSpec,
    LabelSpec,
    NegativeSpec,
    SampleSpec,
    SplitSpec,
    WeightSpec,
    from_dict,
    read_spec,
)
from plait.settings import Home
from tests.samples.conftest import random_events

NOW = datetime(2024, 5, 25, tzinfo=UTC)
MANY = SampleSpec(
    labels=(
        LabelSpec(name="click", types=("click",)),
        LabelSpec(name="like", types=("rating",), min_value=4),
        LabelSpec(name="long", types=("dwell",), min_value=4, total=True, window=timedelta(hours=5)),
    ),
    filters=FilterSpec(max_per_day=60, max_click_rate=0.9, min_session=2, min_user=3, min_item=2),
    weights=WeightSpec(kind="propensity", clip=5),
)


def read(home: Home, name: str = "default") -> pa.Table:
    return pads.dataset(sorted((home.samples / name).glob("*.parquet"))).to_table()


def test_samples_hold_one_row_per_impression_in_time_order(make_home: Callable[..., Home]) -> None:
    home = make_home()
    manifest = build_samples(home, SampleSpec(), now=NOW)
    table = read(home)
    assert table.schema.equals(output_schema(SampleSpec()))
    assert table.column("sample_id").to_pylist() == list(range(450))
    stamps = table.column("event_timestamp").to_pylist()
    assert stamps == sorted(stamps)
    assert sum(manifest.rows.values()) == 450
    assert (
        manifest.positives["click"]["train"]
        == pc.sum(table.filter(pc.equal(table["split"], "train")).column("click")).as_py()
    )
    assert read_manifest(home.samples / "default") == manifest


def test_a_value_or_propensity_that_is_not_a_number_is_missing(make_home: Callable[..., Home]) -> None:
    """SQL holds NaN greater than every number: it made likes, sums and the greatest weight."""
    tables = random_events(1)
    found = []
    for missing in (None, float("nan"), float("inf")):
        changed = {}
        for kind, column in (("feedback", "value"), ("impressions", "propensity")):
            told = tables[kind].column(column).to_pylist()
            odd = pa.array([missing if i % 3 == 0 else value for i, value in enumerate(told)], pa.float64())
            place = tables[kind].schema.get_field_index(column)
            changed[kind] = tables[kind].set_column(place, column, odd)
        build_samples(make_home(**changed), MANY, now=NOW)
        found.append(read(make_home(**changed)).to_pylist())
    assert found[0] == found[1] == found[2]
    assert 0 < sum(row["like"] for row in found[1]) < len(found[1])


def test_the_steps_say_where_rows_went(make_home: Callable[..., Home]) -> None:
    home = make_home()
    raw = pads.dataset(home.events / "impressions").to_table()
    steps = build_samples(home, MANY, now=NOW).steps
    rows = [(step.table, step.step, step.rows) for step in steps]
    assert rows[0] == ("impressions", "read", raw.num_rows)
    assert rows[1] == ("impressions", "complete", raw.num_rows - 1)
    assert rows[2] == ("impressions", "without duplicates", 450)
    assert rows[6][1].startswith("joined to feedback: ")
    left = [n for table, _, n in rows if table == "samples"]
    assert left == sorted(left, reverse=True)


def test_of_an_impression_logged_twice_the_first_known_counts(make_home: Callable[..., Home]) -> None:
    home = make_home()
    build_samples(home, SampleSpec(), now=NOW)
    assert pc.max(read(home).column("position")).as_py() == 3


def test_young_samples_are_marked_or_dropped(make_home: Callable[..., Home]) -> None:
    home = make_home()
    spec = SampleSpec(attribution=AttributionSpec(window=timedelta(days=3)))
    now = datetime(2024, 5, 18, tzinfo=UTC)
    marked = build_samples(home, spec, now=now)
    table = read(home)
    for row in table.select(["event_timestamp", "label_mature"]).to_pylist():
        assert row["label_mature"] == (row["event_timestamp"] <= now - timedelta(days=3))
    dropped = build_samples(home, SampleSpec(attribution=spec.attribution, immature="drop"), now=now)
    assert 0 < marked.immature == sum(marked.rows.values()) - sum(dropped.rows.values())
    assert dropped.immature == 0


def test_building_twice_gives_the_same_bytes(make_home: Callable[..., Home]) -> None:
    home = make_home()
    spec = SampleSpec(negatives=NegativeSpec(kind="popularity"), split=SplitSpec(kind="user"))
    assert build_samples(home, spec, now=NOW).data_hash == build_samples(home, spec, now=NOW).data_hash


COMBINATIONS = [
    MANY,
    SampleSpec(
        attribution=AttributionSpec(join="user_item", touch="any"),
        split=SplitSpec(kind="user_time"),
        weights=WeightSpec(kind="position"),
        negatives=NegativeSpec(kind="in_batch", batch=20),
    ),
    SampleSpec(negatives=NegativeSpec(kind="popularity", keep_impressions=True), split=SplitSpec(kind="leave_one_out")),
    SampleSpec(negatives=NegativeSpec(kind="uniform"), split=SplitSpec(kind="user"), seed=9),
    SampleSpec(negatives=NegativeSpec(kind="hard", per_positive=1)),
]


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_spark_and_duckdb_write_equal_rows(make_home: Callable[..., Home]) -> None:
    home = make_home(seed=4)
    notes: dict[str, list] = {"duckdb": [], "spark": []}
    tables: dict[str, list[pa.Table]] = {"duckdb": [], "spark": []}
    for name in ("duckdb", "spark"):
        with open_engine(name, threads=2) as engine:
            for spec in COMBINATIONS:
                steps = []
                rows = sample_rows(engine, home, spec, now=NOW, note=lambda *step, to=steps: to.append(step))
                rows = rows.order_by("timestamp", "request_id", "user_id", "item_id", "origin", "slot")
                notes[name].append(steps)
                names = [f.name for f in output_schema(spec) if f.name not in ("sample_id", "event_timestamp")]
                tables[name].append(engine.to_arrow(rows.select("timestamp", *names)))
    for spec, duckdb, spark in zip(COMBINATIONS, tables["duckdb"], tables["spark"], strict=True):
        schema = duckdb.schema
        assert duckdb.num_rows > 100
        assert spark.cast(schema).equals(duckdb), spec
    assert notes["duckdb"] == notes["spark"]


def command(home: Home, *words: str):
    from plait.cli import cli

    return CliRunner(env={"PLAIT_HOME": str(home.root)}).invoke(cli, ["samples", "build", *words])


def test_each_stage_is_told_as_it_begins_before_its_counts(make_home: Callable[..., Home]) -> None:
    told: list[tuple] = []
    build_samples(
        make_home(),
        MANY,
        now=NOW,
        progress=lambda *call: told.append(call),
        report=lambda step: told.append((step.table, step.step.partition(":")[0])),
    )
    assert [call for call in told if len(call) == 3] == [(name, i, len(STAGES)) for i, name in enumerate(STAGES)]
    stage = ""
    begun = {}
    for call in told:
        stage = call[0] if len(call) == 3 else stage
        begun.setdefault(call, stage)
    assert begun["impressions", "read"] == "impressions"
    assert begun["feedback", "without duplicates"] == "feedback"
    assert begun["samples", "joined to feedback"] == "join"
    assert begun["samples", "written"] == "write"


def test_the_command_prints_counts_and_rates(make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_home()
    monkeypatch.chdir(home.project)
    result = command(
        home, "--label", "click", "--label", "like=rating>=4", "--negatives", "uniform:2", "--window", "2d"
    )
    assert result.exit_code == 0, result.output
    assert "with uniform negatives" in result.output
    assert re.search(r"train +[\d,]+  click \d+\.\d+%, like \d+\.\d+%", result.output)
    manifest = read_manifest(home.samples / "default")
    assert manifest.spec["attribution"]["window"] == 172_800
    assert list(manifest.positives) == ["click", "like"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label", "clik"], "did you mean 'click'"),
        (["--label", "a=b=c"], "is none of NAME"),
        (["--window", "3 fortnights"], "not a duration"),
        (["--negatives", "unifrom:2"], "did you mean 'uniform'"),
        (["--negatives", "uniform:many"], "KIND:NUMBER"),
        (["--spec", "missing.yaml"], "no sample specification"),
        (["--scene", "nowhere"], "no impression is left"),
        (["--memory", "lots"], "not a size"),
    ],
)
def test_a_wrong_choice_ends_in_one_line_and_leaves_the_old_samples(
    make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    home = make_home()
    monkeypatch.chdir(home.project)
    before = build_samples(home, SampleSpec(), now=NOW)
    result = command(home, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert read_manifest(home.samples / "default") == before
    assert [path.name for path in home.samples.iterdir()] == ["default"]


def test_a_missing_table_is_named(make_home: Callable[..., Home]) -> None:
    home = make_home()
    shutil.rmtree(home.events / "feedback")
    with pytest.raises(DataError, match=r"no feedback in .*plait data prepare"):
        build_samples(home, SampleSpec(), now=NOW)


def test_a_missing_column_is_named(make_home: Callable[..., Home]) -> None:
    home = make_home()
    for file in (home.events / "impressions").glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["item_id"]), file)
    with pytest.raises(DataError, match="lacks item_id"):
        build_samples(home, SampleSpec(), now=NOW)


def test_a_corrupt_part_is_named(make_home: Callable[..., Home]) -> None:
    home = make_home()
    part = home.events / "impressions" / "b.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"b\.parquet is not a readable parquet file"):
        build_samples(home, SampleSpec(), now=NOW)


def test_a_part_corrupt_in_its_pages_is_an_error_and_not_half_a_result(make_home: Callable[..., Home]) -> None:
    home = make_home()
    part = home.events / "impressions" / "b.parquet"
    content = bytearray(part.read_bytes())
    content[100:600] = bytes(500)
    part.write_bytes(content)
    with pytest.raises(DataError, match=str(part)):
        build_samples(home, SampleSpec(), now=NOW)
    assert list(home.samples.iterdir()) == []


def test_labels_of_one_class_are_refused(make_home: Callable[..., Home]) -> None:
    home = make_home()
    impossible = SampleSpec(labels=(LabelSpec(name="click", types=("rating",), min_value=1000),))
    with pytest.raises(DataError, match=r"is 0 in all .* training samples"):
        build_samples(home, impossible, now=NOW)


def test_a_failed_write_leaves_the_old_samples(make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_home()
    before = build_samples(home, SampleSpec(), now=NOW)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plait.offline.parts.pq.ParquetWriter.write_table", full)
    with pytest.raises((OSError, PlaitError), match="No space left"):
        build_samples(home, SampleSpec(seed=2), now=NOW)
    assert read_manifest(home.samples / "default") == before
    assert [path.name for path in home.samples.iterdir()] == ["default"]


def test_a_spec_survives_its_manifest(tmp_path: Path) -> None:
    assert from_dict(MANY.to_dict()) == MANY


def test_a_yaml_spec_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "samples.yaml"
    path.write_text("labels: [click, like=rating>=4]\nattribution: {window: 12h}\nnegatives: {kind: hard}\n")
    spec = read_spec(path)
    assert (spec.label, spec.attribution.window, spec.negatives.kind) == ("click", timedelta(hours=12), "hard")
    for text, message in [
        ("atribution: {}", "did you mean 'attribution'"),
        ("negatives: {per_positiv: 3}", "did you mean 'per_positive'"),
        ("negatives: {per_positive: three}", "not of type int"),
        ("split: {train: 1.2}", "not shares"),
        ("labels: 7", "give a list"),
        ("seed: -1", "seed"),
        ("- 1", "expected keys"),
        ("a: [", "not YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(SpecError, match=message):
            read_spec(path)


def test_an_unknown_engine_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'duckdb'"), open_engine("duckdbb"):
        pass
