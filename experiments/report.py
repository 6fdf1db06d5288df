"""The verdict on an experiment: sample ratio first, then metrics, then a conclusion.

`build_report` reads the event tables once and returns a Report; report_text, report_html and `Report.to_dict` present
it. How each number is computed, and where it comes from, is in docs/statistics.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import duckdb

from experiments.metrics import MetricSet, load_metrics
from experiments.report_analysis import analyse, request_columns
from experiments.report_conclusion import blocked_by, conclude
from experiments.report_model import Conclusion, MetricResult, Report
from experiments.report_plan import Plan, chosen_metrics, plan_from_log, with_overrides
from experiments.report_query import DAY_US, UnitTables, define_view, micros
from experiments.stats.checks import SampleRatio, adjust, sample_ratio
from plait.clock import Clock
from plait.errors import SpecError, UnknownNameError
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
    memory: str = "1200MB",
    threads: int = 2,
) -> Report:
    """The report of one experiment over the home's event tables.

    since, until: aware; exposures from `since` on (default: all), everything known before `until` (default: now).
    triggered: only units that an exposure marks counterfactual. despite_mismatch: compute effects even where the
    sample ratio blocks them. depth: with daily series, segments and interactions.
    Raises UnknownNameError for an experiment that is neither configured nor logged.
    """
    metrics = metrics or load_metrics()
    clock = Clock.of(home)
    until = until or clock.now()
    if since is not None and since >= until:
        raise SpecError(f"since ({since.isoformat()}) lies before until ({until.isoformat()})")
    plan = with_overrides(plan or find_plan(home, experiment), control=control, weights=weights)
    metrics = chosen_metrics(metrics, plan)
    with tempfile.TemporaryDirectory(prefix="plait-report-") as scratch:
        tables = UnitTables(
            home.events, plan, since=since, until=until, triggered=triggered, memory=memory, threads=threads,
            scratch=Path(scratch),
        )  # fmt: skip
        try:
            return _report(home, tables, metrics, since, until, clock.now(), despite_mismatch, depth)
        finally:
            tables.close()


def _report(
    home: Home,
    tables: UnitTables,
    metrics: MetricSet,
    since: datetime | None,
    until: datetime,
    created: datetime,
    despite_mismatch: bool,
    depth: bool,
) -> Report:
    plan, counts, analysis = tables.plan, tables.counts, metrics.analysis
    ratio = sample_ratio(
        counts.units, plan.expected_counts(counts.by_version) if tables.n_units else dict.fromkeys(plan.arms, 1.0),
        threshold=analysis.srm_threshold,
    )  # fmt: skip
    warnings = list(plan.notes) + _warnings(tables, ratio)
    conclusion = blocked_by(plan, counts, ratio)
    results: list[MetricResult] = []
    if conclusion is None or (despite_mismatch and ratio.mismatch):
        handles = request_columns(tables, metrics.metrics, micros(until))
        results = [analyse(tables, handle, analysis) for handle in handles]
        results = correct(results, {metric.name for metric in metrics.primaries})
        warnings += _late_warnings(results)
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
    )


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


def find_plan(home: Home, experiment: str) -> Plan:
    """The plan from the configuration store, or from the log where the store does not know the experiment."""
    with duckdb.connect() as db:
        define_view(db, home.events, "exposures")
        seen = db.execute(
            "SELECT experiment, layer, unit_kind, list(DISTINCT arm ORDER BY arm), count(*) AS n FROM exposures "
            "GROUP BY ALL ORDER BY n DESC"
        ).fetchall()
    known = {row[0] for row in seen}
    if experiment not in known:
        raise UnknownNameError("experiment", experiment, known, where="the exposure log")
    _, layer, unit_kind, arms, _ = next(row for row in seen if row[0] == experiment)
    if len(arms) < 2:
        raise SpecError(f"experiment {experiment!r}: the log holds one arm only, {arms[0]!r}; nothing can be compared")
    return plan_from_log(experiment, layer=layer, unit_kind=unit_kind, arms=tuple(arms))


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
    if tables.plan.unit_kind not in ("user", "request"):
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
