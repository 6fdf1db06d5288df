"""A report whose pass over the events runs on Spark says what DuckDB's says."""

from __future__ import annotations

import json
import math
from datetime import timedelta

import pytest
from click.testing import CliRunner

from experiments.metrics import parse_metrics
from experiments.report import build_report
from experiments.report_commands import report
from tests.experiment_stats.test_report import METRICS, metrics, random_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.spark,
    pytest.mark.usefixtures("spark"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:pyspark", "ignore::ResourceWarning", "ignore::UserWarning:pyspark"
    ),
]
RANKINGS = [
    {"name": measure, "type": "ranking", "measure": measure, "k": 2, "gains": {"click": 1, "purchase": 2.5}}
    for measure in ("precision", "recall", "hit_rate")
]


def assert_same(ours, theirs, path="report"):
    """Equal but for the last digits of sums, which depend on their order."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{path}[{i}]")
    elif isinstance(ours, float):
        assert math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12), f"{path}: {ours} and {theirs}"
    else:
        assert ours == theirs, path


def as_plain(result):
    plain = json.loads(json.dumps(result.to_dict(), default=lambda value: value.tolist()))
    plain.pop("created", None)
    return plain


@pytest.mark.parametrize("unit_kind", ["user", "request", "device"])
def test_spark_and_duckdb_write_the_same_report(log, unit_kind):
    random_log(log, 7)
    if unit_kind != "user":
        requests = [f"q{i}" for i in range(120)]
        units = requests if unit_kind == "request" else [f"device \\{i % 40}'s" for i in range(120)]
        arms = ["control" if hash_ % 2 else "new" for hash_ in (i % 40 for i in range(120))]
        log.exposures(units, arms, -100.0, unit_kind=unit_kind, request_ids=requests, counterfactual=True)
        log.exposures(units, arms, -120.0, unit_kind=unit_kind, request_ids=requests)  # plain, and before
    else:
        other = ["x" if user % 2 else "y" for user in range(60)]
        log.exposures(range(60), other, 0.0, experiment="other", layer="elsewhere")
    log.users(range(65), country=[("de", "fr", "it")[user % 3] for user in range(65)])
    declared = parse_metrics({"metrics": [*METRICS, *RANKINGS], "analysis": {"bootstrap": 0, "segments": ["country"]}})
    found = [
        as_plain(build_report(log.home, "test", metrics=declared, until=log.until - timedelta(days=19), engine=engine,
                              despite_mismatch=True, triggered=unit_kind == "device"))
        for engine in ("duckdb", "spark")
    ]  # fmt: skip
    assert found[0]["metrics"], "a report without metrics proves nothing"
    assert_same(*found)


def test_an_empty_table_and_the_command_line(log, monkeypatch):
    log.exposures(range(40), ["control", "new"] * 20)
    log.feedback(range(40), 2.0)
    (log.home.project / "experiments").mkdir()
    monkeypatch.chdir(log.home.project)
    texts = []
    for engine in ("duckdb", "spark"):
        ran = CliRunner().invoke(report, ["test", "--until", "2026-03-20", "--engine", engine])
        assert ran.exit_code == 0, ran.output
        texts.append(ran.output)
    assert texts[0] == texts[1]
    assert_same(*(as_plain(build_report(log.home, "test", metrics=metrics(), until=log.until, engine=engine))
                  for engine in ("duckdb", "spark")))  # fmt: skip
