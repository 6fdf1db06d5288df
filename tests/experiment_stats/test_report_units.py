"""Reports by user, session, device and request: exposures joined with events by that unit, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.metrics import parse_metrics
from experiments.report import build_report
from experiments.stats.moments import PairMoments, ratio_estimate

METRICS = [
    {"name": "clicks", "type": "count", "event": "click", "role": "primary", "cuped": False},
    {"name": "spent", "type": "mean", "event": "purchase", "window": "3d", "cuped": False},
    {"name": "rate", "type": "ratio", "numerator": {"event": "click"}, "denominator": {"event": "impression"}},
    {"name": "hits", "type": "ranking", "measure": "hit_rate", "k": 2},
]
HOURS = 24 * 10


def visits(rng: np.random.Generator, n: int) -> list[dict[str, Any]]:
    """n requests: a user has up to three devices and sessions of some requests; a device may be shared by users."""
    made = []
    for i in range(n):
        user = int(rng.integers(0, 25))
        made.append(
            {
                "request": f"r{i}",
                "user": user,
                "session": None if rng.random() < 0.1 else f"s{user}-{rng.integers(0, 6)}",
                "device": None if rng.random() < 0.1 else f"d{(user + rng.integers(0, 3)) % 20}",
                "at": float(rng.uniform(0, HOURS)),
            }
        )
    return made


def write(log: Any, requests: list[dict[str, Any]], kind: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Exposures by `kind`, two impressions a request, and feedback: a third of it names only its request, some of it
    another session and device than the request's, and some no request at all."""
    arm_of: dict[Any, str] = {}
    exposed = [r for r in requests if r[kind] is not None and rng.random() < 0.8]
    arms = [arm_of.setdefault(r[kind], str(rng.choice(["a", "b"]))) for r in exposed]
    log.exposures(
        [r[kind] for r in exposed],
        arms,
        [r["at"] for r in exposed],
        unit_kind=kind,
        request_ids=[r["request"] for r in exposed],
    )
    shown = [r for r in requests for _ in range(2)]
    log.impressions(
        [r["user"] for r in shown],
        [r["at"] for r in shown],
        items=[1, 2] * len(requests),
        positions=[1, 2] * len(requests),
        request_ids=[r["request"] for r in shown],
        session_id=[r["session"] for r in shown],
        device_id=[r["device"] for r in shown],
    )
    events = []
    for type_ in ("click", "purchase"):
        of = [requests[i] for i in rng.integers(0, len(requests), 2 * len(requests))]
        silent, elsewhere, alone = (rng.random(len(of)) < share for share in (0.3, 0.1, 0.1))
        # whose ids the event carries: those of its own request, or of another one of the same user's
        of_user = [[r for r in requests if r["user"] == one["user"]] for one in of]
        own = [rng.choice(others) if e else r for r, e, others in zip(of, elsewhere, of_user, strict=True)]
        hours = [r["at"] + float(rng.uniform(0, 30)) for r in of]
        value = rng.uniform(1, 9, len(of)) if type_ == "purchase" else None
        items = rng.integers(1, 3, len(of))
        log.feedback(
            [r["user"] for r in of],
            hours,
            type=type_,
            value=value,
            items=items.tolist(),
            request_ids=[None if a else r["request"] for r, a in zip(of, alone, strict=True)],
            session_id=[None if s else r["session"] for r, s in zip(own, silent, strict=True)],
            device_id=[None if s else r["device"] for r, s in zip(own, silent, strict=True)],
        )
        for i, r in enumerate(of):
            events.append(
                {
                    "type": type_,
                    "request": None if alone[i] else r["request"],
                    "unit": unit_of(kind, r, own[i], silent=silent[i], alone=alone[i]),
                    "at": hours[i],
                    "value": 0.0 if value is None else float(value[i]),
                    "item": int(items[i]),
                }
            )
    log.first = {}
    for r in exposed:
        log.first[r[kind]] = min(r["at"], log.first.get(r[kind], 1e9))
    log.arm_of = {unit: arm_of[unit] for unit in log.first}
    return events


def unit_of(kind: str, request: Any, own: Any, *, silent: bool, alone: bool) -> Any:
    """The unit an event belongs to: the one whose id it carries, else that of the request it names."""
    named = None if alone else request[kind]
    if kind == "user":
        return request["user"]
    if kind == "request" or silent or own[kind] is None:
        return named
    return own[kind]


@pytest.mark.parametrize("kind", ["user", "session", "device", "request"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_report_joins_by_the_unit_of_its_experiment(log: Any, kind: str, seed: int) -> None:
    """An event counts for the unit it names, or that its request was made by; never for another one's unit."""
    rng = np.random.default_rng(seed)
    requests = visits(rng, 150)
    events = write(log, requests, kind, rng)
    result = build_report(
        log.home, "test", metrics=parse_metrics({"metrics": METRICS, "analysis": {"bootstrap": 0}}), until=log.until,
        despite_mismatch=True,
    )  # fmt: skip
    units = {a: [u for u in log.first if log.arm_of[u] == a] for a in ("a", "b")}
    assert result.counts.units == {a: len(units[a]) for a in units}

    def clicks(u: Any) -> int:
        return sum(e["type"] == "click" and e["unit"] == u and e["at"] >= log.first[u] for e in events)

    def spent(u: Any) -> float:
        since, till = log.first[u], log.first[u] + 72
        return sum(e["value"] for e in events if e["type"] == "purchase" and e["unit"] == u and since <= e["at"] < till)

    def lists(u: Any) -> list[str]:
        return [r["request"] for r in requests if r[kind] == u and r["at"] >= log.first[u]]

    def hits(u: Any) -> int:
        return sum(any(e["type"] == "click" and e["request"] == request for e in events) for request in lists(u))

    found = {metric.metric.name: {arm.arm: arm for arm in metric.arms} for metric in result.metrics}
    for arm, of in units.items():
        assert found["clicks"][arm].value == pytest.approx(np.mean([clicks(u) for u in of]))
        assert found["spent"][arm].value == pytest.approx(np.mean([spent(u) for u in of]))
        for name, numerator, per in (("rate", clicks, 2), ("hits", hits, 1)):
            pairs = np.array([(numerator(u), per * len(lists(u))) for u in of], float)
            expected = ratio_estimate(PairMoments.of(*pairs.T))
            assert found[name][arm].value == pytest.approx(expected.value)
            assert found[name][arm].se == pytest.approx(expected.se)


def test_tables_without_these_columns_count_nothing_for_sessions_and_everything_for_users(log: Any) -> None:
    """What releases before them wrote: the columns read as null."""
    import pyarrow.parquet as pq

    for kind, units in (("session", [f"s{u}" for u in range(4)]), ("user", range(4))):
        log.exposures(units, ["a", "b"] * 2, 0.0, experiment=f"by-{kind}", unit_kind=kind)
    log.impressions(range(4), 0.5).feedback(range(4), 1.0)
    for table in ("impressions", "feedback"):
        for part in (log.home.events / table).glob("*.parquet"):
            pq.write_table(pq.read_table(part).drop_columns(["session_id", "device_id"]), part)
    declared = parse_metrics({"metrics": METRICS[:1], "analysis": {"bootstrap": 0}})
    for kind, expected in (("session", 0.0), ("user", 1.0)):
        result = build_report(log.home, f"by-{kind}", metrics=declared, until=log.until, despite_mismatch=True)
        assert [arm.value for arm in result.metrics[0].arms] == [expected, expected]
