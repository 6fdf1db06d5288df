"""Exposure: when a parameter is used, once per unit, experiment, arm and version, and counted to the last one."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.assignment import Assignment
from experiments.exposure import ExposureRecorder, ExposureWindow
from experiments.snapshot import Snapshot

AT = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)


def snapshot(*, version: int = 1, **changes: Any) -> Snapshot:
    """Layers p and q by user, one experiment each; in p the control arm sets nothing; a launch layer moves p.x."""
    document: dict[str, Any] = {
        "parameters": {name: {"type": "int", "default": 0} for name in ("p.x", "p.y", "q.x")},
        "layers": {
            "p": {"unit": "user", "parameters": ["p.*"]},
            "q": {"unit": "user", "parameters": ["q.*"]},
            "ship": {"unit": "user", "launch": True, "parameters": ["p.x"]},
        },
        "experiments": {
            "ep": {
                "layer": "p",
                "state": "running",
                "buckets": "all",
                "arms": {
                    "control": {"weight": 50},
                    "treatment": {"weight": 50, "values": {"p.x": 1}, "testers": ["anna"]},
                },
            },
            "eq": {
                "layer": "q",
                "state": "running",
                "buckets": "all",
                "arms": {"on": {"weight": 100, "values": {"q.x": 1}}},
            },
            "launch": {
                "layer": "ship",
                "state": "running",
                "buckets": "all",
                "arms": {"on": {"weight": 100, "values": {"p.x": 5}}},
            },
        },
    }
    return Snapshot.of(document | changes, version=version)


def user_in(found: Snapshot, arm: str) -> str:
    return next(
        f"u{i}" for i in range(100) if found.assign({"user": f"u{i}"}).values["p.x"] == (1 if arm == "treatment" else 5)
    )


def exposed(assignment: Any) -> set[str]:
    return {f"{ref.experiment}.{ref.arm}" for ref in assignment.exposures()}


def record(recorder: ExposureRecorder, assignment: Assignment, request_id: str, at: datetime) -> int:
    """How many were logged."""
    return len(recorder.record(assignment.exposures(), assignment.version, request_id, at).logged)


class Log:
    """An event log that takes everything, or with full=True nothing."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.full = False

    def enqueue(self, records: Sequence[Mapping[str, Any]]) -> bool:
        if not self.full:
            self.records.extend(records)
        return not self.full


def test_nothing_is_exposed_until_a_parameter_is_used():
    assignment = snapshot().assign({"user": "u1"})
    assert assignment.values["q.x"] == 1
    assert assignment.exposures() == ()
    assert len(assignment.arms) == 3
    assert assignment["q.x"] == 1
    assert exposed(assignment) == {"eq.on"}


def test_a_parameter_no_arm_sets_exposes_nobody():
    assignment = snapshot().assign({"user": "u1"})
    assert assignment["p.y"] == 0
    assert exposed(assignment) == set()


def test_the_control_arm_that_sets_nothing_is_exposed_all_the_same_and_so_is_the_launch_below():
    found = snapshot()
    control = found.assign({"user": user_in(found, "control")})
    assert control["p.x"] == 5
    assert exposed(control) == {"ep.control", "launch.on"}
    treatment = found.assign({"user": user_in(found, "treatment")})
    assert treatment["p.x"] == 1
    assert exposed(treatment) == {"ep.treatment"}


def test_both_sides_of_a_holdout_are_exposed():
    found = snapshot(holdouts={"h": {"unit": "user", "buckets": "0-4999"}})
    sides = set()
    for i in range(30):
        assignment = found.assign({"user": f"u{i}"})
        assignment["q.x"]
        sides |= exposed(assignment) & {"h.holdout", "h.open"}
        assert ("h.holdout" in exposed(assignment)) == (assignment["q.x"] == 0)
    assert sides == {"h.holdout", "h.open"}


def test_an_exposure_is_logged_once_per_unit_experiment_arm_and_version():
    log = Log()
    recorder = ExposureRecorder(log.enqueue)
    for version in (1, 1, 2):
        for user in ("u1", "u2"):
            assignment = snapshot(version=version).assign({"user": user})
            assignment["q.x"]
            record(recorder, assignment, f"r-{user}", AT)
    assert [(r["unit"], r["config_version"]) for r in log.records] == [("u1", 1), ("u2", 1), ("u1", 2), ("u2", 2)]
    assert log.records[0] == {
        "timestamp": 1772353800000000,
        "request_id": "r-u1",
        "unit_kind": "user",
        "unit": "u1",
        "layer": "q",
        "experiment": "eq",
        "arm": "on",
        "config_version": 1,
        "forced": False,
        "counterfactual": False,
        "propensity": None,
        "context": None,
    }
    counts = recorder.counts
    assert (counts.used, counts.logged, counts.repeated, counts.dropped) == (6, 4, 2, 0)


def test_testers_are_logged_with_their_mark():
    log = Log()
    recorder = ExposureRecorder(log.enqueue)
    assignment = snapshot().assign({"user": "anna"})
    assignment["p.x"]
    record(recorder, assignment, "r", AT)
    assert [(r["arm"], r["forced"]) for r in log.records] == [("treatment", True)]
    assert recorder.counts.forced == 1


