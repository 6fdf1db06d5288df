"""What a report holds, as frozen dataclasses; text, JSON and HTML only present it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from experiments.metrics import Analysis, Metric
from experiments.report_plan import Plan
from experiments.report_query import UnitCounts
from experiments.stats.checks import AACheck, Interaction, SampleRatio
from experiments.stats.effects import Effect, NonInferiority

Verdict = Literal["ship", "do not ship", "keep running"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmValue:
    """A metric in one arm, with its own two-sided interval. `adjusted`: after CUPED."""

    arm: str
    n: int
    value: float
    se: float
    low: float
    high: float
    adjusted: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One treatment arm against control on one metric. Relative effects are fractions: 0.02 is +2 %."""

    arm: str
    absolute: Effect
    relative: Effect
    adjusted_absolute: Effect | None  # CUPED
    adjusted_relative: Effect | None
    sequential: Effect  # relative, always valid; on the adjusted estimate where there is one
    deciding: Effect  # relative, by the declared decision rule
    p_adjusted: float  # deciding p-value, corrected for the other comparisons of its family
    bootstrap: Effect | None
    guardrail: NonInferiority | None
    mde: float  # relative effect that the deciding rule finds with the declared power, now
    power: float  # of the deciding rule to find min_effect, now
    units_needed: float  # units in all arms for that power
    probability_best: float | None = None
    expected_loss: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesPoint:
    """One treatment arm on one day: the effect of all data so far, and of that day alone."""

    day: str
    arm: str
    n_units: int
    cumulative: Effect
    sequential: Effect
    daily: Effect


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """Whether the effect changes with days since a unit's first exposure: novelty (falls) or learning (grows)."""

    arm: str
    slope_per_day: float
    p_value: float
    first: float  # relative effect over the first third of the days
    last: float  # and over the last third


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentResult:
    """One treatment arm within one value of a user attribute; p_adjusted is Holm's over all segments of the metric."""

    attribute: str
    label: str
    arm: str
    n_units: int
    effect: Effect
    p_adjusted: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInteraction:
    """Whether another experiment's arms change this experiment's effect."""

    experiment: str
    layer: str
    n_units: int
    result: Interaction
    p_adjusted: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One metric over all arms. `pre_period`: p-values of "the arms did not differ before exposure", per treatment."""

    metric: Metric
    arms: tuple[ArmValue, ...]
    comparisons: tuple[Comparison, ...]
    variance_removed: float | None
    pre_period: Mapping[str, float]
    notes: tuple[str, ...] = ()
    series: tuple[SeriesPoint, ...] = ()
    trends: tuple[Trend, ...] = ()
    segments: tuple[SegmentResult, ...] = ()
    interactions: tuple[LayerInteraction, ...] = ()

    def comparison(self, arm: str) -> Comparison | None:
        return next((comparison for comparison in self.comparisons if comparison.arm == arm), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conclusion:
    """What to do. `blocked` means that the data cannot be trusted, so that effects say nothing."""

    verdict: Verdict
    arm: str | None
    headline: str
    reasons: tuple[str, ...]
    blocked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The whole report. `metrics` is empty where a failed check blocks it."""

    plan: Plan
    analysis: Analysis
    since: datetime | None
    until: datetime
    created: datetime
    counts: UnitCounts
    sample_ratio: SampleRatio
    warnings: tuple[str, ...]
    metrics: tuple[MetricResult, ...]
    conclusion: Conclusion
    aa: Mapping[str, AACheck] | None = None
    daily_units: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (day, new units per arm in the plan's order)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: times as ISO 8601, what is not a number as null."""
        answer = plain(self)
        assert isinstance(answer, dict)
        answer["plan"]["control"] = self.plan.control
        answer["sample_ratio"]["mismatch"] = self.sample_ratio.mismatch
        for name, check in (self.aa or {}).items():
            answer["aa"][name]["healthy"] = check.healthy
        return answer


def plain(value: Any) -> Any:
    """Dataclasses as mappings, times as ISO 8601, what is not a number as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {("default" if key is None else str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "total_seconds"):
        return value.total_seconds()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
