"""`plait experiments report` and `plait experiments power`."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import orjson

from plait.errors import SpecError

if TYPE_CHECKING:
    from experiments.spec import Experiment
    from plait.settings import Home


@click.command()
@click.argument("experiment")
@click.option(
    "--since", help="Only exposures from then on: a date, a time (UTC unless it says so), or a span such as 7d."
)
@click.option("--until", help="Only what was known before then (default: now).")
@click.option(
    "--metrics",
    "metrics_file",
    type=click.Path(path_type=Path),
    help="Metrics file (default: experiments/metrics.yaml).",
)
@click.option(
    "--decision", type=click.Choice(["sequential", "group_sequential", "fixed"]), help="Overrides the metrics file."
)
@click.option("--control", help="The control arm, where the configuration does not tell.")
@click.option("--weights", help="The planned split, where the configuration does not tell: a=1,b=1.")
@click.option("--triggered", is_flag=True, help="Only units whose exposure is marked counterfactual.")
@click.option("--despite-mismatch", is_flag=True, help="Show effects though the sample ratio blocks them.")
@click.option(
    "--aa", type=int, default=0, help="Also split the control arm at random this often, to check each metric."
)
@click.option(
    "--engine",
    type=click.Choice(["duckdb", "spark"]),
    default="duckdb",
    show_default=True,
    help="What reads the events; spark when they outgrow a machine.",
)
@click.option("--format", "form", type=click.Choice(["text", "json", "html"]), default="text", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write there instead of to the terminal.")
def report(
    experiment: str,
    since: str | None,
    until: str | None,
    metrics_file: Path | None,
    decision: str | None,
    control: str | None,
    weights: str | None,
    triggered: bool,
    despite_mismatch: bool,
    aa: int,
    engine: str,
    form: str,
    out: Path | None,
) -> None:
    """The verdict on EXPERIMENT: sample ratio, effects with intervals, guard-rails, and what to do.

    Reads the exposures and feedback of the event log. Looking every day is fine with the default decision rule.
    Of a bandit: what each arm would earn alone, by its logged propensities, and what learning cost.
    """
    from dataclasses import replace

    from experiments.metrics import Decision
    from experiments.report import build_report
    from experiments.report_source import find_bandit, project_metrics
    from plait.clock import Clock
    from plait.eventlog import roll
    from plait.files import write_atomically
    from plait.settings import find_home

    home = find_home()
    roll(home)
    now = Clock.of(home).now()
    bandit = find_bandit(home, experiment)
    if bandit is not None:
        options = {
            "--metrics": metrics_file, "--decision": decision, "--control": control, "--weights": weights,
            "--triggered": triggered, "--despite-mismatch": despite_mismatch, "--aa": aa,
            "--engine": None if engine == "duckdb" else engine,
        }  # fmt: skip
        if meant_for_splits := [name for name, value in options.items() if value]:
            raise SpecError(f"{experiment} is a bandit, no fixed split: leave out {', '.join(meant_for_splits)}")
        headline, text = bandit_report(home, *bandit, moment(since, now), moment(until, now), form)
    else:
        metrics = project_metrics(home, metrics_file)
        if decision:
            metrics = replace(metrics, analysis=replace(metrics.analysis, decision=cast(Decision, decision)))
        result = build_report(
            home,
            experiment,
            metrics=metrics,
            since=moment(since, now),
            until=moment(until, now),
            control=control,
            weights=parse_weights(weights),
            triggered=triggered,
            despite_mismatch=despite_mismatch,
            aa=aa,
            engine=engine,
        )
        headline, text = result.conclusion.headline, render(result, form)
    if out is None:
        click.echo(text, nl=not text.endswith("\n"))
    else:
        write_atomically(out, text.encode())
        click.echo(f"{headline} Report: {out}")


def bandit_report(
    home: Home, experiment: Experiment, policy: int | None, since: datetime | None, until: datetime | None, form: str
) -> tuple[str, str]:
    """Headline and text of a bandit's report in one of the three forms."""
    from experiments import bandit_text
    from experiments.bandit_report import build_bandit_report

    result = build_bandit_report(home, experiment, since=since, until=until, policy=policy)
    if form == "json":
        return result.headline, as_json(result)
    return result.headline, bandit_text.as_html(result) if form == "html" else bandit_text.as_text(result)


