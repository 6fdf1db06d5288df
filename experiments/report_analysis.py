"""One metric, from the unit tables to comparisons: estimates per arm, CUPED, the deciding rule, power, guard-rails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
from scipy import optimize, stats

from experiments.metrics import Analysis, Column, Metric
from experiments.report_model import ArmValue, Comparison, MetricResult
from experiments.report_plan import Plan
from experiments.report_query import UnitTables
from experiments.stats.bayes import Belief, beta_posterior, compare_posteriors, normal_posterior
from experiments.stats.cuped import cuped_means, cuped_ratios
from experiments.stats.effects import (
    Effect,
    difference,
    non_inferiority,
    rare_proportion_difference,
    relative_lift,
)
from experiments.stats.moments import (
    Estimate,
    PairMoments,
    VectorMoments,
    mean_estimate,
    ratio_estimate,
)
from experiments.stats.resampling import Sums, bootstrap_difference, quantile_estimate, quantile_levels
from experiments.stats.sequential import (
    always_valid,
    group_sequential_boundaries,
    mixture_rho_squared,
    sequence_multiplier,
)
from plait.errors import SpecError, UnknownNameError
from plait.settings import Home

DOMINANT = 0.1  # share of a metric's total in one unit that is worth a note
RARE = 10  # events in an arm below which a share is judged by score intervals


@dataclass(kw_only=True, slots=True)
class Handle:
    """The unit-level columns of one metric. Expressions are SQL over the active units' table."""

    metric: Metric
    numerator: str = ""
    denominator: str = "1"
    before: str | None = None
    before_denominator: str | None = None
    cap: tuple[float, float] | None = None
    until_first: int | None = None  # only units first exposed by then, in microseconds
    notes: list[str] = field(default_factory=list)

    @property
    def value(self) -> str:
        """A unit's value: what is averaged over units (the numerator of a ratio)."""
        if self.metric.is_share:
            return f"({self.numerator} > 0)::INTEGER"
        if self.cap:
            return f"greatest(least({self.numerator}, {self.cap[1]!r}), {self.cap[0]!r})"
        return self.numerator

    @property
    def is_ratio(self) -> bool:
        return self.denominator != "1"

    @property
    def covariate(self) -> str | None:
        """The covariate of a mean, on the metric's own scale."""
        if self.before is None:
            return None
        return f"({self.before} > 0)::INTEGER" if self.metric.is_share and self.own_history else self.before

    @property
    def own_history(self) -> bool:
        return bool(self.metric.covariate and self.metric.covariate.feature is None)


def request_columns(tables: UnitTables, metrics: Sequence[Metric], until_us: int) -> list[Handle]:
    """Ask the tables for every metric's columns and build them; afterwards the handles may be queried."""
    handles, rankings = [], []
    for i, metric in enumerate(metrics):
        handle = Handle(metric=metric)
        if metric.ranking is not None:
            handle.numerator, handle.denominator = f"r{i}", f"q{i}"
            rankings.append((handle.numerator, handle.denominator, metric))
        elif metric.type == "quantile" and metric.level == "event":
            handle.numerator = ""  # its values are single events, read when it is analysed
        else:
            assert metric.numerator is not None
            handle.numerator = tables.want(metric.numerator)
            if metric.denominator is not None:
                handle.denominator = tables.want(metric.denominator)
            if metric.additive and metric.covariate and handle.own_history:
                days = metric.covariate.days
                handle.before = tables.want(_history(metric.numerator), before_days=days)
                if metric.denominator is not None:
                    handle.before_denominator = tables.want(_history(metric.denominator), before_days=days)
        if metric.complete and metric.window is not None:
            handle.until_first = until_us - int(metric.window.total_seconds() * 1e6)
        handles.append(handle)
    tables.build_columns(rankings)
    for handle in handles:
        if handle.metric.winsorize:
            _set_cap(tables, handle)
    return handles


