"""What bandits know: Thompson sampling and LinUCB as frozen sufficient statistics; `update` returns new ones.

Learning (learn.py) makes policies of them that servers draw from (policy.py). To simulate without a server, `choose`
draws here; every choice carries the probability with which it was made, which off-policy evaluation divides by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.policy import with_floor
from experiments.stats.bayes import beta_posterior, compare_posteriors
from experiments.stats.moments import FloatArray
from plait.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The arm chosen and the probability that the policy had of choosing it."""

    arm: str
    propensity: float


def explore(best: Mapping[str, float], floor: float) -> dict[str, float]:
    """Probabilities with at least `floor` for each arm, so that no propensity is too small to divide by.

    >>> explore({"a": 1.0, "b": 0.0}, 0.1)
    {'a': 0.9, 'b': 0.1}
    """
    return dict(zip(best, with_floor(list(best.values()), floor), strict=True))


def draw(probabilities: Mapping[str, float], rng: np.random.Generator) -> Choice:
    """One arm by its probability."""
    arms = list(probabilities)
    weights = np.array([probabilities[arm] for arm in arms])
    index = int(rng.choice(len(arms), p=weights / weights.sum()))
    return Choice(arm=arms[index], propensity=float(weights[index] / weights.sum()))


@dataclass(frozen=True, kw_only=True, slots=True)
class ThompsonSampling:
    """Bernoulli rewards, Beta posteriors; the probability of an arm is that of being best.

    The propensities are computed exactly (by quadrature), not estimated, once per update.
    Source: Thompson, Biometrika 25, 1933; Chapelle and Li, "An Empirical Evaluation of Thompson Sampling", NeurIPS
    2011.
    """

    successes: Mapping[str, float]
    trials: Mapping[str, float]
    prior: tuple[float, float] = (1.0, 1.0)
    floor: float = 0.01
    probabilities: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.successes.keys() != self.trials.keys() or len(self.trials) < 2:
            raise SpecError(
                f"a bandit needs the same two or more arms in successes and trials; got {sorted(self.trials)}"
            )
        for arm, n in self.trials.items():
            if not 0 <= self.successes[arm] <= n:
                raise SpecError(f"arm {arm!r} has {self.successes[arm]} successes in {n} trials")
        posteriors = [beta_posterior(self.successes[arm], n, prior=self.prior) for arm, n in self.trials.items()]
        best = compare_posteriors(posteriors).probability_best
        object.__setattr__(
            self, "probabilities", explore(dict(zip(self.trials, best, strict=True)), min(self.floor, 1 / len(best)))
        )

    @classmethod
    def fresh(cls, arms: Sequence[str], **settings: Any) -> ThompsonSampling:
        """A policy that knows nothing: every arm is equally probable."""
        return cls(successes=dict.fromkeys(arms, 0.0), trials=dict.fromkeys(arms, 0.0), **settings)

    def choose(self, rng: np.random.Generator) -> Choice:
        return draw(self.probabilities, rng)

    def update(self, arms: Sequence[str], rewards: npt.ArrayLike, *, keep: float = 1.0) -> ThompsonSampling:
        """With a batch of outcomes added, reward 0 .. 1 each; `keep` < 1 forgets the past a little (drift)."""
        values = np.asarray(rewards, dtype=np.float64)
        if values.size and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise SpecError("rewards of a Bernoulli bandit lie between 0 and 1")
        successes = {arm: s * keep for arm, s in self.successes.items()}
        trials = {arm: n * keep for arm, n in self.trials.items()}
        for arm, value in zip(arms, values, strict=True):
            if arm not in trials:
                raise SpecError(f"no arm {arm!r} in this bandit; it has {', '.join(trials)}")
            successes[arm] += float(value)
            trials[arm] += 1
        return replace(self, successes=successes, trials=trials)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearBandit:
    """Contextual bandit with one ridge regression per arm: LinUCB's bound to rank arms, sampling to explore.

    `choose` draws each arm's reward from its posterior `n_draws` times (linear Thompson sampling) and takes an arm by
    the share of draws it won, floored: that share is the exact propensity of the choice. `upper_bounds` are LinUCB's;
    `choose_ucb` takes their best, with an epsilon of exploration.
    Sources: Li, Chu, Langford and Schapire, "A contextual-bandit approach …", WWW 2010, algorithm 1;
    Agrawal and Goyal, "Thompson Sampling for Contextual Bandits with Linear Payoffs", ICML 2013.
    """

    arms: tuple[str, ...]
    precision: FloatArray  # (n_arms, d, d): ridge + sum of x x^T
    moment: FloatArray  # (n_arms, d): sum of reward x
    width: float = 1.0
    floor: float = 0.01
    n_draws: int = 200

    @classmethod
    def fresh(cls, arms: Sequence[str], dimension: int, *, ridge: float = 1.0, **settings: Any) -> LinearBandit:
        if len(set(arms)) < 2 or dimension < 1 or ridge <= 0:
            raise SpecError("a linear bandit needs two or more arms, a dimension of at least 1 and a ridge above 0")
        return cls(
            arms=tuple(arms),
            precision=np.stack([np.eye(dimension) * ridge] * len(arms)),
            moment=np.zeros((len(arms), dimension)),
            **settings,
        )

    @property
    def theta(self) -> FloatArray:
        """Ridge estimates, shape (n_arms, d)."""
        return np.asarray(np.linalg.solve(self.precision, self.moment[..., None])[..., 0], dtype=np.float64)

    def upper_bounds(self, context: npt.ArrayLike) -> FloatArray:
        """LinUCB's optimistic reward of each arm, shape (n_arms,): x theta + width sqrt(x A^-1 x)."""
        x = self._checked(context)
        spread = np.linalg.solve(self.precision, np.broadcast_to(x, self.moment.shape)[..., None])[..., 0] @ x
        return np.asarray(self.theta @ x + self.width * np.sqrt(spread), dtype=np.float64)

    def choose_ucb(self, context: npt.ArrayLike, rng: np.random.Generator) -> Choice:
        """The arm with the best bound; with probability n_arms x floor any arm at random."""
        bounds = self.upper_bounds(context)
        best = {arm: float(i == int(np.argmax(bounds))) for i, arm in enumerate(self.arms)}
        return draw(explore(best, min(self.floor, 1 / len(self.arms))), rng)

    def choose(self, context: npt.ArrayLike, rng: np.random.Generator) -> Choice:
        """Linear Thompson sampling; the propensity is the share of draws in which the arm is best, floored."""
        x = self._checked(context)
        # theta x is normal, so that draws of the arms' rewards need no draw of theta.
        mean = self.theta @ x
        spread = np.linalg.solve(self.precision, np.broadcast_to(x, self.moment.shape)[..., None])[..., 0] @ x
        rewards = mean + self.width * np.sqrt(spread) * rng.standard_normal((self.n_draws, len(self.arms)))
        wins = np.bincount(rewards.argmax(axis=1), minlength=len(self.arms)) / self.n_draws
        best = {arm: float(wins[i]) for i, arm in enumerate(self.arms)}
        return draw(explore(best, min(self.floor, 1 / len(self.arms))), rng)

    def update(
        self,
        arms: Sequence[str],
        contexts: npt.ArrayLike,
        rewards: npt.ArrayLike,
        *,
        weights: npt.ArrayLike | None = None,
    ) -> LinearBandit:
        """With a batch of outcomes added: contexts of shape (n, d), rewards and weights (default 1) of shape (n,)."""
        x, y = np.atleast_2d(np.asarray(contexts, dtype=np.float64)), np.asarray(rewards, dtype=np.float64)
        w = np.ones_like(y) if weights is None else np.asarray(weights, dtype=np.float64)
        if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(w).all()):
            raise SpecError("contexts, rewards and weights of a bandit are finite numbers")
        precision, moment = self.precision.copy(), self.moment.copy()
        names = np.asarray(arms)
        for i, arm in enumerate(self.arms):
            mine = names == arm
            weighted = w[mine, None] * x[mine]
            precision[i] += x[mine].T @ weighted
            moment[i] += y[mine] @ weighted
        if unknown := sorted(set(names.tolist()) - set(self.arms)):
            raise SpecError(f"no arm {unknown[0]!r} in this bandit; it has {', '.join(self.arms)}")
        return replace(self, precision=precision, moment=moment)

    def _checked(self, context: npt.ArrayLike) -> FloatArray:
        x = np.asarray(context, dtype=np.float64)
        if x.shape != self.moment.shape[1:] or not np.isfinite(x).all():
            raise SpecError(
                f"a context of shape {x.shape}, or not finite; this bandit takes {self.moment.shape[1]} numbers"
            )
        return x
