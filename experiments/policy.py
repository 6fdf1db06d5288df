"""Bandit policies as they serve: a frozen function of context and hash that names an arm and its exact propensity.

A policy is what learning left (a JSON document, see `learn`) seen through the configuration as it is now: weights are
the prior probability that each arm is the best, the floor is the share that no arm falls below. The chance of an arm is
computed first and the arm drawn from it by a hash, so that the logged propensity is the chance by construction.
Only numpy is needed here: every server worker imports this module.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from experiments.hashing import N_BUCKETS
from experiments.spec import Bandit, ContextField, Experiment
from plait.errors import SpecError

FloatArray = npt.NDArray[np.float64]
Values = tuple[float | str, ...]
MAX_TEXT = 100
"""Longer texts in a context are cut: what is logged with every request stays small."""
_CLIP = 10.0
"""A scaled number beyond this counts as this: one outlier must not outweigh everything else."""
_MAX_SEEN = 10_000
_GRID = np.linspace(-6.0, 6.0, 129)
_DENSITY = np.exp(-(_GRID**2) / 2)


class Draw(NamedTuple):
    """An arm by its index, the chance it had, the context as JSON, and what decided.

    chosen_by: "policy"; "weights", before anything was learned; "no_context", where a field was missing or unusable.
    """

    arm: int
    propensity: float
    context: str | None
    chosen_by: str


class Policy(Protocol):
    """u in [0, 1) is the hash of the unit or request. `version` 0 is the initial policy, the weights."""

    @property
    def version(self) -> int: ...
    def choose(self, u: float, attributes: Mapping[str, Any]) -> Draw: ...
    def shares(self, attributes: Mapping[str, Any]) -> tuple[float, ...]: ...


def with_floor(shares: Sequence[float], floor: float) -> tuple[float, ...]:
    """Shares that sum to 1, none below `floor`: those below are lifted to it, the others give in proportion.

    >>> with_floor([3.0, 1.0, 0.0], 0.1)
    (0.675, 0.225, 0.1)
    """
    k, total = len(shares), sum(shares)
    if not 0 <= floor <= 1 / k:
        raise SpecError(f"an exploration floor of {floor} for {k} arms is impossible; at most {1 / k:.4g}")
    if not (math.isfinite(total) and total > 0 and min(shares) >= 0):
        return (1 / k,) * k
    shares = [share / total for share in shares]
    lifted: set[int] = set()
    while True:
        rest = sum(share for i, share in enumerate(shares) if i not in lifted)
        scale = (1 - floor * len(lifted)) / rest if rest > 0 else 0.0
        low = {i for i, share in enumerate(shares) if i not in lifted and share * scale < floor}
        if not low:
            return tuple(floor if i in lifted else share * scale for i, share in enumerate(shares))
        lifted |= low
        if len(lifted) == k:  # floor = 1 / k, up to rounding
            return (1 / k,) * k


def best_of_normals(means: FloatArray, sds: FloatArray) -> FloatArray:
    """P(each of independent normals is the largest), shapes (n_arms,); exact for two, else on a grid, to about 1e-4.

    P(i best) = integral of phi(z) prod_(j != i) Phi((mean_i + sd_i z - mean_j) / sd_j), trapezoid over 129 points.
    """
    sds = np.maximum(sds, 1e-12 + 1e-9 * float(np.abs(means).max()))
    if len(means) == 2:
        first = 0.5 * math.erfc((means[1] - means[0]) / math.sqrt(2 * (sds[0] ** 2 + sds[1] ** 2)))
        return np.array([first, 1.0 - first])
    points_AG = means[:, None] + sds[:, None] * _GRID
    below_AAG = _normal_cdf((points_AG[:, None, :] - means[None, :, None]) / sds[None, :, None])
    arms = np.arange(len(means))
    below_AAG[arms, arms] = 1.0
    best = below_AAG.prod(axis=1) @ _DENSITY
    return np.asarray(best / best.sum())


def _normal_cdf(x: FloatArray) -> FloatArray:
    """Phi to 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    z = np.minimum(np.abs(x), 30.0) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    half = 0.5 * tail * np.exp(-z * z)
    return np.where(x < 0, half, 1 - half)