def add_feature_covariates(home: Home, tables: UnitTables, handles: Sequence[Handle]) -> None:
    """Join the covariates that metrics take from the feature store: a feature of the user as of its first exposure.

    The read is Feast's point-in-time one, so a feature that the arm may have moved can never get in. Raises SpecError
    if units are not users, the service or feature does not exist, or the feature is not the user's own and numeric.
    """
    wanted = [
        (handle, handle.metric.covariate)
        for handle in handles
        if handle.metric.covariate is not None and handle.metric.covariate.feature is not None
    ]
    if not wanted or tables.n_units == 0:
        return
    if tables.plan.unit_kind != "user":
        raise SpecError(f"CUPED by a feature needs user units; {tables.plan.experiment} has {tables.plan.unit_kind}")
    from plait.service import open_store, resolve_service

    store = open_store(home)
    units = tables.db.execute("SELECT key AS user_id, make_timestamptz(first) AS event_timestamp FROM units").df()
    for i, (handle, covariate) in enumerate(wanted):
        assert covariate.feature_service and covariate.feature
        service = resolve_service(store, covariate.feature_service)
        features = {feature.name: feature for feature in service.features}
        views = {view.name: view for view in service.views}
        if covariate.feature not in features:
            raise UnknownNameError("feature", covariate.feature, features, where=f"{handle.metric.name}: cuped")
        feature = features[covariate.feature]
        view = views.get(feature.view)
        number = pa.types.is_integer(feature.dtype) or pa.types.is_floating(feature.dtype)
        if view is None or view.join_keys != ("user_id",) or not number:
            raise SpecError(
                f"{handle.metric.name}: cuped feature {feature.name!r} of view {feature.view!r} ({feature.dtype}) "
                "cannot be a covariate; take a number from a stored view whose only join key is user_id"
            )
        joined = store.get_historical_features(units, features=[f"{feature.view}:{feature.name}"]).to_df()
        values = joined[feature.name].astype("float64")
        # Units without a value get the mean of the others, which moves no arm against another.
        values = values.where(np.isfinite(values))
        values = values.fillna(values.mean() if values.notna().any() else 0.0)
        name = f"f{i}"
        tables.add_covariate(name, pa.table({"key": joined["user_id"].to_numpy(), "value": values.to_numpy()}))
        handle.before = name
        if handle.is_ratio:
            handle.before_denominator = "1"  # a feature is a mean over units, not a ratio of sums


def _history(column: Column) -> Column:
    """The same events without the window, which counts from exposure on."""
    return replace(column, start=timedelta(0), end=None)


def _set_cap(tables: UnitTables, handle: Handle) -> None:
    assert handle.metric.winsorize
    low_q, high_q = handle.metric.winsorize
    low = tables.quantile(handle.numerator, low_q) if low_q > 0 else -math.inf
    high = tables.quantile(handle.numerator, high_q)
    if not math.isfinite(high) or high <= max(low, 0.0):
        share = f"{1 - high_q:.2%}"
        handle.notes.append(f"not winsorised: fewer than {share} of the units have any value, the cap would be 0")
        return
    handle.cap = (low if math.isfinite(low) else -1e300, high)
    handle.notes.append(f"units' values are capped at {high:g}, their {high_q:.1%} quantile over all arms")


def analyse(tables: UnitTables, handle: Handle, analysis: Analysis, *, seed: int = 0) -> MetricResult:
    """Estimates, comparisons and the Bayesian view of one metric. p_adjusted is filled in later, over the family."""
    plan, metric = tables.plan, handle.metric
    notes = list(handle.notes)
    moments = _moments(tables, handle)
    plain = _estimates(tables, handle, moments)
    adjusted: tuple[Estimate, ...] | None = None
    removed: float | None = None
    if handle.before is not None and moments:
        outcome = cuped_ratios(moments) if handle.is_ratio else cuped_means([m.pair(0, 1) for m in moments])
        removed = outcome.variance_removed
        if removed > 0:
            adjusted = outcome.estimates
        else:
            notes.append("CUPED changes nothing: no unit has a history that varies")
    notes += _notes(plan, metric, plain, handle)
    if not (metric.is_share or metric.type == "quantile" or handle.cap):
        notes += _dominance(tables, handle)
    events = [round(m.mean[0] * m.n) if m.n else 0 for m in moments] if metric.is_share else None
    comparisons = []
    for i, arm in enumerate(plan.arms[1:], start=1):
        comparisons.append(_compare(tables, handle, analysis, plain, adjusted, events, i, arm, seed))
    best = _belief(metric, adjusted or plain, events)
    if best:
        comparisons = [
            replace(c, probability_best=best.probability_best[i], expected_loss=best.expected_loss[i])
            for i, c in enumerate(comparisons, start=1)
        ]
    return MetricResult(
        metric=metric,
        arms=tuple(
            _arm_value(arm, plain[i], adjusted[i] if adjusted else None, analysis.alpha)
            for i, arm in enumerate(plan.arms)
        ),
        comparisons=tuple(comparisons),
        variance_removed=removed,
        pre_period=_pre_period(plan, handle, moments, analysis.alpha),
        notes=tuple(notes),
    )


