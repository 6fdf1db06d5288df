"""The report on a bandit: by logged propensities, against the estimators elsewhere, and against known truth."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from experiments.bandit_report import BanditReport, build_bandit_report
from experiments.bandit_text import as_html, as_text
from experiments.offpolicy import importance_weights, policy_value
from experiments.report import build_report
from experiments.snapshot import Snapshot
from experiments.store import ConfigStore
from plait.cli import cli
from plait.errors import SpecError
from plait.eventlog import EXPOSURES, FEEDBACK
from plait.settings import Home
from tests.experiment_stats.conftest import START, us

ARMS = ("a", "b", "c")
UNTIL = START + timedelta(days=30)


def document(arms: tuple[str, ...] = ARMS, **bandit: Any) -> dict[str, Any]:
    weights = dict(zip(arms, (40, 30, 30), strict=False))
    values = {arm: {"weight": weight, "values": {"p.x": arm}} for arm, weight in weights.items()}
    experiment = {"layer": "p", "state": "running", "buckets": "all", "arms": values, "control": "b"}
    return {
        "parameters": {"p.x": {"type": "string", "default": ""}},
        "layers": {"p": {"unit": "user", "parameters": ["p.*"]}},
        "experiments": {"e": experiment | {"bandit": {"method": "thompson", "half_life": "1h", **bandit}}},
    }


def report(home: Home, **options: Any) -> BanditReport:
    return build_bandit_report(home, Snapshot.of(document()).spec.experiments["e"], until=UNTIL, **options)


def simulate(seed: int, n: int = 4000, truth: tuple[float, ...] = (0.1, 0.3, 0.2)) -> dict[str, Any]:
    """Shares that follow what was earned, by day; users come back, and some click more than others."""
    rng = np.random.default_rng(seed)
    unit, day = rng.integers(0, n // 4, n), np.sort(rng.integers(0, 10, n))
    taste = rng.uniform(-0.08, 0.08, n // 4)
    arm, propensity, reward = np.zeros(n, int), np.zeros(n), np.zeros(n)
    won, tried = np.ones(3), np.full(3, 2.0)
    for d in range(10):
        rows = np.flatnonzero(day == d)
        best = np.bincount(rng.beta(won, tried - won, (400, 3)).argmax(axis=1), minlength=3) / 400
        shares = 0.05 + 0.85 * best
        arm[rows] = rng.choice(3, len(rows), p=shares)
        propensity[rows] = shares[arm[rows]]
        reward[rows] = rng.random(len(rows)) < np.array(truth)[arm[rows]] + taste[unit[rows]]
        won += np.bincount(arm[rows], weights=reward[rows], minlength=3)
        tried += np.bincount(arm[rows], minlength=3)
    return {"unit": unit, "day": day, "arm": arm, "propensity": propensity, "reward": reward}


def write(home: Home, log: dict[str, Any], keep: Any = None, **changes: Any) -> None:
    rows = np.arange(len(log["unit"])) if keep is None else np.flatnonzero(keep)
    at = [us(START + timedelta(days=float(log["day"][i]), seconds=int(i))) for i in rows]
    n = len(rows)
    exposures = {
        "timestamp": pa.array(at, pa.timestamp("us", tz="UTC")),
        "request_id": [f"r{i}" for i in rows],
        "unit_kind": ["user"] * n,
        "unit": [str(u) for u in log["unit"][rows]],
        "layer": ["p"] * n,
        "experiment": ["e"] * n,
        "arm": [ARMS[a] for a in log["arm"][rows]],
        "config_version": [1] * n,
        "forced": [False] * n,
        "counterfactual": [False] * n,
        "propensity": log["propensity"][rows],
        "context": pa.nulls(n, pa.string()),
    } | changes
    clicked = [i for i in range(len(log["unit"])) if log["reward"][i]]
    clicks = [
        {"event_id": f"e{i}", "type": "click", "request_id": f"r{i}", "user_id": int(log["unit"][i]),
         "timestamp": START + timedelta(days=float(log["day"][i]), seconds=int(i) + 5)}
        for i in clicked
    ]  # fmt: skip
    for table, rows_ in (
        ("exposures", pa.table(exposures).cast(EXPOSURES)),
        ("feedback", pa.Table.from_pylist(clicks, schema=FEEDBACK)),
    ):
        (home.events / table).mkdir(parents=True, exist_ok=True)
        pq.write_table(rows_, home.events / table / "part.parquet")


@pytest.fixture
def home(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Home:
    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.mark.parametrize("seed", range(3))
def test_the_estimates_are_those_of_the_off_policy_estimators(home, seed):
    log = simulate(seed)
    write(home, log)
    result = report(home)
    assert [arm.arm for arm in result.arms] == ["b", "a", "c"]  # the control first
    assert result.counts.decisions == 4000
    for arm in result.arms:
        target = (log["arm"] == ARMS.index(arm.arm)).astype(float)
        weights = importance_weights(target, log["propensity"])
        for method, mine in (("snips", arm.snips), ("ips", arm.ips)):
            theirs = policy_value(log["reward"], weights, method=method, clusters=log["unit"])
            for name in ("value", "se", "low", "high"):
                assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-9), (method, name)
        assert arm.decisions == target.sum()
        assert arm.effective_decisions == pytest.approx(weights.effective_sample_size)
        assert arm.weight.value == pytest.approx(weights.mean)
    assert result.earned.value == pytest.approx(log["reward"].mean())


def test_differences_and_regret_carry_the_error_of_the_difference(home):
    """Against the influence of each unit, summed in a plain loop."""
    log = simulate(7)
    write(home, log)
    result = report(home)
    units = np.unique(log["unit"])

    def influence(top: Any, below: Any) -> tuple[float, Any]:
        t, b = (np.array([column[log["unit"] == u].sum() for u in units]) for column in (top, below))
        return t.sum() / b.sum(), (t - t.sum() / b.sum() * b) / b.mean()

    ones = np.ones(4000)
    earned, of_earned = influence(log["reward"], ones)
    alone = {}
    for i, name in enumerate(ARMS):
        w = (log["arm"] == i) / log["propensity"]
        alone[name] = influence(w * log["reward"], w)
    best = max(alone, key=lambda name: alone[name][0])
    assert result.best == best
    for mine, value, parts in (
        (result.regret, alone[best][0] - earned, alone[best][1] - of_earned),
        (result.arms[1].difference, alone["a"][0] - alone["b"][0], alone["a"][1] - alone["b"][1]),
    ):
        assert mine.value == pytest.approx(value)
        assert mine.se == pytest.approx(parts.std(ddof=1) / np.sqrt(len(units)))


def test_intervals_cover_the_truth_though_the_shares_followed_the_rewards(home):
    """Plain means would do for one arm; with shares that move, weighted estimates must, for every arm."""
    truth, missed, alarms, n = dict(zip(ARMS, (0.1, 0.3, 0.2), strict=True)), 0, 0, 40
    for seed in range(100, 100 + n):
        write(home, simulate(seed, 2000))
        result = report(home)
        missed += sum(not arm.snips.low <= truth[arm.arm] <= arm.snips.high for arm in result.arms)
        alarms += result.blocked
    assert missed <= 3 * n * 0.05 + 4 * np.sqrt(3 * n * 0.05 * 0.95)
    assert alarms <= 1


def test_lost_exposures_of_one_arm_block_the_report(home):
    log = simulate(1)
    lost = (log["arm"] == 2) & (np.arange(4000) % 2 == 0)
    write(home, log, keep=~lost)
    result = report(home)
    assert result.blocked
    assert result.headline.startswith("Do not believe")
    assert "MISMATCH" in as_text(result)
    write(home, log)
    assert not report(home).blocked


def test_wrong_propensities_block_the_report(home):
    log = simulate(2)
    log["propensity"] = np.where(log["arm"] == 1, log["propensity"] * 0.8, log["propensity"])
    write(home, log)
    assert report(home).blocked


def test_days_show_how_the_shares_moved(home):
    log = simulate(3)
    write(home, log)
    days = report(home).days
    assert [day.day for day in days] == [f"2026-03-{d:02}" for d in range(1, 11)]
    for d, day in enumerate(days):
        rows = log["day"] == d
        assert day.reward == pytest.approx(log["reward"][rows].mean())
        assert day.decisions == tuple(int((log["arm"][rows] == ARMS.index(name)).sum()) for name in "bac")
    assert report(home, since=START + timedelta(days=9)).counts.decisions == (log["day"] == 9).sum()


def test_what_is_no_decision_is_left_out_and_told(home):
    log = simulate(4, 400)
    propensity = log["propensity"].tolist()
    propensity[:30] = [None] * 30
    write(home, log, propensity=pa.array(propensity, pa.float64()), forced=[i in range(30, 37) for i in range(400)])
    result = report(home)
    assert result.counts.decisions == 363
    assert (result.counts.fixed_split, result.counts.forced) == (30, 7)
    assert any("fixed split" in warning for warning in result.warnings)


def test_little_data_is_said_to_be_little(home):
    assert report(home).headline.startswith("No decision")
    assert "No decision" in as_text(report(home))
    write(home, simulate(5, 40))
    result = report(home)
    assert result.headline.startswith("Too early")
    assert any("units" in warning for warning in result.warnings)
    as_html(result)
    log = simulate(5, 200)
    log["unit"] = np.zeros(200, int)
    write(home, log)
    assert "more than one unit" in report(home).headline
    json.dumps(report(home).to_dict(), allow_nan=False)


def test_the_command_reports_a_bandit_as_one(home, tmp_path):
    ConfigStore.at(home).apply(document(), author="anna")
    write(home, simulate(6))
    until = f"--until={UNTIL:%Y-%m-%d}"

    def plait(*args: str) -> Any:
        return CliRunner().invoke(cli, ["experiments", "report", "e", until, *args])

    text = plait()
    assert text.exit_code == 0, text.output
    assert "thompson bandit" in text.output
    assert "b *" in text.output
    assert text.output.count("Shares over time") == 1
    assert max(map(len, text.output.splitlines())) < 150
    found = json.loads(plait("--format", "json").output)
    assert (found["kind"], found["best"], found["blocked"]) == ("bandit", "b", False)
    page = tmp_path / "report.html"
    assert "Report:" in plait("--format", "html", "--out", str(page)).output
    assert "alone (SNIPS)" in page.read_text()
    refused = plait("--weights", "a=1,b=1,c=1", "--aa", "5")
    assert refused.exit_code != 0
    assert "leave out --weights, --aa" in str(refused.output) + str(refused.exception)
    with pytest.raises(SpecError, match="cannot be judged as a fixed split"):
        build_report(home, "e", until=UNTIL)
