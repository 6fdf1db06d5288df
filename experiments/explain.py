"""Why a unit gets what it gets, layer by layer.

Written from the declaration, not from the compiled plan: slow, plain, and by that a second witness that the tests hold
against `assign`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import mmh3

from experiments.assignment import StickyArms
from experiments.hashing import N_BUCKETS, arm_bucket, bucket, prefixed, refusal, salt_prefix
from experiments.policy import Policy, initial_policy
from experiments.spec import ROOT, Arm, Experiment, ExperimentsSpec, Holdout, Layer, Ranges

_NO_POLICIES: Mapping[str, Policy] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExplanation:
    """One layer's decision. `parameters`: what this layer sets for the unit; `why`: one sentence.

    shares: the chance of each arm, where a bandit draws it.
    """

    layer: str
    unit_kind: str
    unit: str | None
    bucket: int | None
    experiment: str | None
    arm: str | None
    arm_bucket: int | None
    forced: bool
    parameters: Mapping[str, Any]
    why: str
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """All layers, the global holdouts (name → held or not), and the values that come out."""

    version: int
    layers: tuple[LayerExplanation, ...]
    holdouts: Mapping[str, bool]
    values: Mapping[str, Any]


def explain(
    spec: ExperimentsSpec,
    version: int,
    units: Mapping[str, Any],
    attributes: Mapping[str, Any],
    at: datetime,
    *,
    sticky: StickyArms | None = None,
    policies: Mapping[str, Policy] = _NO_POLICIES,
) -> Explanation:
    """The explanation for `units` at `at` (aware)."""
    return _Explainer(spec, units, attributes, at, sticky, policies).explain(version)


class _Explainer:
    def __init__(
        self,
        spec: ExperimentsSpec,
        units: Mapping[str, Any],
        attributes: Mapping[str, Any],
        at: datetime,
        sticky: StickyArms | None,
        policies: Mapping[str, Policy],
    ) -> None:
        self._spec, self._units, self._attributes, self._at, self._sticky = spec, units, attributes, at, sticky
        self._policies = policies
        self._decided: dict[str, LayerExplanation] = {}

    def explain(self, version: int) -> Explanation:
        layers = sorted(self._spec.layers.values(), key=lambda layer: (not layer.launch, self._spec.depth(layer.name)))
        values = {name: parameter.default for name, parameter in self._spec.parameters.items()}
        explained = tuple(self._layer(layer) for layer in layers)
        for layer in explained:
            values.update(layer.parameters)
        holdouts = {
            holdout.name: self._held(holdout)
            for holdout in self._spec.holdouts.values()
            if holdout.layer is None and refusal(self._units.get(holdout.unit)) is None and self._spec.enabled
        }
        return Explanation(version=version, layers=explained, holdouts=holdouts, values=values)

    def _layer(self, layer: Layer) -> LayerExplanation:
        if layer.name not in self._decided:
            self._decided[layer.name] = self._decide(layer)
        return self._decided[layer.name]

    def _decide(self, layer: Layer) -> LayerExplanation:
        spec, unit = self._spec, self._units.get(layer.unit)
        usable = refusal(unit) is None
        where = bucket(layer.salt, str(unit)) if usable else None

        def rest(why: str) -> LayerExplanation:
            return self._result(layer, where, why)

        if not spec.enabled:
            return rest("the configuration is switched off (enabled: false)")
        for experiment in self._in_layer(layer):
            for arm in experiment.arms if usable and not self._ended(experiment) else ():
                if unit in arm.testers:
                    return self._result(layer, where, f"{unit!r} is a tester of this arm", experiment, arm, forced=True)
        if not usable:
            given = layer.unit in self._units
            return rest(
                f"the {layer.unit} id cannot be used: {refusal(unit)}" if given else f"no {layer.unit} id was given"
            )
        for holdout in spec.holdouts.values():
            covers = holdout.layer is None and (holdout.layers is None or layer.name in holdout.layers)
            if covers and refusal(self._units.get(holdout.unit)) is None and self._held(holdout):
                return rest(f"held out by the global holdout {holdout.name!r}")
        if layer.domain != ROOT:
            parent = spec.domains[layer.domain].layer
            reason = self._layer(spec.layers[parent]).why
            if reason != f"bucket belongs to the domain {layer.domain!r}":
                return rest(f"not in the domain {layer.domain!r} (in layer {parent!r}: {reason})")
        assert where is not None
        for holdout in spec.holdouts.values():
            if holdout.layer == layer.name and _inside(where, holdout.ranges):
                held = {name: spec.parameters[name].default for name in layer.parameters}
                return self._result(layer, where, f"held out by {holdout.name!r}", held=held)
        for domain in spec.domains.values():
            if domain.layer == layer.name and _inside(where, domain.ranges):
                return rest(f"bucket belongs to the domain {domain.name!r}")
        return self._by_experiments(layer, where)

    def _by_experiments(self, layer: Layer, where: int) -> LayerExplanation:
        why = "no experiment owns this bucket"
        for experiment in self._in_layer(layer):
            if not _inside(where, experiment.ranges):
                continue
            why, arm = self._by_experiment(experiment, where)
            if arm is not None:
                return self._result(layer, where, why, experiment, arm)
            if not why.startswith("idle: "):  # an idle one may share its buckets with the one that runs now
                return self._result(layer, where, why)
        return self._result(layer, where, why.removeprefix("idle: "))

    def _by_experiment(self, experiment: Experiment, where: int) -> tuple[str, Arm | None]:
        name = f"experiment {experiment.name!r}"
        unit = self._units[self._spec.layers[experiment.layer].unit]
        if experiment.state != "running":
            return f"idle: {name} owns this bucket but is a {experiment.state}", None
        if experiment.start and self._at < experiment.start:
            return f"idle: {name} owns this bucket but starts only at {experiment.start.isoformat()}", None
        if self._ended(experiment):
            return f"idle: {name} owns this bucket but has ended", None
        traffic = experiment.traffic_at(self._at)
        open_here = _inside(where, experiment.open_ranges(traffic))
        if not open_here and not (experiment.sticky and self._sticky):
            return f"{name} owns this bucket but its traffic is {traffic / 100:g} % and does not reach it", None
        for needed, arms in experiment.requires:
            got = self._layer(self._spec.layers[self._spec.experiments[needed].layer])
            if got.experiment != needed or (arms and got.arm not in arms):
                wanted = f" in {' or '.join(sorted(arms))}" if arms else ""
                return f"{name} requires {needed!r}{wanted}, which this unit is not in", None
        if not experiment.where.test(self._attributes):
            return f"{name} is for others: not ({experiment.where.text})", None
        if experiment.group is not None and not self._in_group(experiment):
            return f"{name} is in group {experiment.group!r}, whose bucket of this unit is another's", None
        stored = self._stored(experiment, unit)
        if stored is not None:
            return f"{name}, where this unit's arm is kept (sticky)", stored
        if not open_here:
            return f"{name} owns this bucket but its traffic is {traffic / 100:g} % and does not reach it", None
        if experiment.bandit is not None:
            return self._drawn(experiment, unit)
        return f"{name} owns this bucket", _arm_at(experiment, arm_bucket(experiment.salt, unit))

    def _drawn(self, experiment: Experiment, unit: str) -> tuple[str, Arm]:
        """What a bandit draws: the shares laid side by side, and where the hash falls."""
        assert experiment.bandit is not None
        policy, shares = self._shares(experiment)
        by, drawn = "unit", unit
        if experiment.bandit.by_request and refusal(self._units.get("request")) is None:
            by, drawn = "request", self._units["request"]
        point = mmh3.mmh3_32_uintdigest(salt_prefix("arm", experiment.salt) + prefixed(drawn)) / 2**32
        end, arm = 0.0, experiment.arms[-1]
        for candidate in experiment.arms[:-1]:
            end += shares[candidate.name]
            if point < end:
                arm = candidate
                break
        learned = f"policy {policy.version}" if policy.version else "its weights (nothing is learned yet)"
        chances = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        return f"bandit {experiment.name!r} draws by {by} from {learned}: {chances}", arm

    def _shares(self, experiment: Experiment) -> tuple[Policy, dict[str, float]]:
        policy = self._policies.get(experiment.name) or initial_policy(experiment)
        names = (arm.name for arm in experiment.arms)
        return policy, dict(zip(names, policy.shares(self._attributes), strict=True))

    def _in_layer(self, layer: Layer) -> list[Experiment]:
        return [e for e in self._spec.experiments.values() if e.layer == layer.name and e.state != "stopped"]

    def _ended(self, experiment: Experiment) -> bool:
        return experiment.end is not None and self._at >= experiment.end

    def _held(self, holdout: Holdout) -> bool:
        return _inside(_hashed("holdout", holdout.salt, self._units[holdout.unit]), holdout.ranges)

    def _in_group(self, experiment: Experiment) -> bool:
        group = self._spec.groups[experiment.group or ""]
        unit = self._units.get(group.unit)
        return refusal(unit) is None and _inside(_hashed("group", group.name, str(unit)), experiment.group_ranges)

    def _stored(self, experiment: Experiment, unit: str) -> Arm | None:
        if not experiment.sticky or self._sticky is None:
            return None
        name = self._sticky.get(experiment.name, self._spec.layers[experiment.layer].unit, unit)
        return next((arm for arm in experiment.arms if arm.name == name), None)

    def _result(
        self,
        layer: Layer,
        where: int | None,
        why: str,
        experiment: Experiment | None = None,
        arm: Arm | None = None,
        *,
        forced: bool = False,
        held: Mapping[str, Any] | None = None,
    ) -> LayerExplanation:
        unit = self._units.get(layer.unit)
        return LayerExplanation(
            layer=layer.name,
            unit_kind=layer.unit,
            unit=unit if isinstance(unit, str) else None,
            bucket=where,
            experiment=experiment.name if experiment else None,
            arm=arm.name if arm else None,
            arm_bucket=arm_bucket(experiment.salt, str(unit)) if experiment else None,
            forced=forced,
            parameters=dict(arm.values) if arm else dict(held or {}),
            why=why,
            shares=self._shares(experiment)[1] if experiment and experiment.bandit and arm and not forced else {},
        )


def _hashed(kind: str, salt: str, unit: str) -> int:
    return mmh3.mmh3_32_uintdigest(salt_prefix(kind, salt) + prefixed(unit)) % N_BUCKETS


def _inside(where: int, ranges: Ranges) -> bool:
    return any(first <= where < end for first, end in ranges)


def _arm_at(experiment: Experiment, where: int) -> Arm:
    first = 0
    for arm in experiment.arms:
        first += arm.parts
        if where < first:
            return arm
    raise AssertionError("weights add up to 10,000: ExperimentsSpec holds that")