def _moments(tables: UnitTables, handle: Handle) -> list[VectorMoments]:
    metric = handle.metric
    if metric.type == "quantile":
        return []
    expressions = expressions_of(handle)
    return tables.moments(expressions, until_first=handle.until_first)[None]


def expressions_of(handle: Handle) -> list[str]:
    """The unit-level values whose moments give the metric: [y], [y, x], [y, d] or [y, d, y before, d before]."""
    expressions = [handle.value]
    if handle.is_ratio:
        expressions.append(handle.denominator)
        if handle.before and handle.before_denominator:
            expressions += [handle.before, handle.before_denominator]
    elif handle.covariate:
        expressions.append(handle.covariate)
    return expressions


def estimate_of(handle: Handle, moments: VectorMoments) -> Estimate:
    """The plain estimate of an additive or ranking metric."""
    if handle.is_ratio:
        return ratio_estimate(moments.pair(0, 1))
    return mean_estimate(moments.one(0))


def _estimates(tables: UnitTables, handle: Handle, moments: Sequence[VectorMoments]) -> list[Estimate]:
    if handle.metric.type == "quantile":
        if handle.metric.level == "event":
            return _event_quantiles(tables, handle)
        return [_unit_quantile(tables, handle, i) for i in range(len(tables.plan.arms))]
    return [estimate_of(handle, m) for m in moments]


def _unit_quantile(tables: UnitTables, handle: Handle, arm: int) -> Estimate:
    assert handle.metric.quantile is not None
    q, cut = handle.metric.quantile, handle.until_first
    n = tables.arm_counts(cut)[arm]
    if n == 0:
        return Estimate(value=math.nan, variance=math.nan, n=0)
    value = tables.quantile(handle.numerator, q, arm=arm, until_first=cut)
    # Units without a row have the value 0, which the negation keeps out of the indicator's zeros where it counts.
    below = tables.moments([f"({handle.numerator} > {value!r})::INTEGER"], until_first=cut)[None][arm]
    share = 1 - float(below.mean[0]) if value >= 0 else _share_below(tables, handle, value, arm, n)
    variance = share * (1 - share) * n / max(n - 1, 1)
    counts = PairMoments(n=n, mean_y=share, mean_x=1.0, var_y=variance, var_x=0.0, cov=0.0)
    low, high = (
        tables.quantile(handle.numerator, level, arm=arm, until_first=cut) for level in quantile_levels(counts, q)
    )
    return quantile_estimate(value, low, high, n)


def _share_below(tables: UnitTables, handle: Handle, value: float, arm: int, n: int) -> float:
    moments = tables.moments([f"({handle.numerator} <= {value!r})::INTEGER"], until_first=handle.until_first)
    return float(moments[None][arm].mean[0])


def _event_quantiles(tables: UnitTables, handle: Handle) -> list[Estimate]:
    assert handle.metric.quantile is not None and handle.metric.numerator is not None
    q = handle.metric.quantile
    tables.event_values("event_values", handle.metric.numerator)
    answer = []
    for arm in range(len(tables.plan.arms)):
        where = f"FROM event_values WHERE arm = {arm}"
        row = tables.db.execute(f"SELECT count(DISTINCT key), quantile_cont(value, {q!r}) {where}").fetchone()
        assert row is not None
        n_units, value = row
        if n_units < 2:
            answer.append(Estimate(value=math.nan if value is None else value, variance=math.nan, n=n_units))
            continue
        counted = tables.db.execute(f"""
            SELECT avg(b), avg(n), var_samp(b), var_samp(n), covar_samp(b, n)
            FROM (SELECT count(*) FILTER (value <= {value!r}) AS b, count(*) AS n {where} GROUP BY key)""").fetchone()
        assert counted is not None
        names = ("mean_y", "mean_x", "var_y", "var_x", "cov")
        counts = PairMoments(n=n_units, **dict(zip(names, counted, strict=True)))
        levels = quantile_levels(counts, q)
        ends = tables.db.execute(f"SELECT quantile_cont(value, [{levels[0]!r}, {levels[1]!r}]) {where}").fetchone()
        assert ends is not None
        answer.append(quantile_estimate(value, ends[0][0], ends[0][1], n_units))
    tables.events.drop("event_values")
    return answer


