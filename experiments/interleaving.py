"""Interleaving: two rankers share one list, and clicks tell which is better with far fewer users than an A/B test.

The credit each click gives, and the test over users. experiments.slates makes the lists; impressions log the teams.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.slates import Interleaved, softmax_rank
from experiments.stats.effects import Effect
from experiments.stats.moments import Moments


def credit(shown: Interleaved, clicked: Sequence[Hashable] | set[Hashable]) -> float:
    """Clicks on team b's items minus clicks on team a's: above 0 speaks for b.

    >>> credit(Interleaved(items=(1, 2, 3), teams=("a", "b", "b")), {2, 3})
    2.0
    """
    hits = set(clicked)
    return float(
        sum((1 if team == "b" else -1) for item, team in zip(shown.items, shown.teams, strict=True) if item in hits)
    )


def probabilistic_credit(
    items: Sequence[Hashable],
    a: Sequence[Hashable],
    b: Sequence[Hashable],
    clicked: Sequence[Hashable] | set[Hashable],
    *,
    tau: float = 3.0,
) -> float:
    """Expected credit over all team assignments that could have made this list: less noise than the teams drawn.

    Positions are independent given the list, so the sum over assignments is a sum over positions of
    P(b | item, position) - P(a | item, position). Source: Hofmann et al., CIKM 2011, section 4.2 (marginalisation).
    """
    hits = set(clicked)
    weights = [{item: softmax_rank(rank, tau) for rank, item in enumerate(ranked, start=1)} for ranked in (a, b)]
    total = 0.0
    for item in items:
        share = []
        for pool in weights:
            mass = sum(pool.values())
            share.append(pool.get(item, 0.0) / mass if mass else 0.0)
        if item in hits and sum(share) > 0:
            total += (share[1] - share[0]) / (share[1] + share[0])
        for pool in weights:
            pool.pop(item, None)
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Outcome over users. `effect`: mean credit per user (> 0: b is better) with interval; wins count users."""

    effect: Effect
    wins_a: int
    wins_b: int
    ties: int
    sign_p_value: float

    @property
    def delta(self) -> float:
        """(wins of b + ties / 2) / users - 1/2 (Chapelle et al., "Large-scale validation …", TOIS 30(1), 2012)."""
        n = self.wins_a + self.wins_b + self.ties
        return (self.wins_b + self.ties / 2) / n - 0.5 if n else 0.0


def credit_test(list_credits: npt.ArrayLike, units: npt.ArrayLike, *, alpha: float = 0.05) -> Preference:
    """Judge the credits of many lists, shape (n_lists,); `units` names the user of each, whose lists are summed.

    effect: t test that the mean credit of a user is zero (scipy); sign_p_value: exact sign test over the users that
    have a winner.
    """
    values = np.asarray(list_credits, dtype=np.float64)
    _, index = np.unique(np.asarray(units), return_inverse=True)
    per_user = np.bincount(index, weights=values) if values.size else np.zeros(0)
    wins_b, wins_a = int((per_user > 0).sum()), int((per_user < 0).sum())
    sign_p = float(stats.binomtest(wins_b, wins_a + wins_b, 0.5).pvalue) if wins_a + wins_b else 1.0
    moments = Moments.of(per_user)
    nan = float("nan")
    effect = Effect(estimate=moments.mean, se=nan, low=nan, high=nan, p_value=1.0, alpha=alpha)
    if moments.n > 1 and moments.var > 0:
        test = stats.ttest_1samp(per_user, 0.0)
        interval = test.confidence_interval(1 - alpha)
        effect = Effect(
            estimate=moments.mean,
            se=(moments.var / moments.n) ** 0.5,
            low=float(interval.low),
            high=float(interval.high),
            p_value=float(test.pvalue),
            alpha=alpha,
            df=moments.n - 1,
        )
    return Preference(
        effect=effect, wins_a=wins_a, wins_b=wins_b, ties=len(per_user) - wins_a - wins_b, sign_p_value=sign_p
    )