@dataclass(frozen=True, slots=True)
class ContextEncoder:
    """From attributes to plain values, and from values to the vector that a linear bandit reads."""

    fields: tuple[ContextField, ...]

    @property
    def dimension(self) -> int:
        """1 for the intercept, 1 a number, 1 a category. A text that is none of the categories is all zeros."""
        return 1 + sum(len(f.categories) or 1 for f in self.fields)

    def read(self, attributes: Mapping[str, Any]) -> Values | None:
        """The fields' values; None if one is missing, not finite or of another type.

        Texts are cut at 100 characters; true, false and whole numbers are texts where categories are declared.
        """
        values: list[float | str] = []
        for f in self.fields:
            value = attributes.get(f.name)
            kind = value.__class__
            if f.categories:
                if kind is not str:
                    if kind is bool:
                        value = "true" if value else "false"
                    elif kind is int:
                        value = str(value) if -(10**18) < value < 10**18 else ""  # type: ignore[operator]
                    else:
                        return None
                values.append(value if len(value) <= MAX_TEXT else value[:MAX_TEXT])  # type: ignore[arg-type,index]
            elif (kind is float or kind is int) and -1e300 < value < 1e300:  # type: ignore[operator]
                values.append(float(value))  # type: ignore[arg-type]
            else:
                return None
        return tuple(values)

    def vector(self, values: Values) -> FloatArray:
        """Shape (dimension,)."""
        out = [1.0]
        for f, value in zip(self.fields, values, strict=True):
            if f.categories:
                out += [float(value == category) for category in f.categories]
            else:
                out.append(min(max((float(value) - f.center) / f.scale, -_CLIP), _CLIP))
        return np.array(out)

    def to_json(self, values: Values) -> str:
        """What is logged: plain values, so that another encoding can be fitted to the same log."""
        named = {f.name: value for f, value in zip(self.fields, values, strict=True)}
        return json.dumps(named, ensure_ascii=False, separators=(",", ":"))

    def signature(self) -> list[dict[str, Any]]:
        """What a learned policy must agree with, as plain data."""
        return [{**asdict(f), "categories": list(f.categories)} for f in self.fields]