def test_a_counterfactual_is_marked_in_every_arm_and_logged_though_the_plain_use_was():
    found, log = snapshot(), Log()
    recorder = ExposureRecorder(log.enqueue)
    for arm in ("control", "treatment"):
        user = user_in(found, arm)
        plain = found.assign({"user": user})
        plain["p.x"]
        record(recorder, plain, "r1", AT)
        marked = found.assign({"user": user})
        assert marked.alternatives("p.x") == {"control": 5, "treatment": 1}
        marked["p.x"]
        marked.mark_counterfactual("p.x")
        record(recorder, marked, "r2", AT)
        record(recorder, marked, "r3", AT)
    rows = [
        (r["experiment"], r["arm"], r["request_id"], r["counterfactual"])
        for r in log.records
        if r["experiment"] == "ep"
    ]
    expected = [("ep", arm, request, request == "r2") for arm in ("control", "treatment") for request in ("r1", "r2")]
    assert rows == expected


def test_a_parameter_no_experiment_decides_has_no_alternatives():
    assert snapshot().assign({"user": "u1"}).alternatives("p.y") == {}


def test_what_the_log_refuses_is_counted_and_logged_at_the_next_use():
    log = Log()
    log.full = True
    recorder = ExposureRecorder(log.enqueue)
    assignment = snapshot().assign({"user": "u1"})
    assignment["q.x"]
    assert record(recorder, assignment, "r1", AT) == 0
    log.full = False
    assert record(recorder, assignment, "r2", AT) == 1
    assert [r["request_id"] for r in log.records] == ["r2"]
    assert (recorder.counts.used, recorder.counts.dropped, recorder.counts.logged) == (2, 1, 1)


def test_keys_expire_by_the_monotonic_clock_whatever_the_wall_clock_does():
    now = [0.0]
    window = ExposureWindow(ttl_s=60, monotonic=lambda: now[0])
    log = Log()
    recorder = ExposureRecorder(log.enqueue, window)
    assignment = snapshot().assign({"user": "u1"})
    assignment["q.x"]
    moments = [(0, AT), (30, datetime(2020, 1, 1, tzinfo=UTC)), (59.9, AT), (60, AT), (119, AT)]
    logged = []
    for seconds, at in moments:
        now[0] = seconds
        logged.append(record(recorder, assignment, "r", at))
    assert logged == [1, 0, 0, 1, 0]


@given(st.lists(st.tuples(st.integers(0, 8), st.floats(0, 40)), max_size=60), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_the_window_is_bounded_and_forgets_only_the_oldest_or_the_expired(steps, size):
    """Against a plain list of (key, since)."""
    now = [0.0]
    window = ExposureWindow(size=size, ttl_s=60, monotonic=lambda: now[0])
    known: list[tuple[int, float]] = []
    for key, seconds in steps:
        now[0] += seconds
        known = [(k, since) for k, since in known if now[0] - since < 60]
        expected = key not in [k for k, _ in known]
        if expected:
            known = [*known, (key, now[0])][-size:]
        assert window.first(key) == expected
        assert len(window) == len(known) <= size


def test_threads_log_each_unit_exactly_once_and_the_counts_add_up():
    log, found = Log(), snapshot()
    recorder = ExposureRecorder(log.enqueue)

    def serve() -> None:
        for i in range(200):
            assignment = found.assign({"user": f"u{i}"})
            assignment["q.x"]
            record(recorder, assignment, "r", AT)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r["unit"] for r in log.records) == sorted(f"u{i}" for i in range(200))
    counts = recorder.counts
    assert (counts.used, counts.logged, counts.repeated) == (800, 200, 600)


def test_what_a_bandit_drew_is_logged_with_every_request():
    """Each request is a decision to learn from, and none of them pushes others out of the window."""
    raw = snapshot().document
    raw = {**raw, "experiments": {**raw["experiments"], "eq": {**raw["experiments"]["eq"]}}}
    raw["experiments"]["eq"] |= {
        "bandit": {"method": "linear", "context": {"age": {"scale": 10}}},
        "arms": {name: {"weight": 50, "values": {"q.x": i}} for i, name in enumerate("ab")},
    }
    found, logged = Snapshot.of(raw, version=1), []
    recorder = ExposureRecorder(lambda records: not logged.extend(records))
    for i in range(4):
        assignment = found.assign({"user": "u", "request": f"r{i}"}, {"age": 40}, AT)
        assignment["q.x"], assignment["p.x"]
        recorder.record(assignment.exposures(), 1, f"r{i}", AT)
    drawn = [record for record in logged if record["experiment"] == "eq"]
    assert [record["request_id"] for record in drawn] == ["r0", "r1", "r2", "r3"]
    assert {record["propensity"] for record in drawn} == {0.5}
    assert {record["context"] for record in drawn} == {'{"age":40.0}'}
    split = [record for record in logged if record["experiment"] != "eq"]
    assert len({record["experiment"] for record in split}) == len(split)
    assert {record["propensity"] for record in split} == {record["context"] for record in split} == {None}
    assert len(recorder.window) == len(split)
