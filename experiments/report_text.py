"""A report as plain text, for a terminal or a chat."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from experiments.metrics import Analysis
from experiments.report_conclusion import lift_text, p_text
from experiments.report_model import MetricResult, Report

WIDTH = 118


def as_text(report: Report) -> str:
    """The report in lines of at most some 120 columns: conclusion, checks, metrics."""
    plan, conclusion = report.plan, report.conclusion
    lines = [
        f"{plan.experiment}  (layer {plan.layer}, unit {plan.unit_kind}, control {plan.control})",
        f"{_when(report)}; {sum(report.counts.units.values()):,} units, {report.counts.n_exposures:,} exposures",
        "",
        f"=> {conclusion.headline}",
        *bullets(conclusion.reasons),
        "",
        "Sample ratio",
        *text_table(
            ["arm", "units", "planned", "share"],
            [
                [
                    arm,
                    f"{report.counts.units[arm]:,}",
                    f"{report.sample_ratio.expected.get(arm, 0.0):,.1f}",
                    _share(report.counts.units[arm], sum(report.counts.units.values())),
                ]
                for arm in plan.arms
            ],
        ),
        f"  chi-square {report.sample_ratio.statistic:.3f}, df {report.sample_ratio.df}, "
        f"p {p_text(report.sample_ratio.p_value)} (always valid: {p_text(report.sample_ratio.sequential_p_value)}): "
        + ("MISMATCH, the verdict is blocked" if report.sample_ratio.mismatch else "as planned"),
    ]
    if report.warnings:
        lines += ["", "Warnings", *bullets(report.warnings)]
    if report.metrics:
        lines += ["", f"Decided by: {rule_text(report.analysis)}; alpha {report.analysis.alpha:g}"]
    for name, check in (report.aa or {}).items():
        lines.append(
            f"  A/A {name}: {check.false_positive_share:.1%} of {check.n} splits below {check.alpha:g} "
            f"({check.low:.1%} … {check.high:.1%}): {'healthy' if check.healthy else 'NOT healthy'}"
        )
    for result in report.metrics:
        lines += ["", *_metric(result, report)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _metric(result: MetricResult, report: Report) -> list[str]:
    metric = result.metric
    removed = f", CUPED removes {result.variance_removed:.0%} of the variance" if result.variance_removed else ""
    lines = [f"{metric.name}  ({metric.role}, {metric.type}, goal {metric.goal}{removed})"]
    rows = []
    for value in result.arms:
        comparison = result.comparison(value.arm)
        row = [value.arm, f"{value.n:,}", number_text(value.value)]
        if comparison is None:
            rows.append([*row, "control", "", "", "", ""])
            continue
        fixed = comparison.adjusted_relative or comparison.relative
        rows.append(
            [
                *row,
                lift_text(fixed.estimate),
                interval_text(fixed.low, fixed.high),
                interval_text(comparison.deciding.low, comparison.deciding.high),
                p_text(comparison.p_adjusted),
                "" if comparison.probability_best is None else f"{comparison.probability_best:.1%}",
            ]
        )
    lines += text_table(
        ["arm", "units", "value", "effect", "fixed interval", "deciding interval", "p corrected", "P(best)"], rows
    )
    for comparison in result.comparisons:
        if comparison.guardrail:
            rail = comparison.guardrail
            lines.append(
                f"  guard-rail {comparison.arm}: {rail.status} (margin {rail.margin:.1%}, "
                f"bound {lift_text(rail.worst)})"
            )
        if math.isfinite(comparison.mde):
            needed = number_text(comparison.units_needed, whole=True)
            lines.append(
                f"  {comparison.arm}: finds {lift_text(comparison.mde)} now with a power of "
                f"{report.analysis.power:.0%}; {lift_text(metric.min_effect)} needs {needed} units"
            )
    for trend in result.trends:
        lines.append(
            f"  {trend.arm}: effect {lift_text(trend.first)} early, {lift_text(trend.last)} late after first exposure "
            f"(trend p {p_text(trend.p_value)})"
        )
    for segment in result.segments:
        if segment.p_adjusted < report.analysis.alpha:
            lines.append(
                f"  segment {segment.attribute}={segment.label}, {segment.arm}: {lift_text(segment.effect.estimate)} "
                f"{interval_text(segment.effect.low, segment.effect.high)}, corrected p {p_text(segment.p_adjusted)}"
            )
    for other in result.interactions:
        if other.p_adjusted < report.analysis.alpha:
            lines.append(
                f"  interacts with {other.experiment} (layer {other.layer}): corrected p {p_text(other.p_adjusted)}; "
                "read the two together"
            )
    lines += [f"  note: {note}" for note in result.notes]
    return lines


def _when(report: Report) -> str:
    start = report.since or report.counts.first
    return f"{start:%Y-%m-%d %H:%M} to {report.until:%Y-%m-%d %H:%M} UTC" if start else "no exposure"


def rule_text(analysis: Analysis) -> str:
    """The decision rule in words."""
    return {
        "sequential": f"confidence sequence, valid at every look (tightest at {analysis.tuning_units:,.0f} units)",
        "fixed": "one look at the end; looking earlier and stopping inflates the error",
        "group_sequential": f"{analysis.looks} planned looks with {analysis.spending} spending",
    }[analysis.decision]


def number_text(value: float, *, whole: bool = False) -> str:
    """A value with five significant digits, or a whole number with thousands separated."""
    if not math.isfinite(value):
        return "unreachable" if value > 0 else "-"
    if 0 < abs(value) < 1e-7:
        return "0"
    return f"{value:,.0f}" if whole or abs(value) >= 100_000 else f"{value:.5g}"


def interval_text(low: float, high: float) -> str:
    return f"{lift_text(low)} … {lift_text(high)}" if math.isfinite(low) and math.isfinite(high) else "-"


def _share(part: int, total: int) -> str:
    return f"{part / total:.2%}" if total else "-"


def bullets(texts: Iterable[str]) -> list[str]:
    """Each text as a point, wrapped."""
    return [
        line
        for text in texts
        for line in textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
    ]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
