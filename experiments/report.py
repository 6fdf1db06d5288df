"""The verdict on an experiment: sample ratio first, then metrics, then a conclusion.

`build_report` reads the event tables once and returns a Report; report_text, report_html and `Report.to_dict` present
it. How each number is computed, and where it comes from, is in docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from experiments.metrics import MetricSet
from experiments.report_analysis import Handle, add_feature_covariates, analyse, request_columns
from experiments.report_conclusion import blocked_by, conclude
from experiments.report_depth import (
    aa_splits,
    daily_sums,
    daily_units,
    interactions,
    other_experiments,
    segment_tables,
    segments,
    series,
    trends,
)
from experiments.report_events import DAY_US, micros, open_events
from experiments.report_model import Conclusion, MetricResult, Report
from experiments.report_plan import Plan, chosen_metrics, with_overrides
from experiments.report_query import UnitTables
from experiments.report_source import find_plan, project_metrics
from experiments.stats.checks import SampleRatio, adjust, sample_ratio
from plait.clock import Clock
from plait.errors import SpecError
from plait.settings import Home


def build_report(
    home: Home,
    experiment: str,
    *,
    metrics: MetricSet | None = None,
    plan: Plan | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    control: str | None = None,
    weights: Mapping[str, float] | None = None,
    triggered: bool = False,
    despite_mismatch: bool = False,
    depth: bool = True,
    aa: int = 0,
    engine: str = "duckdb",
    memory: str = "1000MB",
    threads: int = 2,
) -> Report:
    """The report of one experiment over the home's event tables.

    since, until: aware; exposures from `since` on (default: all), everything known before `until` (default: now).
    triggered: only units that an exposure marks counterfactual. despite_mismatch: compute effects even where the
    sample ratio blocks them. depth: with daily series, segments and interactions. aa: random splits of the control
    arm, to check each metric's variance. engine: where the pass over the events runs, duckdb or spark.
    Raises UnknownNameError for an experiment that is neither configured nor logged.
    """
    metrics = metrics or project_metrics(home)
    clock = Clock.of(home)
    until = until or clock.now()
    if since is not None and since >= until:
        raise SpecError(f"since ({since.isoformat()}) lies before until ({until.isoformat()})")
    plan = with_overrides(plan or find_plan(home, experiment), control=control, weights=weights)
    if plan.bandit:
        raise SpecError(
            f"{experiment} is a bandit: its shares move, so it cannot be judged as a fixed split; "
            f"`plait experiments report {experiment}` reports on it as what it is"
        )
    metrics = chosen_metrics(metrics, plan)
    with open_events(home.events, engine=engine, memory=memory, threads=threads) as events:
        tables = UnitTables(events, plan, since=since, until=until, triggered=triggered)
        return _report(home, tables, metrics, since, clock.now(), despite_mismatch, depth, aa)


def _report(
    home: Home,
    tables: UnitTables,
    metrics: MetricSet,
    since: datetime | None,
    created: datetime,
    despite_mismatch: bool,
    depth: bool,
    n_splits: int,
) -> Report:
    plan, counts, analysis, until = tables.plan, tables.counts, metrics.analysis, tables.until
    ratio = sample_ratio(
        counts.units, plan.expected_counts(counts.by_version) if tables.n_units else dict.fromkeys(plan.arms, 1.0),
        threshold=analysis.srm_threshold,
    )  # fmt: skip
    warnings = list(plan.notes) + _warnings(tables, ratio)
    conclusion = blocked_by(plan, counts, ratio)
    results: list[MetricResult] = []
    checks = None
    if conclusion is None or (despite_mismatch and ratio.mismatch):
        handles = request_columns(tables, metrics.metrics, micros(until))
        add_feature_covariates(home, tables, handles)
        results = [analyse(tables, handle, analysis) for handle in handles]
        primaries = {metric.name for metric in metrics.primaries}
        results = correct(results, primaries)
        if depth:
            results, complaints = deepen(home, tables, handles, results, metrics, primaries)
            warnings += complaints
        if n_splits:
            checks = {
                handle.metric.name: aa_splits(tables, handle, analysis, n_splits=n_splits)
                for handle in handles
                if handle.metric.type != "quantile"
            }
        warnings += tables.complaints() + _late_warnings(results)
    first = micros(counts.first) if counts.first else micros(until)
    days = (micros(until) - first) / DAY_US
    final: Conclusion = conclusion or conclude(plan, metrics, results, days_so_far=days)
    return Report(
        plan=plan,
        analysis=analysis,
        since=since,
        until=until,
        created=created,
        counts=counts,
        sample_ratio=ratio,
        warnings=tuple(warnings),
        metrics=tuple(results),
        conclusion=final,
        aa=checks,
        daily_units=tuple(daily_units(tables)),
    )


def deepen(
    home: Home,
    tables: UnitTables,
    handles: Sequence[Handle],
    results: Sequence[MetricResult],
    metrics: MetricSet,
    primaries: set[str],
) -> tuple[list[MetricResult], list[str]]:
    """The results with series and trends, the primary ones also with segments and interactions; and complaints."""
    analysis = metrics.analysis
    attributes, complaints = segment_tables(tables, home.events, analysis.segments)
    others = other_experiments(tables)
    # A metric that waits for complete windows, or is no sum over days, has no daily series.
    daily = [handle for handle in handles if handle.metric.type != "quantile" and handle.until_first is None]
    sums = dict(zip([handle.metric.name for handle in daily], daily_sums(tables, daily), strict=True))
    answer = []
    for handle, result in zip(handles, results, strict=True):
        if handle.metric.name in sums:
            mine = sums[handle.metric.name]
            result = replace(
                result,
                series=tuple(series(tables, handle, analysis, mine)),
                trends=() if handle.metric.is_share else tuple(trends(tables, handle, mine)),
            )
        if handle.metric.name in primaries and handle.metric.type != "quantile":
            result = replace(
                result,
                segments=tuple(segments(tables, handle, analysis, attributes)),
                interactions=tuple(interactions(tables, handle, others)),
            )
        answer.append(result)
    return answer, complaints


def correct(results: list[MetricResult], primaries: set[str]) -> list[MetricResult]:
    """Corrected deciding p-values: Holm over primary metrics and arms, Benjamini-Hochberg over the secondary ones.

    Guard-rails keep theirs: all must pass, so their number needs no correction.
    """
    corrected = {}
    secondary = {r.metric.name for r in results if r.metric.role != "guardrail"} - primaries
    for family, method in ((primaries, "holm"), (secondary, "bh")):
        members = [
            (r.metric.name, c.arm, c.deciding.p_value)
            for r in results
            if r.metric.name in family
            for c in r.comparisons
        ]
        for (name, arm, _), p in zip(members, adjust([p for *_, p in members], method), strict=True):  # type: ignore[arg-type]
            corrected[name, arm] = p
    return [
        replace(
            result,
            comparisons=tuple(
                replace(c, p_adjusted=corrected.get((result.metric.name, c.arm), c.p_adjusted))
                for c in result.comparisons
            ),
        )
        for result in results
    ]


def _warnings(tables: UnitTables, ratio: SampleRatio) -> list[str]:
    counts, answer = tables.counts, []
    total = tables.n_units
    if counts.n_crossed_units:
        share = counts.n_crossed_units / (total + counts.n_crossed_units)
        answer.append(
            f"{counts.n_crossed_units:,} units ({share:.2%}) were seen in more than one arm and are left out"
            + ("; above 1 % something moves units between arms" if share > 0.01 else "")
        )
    if counts.n_forced_units:
        answer.append(f"{counts.n_forced_units:,} units with a forced arm (testers) are left out")
    if counts.n_bad_ids:
        answer.append(f"{counts.n_bad_ids:,} exposures name a user that is not an integer and are left out")
    if counts.n_unknown_arm:
        answer.append(
            f"{counts.n_unknown_arm:,} exposures name an arm that the experiment does not have and are left out"
        )
    if not ratio.mismatch and ratio.p_value < 0.01:
        answer.append(
            f"the sample ratio is unusual (p = {ratio.p_value:.4f}), though not below {ratio.threshold:g}: watch it"
        )
    if tables.plan.unit_kind not in ("user", "session", "device", "request"):
        answer.append(
            f"events carry no {tables.plan.unit_kind} id: outcomes are joined by the requests that were exposed"
        )
    return answer


def _late_warnings(results: list[MetricResult]) -> list[str]:
    answer = []
    for result in results:
        for arm, p in result.pre_period.items():
            if p < 0.001:
                answer.append(
                    f"{result.metric.name}: {arm} differed from control already before exposure (p = {p:.2g}); "
                    "CUPED corrects for it, but find out why"
                )
    return answer