def as_json(result: Any) -> str:
    return orjson.dumps(result.to_dict(), option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode() + "\n"


def render(result: Any, form: str) -> str:
    """The report in one of the three forms."""
    if form == "json":
        return as_json(result)
    if form == "html":
        from experiments.report_html import as_html

        return as_html(result)
    from experiments.report_text import as_text

    return as_text(result)


def moment(text: str | None, now: datetime) -> datetime | None:
    """A date, a time or a span back from now, as an aware time in UTC; None stays None."""
    if text is None:
        return None
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        from experiments.metrics import duration

        return now - duration(text, "the time")
    return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def parse_weights(text: str | None) -> dict[str, float] | None:
    """`a=1,b=1` as a mapping.

    >>> parse_weights("a=1,b=2")
    {'a': 1.0, 'b': 2.0}
    """
    if text is None:
        return None
    weights = {}
    for part in text.split(","):
        arm, equals, number = part.rpartition("=")
        try:
            weights[arm.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals or not arm:
            raise SpecError(f"--weights {text!r}: write it as a=1,b=1")
    return weights


@click.command()
@click.option("--baseline", type=float, help="The metric's value in control (a share, or a mean).")
@click.option("--std", type=float, help="Standard deviation of one unit's value; not needed for a share.")
@click.option(
    "--like", "experiment", help="Take baseline, spread, CUPED and traffic from this experiment's control arm."
)
@click.option("--metric", help="With --like: which metric (default: its first primary one).")
@click.option("--effect", type=float, default=0.02, show_default=True, help="Relative effect worth finding.")
@click.option("--alpha", type=float, default=0.05, show_default=True)
@click.option("--power", "wanted", type=float, default=0.8, show_default=True)
@click.option("--arms", type=int, default=2, show_default=True, help="Arms in all, with equal shares.")
@click.option("--variance-removed", type=float, help="Share of variance that CUPED removes (default: 0).")
@click.option("--looks", type=int, default=5, show_default=True, help="Looks of the group-sequential rule.")
@click.option("--daily-units", type=float, help="New units a day, over all arms: also says how many days.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def power(
    baseline: float | None,
    std: float | None,
    experiment: str | None,
    metric: str | None,
    effect: float,
    alpha: float,
    wanted: float,
    arms: int,
    variance_removed: float | None,
    looks: int,
    daily_units: float | None,
    form: str,
) -> None:
    """How many units an experiment needs to find an effect, under each decision rule.

    Give --baseline (and --std for a mean), or --like an experiment that has run. More than two arms are corrected by
    Bonferroni, as Holm's first step is. What a running experiment can find by now is in its report.
    """
    if experiment is not None:
        past = like_experiment(experiment, metric)
        baseline = past["baseline"] if baseline is None else baseline
        std = past["std"] if std is None else std
        variance_removed = past["variance_removed"] if variance_removed is None else variance_removed
        daily_units = past["daily_units"] if daily_units is None else daily_units
    if baseline is None:
        raise SpecError("give --baseline, the metric's value in control, or --like an experiment that has run")
    answer = power_plan(
        baseline=baseline, std=std, effect=effect, alpha=alpha, power=wanted, arms=arms,
        variance_removed=variance_removed or 0.0, looks=looks, daily_units=daily_units,
    )  # fmt: skip
    if form == "json":
        click.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
        return
    click.echo(
        f"To find {effect:+.2%} on {baseline:.5g} (standard deviation {answer['std']:.5g}) "
        f"with a power of {wanted:.0%} at alpha {alpha:g}, {arms} arms:"
    )
    for rule, row in answer["rules"].items():
        days = f", {row['days']:,.1f} days" if "days" in row else ""
        click.echo(
            f"  {rule.replace('_', ' '):<32} {row['units_per_arm']:>14,.0f} units per arm, "
            f"{row['units']:>14,.0f} in all{days}"
        )
    for row in answer["detectable"]:
        click.echo(f"  after {row['days']:>3} days a fixed look finds {row['effect']:+.2%}")


def like_experiment(experiment: str, metric: str | None) -> dict[str, float]:
    """Baseline, standard deviation of a unit, share of variance that CUPED removed and daily units of a past one."""
    from dataclasses import replace

    from experiments.report import build_report
    from experiments.report_plan import chosen_metrics
    from experiments.report_source import find_plan, project_metrics
    from plait.eventlog import roll
    from plait.settings import find_home

    home = find_home()
    roll(home)
    plan = find_plan(home, experiment)
    metrics = chosen_metrics(project_metrics(home), plan)
    chosen = metrics.get(metric) if metric else metrics.primaries[0]
    metrics = replace(metrics, metrics=(chosen,), analysis=replace(metrics.analysis, bootstrap=0))
    bare = replace(plan, metrics=(), primary=None, guardrails=())
    result = build_report(home, experiment, plan=bare, metrics=metrics, despite_mismatch=True, depth=False)
    control = result.metrics[0].arms[0] if result.metrics else None
    if control is None or control.n < 2 or not control.value or not control.se > 0:
        raise SpecError(
            f"the control arm of {experiment!r} has no {chosen.name} that varies; give --baseline and --std"
        )
    days = max(len(result.daily_units), 1)
    return {
        "baseline": control.value,
        "std": control.se * math.sqrt(control.n),
        "variance_removed": result.metrics[0].variance_removed or 0.0,
        "daily_units": sum(result.counts.units.values()) / days,
    }


def power_plan(
    *,
    baseline: float,
    std: float | None = None,
    effect: float = 0.02,
    alpha: float = 0.05,
    power: float = 0.8,
    arms: int = 2,
    variance_removed: float = 0.0,
    looks: int = 5,
    daily_units: float | None = None,
) -> dict[str, Any]:
    """Units per rule and what is detectable over time, as plain data. SpecError for numbers that cannot be."""
    from experiments.stats.power import (
        group_sequential_inflation,
        minimum_detectable_effect,
        units_per_arm,
        units_per_arm_sequential,
    )

    if std is None:
        if not 0 < baseline < 1:
            raise SpecError(f"--baseline {baseline:g} is no share between 0 and 1; for a mean give --std as well")
        std = math.sqrt(baseline * (1 - baseline))
    for name, value, low, high in (
        ("--alpha", alpha, 0, 1),
        ("--power", power, 0, 1),
        ("--variance-removed", variance_removed, -1e-12, 1),
    ):
        if not low < value < high:
            raise SpecError(f"{name} is {value:g}; it lies between {max(low, 0):g} and {high:g}")
    if baseline == 0 or effect == 0 or std <= 0 or arms < 2 or looks < 1:
        raise SpecError("--baseline and --effect are not 0, --std is above 0, --arms at least 2, --looks at least 1")
    spread = std * math.sqrt(1 - variance_removed)
    each = alpha / (arms - 1)
    absolute = abs(baseline * effect)
    fixed = units_per_arm(spread, absolute, alpha=each, power=power)
    per_arm = {
        "fixed": fixed,
        "group_sequential_obrien_fleming": fixed * group_sequential_inflation(looks, alpha=each, power=power),
        "group_sequential_pocock": fixed
        * group_sequential_inflation(looks, alpha=each, power=power, spending="pocock"),
        "sequential": units_per_arm_sequential(spread, absolute, alpha=each, power=power, tuning_units=2 * fixed),
    }
    rules: dict[str, dict[str, float]] = {}
    for rule, n in per_arm.items():
        rules[rule] = {"units_per_arm": math.ceil(n), "units": math.ceil(n) * arms}
        if daily_units:
            rules[rule]["days"] = math.ceil(n) * arms / daily_units
    detectable = []
    for days in (1, 3, 7, 14, 28, 56) if daily_units else ():
        assert daily_units
        se = spread * math.sqrt(2 * arms / (daily_units * days))
        detectable.append(
            {"days": days, "effect": minimum_detectable_effect(se, alpha=each, power=power) / abs(baseline)}
        )
    return {
        "baseline": baseline,
        "std": std,
        "effect": effect,
        "alpha": alpha,
        "power": power,
        "arms": arms,
        "rules": rules,
        "detectable": detectable,
    }