@dataclass(frozen=True, slots=True, eq=False)
class SharePolicy:
    """The same shares for everybody."""

    version: int
    draws: tuple[Draw, ...]
    edges: tuple[float, ...]

    @classmethod
    def of(cls, version: int, shares: Sequence[float], *, context: str | None, chosen_by: str) -> SharePolicy:
        draws = tuple(Draw(i, share, context, chosen_by) for i, share in enumerate(shares))
        return cls(version, draws, tuple(accumulate(shares))[:-1])

    def choose(self, u: float, attributes: Mapping[str, Any]) -> Draw:
        return self.draws[bisect_right(self.edges, u)]

    def shares(self, attributes: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(draw.propensity for draw in self.draws)


@dataclass(frozen=True, slots=True, eq=False)
class LinearModel:
    """Per arm a normal belief about its coefficients: mean (n_arms, d), covariance (n_arms, d, d) for unit noise."""

    theta_AD: FloatArray
    covariance_ADD: FloatArray
    width: float
    optimistic: bool  # LinUCB: the best upper bound; else by P(best)

    def best(self, x_D: FloatArray) -> FloatArray:
        """P(each arm is the best here), shape (n_arms,); for LinUCB 1 for the best bound."""
        means = self.theta_AD @ x_D
        sds = self.width * np.sqrt(np.maximum((self.covariance_ADD @ x_D) @ x_D, 0.0))
        if self.optimistic:
            return np.eye(len(means))[int(np.argmax(means + sds))]
        return best_of_normals(means, sds)


@dataclass(frozen=True, slots=True, eq=False)
class ContextPolicy:
    """Shares by context, computed once per context and remembered; without a model, the weights."""

    version: int
    encoder: ContextEncoder
    model: LinearModel | None
    weights: tuple[float, ...]
    floor: float
    fallback: SharePolicy
    _seen: dict[Values, SharePolicy] = field(default_factory=dict)

    def choose(self, u: float, attributes: Mapping[str, Any]) -> Draw:
        return self._here(attributes).choose(u, attributes)

    def shares(self, attributes: Mapping[str, Any]) -> tuple[float, ...]:
        return self._here(attributes).shares(attributes)

    def _here(self, attributes: Mapping[str, Any]) -> SharePolicy:
        values = self.encoder.read(attributes)
        if values is None:
            return self.fallback
        known = self._seen.get(values)
        if known is None:
            known = self._compute(values)
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen[values] = known
        return known

    def _compute(self, values: Values) -> SharePolicy:
        context = self.encoder.to_json(values)
        if self.model is None:
            return SharePolicy.of(self.version, self.weights, context=context, chosen_by="weights")
        best = self.model.best(self.encoder.vector(values)).tolist()
        shares = posterior_shares(best, self.weights, self.floor)
        return SharePolicy.of(self.version, shares, context=context, chosen_by="policy")


def posterior_shares(best: Sequence[float], weights: Sequence[float], floor: float) -> tuple[float, ...]:
    """Each arm's share, given P(best) under equal prior chances and the weights as the prior chances.

    By Bayes' rule P(i best | data) is proportional to weight_i P(i best | data, equal chances); then the floor.
    """
    return with_floor([p * w for p, w in zip(best, weights, strict=True)], floor)


def initial_policy(experiment: Experiment) -> Policy:
    """What serves until something was learned: the weights. It logs contexts already, to learn from."""
    bandit, weights = _bandit(experiment), _weights(experiment)
    if not bandit.context:
        return SharePolicy.of(0, weights, context=None, chosen_by="weights")
    return _context_policy(0, bandit, None, weights)


def compile_policy(experiment: Experiment, version: int, document: Mapping[str, Any]) -> Policy:
    """A learned policy under the present configuration.

    Raises SpecError where it does not fit: it was learned for another method, reward, set of arms or context.
    """
    bandit, weights = _bandit(experiment), _weights(experiment)
    contextual = bandit.method != "thompson"
    try:
        arms = document["arms"]
        learned = (document["method"] != "thompson", document["reward"], sorted(arms))
        wanted = (contextual, bandit.reward, sorted(arm.name for arm in experiment.arms))
        if learned != wanted:
            raise SpecError(
                f"policy {version} of {experiment.name} was learned for {learned}, not {wanted}; learn again"
            )
        if contextual and document["fields"] != ContextEncoder(bandit.context).signature():
            raise SpecError(f"policy {version} of {experiment.name} was learned for another context; learn again")
        each = [arms[arm.name] for arm in experiment.arms]
        if not contextual:
            best = [float(arm["best"]) for arm in each]
            if not (all(map(math.isfinite, best)) and min(best) >= 0 and sum(best) > 0):
                raise SpecError(f"policy {version} of {experiment.name} holds chances {best}; learn again")
            shares = posterior_shares(best, weights, bandit.floor / N_BUCKETS)
            return SharePolicy.of(version, shares, context=None, chosen_by="policy")
        theta = np.array([arm["theta"] for arm in each], np.float64)
        covariance = np.array([arm["covariance"] for arm in each], np.float64)
        d = ContextEncoder(bandit.context).dimension
        if theta.shape != (len(each), d) or covariance.shape != (len(each), d, d):
            raise SpecError(f"policy {version} of {experiment.name} has {theta.shape} coefficients; learn again")
        if not (np.isfinite(theta).all() and np.isfinite(covariance).all()):
            raise SpecError(f"policy {version} of {experiment.name} holds numbers that are not finite; learn again")
    except SpecError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpecError(f"policy {version} of {experiment.name} cannot be read ({error!r}); learn again") from error
    model = LinearModel(theta, covariance, bandit.width, bandit.method == "linucb")
    return _context_policy(version, bandit, model, weights)


def _context_policy(
    version: int, bandit: Bandit, model: LinearModel | None, weights: tuple[float, ...]
) -> ContextPolicy:
    fallback = SharePolicy.of(version, weights, context=None, chosen_by="no_context")
    return ContextPolicy(version, ContextEncoder(bandit.context), model, weights, bandit.floor / N_BUCKETS, fallback)


def _bandit(experiment: Experiment) -> Bandit:
    assert experiment.bandit is not None, "only bandits have policies"
    return experiment.bandit


def _weights(experiment: Experiment) -> tuple[float, ...]:
    return tuple(arm.parts / N_BUCKETS for arm in experiment.arms)
