"""Plots of a report as inline SVG: no script, no external asset, colours from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from experiments.report_conclusion import lift_text
from experiments.report_model import MetricResult, Report, SeriesPoint

WIDTH = 720.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """Linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        clipped = min(max(value, self.low), self.high)
        return self.start + (clipped - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        """About n round values within the range."""
        raw = (self.high - self.low) / max(n, 1)
        step = 10 ** math.floor(math.log10(raw))
        step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def forest(report: Report) -> str:
    """Relative effects of every metric and treatment: the deciding interval, thin, over the fixed one, thick."""
    rows = [
        (result, comparison)
        for result in report.metrics
        for comparison in result.comparisons
        if comparison.deciding.defined and math.isfinite(comparison.deciding.low)
    ]
    if not rows:
        return ""
    # One wild interval must not flatten the others: the axis ends at the widest of the better four fifths.
    reach = sorted(max(abs(c.deciding.low), abs(c.deciding.high)) for _, c in rows)
    edge = reach[min(len(reach) - 1, math.ceil(0.8 * len(reach)))] * 1.08 or 0.01
    left, line = 250.0, 30.0
    x = _Scale(low=-edge, high=edge, start=left, end=WIDTH - 90)
    height = line * len(rows) + 34
    parts = [_open(WIDTH, height, "Relative effect of each treatment on each metric, with intervals")]
    for tick in x.ticks(8):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 26:.1f}"/>')
        parts.append(_text(x(tick), height - 10, _percent(tick, x), "tick", "middle"))
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{height - 26:.1f}"/>')
    for i, (result, comparison) in enumerate(rows):
        y = line * i + line / 2 + 4
        effect, fixed = comparison.deciding, comparison.adjusted_relative or comparison.relative
        sign = 1 if result.metric.goal == "increase" else -1
        kind = "flat"
        if comparison.p_adjusted < report.analysis.alpha:
            kind = "good" if sign * effect.estimate > 0 else "bad"
        label = f"{result.metric.name} · {comparison.arm}"
        parts.append(_text(left - 12, y + 4, label if len(label) <= 36 else label[:35] + "…", "label", "end"))
        if comparison.guardrail:
            margin = -sign * comparison.guardrail.margin
            if abs(margin) < edge:
                parts.append(
                    f'<line class="margin" x1="{x(margin):.1f}" x2="{x(margin):.1f}" '
                    f'y1="{y - 12:.1f}" y2="{y + 12:.1f}"><title>margin {lift_text(margin)}</title></line>'
                )
        title = f"{label}: {lift_text(effect.estimate)} ({lift_text(effect.low)} to {lift_text(effect.high)})"
        parts.append(
            f'<g class="{kind}"><title>{escape(title)}</title>'
            f'<line class="thin" x1="{x(effect.low):.1f}" x2="{x(effect.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line class="thick" x1="{x(fixed.low):.1f}" x2="{x(fixed.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x(effect.estimate):.1f}" cy="{y:.1f}" r="4.5"/></g>'
        )
        parts.append(_text(WIDTH - 80, y + 4, lift_text(effect.estimate), f"value {kind}", "start"))
    return "".join([*parts, "</svg>"])


def series_plot(result: MetricResult, arm: str) -> str:
    """Day by day: the always-valid band and the cumulative effect, and each day's own effect as dots."""
    points = [p for p in result.series if p.arm == arm and p.cumulative.defined]
    if len(points) < 2:
        return ""
    # The first days' intervals are too wide to show: the axis follows the second half.
    later = points[len(points) // 2 :]
    edge = max(max(abs(p.sequential.low), abs(p.sequential.high)) for p in later) * 1.5 or 0.01
    left, top, height = 64.0, 10.0, 190.0
    y = _Scale(low=-edge, high=edge, start=height - 30, end=top)
    x = _Scale(low=0, high=len(points) - 1, start=left, end=WIDTH - 16)
    parts = [_open(WIDTH, height, f"Effect on {result.metric.name} of {arm}, day by day")]
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 16}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 8, y(tick) + 4, _percent(tick, y), "tick", "end"))
    parts.append(f'<line class="zero" x1="{left}" x2="{WIDTH - 16}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    upper = [f"{x(i):.1f},{y(p.sequential.high):.1f}" for i, p in enumerate(points)]
    lower = [f"{x(i):.1f},{y(p.sequential.low):.1f}" for i, p in enumerate(points)]
    parts.append(f'<polygon class="band" points="{" ".join([*upper, *reversed(lower)])}"/>')
    parts += [_dot(x(i), y(p.daily.estimate), p) for i, p in enumerate(points) if abs(p.daily.estimate) <= edge]
    line = " ".join(f"{x(i):.1f},{y(p.cumulative.estimate):.1f}" for i, p in enumerate(points))
    parts.append(f'<polyline class="line" points="{line}"/>')
    for i in sorted({0, (len(points) - 1) // 2, len(points) - 1}):
        parts.append(
            _text(x(i), height - 8, points[i].day, "tick", ("start", "middle", "end")[min(2, _third(i, points))])
        )
    return "".join([*parts, "</svg>"])


def traffic_plot(report: Report) -> str:
    """New units per day, one line an arm."""
    days = report.daily_units
    if len(days) < 2:
        return ""
    top_value = max(max(counts) for _, counts in days) or 1
    left, height = 64.0, 130.0
    y = _Scale(low=0, high=top_value * 1.05, start=height - 28, end=8)
    x = _Scale(low=0, high=len(days) - 1, start=left, end=WIDTH - 16)
    parts = [_open(WIDTH, height, "New units per day and arm")]
    for tick in y.ticks(3):
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 16}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:,.0f}", "tick", "end"))
    for arm in range(len(report.plan.arms)):
        line = " ".join(f"{x(i):.1f},{y(counts[arm]):.1f}" for i, (_, counts) in enumerate(days))
        parts.append(f'<polyline class="line arm{arm % 6}" points="{line}"/>')
    parts.append(_text(left, height - 8, days[0][0], "tick", "start"))
    parts.append(_text(WIDTH - 16, height - 8, days[-1][0], "tick", "end"))
    return "".join([*parts, "</svg>"])


def _third(i: int, points: Sequence[SeriesPoint]) -> int:
    return 0 if i == 0 else 2 if i == len(points) - 1 else 1


def _dot(x: float, y: float, point: SeriesPoint) -> str:
    title = f"{point.day} alone: {lift_text(point.daily.estimate)}; {point.n_units:,} units so far"
    return f'<circle class="day" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(title)}</title></circle>'


def _percent(value: float, scale: _Scale) -> str:
    span = scale.high - scale.low
    digits = 0 if span > 0.1 else 1 if span > 0.01 else 2
    return f"{value:+.{digits}%}" if value else "0"


def _open(width: float, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
