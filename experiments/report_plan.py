"""What an experiment was meant to be, against which it is judged: arms, control, unit, planned split, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from experiments.metrics import MetricSet
from plait.errors import SpecError, UnknownNameError

CONTROL_NAMES = ("control", "baseline", "off", "default", "a")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The experiment as declared. `arms` begins with the control.

    weights: per configuration version, the planned weight of each arm; key None holds for versions that are not there.
    """

    experiment: str
    layer: str
    unit_kind: str
    arms: tuple[str, ...]
    weights: Mapping[int | None, Mapping[str, float]]
    declared: bool = True  # False: reconstructed from the log alone
    state: str = ""
    metrics: tuple[str, ...] = ()
    primary: str | None = None
    guardrails: tuple[str, ...] = ()
    bandit: bool = False
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise SpecError(
                f"experiment {self.experiment!r} has arms {list(self.arms)}; a comparison needs two or more"
            )
        if len(self.arms) > 60:
            raise SpecError(f"experiment {self.experiment!r} has {len(self.arms)} arms; a report compares at most 60")

    @property
    def control(self) -> str:
        return self.arms[0]

    def expected_counts(self, units_by_version: Mapping[int | None, int]) -> dict[str, float]:
        """Units each arm should have, given how many units entered under each configuration version."""
        expected = dict.fromkeys(self.arms, 0.0)
        for version, n_units in units_by_version.items():
            weights = self.weights.get(version) or self.weights[None]
            total = sum(weights.get(arm, 0.0) for arm in self.arms)
            for arm in self.arms:
                expected[arm] += n_units * weights.get(arm, 0.0) / total if total else 0.0
        return expected


def plan_from_log(experiment: str, *, layer: str, unit_kind: str, arms: tuple[str, ...]) -> Plan:
    """The plan when no configuration tells: the arms seen, evenly split, control by its usual name or the first."""
    named = [arm for name in CONTROL_NAMES for arm in arms if arm.lower() == name]
    control = named[0] if named else sorted(arms)[0]
    ordered = (control, *(arm for arm in sorted(arms) if arm != control))
    return Plan(
        experiment=experiment,
        layer=layer,
        unit_kind=unit_kind,
        arms=ordered,
        weights={None: dict.fromkeys(ordered, 1.0)},
        declared=False,
        notes=(f"no configuration declares it: an even split and control {control!r} are assumed",),
    )


def with_overrides(plan: Plan, *, control: str | None = None, weights: Mapping[str, float] | None = None) -> Plan:
    """The plan with another control arm, or other planned weights for all versions."""
    if control is not None:
        if control not in plan.arms:
            raise UnknownNameError("arm", control, plan.arms, where=plan.experiment)
        plan = replace(plan, arms=(control, *(arm for arm in plan.arms if arm != control)))
    if weights is not None:
        for arm, weight in weights.items():
            if arm not in plan.arms:
                raise UnknownNameError("arm", arm, plan.arms, where=plan.experiment)
            if not weight >= 0:
                raise SpecError(f"weight {weight!r} of arm {arm!r} is not a number of at least 0")
        plan = replace(plan, weights={None: dict(weights)})
    return plan


def chosen_metrics(metrics: MetricSet, plan: Plan) -> MetricSet:
    """The metrics in the roles that the experiment gives them; all as declared where it says nothing.

    Raises UnknownNameError for a name that the metrics file does not hold.
    """
    if not (plan.metrics or plan.primary or plan.guardrails):
        return metrics
    wanted = list(dict.fromkeys([*filter(None, [plan.primary]), *plan.metrics, *plan.guardrails]))
    if not plan.metrics:
        wanted += [metric.name for metric in metrics.metrics if metric.name not in wanted]
    chosen = []
    for name in wanted:
        metric = metrics.get(name)
        if plan.primary:
            role = "primary" if name == plan.primary else ("secondary" if metric.role == "primary" else metric.role)
            metric = replace(metric, role=role)
        if name in plan.guardrails:
            metric = replace(metric, role="guardrail", margin=0.05 if metric.margin is None else metric.margin)
        chosen.append(metric)
    return replace(metrics, metrics=tuple(chosen))