def _compare(
    tables: UnitTables,
    handle: Handle,
    analysis: Analysis,
    plain: Sequence[Estimate],
    adjusted: Sequence[Estimate] | None,
    events: Sequence[int] | None,
    i: int,
    arm: str,
    seed: int,
) -> Comparison:
    metric, alpha = handle.metric, analysis.alpha
    absolute = difference(plain[0], plain[i], alpha=alpha)
    relative = relative_lift(plain[0], plain[i], alpha=alpha)
    rare = events is not None and min(events[0], events[i]) < RARE
    if rare and events is not None:
        absolute = rare_proportion_difference(events[0], plain[0].n, events[i], plain[i].n, alpha=alpha)
    adjusted_absolute = adjusted_relative = None
    if adjusted and not rare:
        adjusted_absolute = difference(adjusted[0], adjusted[i], alpha=alpha)
        adjusted_relative = relative_lift(adjusted[0], adjusted[i], alpha=alpha)
    base = adjusted_relative or relative
    if base.defined and not rare:
        # The test of the relative effect is that of the difference: a delta-method lift may disagree at the border.
        base = replace(base, p_value=(adjusted_absolute or absolute).p_value)
    n_units = plain[0].n + plain[i].n
    n_all = sum(estimate.n for estimate in plain)
    sequential = always_valid(base, n_units=n_units, alpha=alpha, tuning_units=analysis.tuning_units)
    deciding = decide_effect(base, sequential, analysis, n_units=n_units, n_all=n_all)
    critical = critical_value(analysis, n_units=n_units, n_all=n_all)
    bootstrap = None
    if analysis.bootstrap and metric.type != "quantile" and base.defined:
        bootstrap = _bootstrap(tables, handle, i, analysis, seed)
    guardrail = None
    if metric.margin is not None:
        guardrail = non_inferiority(deciding, margin=metric.margin, goal=metric.goal)
    z_power = float(stats.norm.ppf(analysis.power))
    defined = base.defined and base.se > 0
    return Comparison(
        arm=arm,
        absolute=absolute,
        relative=relative,
        adjusted_absolute=adjusted_absolute,
        adjusted_relative=adjusted_relative,
        sequential=sequential,
        deciding=deciding,
        p_adjusted=deciding.p_value,
        bootstrap=bootstrap,
        guardrail=guardrail,
        mde=(critical + z_power) * base.se if defined else math.nan,
        power=float(stats.norm.sf(critical - metric.min_effect / base.se)) if defined else math.nan,
        units_needed=_units_needed(base.se, n_units, n_all, metric.min_effect, analysis) if defined else math.nan,
    )


def decide_effect(base: Effect, sequential: Effect, analysis: Analysis, *, n_units: int, n_all: int) -> Effect:
    """The effect with the interval and p-value of the declared rule."""
    if analysis.decision == "fixed" or not base.defined:
        return base
    if analysis.decision == "sequential":
        return sequential
    half = critical_value(analysis, n_units=n_units, n_all=n_all) * base.se
    z = abs(base.estimate) / base.se if base.se > 0 else math.inf
    return replace(
        base,
        low=base.estimate - half,
        high=base.estimate + half,
        p_value=_repeated_p_value(z, analysis, n_all),
        df=math.inf,
    )


def critical_value(analysis: Analysis, *, n_units: int, n_all: int, alpha: float | None = None) -> float:
    """Standard errors that the deciding interval reaches to each side, with these units in."""
    alpha = analysis.alpha if alpha is None else alpha
    if analysis.decision == "fixed":
        return float(stats.norm.isf(alpha / 2))
    if analysis.decision == "sequential":
        rho_squared = mixture_rho_squared(tuning_units=analysis.tuning_units, alpha=analysis.alpha)
        return sequence_multiplier(max(n_units, 2), rho_squared=rho_squared, alpha=alpha)
    fractions = looks_so_far(analysis, n_all)
    if not fractions:
        return math.inf
    return group_sequential_boundaries(fractions, alpha=alpha, spending=analysis.spending).z[-1]


def looks_so_far(analysis: Analysis, n_all: int) -> list[float]:
    """Information fractions of the looks taken, the present one last; empty before the first planned look."""
    assert analysis.planned_units
    now = min(n_all / analysis.planned_units, 1.0)
    taken = math.floor(now * analysis.looks + 1e-9)
    return [(k + 1) / analysis.looks for k in range(taken - 1)] + [now] if taken else []


def _repeated_p_value(z: float, analysis: Analysis, n_all: int) -> float:
    """The least alpha at which this look crosses its boundary (Jennison and Turnbull, chapter 9)."""
    if not looks_so_far(analysis, n_all):
        return 1.0

    def gap(log_alpha: float) -> float:
        return critical_value(analysis, n_units=2, n_all=n_all, alpha=math.exp(log_alpha)) - z

    low, high = math.log(1e-9), math.log(0.999)
    if gap(low) <= 0:
        return 1e-9
    return math.exp(optimize.brentq(gap, low, high, xtol=1e-4)) if gap(high) < 0 else 1.0


