"""The conclusion in plain words: ship, do not ship, or keep running, and why.

The rules, in this order. (1) A failed sample ratio, or an arm without units, blocks: no effect is believed. (2) A
treatment that fails a guard-rail, or is worse on a primary metric, is not shipped. (3) One that is better on a primary
metric and passes every guard-rail is shipped; of several, the one most probably best. (4) If every treatment's
interval excludes an effect worth finding, nothing is there: do not ship. (5) Otherwise keep running.
Guard-rails need no correction for their number: all of them must pass (intersection-union test; Berger, Technometrics
24(4), 1982). Primary metrics are corrected by Holm over metrics and arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.metrics import Analysis, MetricSet
from experiments.report_model import Comparison, Conclusion, MetricResult
from experiments.report_plan import Plan
from experiments.report_query import UnitCounts
from experiments.stats.checks import SampleRatio


def blocked_by(plan: Plan, counts: UnitCounts, ratio: SampleRatio) -> Conclusion | None:
    """The conclusion where the data cannot be judged at all; None where it can."""
    total = sum(counts.units.values())
    if total == 0 and counts.n_exposures:
        return Conclusion(
            verdict="keep running",
            arm=None,
            headline=f"Keep running: no exposed unit of {plan.experiment} can be analysed.",
            reasons=(
                f"The log holds {counts.n_exposures:,} exposures, of which {counts.n_counterfactual:,} units are "
                "marked counterfactual (--triggered takes only those); testers and units of several arms are left out.",
            ),
            blocked=True,
        )
    if total == 0:
        return Conclusion(
            verdict="keep running",
            arm=None,
            headline=f"Keep running: no unit of {plan.experiment} has been exposed yet.",
            reasons=(
                "The log holds no exposure to analyse; check that the experiment is applied and its parameter used.",
            ),
            blocked=True,
        )
    missing = [arm for arm in plan.arms if counts.units[arm] == 0 and ratio.expected.get(arm, 0) > 0]
    if ratio.mismatch:
        split = ", ".join(
            f"{arm} {counts.units[arm]:,} (expected {ratio.expected.get(arm, 0):,.0f})" for arm in plan.arms
        )
        reasons = [
            f"Sample-ratio mismatch: {split}; p {p_text(ratio.p_value)}, below {ratio.threshold:g}.",
            "Units are missing or moved in a way that depends on the arm, so any difference may be theirs.",
            "Look for lost exposures, a crash or redirect in one arm, bots, a changed weight; then restart.",
        ]
        if missing:
            reasons.insert(1, f"Arm {', '.join(missing)} has no unit at all.")
        return Conclusion(
            verdict="do not ship",
            arm=None,
            headline="Do not ship: the sample ratio is wrong, so the effects cannot be trusted.",
            reasons=tuple(reasons),
            blocked=True,
        )
    if missing or counts.units[plan.control] == 0:
        names = ", ".join(missing or [plan.control])
        return Conclusion(
            verdict="keep running",
            arm=None,
            headline=f"Keep running: arm {names} has no unit yet.",
            reasons=(f"{total:,} units are exposed, none to {names}; there is nothing to compare.",),
            blocked=True,
        )
    return None


@dataclass(kw_only=True, slots=True)
class _Standing:
    """How one treatment stands."""

    arm: str
    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)  # primaries that may still hide an effect worth finding
    best: float = 0.0


def conclude(plan: Plan, metrics: MetricSet, results: Sequence[MetricResult], *, days_so_far: float) -> Conclusion:
    """The verdict over all treatments. Effects are judged by the declared rule with corrected p-values."""
    analysis = metrics.analysis
    primaries = {metric.name for metric in metrics.primaries}
    standings = [_stand(arm, primaries, results, analysis) for arm in plan.arms[1:]]
    reasons = [reason for standing in standings for reason in _reasons(standing, results, primaries)]
    winners = [s for s in standings if s.better and not (s.worse or s.failed)]
    ready = [s for s in winners if not s.undecided]
    if ready:
        winner = max(ready, key=lambda s: s.best)
        return Conclusion(
            verdict="ship",
            arm=winner.arm,
            headline=f"Ship {winner.arm}: {' and '.join(winner.better)} improved and every guard-rail holds."
            if any(r.metric.role == "guardrail" for r in results)
            else f"Ship {winner.arm}: {' and '.join(winner.better)} improved.",
            reasons=tuple(reasons),
        )
    if winners:
        winner = max(winners, key=lambda s: s.best)
        reasons.append(_patience(results, {*winner.undecided}, days_so_far, winner.arm))
        return Conclusion(
            verdict="keep running",
            arm=winner.arm,
            headline=f"Keep running: {winner.arm} improves {' and '.join(winner.better)}, but "
            f"{' and '.join(winner.undecided)} may still be harmed beyond the margin.",
            reasons=tuple(filter(None, reasons)),
        )
    if all(s.worse or s.failed for s in standings):
        harmed = sorted({name for s in standings for name in (*s.worse, *s.failed)})
        return Conclusion(
            verdict="do not ship",
            arm=None,
            headline=f"Do not ship: {' and '.join(harmed)} got worse.",
            reasons=tuple(reasons),
        )
    if not any(s.open for s in standings if not (s.worse or s.failed)):
        return Conclusion(
            verdict="do not ship",
            arm=None,
            headline="Do not ship: there is no effect large enough to matter.",
            reasons=tuple(reasons),
        )
    alive = next(s for s in standings if s.open and not (s.worse or s.failed))
    reasons.append(_patience(results, {*alive.open}, days_so_far, alive.arm))
    return Conclusion(
        verdict="keep running",
        arm=None,
        headline="Keep running: the data cannot tell yet.",
        reasons=tuple(filter(None, reasons)),
    )


def _stand(arm: str, primaries: set[str], results: Sequence[MetricResult], analysis: Analysis) -> _Standing:
    standing = _Standing(arm=arm)
    for result in results:
        comparison, name = result.comparison(arm), result.metric.name
        if comparison is None:
            continue
        sign = 1.0 if result.metric.goal == "increase" else -1.0
        effect = comparison.deciding
        if result.metric.role == "guardrail" and comparison.guardrail is not None:
            status = comparison.guardrail.status
            if status == "fail":
                standing.failed.append(name)
            elif status == "undecided":
                standing.undecided.append(name)
        if name in primaries:
            standing.best = max(standing.best, comparison.probability_best or 0.0)
            if effect.defined and comparison.p_adjusted < analysis.alpha:
                (standing.better if sign * effect.estimate > 0 else standing.worse).append(name)
            elif not effect.defined or max(sign * effect.low, sign * effect.high) > result.metric.min_effect:
                standing.open.append(name)
    return standing


def _reasons(standing: _Standing, results: Sequence[MetricResult], primaries: set[str]) -> list[str]:
    reasons = []
    for result in results:
        comparison = result.comparison(standing.arm)
        if comparison is None:
            continue
        name, effect = result.metric.name, comparison.deciding
        if name in primaries:
            if not effect.defined:
                why = "; ".join(result.notes) or "too few units"
                reasons.append(f"{standing.arm}: the effect on {name} is not defined ({why}).")
                continue
            tail = (
                f"{lift_text(effect.estimate)} ({lift_text(effect.low)} to {lift_text(effect.high)}, "
                f"corrected p {p_text(comparison.p_adjusted)})"
            )
            if name in standing.better:
                reasons.append(f"{standing.arm}: {name} is better, {tail}.")
            elif name in standing.worse:
                reasons.append(f"{standing.arm}: {name} is worse, {tail}.")
            elif name in standing.open:
                reasons.append(
                    f"{standing.arm}: {name} is undecided, {tail}; "
                    f"a true effect of {lift_text(result.metric.min_effect)} would be found by now with a probability "
                    f"of {comparison.power:.0%}."
                )
            else:
                reasons.append(
                    f"{standing.arm}: {name} has no gain of {lift_text(result.metric.min_effect)} or more, {tail}."
                )
        elif result.metric.role == "guardrail" and comparison.guardrail is not None:
            rail = comparison.guardrail
            says = {
                "pass": "is safe: harm beyond the margin is excluded",
                "fail": "fails: it is harmed beyond the margin",
                "undecided": "is not yet proven safe",
            }[rail.status]
            reasons.append(
                f"{standing.arm}: guard-rail {name} {says} ({lift_text(effect.estimate)}, "
                f"bound {lift_text(rail.worst)}, margin {rail.margin:.1%})."
            )
    return reasons


def _patience(results: Sequence[MetricResult], names: set[str], days_so_far: float, arm: str) -> str:
    """How long it may take, at the traffic so far."""
    needed = now = 0.0
    for result in results:
        comparison: Comparison | None = result.comparison(arm)
        if result.metric.name in names and comparison is not None and comparison.units_needed > needed:
            needed, now = comparison.units_needed, float(sum(value.n for value in result.arms))
    if not needed or not math.isfinite(needed) or now <= 0 or days_so_far <= 0:
        return ""
    if needed <= now:
        return "The declared power is reached; more units will narrow the intervals further."
    days = days_so_far * (needed / now - 1)
    return (
        f"The declared power needs about {needed:,.0f} units in all, {now:,.0f} are in: "
        f"{f'some {days:,.0f} more days' if days >= 1 else 'less than a day more'} at this rate."
    )


def lift_text(value: float) -> str:
    """A relative effect with its sign.

    >>> lift_text(0.0213)
    '+2.13%'
    """
    return f"{value:+.2%}" if math.isfinite(value) else "not defined"


def p_text(value: float) -> str:
    """A p-value as people write it.

    >>> p_text(0.00004), p_text(0.0312)
    ('< 0.0001', '0.031')
    """
    if not math.isfinite(value):
        return "not defined"
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"
