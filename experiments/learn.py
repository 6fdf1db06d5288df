"""Learning: a bandit's policy, computed anew from the whole log each time.

Nothing is added up between runs, so a run that died, or ran twice, counts nothing twice; and a policy is a function of
the log alone: decisions are aged against the newest of them, not against the clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from experiments.bandits import LinearBandit, ThompsonSampling
from experiments.decisions import DecisionCounts, decision_tables
from experiments.policy import ContextEncoder
from experiments.spec import Experiment
from plait.errors import SpecError

_ROWS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """A policy's document (see `policy.compile_policy`), or None where the log holds no decision yet."""

    experiment: str
    counts: DecisionCounts
    without_context: int  # decisions that a contextual bandit cannot learn from
    document: Mapping[str, Any] | None


def learn(
    events: Path, experiment: Experiment, until: datetime, *, tail: Mapping[str, pa.Table] | None = None
) -> Learned:
    """The policy of `experiment` from the event tables under `events`, and `tail`, as of `until` (aware).

    Raises SpecError if the experiment is no bandit, DataError for event tables that cannot be read.
    """
    bandit = experiment.bandit
    if bandit is None:
        raise SpecError(f"{experiment.name} is no bandit; give it a `bandit` block (docs/experiments.md, Bandits)")
    with decision_tables(events, experiment, until, tail=tail) as (db, counts):
        if counts.newest_us is None:
            return Learned(experiment=experiment.name, counts=counts, without_context=0, document=None)
        head: dict[str, Any] = {
            "method": bandit.method,
            "reward": bandit.reward,
            "decisions": counts.decisions,
            "newest": (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=counts.newest_us)).isoformat(),
        }
        if bandit.method == "thompson":
            return Learned(
                experiment=experiment.name, counts=counts, without_context=0,
                document=head | {"arms": _thompson(db, experiment)},
            )  # fmt: skip
        encoder = ContextEncoder(bandit.context)
        arms, n_without = _linear(db, experiment, encoder)
        document = head | {"fields": encoder.signature(), "arms": arms} if n_without < counts.decisions else None
        return Learned(experiment=experiment.name, counts=counts, without_context=n_without, document=document)


def _thompson(db: duckdb.DuckDBPyConnection, experiment: Experiment) -> dict[str, Any]:
    """Per arm: weighted trials and successes, and the chance that it is the best under equal prior chances."""
    trials = {arm.name: 0.0 for arm in experiment.arms}
    successes = dict(trials)
    for arm, n, paid in db.execute("""
        SELECT arm, sum(weight)::DOUBLE, coalesce(sum(weight) FILTER (reward > 0), 0)::DOUBLE
        FROM decisions GROUP BY 1""").fetchall():
        trials[arm], successes[arm] = n, min(paid, n)
    best = ThompsonSampling(successes=successes, trials=trials, floor=0.0).probabilities
    return {arm: {"trials": trials[arm], "successes": successes[arm], "best": best[arm]} for arm in trials}


def _linear(
    db: duckdb.DuckDBPyConnection, experiment: Experiment, encoder: ContextEncoder
) -> tuple[dict[str, Any], int]:
    """Per arm: weighted trials and successes, and the ridge regression of rewards on contexts; rows without context.

    Rows are summed per arm and context, and read in a fixed order: the same log gives the same bits.
    """
    names = [arm.name for arm in experiment.arms]
    bandit = LinearBandit.fresh(names, encoder.dimension)
    trials, successes, n_without = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0
    reader = db.execute("""
        SELECT arm, context, count(*)::BIGINT AS n, sum(weight)::DOUBLE AS trials,
               coalesce(sum(weight) FILTER (reward > 0), 0)::DOUBLE AS successes
        FROM decisions GROUP BY 1, 2 ORDER BY 1, 2""").to_arrow_reader(_ROWS)
    for batch in reader:
        arms, vectors, weights, means = [], [], [], []
        for row in batch.to_pylist():
            values = encoder.read(json.loads(row["context"])) if row["context"] else None
            if values is None:
                n_without += row["n"]
                continue
            trials[row["arm"]] += row["trials"]
            successes[row["arm"]] += row["successes"]
            if row["trials"] > 0:
                arms.append(row["arm"])
                vectors.append(encoder.vector(values))
                weights.append(row["trials"])
                means.append(row["successes"] / row["trials"])
        if arms:
            bandit = bandit.update(arms, np.array(vectors), means, weights=weights)
    covariance = np.linalg.inv(bandit.precision)
    learned = {
        name: {
            "trials": trials[name],
            "successes": successes[name],
            "theta": bandit.theta[i].tolist(),
            "covariance": covariance[i].tolist(),
        }
        for i, name in enumerate(names)
    }
    return learned, n_without
