"""A holdout is judged like an experiment: held-out units against everybody else, by the split it was declared with."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.metrics import parse_metrics
from experiments.report import build_report
from experiments.snapshot import Snapshot
from experiments.store import ConfigStore
from plait.errors import UnknownNameError

CLICKS = parse_metrics({"metrics": [{"name": "clicks", "type": "count", "event": "click", "cuped": False}]})


def configuration(holdout: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": {"p.x": {"type": "int", "default": 0}},
        "layers": {"p": {"unit": "session", "parameters": ["p.x"]}},
        "holdouts": {"hold": holdout},
        "experiments": {
            "e": {
                "layer": "p",
                "state": "running",
                "buckets": "1000-9999",
                "arms": {"control": {"weight": 50}, "new": {"weight": 50, "values": {"p.x": 1}}},
            }
        },
    }


@pytest.mark.parametrize("holdout", [{"layer": "p", "buckets": "0-999"}, {"unit": "session", "buckets": "0-999"}])
def test_held_out_units_are_compared_with_all_others_and_the_split_is_as_declared(log: Any, holdout: Any) -> None:
    """A tenth is held out: no sample-ratio alarm. Arm new brings one click more, so everything shipped brings half."""
    ConfigStore.at(log.home).apply(configuration(holdout), author="anna")
    snapshot = Snapshot.of(configuration(holdout), version=1)
    sides: dict[str, str] = {}
    clicked: list[str] = []
    for i in range(3000):
        session = f"s{i}"
        assignment = snapshot.assign({"session": session})
        if assignment["p.x"]:
            clicked.append(session)
        sides |= {ref.unit: ref.arm for ref in assignment.exposures() if ref.experiment == "hold"}
    assert len(sides) == 3000
    log.exposures(list(sides), list(sides.values()), unit_kind="session", experiment="hold", layer="")
    log.feedback([0] * len(clicked), session_id=clicked, request_ids=[None] * len(clicked))
    result = build_report(log.home, "hold", metrics=CLICKS, until=log.until)
    assert (result.plan.control, result.plan.declared) == ("holdout", True)
    assert result.counts.units == {side: list(sides.values()).count(side) for side in ("holdout", "open")}
    assert result.sample_ratio.p_value > 0.01
    held, free = result.metrics[0].arms
    assert held.value == 0 and free.value == len(clicked) / result.counts.units["open"] == pytest.approx(0.5, abs=0.07)


def test_a_name_that_is_neither_experiment_nor_holdout_suggests_both(log: Any) -> None:
    ConfigStore.at(log.home).apply(configuration({"layer": "p", "buckets": "0-999"}), author="anna")
    with pytest.raises(UnknownNameError, match="did you mean 'hold'"):
        build_report(log.home, "hodl", metrics=CLICKS, until=log.until)
