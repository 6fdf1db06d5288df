"""What is shown: sorted, explored with exact propensities, interleaved with teams; and that the log says so."""

from __future__ import annotations

import doctest
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

import experiments.slates
from experiments.interleaving import credit, credit_test
from experiments.slates import Interleaved, plackett_luce
from experiments.snapshot import Snapshot
from serving.slate import explored_slate, interleaved_slate, sorted_slate
from tests.serving.conftest import make_world

IDS = np.array([11, 12, 13, 14, 15])
SCORES = np.array([0.9, 0.5, 0.8, 0.1, 0.5], np.float32)


def test_the_examples_in_docstrings_run() -> None:
    assert doctest.testmod(experiments.slates).failed == 0


def test_sorted_is_by_score_then_by_id() -> None:
    assert IDS[sorted_slate(IDS, SCORES, 4).order].tolist() == [11, 13, 12, 15]
    assert sorted_slate(IDS, None, 2).order.tolist() == [0, 1]
    assert sorted_slate(IDS[:0], SCORES[:0], 3).order.tolist() == []


def test_explored_orders_come_as_often_as_their_propensities_say() -> None:
    """All 6 orders of 3 shown items: the product of the logged propensities is the share of draws."""
    n = 20_000
    drawn: Counter[tuple[int, ...]] = Counter()
    said: dict[tuple[int, ...], float] = {}
    for i in range(n):
        slate = explored_slate(IDS, SCORES, 3, 0.3, f"r{i}")
        order = tuple(slate.order.tolist())
        drawn[order] += 1
        said[order] = float(np.prod(slate.propensities))
    assert set(said) == set(itertools.permutations([0, 2, 1]))  # 12 before 15, and only what sorting would show
    assert sum(said.values()) == pytest.approx(1)
    for order, share in said.items():
        assert drawn[order] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_propensities_are_the_formula() -> None:
    weights = np.array([2.0, -1.0, 0.5])
    e = np.exp(weights)
    expected = [e[0] / e.sum(), e[1] / (e[1] + e[2]), 1.0]
    assert plackett_luce(weights).tolist() == pytest.approx(expected)
    assert plackett_luce(np.array([1e6, 0.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", ["team_draft", "probabilistic"])
def test_equal_rankers_get_equal_credit_and_the_better_one_wins(method: str) -> None:
    rng = np.random.default_rng(1)
    good = np.array([0.9, 0.1, 0.7, 0.2, 0.5])  # also the chance of a click
    for other, verdict in ((good, "tie"), (-good, "a")):
        scored = []
        for i in range(3000):
            slate = interleaved_slate(IDS, good, other, 3, method, f"q{i}")
            assert slate.teams is not None and len(slate.teams) == 3 == len(set(slate.order.tolist()))
            clicked = {int(item) for item in slate.order if rng.random() < good[item]}
            scored.append(credit(Interleaved(items=tuple(slate.order.tolist()), teams=slate.teams), clicked))  # type: ignore[arg-type]
        test = credit_test(scored, range(3000))
        assert (test.effect.p_value > 0.001) if verdict == "tie" else (test.effect.high < 0)


def test_a_request_answered_again_is_answered_alike() -> None:
    for draw in (
        lambda r: explored_slate(IDS, SCORES, 4, 1.0, r),
        lambda r: interleaved_slate(IDS, SCORES, -SCORES, 4, "team_draft", r),
    ):
        assert draw("r1").order.tolist() == draw("r1").order.tolist()
        assert len({tuple(draw(f"r{i}").order.tolist()) for i in range(50)}) > 1


# -- through the server ---------------------------------------------------------------------------------------------


def configuration(**values: Any) -> Snapshot:
    return Snapshot.of(
        {
            "parameters": {
                "rank.model": {"type": "model", "default": "deepfm"},
                "rank.interleave_with": {"type": "model", "default": ""},
                "rank.interleave_method": {"type": "string", "default": "team_draft"},
                "rank.exploration": {"type": "float", "default": 0.0},
            },
            "layers": {"rank": {"unit": "user", "parameters": ["rank.*"]}},
            "experiments": {
                "mix": {
                    "layer": "rank",
                    "state": "running",
                    "buckets": "all",
                    "arms": {"on": {"weight": 100, "values": values}},
                }
            },
        },
        version=4,
    )


def logged(world: Any) -> dict[str, Any]:
    return world.log.records["request"][-1]


@pytest.mark.parametrize("method", ["team_draft", "probabilistic"])
def test_the_server_interleaves_and_logs_teams(method: str) -> None:
    snapshot = configuration(**{"rank.interleave_with": "lightgbm", "rank.interleave_method": method})
    with make_world(snapshot=snapshot) as world:
        world.scorers["lightgbm:1"].score = lambda request, candidates: np.array(  # type: ignore[method-assign]
            [1 - m / 10 for m in candidates["movie_mean"].to_pylist()], np.float32
        )
        teams: Counter[str] = Counter()
        for user in range(1, 40):
            answer = world.predict(entities={"user_id": user}, candidate_ids=[1, 2, 3, 4, 5, 6], top_k=4).get_json()
            record = logged(world)
            assert answer["degraded"] == [] and len(set(record["items"])) == 4
            assert [row["item_id"] for row in answer["ranking"]] == record["items"]
            assert record["propensities"] is None and record["model"] == "deepfm"
            teams.update(record["teams"])
            if method == "team_draft":  # either ranker's best leads the list
                assert record["items"][0] == (6 if record["teams"][0] == "a" else 1)
        assert 0.3 < teams["a"] / teams.total() < 0.7


@pytest.mark.parametrize("fault", ["not loaded", "cannot score", "features late"])
def test_a_second_ranker_that_fails_leaves_the_first_one_s_list(fault: str) -> None:
    snapshot = configuration(**{"rank.interleave_with": "nobody" if fault == "not loaded" else "lightgbm"})
    with make_world(snapshot=snapshot) as world:
        if fault == "cannot score":
            world.scorers["lightgbm:1"].error = ValueError("no")
        elif fault == "features late":
            reads = itertools.count()

            def before() -> None:
                if next(reads):
                    raise TimeoutError("late")

            world.reader.before = before
        answer = world.predict(candidate_ids=[1, 2, 3]).get_json()
        assert [row["item_id"] for row in answer["ranking"]] == [3, 2, 1]
        assert answer["degraded"] == ["not_interleaved"]
        assert world.metric("plait_degraded_total", reason="not_interleaved") == 1
        assert (logged(world)["teams"], logged(world)["propensities"]) == (None, [1.0, 1.0, 1.0])


def test_the_server_explores_and_logs_propensities() -> None:
    with make_world(snapshot=configuration(**{"rank.exploration": 0.5})) as world:
        first: Counter[int] = Counter()
        for user in range(1, 60):
            answer = world.predict(entities={"user_id": user}, candidate_ids=[1, 2, 8, 9], top_k=3).get_json()
            record = logged(world)
            weights = np.array([item % 10 / 10 for item in record["items"]], np.float32) / 0.5
            assert record["propensities"] == pytest.approx(plackett_luce(weights).tolist(), abs=1e-6)
            assert sorted(record["items"]) == [2, 8, 9]
            assert [row["item_id"] for row in answer["ranking"]] == record["items"]
            first[record["items"][0]] += 1
        assert len(first) == 3


def test_a_model_that_the_caller_names_is_shown_as_it_ranks() -> None:
    with make_world(snapshot=configuration(**{"rank.exploration": 5.0})) as world:
        for user in range(1, 30):
            answer = world.predict(entities={"user_id": user}, candidate_ids=[1, 2, 3], model="deepfm").get_json()
            assert [row["item_id"] for row in answer["ranking"]] == [3, 2, 1]
            assert logged(world)["propensities"] == [1.0, 1.0, 1.0]
