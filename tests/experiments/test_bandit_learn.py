"""Learning from the log: against plain loops, twice, after a crash, from the command line, and until it knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from experiments import decisions as decisions_module
from experiments import learn_commands
from experiments.exposure import exposure_record
from experiments.learn import Learned, learn
from experiments.learn_commands import run_once
from experiments.live import LiveConfig
from experiments.policy import ContextEncoder, compile_policy
from experiments.policy_store import PolicyStore
from experiments.snapshot import Snapshot
from experiments.store import ConfigStore
from plait.cli import cli
from plait.clock import Clock
from plait.errors import StoreError
from plait.eventlog import EXPOSURES, FEEDBACK, EventLog, log_folder, unrolled
from plait.settings import Home

START = datetime(2026, 3, 1, tzinfo=UTC)
CONTEXT = {"age": {"scale": 20, "center": 40}, "country": {"categories": ["SE", "NO"]}}
Row = dict[str, Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    monkeypatch.setenv("PLAIT_AUTHOR", "anna")
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


def document(arms: str = "abc", state: str = "running", **bandit: Any) -> dict[str, Any]:
    share = 100 / len(arms)
    weights = [round(share, 2)] * (len(arms) - 1)
    weights.append(round(100 - sum(weights), 2))
    values = {arm: {"weight": w, "values": {"p.x": arm}} for arm, w in zip(arms, weights, strict=True)}
    experiment = {"layer": "p", "state": state, "buckets": "all", "arms": values}
    return {
        "parameters": {"p.x": {"type": "string", "default": ""}},
        "layers": {"p": {"unit": "user", "parameters": ["p.*"]}},
        "experiments": {"e": experiment | {"bandit": {"method": "thompson", "wait": "0s", **bandit}}},
    }


def experiment(**bandit: Any) -> Any:
    return Snapshot.of(document(**bandit)).spec.experiments["e"]


def write(home: Home, table: str, rows: list[Row], part: int = 0) -> None:
    folder = home.events / table
    folder.mkdir(parents=True, exist_ok=True)
    schema = {"exposures": EXPOSURES, "feedback": FEEDBACK}[table]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"part-{part}.parquet")


def exposure(i: int, hours: float, arm: str, **changes: Any) -> Row:
    return {
        "timestamp": START + timedelta(hours=hours), "request_id": f"r{i}", "unit_kind": "user", "unit": f"u{i}",
        "layer": "p", "experiment": "e", "arm": arm, "config_version": 1, "forced": False, "counterfactual": False,
        "propensity": 0.5, "context": None,
    } | changes  # fmt: skip


def click(i: int, hours: float, request: str | None, **changes: Any) -> Row:
    at = START + timedelta(hours=hours)
    row = {"event_id": f"e{i}", "type": "click", "request_id": request, "user_id": 1, "timestamp": at, "created": at}
    return row | changes


def random_log(seed: int) -> tuple[list[Row], list[Row]]:
    rng = Random(seed)
    exposures, clicks = [], []
    for i in range(200):
        context = rng.choice(
            [None, '{"age":30.0,"country":"SE"}', json.dumps({"age": rng.uniform(0, 90), "country": "x"})]
        )
        exposures.append(
            exposure(
                i, rng.uniform(0, 100), rng.choice("abcz"), unit=f"u{rng.randrange(40)}", context=context,
                request_id=f"r{rng.randrange(170)}", forced=rng.random() < 0.05, experiment=rng.choice("eeeef"),
                propensity=rng.choice([0.5, 0.2, 0.3, 0.1, None, 0.0, 1.5]),
            )
        )  # fmt: skip
    for i in range(120):
        kind, request = rng.choice(["click", "click", "view"]), rng.choice([None, f"r{rng.randrange(170)}"])
        clicks.append(click(i, rng.uniform(0, 100), request, type=kind))
    return exposures, clicks


def naive_decisions(exposures: list[Row], clicks: list[Row], until: datetime, wait: timedelta) -> list[Row]:
    """One dict per request and unit: the first usable exposure, with its reward."""
    first: dict[tuple[str, str], Row] = {}
    for row in sorted(exposures, key=lambda r: (r["timestamp"], r["arm"], r["propensity"] or 0)):
        usable = row["experiment"] == "e" and not row["forced"] and row["arm"] in "abc"
        if usable and row["propensity"] and row["propensity"] <= 1 and row["timestamp"] <= until - wait:
            first.setdefault((row["request_id"], row["unit"]), row)
    paid = {c["request_id"] for c in clicks if c["type"] == "click" and c["timestamp"] < until}
    return [{**row, "reward": float(row["request_id"] in paid)} for row in first.values()]


def naive_weights(decisions: list[Row], half_life_h: float | None, by_unit: bool) -> list[float]:
    newest = max(d["timestamp"] for d in decisions)
    aged = [
        0.5 ** ((newest - d["timestamp"]).total_seconds() / 3600 / half_life_h) if half_life_h else 1.0
        for d in decisions
    ]
    if not by_unit:
        return aged
    same = [
        [w for w, e in zip(aged, decisions, strict=True) if (e["unit"], e["arm"]) == (d["unit"], d["arm"])]
        for d in decisions
    ]
    return [w * max(group) / sum(group) for w, group in zip(aged, same, strict=True)]


CASES = [
    {}, {"half_life": "12h"}, {"by": "unit"}, {"by": "unit", "half_life": "30h"}, {"wait": "6h", "half_life": "2d"},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_thompson_counts_what_a_plain_loop_counts(home, seed, options, monkeypatch):
    monkeypatch.setattr(decisions_module, "_SLICE_ROWS", 60)  # several slices of so small a log
    exposures, clicks = random_log(seed)
    write(home, "exposures", exposures[:90])
    write(home, "exposures", exposures[90:], part=1)
    write(home, "feedback", clicks)
    until = START + timedelta(hours=80)
    learned = learn(home.events, experiment(**options), until)
    hours = {"12h": 12, "30h": 30, "2d": 48, None: None}[options.get("half_life")]
    decisions = naive_decisions(exposures, clicks, until, timedelta(hours=6 if "wait" in options else 0))
    weights = naive_weights(decisions, hours, options.get("by") == "unit")
    assert learned.counts.decisions == len(decisions) > 30
    assert learned.document is not None
    for arm in "abc":
        mine = [(w, d["reward"]) for w, d in zip(weights, decisions, strict=True) if d["arm"] == arm]
        stats = learned.document["arms"][arm]
        assert stats["trials"] == pytest.approx(sum(w for w, _ in mine), abs=1e-9)
        assert stats["successes"] == pytest.approx(sum(w * r for w, r in mine), abs=1e-9)
    assert sum(arm["best"] for arm in learned.document["arms"].values()) == pytest.approx(1)
    rng = np.random.default_rng(seed)
    draws = np.column_stack(
        [
            rng.beta(1 + s["successes"], 1 + s["trials"] - s["successes"], 200_000)
            for s in learned.document["arms"].values()
        ]
    )
    won = np.bincount(draws.argmax(axis=1), minlength=3) / 200_000
    assert [arm["best"] for arm in learned.document["arms"].values()] == pytest.approx(won, abs=0.005)


@pytest.mark.parametrize("options", [{}, {"by": "unit", "half_life": "30h"}])
@pytest.mark.parametrize("method", ["linear", "linucb"])
def test_linear_fits_the_ridge_regression_of_a_plain_loop(home, method, options):
    exposures, clicks = random_log(9)
    write(home, "exposures", exposures)
    write(home, "feedback", clicks)
    until = START + timedelta(hours=100)
    bandit = experiment(method=method, context=CONTEXT, **options)
    learned = learn(home.events, bandit, until)
    decisions = naive_decisions(exposures, clicks, until, timedelta(0))
    weights = naive_weights(decisions, 30 if options else None, bool(options))
    assert learned.without_context == sum(d["context"] is None for d in decisions) > 0
    assert learned.document is not None
    for arm in "abc":
        precision, moment = np.eye(4), np.zeros(4)
        for w, d in zip(weights, decisions, strict=True):
            if d["arm"] == arm and d["context"]:
                c = json.loads(d["context"])
                x = np.array([1, (c["age"] - 40) / 20, c["country"] == "SE", c["country"] == "NO"])
                precision += w * np.outer(x, x)
                moment += w * d["reward"] * x
        stats = learned.document["arms"][arm]
        np.testing.assert_allclose(stats["theta"], np.linalg.solve(precision, moment), atol=1e-7)
        np.testing.assert_allclose(stats["covariance"], np.linalg.inv(precision), atol=1e-7)
    assert compile_policy(bandit, 1, learned.document).version == 1


def test_the_same_log_gives_the_same_bits_whatever_the_order_of_its_parts(home, tmp_path):
    exposures, clicks = random_log(3)
    write(home, "feedback", clicks)
    seen = set()
    for seed in range(4):
        Random(seed).shuffle(exposures)
        for old in (home.events / "exposures").glob("*"):
            old.unlink()
        for part in range(seed + 1):
            write(home, "exposures", exposures[part :: seed + 1], part)
        for options in ({"half_life": "7h", "by": "unit"}, {"method": "linear", "context": CONTEXT, "half_life": "7h"}):
            learned = learn(home.events, experiment(**options), START + timedelta(hours=99))
            seen.add(json.dumps(learned.document, sort_keys=True))
    assert len(seen) == 2


def test_an_empty_log_teaches_nothing(home):
    learned = learn(home.events, experiment(), START)
    assert isinstance(learned, Learned) and learned.document is None
    write(home, "exposures", [exposure(0, 0, "a")])
    assert learn(home.events, experiment(method="linear", context=CONTEXT), START + timedelta(1)).document is None


def test_a_decision_forgotten_for_thirty_half_lives_is_not_read(home):
    write(home, "exposures", [exposure(0, 0, "a"), exposure(1, 40, "b")])
    assert learn(home.events, experiment(half_life="1h"), START + timedelta(hours=41)).counts.decisions == 1


# -- the command -------------------------------------------------------------------------------------------------------


def plait(*args: str, ok: bool = True) -> Result:
    result = CliRunner().invoke(cli, ["experiments", *args])
    assert (result.exit_code == 0) == ok, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def ready(home: Home, **options: Any) -> PolicyStore:
    store = ConfigStore.at(home)
    store.apply(document(**options), author="anna")
    write(home, "exposures", [exposure(i, i / 10, "abc"[i % 3]) for i in range(90)])
    write(home, "feedback", [click(i, 50, f"r{3 * i}") for i in range(20)])
    return PolicyStore(store.engine)


def test_learning_twice_leaves_one_version(home):
    policies = ready(home)
    first = plait("learn").output
    assert "e: policy 1 (90 decisions)" in first
    assert "earned 0.6667 over a weight of 30.0" in first
    assert "policy 1 already says this" in plait("learn", "e").output
    assert [each.version for each in policies.history("e")] == [1]
    assert policies.get("e").author == "anna"
    write(home, "exposures", [exposure(100, 60, "b")], part=7)
    assert "policy 2 (91 decisions)" in plait("learn").output


def test_what_was_learned_is_listed(home):
    ready(home)
    assert "no policy yet" in plait("policies", "e").output
    plait("learn")
    assert "90 decisions  a 20.0/30.0 P(best)" in plait("policies", "e").output


def test_a_dry_run_writes_nothing(home):
    policies = ready(home)
    assert "would be policy 1" in plait("learn", "--dry-run").output
    assert policies.get("e") is None
    plait("learn")
    assert "policy 1 already says this" in plait("learn", "--dry-run").output


def test_the_tail_of_the_log_is_learned_from_before_it_is_rolled(home):
    """By reading it where it lies, or by rolling it first, or with some rows in both: the same policy."""
    policies, spec = ready(home), Snapshot.of(document()).spec
    log = EventLog(log_folder(home), "serve")
    log.append("exposure", [{**exposure(500, 1, "b"), "timestamp": 1772330400000000}])
    log.append("feedback", [{**click(500, 2, "r500"), "timestamp": 1772334000000000, "created": 1772334000000000}])
    run_once(home, spec, policies, "e", author="anna", rolling=False)
    assert not list((home.events / "exposures").glob("log-*"))
    before = policies.get("e").document
    assert (before["decisions"], before["arms"]["b"]["successes"]) == (91, 1.0)
    tail = unrolled(home)
    assert run_once(home, spec, policies, "e", author="anna") == {"e": 1}
    assert list((home.events / "exposures").glob("log-*"))
    assert learn(home.events, spec.experiments["e"], Clock.of(home).now(), tail=tail).document == before
    log.close()


def test_a_crash_on_the_way_counts_nothing_twice(home, monkeypatch):
    """Killed after the log was rolled and before the policy was written: the next run is as the first would be."""
    policies = ready(home)
    spec = Snapshot.of(document()).spec
    with closing(EventLog(log_folder(home), "serve")) as log:
        log.append("exposure", [{**exposure(500, 1, "b"), "timestamp": 1772330400000000}])
        log.append("feedback", [{**click(500, 2, "r500"), "timestamp": 1772334000000000, "created": 1772334000000000}])

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(PolicyStore, "put", die)
        for _ in range(3):
            with pytest.raises(Killed):
                run_once(home, spec, policies, "e", author="anna")
    assert policies.get("e") is None
    for _ in range(3):
        assert run_once(home, spec, policies, "e", author="anna") == {"e": 1}
    learned = policies.get("e").document
    assert learned["decisions"] == 91
    assert learned["arms"]["b"] | {"best": 0} == {"trials": 31.0, "successes": 1.0, "best": 0}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["learn", "f"], "no experiment 'f'"),
        (["learn", "--follow", "--every", "0s"], "at least 1s"),
        (["learn", "--follow", "--every", "soon"], "write a span"),
    ],
)
def test_wrong_calls_are_told(home, args, said):
    ready(home)
    output = plait(*args, ok=False).output
    assert said in output


def test_an_experiment_without_a_bandit_is_not_learned(home):
    plain = document()
    del plain["experiments"]["e"]["bandit"]
    ConfigStore.at(home).apply(plain, author="anna")
    assert "fixed split" in plait("learn", "e", ok=False).output
    assert "no experiment that is running has a `bandit`" in plait("learn", ok=False).output


def test_following_goes_on_when_the_store_is_away_and_stops_when_told(home, monkeypatch):
    policies, naps = ready(home), []
    put = PolicyStore.put

    def flaky(self: PolicyStore, *args: Any, **kwargs: Any) -> Any:
        if len(naps) == 1:
            raise StoreError("the store of policies does not answer")
        return put(self, *args, **kwargs)

    def nap(seconds: float) -> None:
        naps.append(seconds)
        write(home, "exposures", [exposure(200 + len(naps), 60 + len(naps), "b")], part=len(naps))
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(PolicyStore, "put", flaky)
    monkeypatch.setattr(learn_commands.time, "sleep", nap)
    result = plait("learn", "--follow", "--every", "5s")
    assert naps == [5.0] * 3
    assert "does not answer; trying again in 5s" in result.output
    assert "stopped" in result.output
    assert policies.get("e").document["decisions"] == 92
    assert [each.version for each in policies.history("e")] == [2, 1]


# -- until it knows ----------------------------------------------------------------------------------------------------


def simulate(
    home: Home, earns: Mapping[tuple[str, str], float], rounds: int, per_round: int, **options: Any
) -> list[tuple[str, str]]:
    """Requests of users of two countries through assign, log, learn and the live configuration; (country, arm) drawn
    in the last round. earns: (country, arm) → chance of a click."""
    store = ConfigStore.at(home)
    store.apply(document(**options), author="anna")
    live, policies, rng = LiveConfig(store), PolicyStore(store.engine), Random(1)
    drawn: list[tuple[str, str]] = []
    for turn in range(rounds):
        drawn, now = [], Clock.of(home).now()
        at_us = int(now.timestamp() * 1e6)
        with closing(EventLog(log_folder(home), f"w{turn}")) as log:
            for i in range(per_round):
                request, country = f"r{turn}-{i}", rng.choice(["SE", "NO"])
                units = {"user": f"u{rng.randrange(50)}", "request": request}
                assignment = live.snapshot.assign(units, {"country": country, "age": 40}, now)
                arm = assignment["p.x"]
                log.enqueue("exposure", [exposure_record(a, now, request, 1) for a in assignment.exposures()])
                if rng.random() < earns[country, arm]:
                    event = {"event_id": f"e-{request}", "type": "click", "request_id": request, "user_id": 1}
                    log.enqueue("feedback", [{**event, "timestamp": at_us, "created": at_us}])
                drawn.append((country, arm))
        run_once(home, live.snapshot.spec, policies, "e", author="anna")
        live.poll()
    return drawn


def test_thompson_ends_at_the_best_arm(home):
    earns = {(c, a): p for a, p in (("a", 0.1), ("b", 0.3), ("c", 0.2)) for c in ("SE", "NO")}
    drawn = simulate(home, earns, rounds=8, per_round=250, floor=2)
    assert sum(arm == "b" for _, arm in drawn) / len(drawn) > 0.85


@pytest.mark.parametrize("method", ["linear", "linucb"])
def test_a_contextual_bandit_learns_who_wants_what(home, method):
    earns = {("SE", "a"): 0.5, ("SE", "b"): 0.2, ("NO", "a"): 0.2, ("NO", "b"): 0.5}
    drawn = simulate(home, earns, rounds=8, per_round=200, arms="ab", method=method, context=CONTEXT, floor=2)
    assert sum(arm == {"SE": "a", "NO": "b"}[country] for country, arm in drawn) / len(drawn) > 0.9


def test_a_half_life_follows_a_taste_that_turns(home):
    """What was best for long, and is no more, is forgotten; without a half-life it still leads."""
    exposures = [exposure(i, 0, "a") for i in range(1000)] + [exposure(1000 + i, 0, "b") for i in range(1000)]
    exposures += [exposure(2000 + i, 240, "a") for i in range(200)] + [exposure(2200 + i, 240, "b") for i in range(200)]
    clicks = [click(i, 1, f"r{i}") for i in (*range(400), *range(1000, 1200))]
    clicks += [click(i, 241, f"r{i}") for i in (*range(2000, 2040), *range(2200, 2280))]
    write(home, "exposures", exposures)
    write(home, "feedback", clicks)
    until = START + timedelta(hours=250)
    forever = learn(home.events, experiment(arms="ab"), until).document
    fading = learn(home.events, experiment(arms="ab", half_life="1d"), until).document
    assert forever["arms"]["a"]["best"] > 0.99
    assert fading["arms"]["b"]["best"] > 0.99
    assert math.isclose(fading["arms"]["a"]["trials"], 200 + 1000 / 2**10)


def test_learned_contexts_are_read_as_they_are_served():
    """The log keeps plain values, so the learner's reader gives back what the server saw."""
    encoder = ContextEncoder(experiment(method="linear", context=CONTEXT).bandit.context)
    for attributes in ({"age": 1 / 3, "country": "ÅÄ\u2028\"'"}, {"age": -1e200, "country": 10**17}):
        values = encoder.read(attributes)
        assert encoder.read(json.loads(encoder.to_json(values))) == values
