"""A bandit's report as plain text, and as one HTML page."""

from __future__ import annotations

import math

from experiments.bandit_report import BanditReport, Value
from experiments.report_conclusion import p_text
from experiments.report_text import bullets, number_text, text_table

_DAYS = 14
ARM_HEADER = [
    "arm",
    "decisions",
    "share",
    "alone (SNIPS)",
    "95 % interval",
    "alone (IPS)",
    "against control",
    "weights",
]


def as_text(report: BanditReport) -> str:
    """The report in lines of at most some 120 columns."""
    lines = [
        f"{report.experiment}  ({report.method} bandit, layer {report.layer}, reward {report.reward}, "
        f"{f'policy {report.policy}' if report.policy else 'no policy yet'})",
        f"{window_text(report)}; {report.counts.decisions:,} decisions on {report.n_units:,} units",
        "",
        f"=> {report.headline}",
    ]
    if report.counts.decisions:
        lines += ["", *text_table(ARM_HEADER, arm_rows(report)), "", *(f"  {line}" for line in summary(report))]
        header = ["day (UTC)", "decisions", "reward", *arm_names(report)]
        header = ["day (UTC)", "decisions", "reward", *arm_names(report)]
        lines += ["", "Shares over time", *text_table(header, day_rows(report))]
    if report.warnings:
        lines += ["", "Warnings", *bullets(report.warnings)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def as_html(report: BanditReport) -> str:
    """One self-contained page of the same."""
    from experiments.report_html import environment  # brings matplotlib

    return (
        environment()
        .get_template("bandit.html")
        .render(
            report=report,
            window=window_text(report),
            header=ARM_HEADER,
            arms=arm_rows(report),
            summary=summary(report),
            names=arm_names(report),
            days=day_rows(report, limit=None),
        )
    )


def arm_rows(report: BanditReport) -> list[list[str]]:
    """One row per arm: what it would earn alone, by both estimators."""
    rows = []
    for arm in report.arms:
        against = "control" if arm.arm == report.control else "-"
        if arm.difference is not None:
            against = f"{arm.difference.value:+.5g} {interval(arm.difference, sign='+')}"
        weights = f"{arm.weight.value:.3f}" + ("" if arm.check_p is None else f" (p {p_text(arm.check_p)})")
        rows.append(
            [
                arm.arm + (" *" if arm.arm == report.best else ""),
                f"{arm.decisions:,}",
                f"{arm.share:.1%}",
                number_text(arm.snips.value),
                interval(arm.snips),
                number_text(arm.ips.value),
                against,
                weights,
            ]
        )
    return rows


def summary(report: BanditReport) -> list[str]:
    """What was earned, the regret, and the check of the log, in words."""
    lines = []
    if report.earned is not None:
        lines.append(f"the bandit earned {number_text(report.earned.value)} a decision {interval(report.earned)}")
    if report.regret is not None:
        total = report.regret.value * report.counts.decisions
        lines.append(
            f"regret against {report.best} (*) alone: {report.regret.value:+.5g} a decision "
            f"{interval(report.regret, sign='+')}, {total:+,.1f} in all; the best of several estimates is flattered"
        )
    if report.check_p is not None:
        lines.append(
            f"weights of an arm average 1 if the log is whole: p {p_text(report.check_p)}, "
            + ("MISMATCH, nothing here is to be believed" if report.blocked else "as it should be")
        )
    return lines


def arm_names(report: BanditReport) -> list[str]:
    return [arm.arm for arm in report.arms]


def day_rows(report: BanditReport, limit: int | None = _DAYS) -> list[list[str]]:
    """Each day's decisions, reward and shares; the last `limit` days."""
    days = report.days if limit is None else report.days[-limit:]
    rows = []
    for day in days:
        n = sum(day.decisions)
        rows.append([day.day, f"{n:,}", number_text(day.reward), *(f"{each / n:.1%}" for each in day.decisions)])
    return rows


def window_text(report: BanditReport) -> str:
    start = f"{report.since:%Y-%m-%d %H:%M}" if report.since else (report.days[0].day if report.days else "the start")
    return f"{start} to {report.until:%Y-%m-%d %H:%M} UTC"


def interval(value: Value, *, sign: str = "") -> str:
    if not (math.isfinite(value.low) and math.isfinite(value.high)):
        return "-"
    return f"({value.low:{sign}.5g} … {value.high:{sign}.5g})"