def _units_needed(se: float, n_units: int, n_all: int, effect: float, analysis: Analysis) -> float:
    """Units in all arms at which the deciding rule finds `effect` with the declared power."""
    if effect <= 0:
        return math.inf
    z_power = float(stats.norm.ppf(analysis.power))

    def gap(log_scale: float) -> float:
        scale = math.exp(log_scale)
        critical = critical_value(
            replace(analysis, decision="fixed") if analysis.decision == "group_sequential" else analysis,
            n_units=max(int(n_units * scale), 2),
            n_all=int(n_all * scale),
        )
        return critical + z_power - effect * math.sqrt(scale) / se

    low, high = -12.0, 30.0
    if gap(high) > 0:
        return math.inf
    return n_all * math.exp(float(optimize.brentq(gap, low, high, xtol=1e-3))) if gap(low) > 0 else 2.0


def _bootstrap(tables: UnitTables, handle: Handle, i: int, analysis: Analysis, seed: int) -> Effect:
    sums = []
    table = tables.buckets(handle.value, handle.denominator, until_first=handle.until_first)
    arm = table["arm"].to_numpy()
    for index in (0, i):
        chosen = arm == index
        sums.append(
            Sums(numerator=table["numerator"].to_numpy()[chosen], denominator=table["denominator"].to_numpy()[chosen])
        )
    return bootstrap_difference(
        sums[0], sums[1], n_resamples=analysis.bootstrap, alpha=analysis.alpha, relative=True, seed=seed
    )


def _belief(metric: Metric, estimates: Sequence[Estimate], events: Sequence[int] | None) -> Belief | None:
    if not all(estimate.usable for estimate in estimates):
        return None
    if events is not None and min(events) < RARE:
        return compare_posteriors(
            [beta_posterior(e, estimate.n) for e, estimate in zip(events, estimates, strict=True)], goal=metric.goal
        )
    if not any(estimate.variance > 0 for estimate in estimates):
        return None
    return compare_posteriors([normal_posterior(estimate) for estimate in estimates], goal=metric.goal)


def _pre_period(plan: Plan, handle: Handle, moments: Sequence[VectorMoments], alpha: float) -> dict[str, float]:
    """The A/A check on the same units: what the arms did before exposure must not differ."""
    if handle.before is None or not moments:
        return {}
    if handle.is_ratio:
        before = [ratio_estimate(m.pair(2, 3)) for m in moments]
    else:
        before = [mean_estimate(m.one(1)) for m in moments]
    answer = {}
    for i, arm in enumerate(plan.arms[1:], start=1):
        effect = difference(before[0], before[i], alpha=alpha)
        if effect.defined and (effect.se > 0 or effect.estimate != 0):
            answer[arm] = effect.p_value
    return answer


def _arm_value(arm: str, estimate: Estimate, adjusted: Estimate | None, alpha: float) -> ArmValue:
    half = float(stats.norm.isf(alpha / 2)) * estimate.se if estimate.usable else math.nan
    return ArmValue(
        arm=arm,
        n=estimate.n,
        value=estimate.value,
        se=estimate.se if estimate.n else math.nan,
        low=estimate.value - half,
        high=estimate.value + half,
        adjusted=adjusted.value if adjusted else None,
    )


def _dominance(tables: UnitTables, handle: Handle) -> list[str]:
    """A note where a single unit decides the metric: no interval can be trusted then."""
    x = handle.numerator
    row = tables.db.execute(f"SELECT arg_max(key, {x}), max({x}), sum({x}), count(*) FROM active").fetchone()
    assert row is not None
    unit, largest, total, n_active = row
    if not total or n_active < 30 or largest < DOMINANT * total:
        return []
    return [f"one unit ({unit}) holds {largest / total:.0%} of all values: winsorise the metric, or look at the unit"]


def _notes(plan: Plan, metric: Metric, estimates: Sequence[Estimate], handle: Handle) -> list[str]:
    notes = []
    empty = [arm for arm, estimate in zip(plan.arms, estimates, strict=True) if estimate.n == 0]
    if empty and handle.until_first is not None:
        notes.append(f"no unit of {', '.join(empty)} has completed its window yet")
    values = [estimate.value for estimate in estimates if estimate.n and math.isfinite(estimate.value)]
    if values and not any(values):
        event = metric.numerator.event if metric.numerator else None
        notes.append(f"every value is zero: no {event or 'feedback'} event of an exposed unit is in the log")
    elif values and estimates[0].n and estimates[0].value == 0:
        notes.append("the control's value is zero, so that a relative effect is not defined")
    return notes
