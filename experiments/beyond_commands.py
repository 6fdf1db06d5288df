"""`plait experiments interleaving | offpolicy | uplift`: what an A/B test does not answer, or not as soon."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from plait.errors import DataError, SpecError, UnknownNameError
from plait.settings import find_home

_format = click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
_since = click.option("--since", help="Only what was shown from then on: a date, a time, or a span such as 7d.")
_event = click.option("--event", default="click", show_default=True, help="The event that counts as a reward.")


@click.command()
@click.argument("experiment")
@_event
@_since
@_format
def interleaving(experiment: str, event: str, since: str | None, form: str) -> None:
    """Which of two interleaved rankers users of EXPERIMENT prefer.

    An arm with rank.interleave_with shows lists of two rankers: a is the arm's rank.model, b the other. Each event on
    an item is a credit for the ranker that put it there; users, not clicks, are tested.
    """
    from experiments.interleaving_log import interleaved_arms
    from experiments.report_commands import moment
    from plait.clock import Clock
    from plait.eventlog import roll

    home = find_home()
    roll(home)
    arms = interleaved_arms(home, experiment, event=event, since=moment(since, Clock.of(home).now()))
    if form == "json":
        click.echo(_json([{**asdict(arm), "conclusion": arm.conclusion} for arm in arms]))
        return
    for arm in arms:
        test, effect = arm.preference, arm.preference.effect
        click.echo(f"{experiment}, arm {arm.arm}: {arm.n_lists:,} lists of {arm.n_users:,} users")
        click.echo(f"=> {arm.conclusion}")
        for team, of in (("a", "rank.model"), ("b", "rank.interleave_with")):
            share = arm.hits[team] / arm.shown[team] if arm.shown[team] else math.nan
            click.echo(
                f"  {team} ({of}): {arm.shown[team]:,} items shown, {arm.hits[team]:,} with a {event} ({share:.2%})"
            )
        click.echo(
            f"  credit per user, b less a: {effect.estimate:+.3f} ({effect.low:+.3f} … {effect.high:+.3f}), "
            f"p {effect.p_value:.2g}; {test.wins_b:,} users for b, {test.wins_a:,} for a, {test.ties:,} even "
            f"(sign test p {test.sign_p_value:.2g})"
        )


@click.command()
@click.option("--model", help="NAME, NAME:VERSION or NAME@ALIAS: what it would have earned, from the explored log.")
@click.option("--top", default=1, show_default=True, type=click.IntRange(1), help="Value the first so many positions.")
@click.option("--temperature", default=0.0, show_default=True, help="Of the new ranker's own exploration; 0 sorts.")
@click.option(
    "--log", "path", type=click.Path(path_type=Path), help="Instead: a CSV or parquet file of logged actions."
)
@click.option("--reward", default="reward", show_default=True, help="Its column of rewards.")
@click.option("--propensity", default="propensity", show_default=True, help="… of the logged policy's chances.")
@click.option(
    "--target", default="target", show_default=True, help="… of the new policy's chances of the same actions."
)
@click.option("--predicted", default="predicted", show_default=True, help="… of a reward model, if there is one.")
@click.option("--expected", default="expected", show_default=True, help="… of its mean over the new policy's actions.")
@click.option("--cluster", default="cluster", show_default=True, help="… of the unit of each row, if rows depend.")
@_event
@_since
@_format
def offpolicy(
    model: str | None, top: int, temperature: float, path: Path | None, event: str, since: str | None, form: str,
    **columns: str,
) -> None:  # fmt: skip
    """What a new ranker would have earned, before it is shown to anybody.

    From the log of an arm that explores (rank.exploration above 0), or from any log of actions with their chances under
    the logged and the new policy. Believe it where the log supports the policy: the report says so.
    """
    from experiments.offpolicy_log import COLUMNS, estimate, read_explored, read_table, value_ranker
    from experiments.report_commands import moment
    from plait.clock import Clock

    if (model is None) == (path is None):
        raise click.UsageError("give either --model, to value it on the event log, or --log FILE")
    if temperature < 0 or not math.isfinite(temperature):
        raise SpecError(f"--temperature {temperature}: 0 or above")
    if path is not None:
        found = read_table(path, {role: columns[role] for role in COLUMNS})
        result = estimate(
            found["reward"], found["target"], found["propensity"], clusters=found.get("cluster"),
            predicted=found.get("predicted"), expected=found.get("expected"),
        )  # fmt: skip
        title = f"{path.name}: {result.n_rows:,} logged actions"
    else:
        from plait.artifacts import load_artifact
        from plait.eventlog import roll
        from plait.models import ModelRegistry

        home = find_home()
        roll(home)
        version = ModelRegistry(home).resolve(str(model))
        artifact = load_artifact(version.path)
        log = read_explored(home, artifact, event=event, since=moment(since, Clock.of(home).now()))
        result = value_ranker(log, artifact.score_rows(log.features), top=top, temperature=temperature)
        title = f"{version} on {result.n_rows:,} shown items of {result.n_units:,} users ({event}, first {top})"
    if form == "json":
        click.echo(_json(asdict(result)))
        return
    click.echo(title)
    click.echo(f"=> {_verdict(result)}")
    for note in result.notes:
        click.echo(f"  - {note}")
    click.echo(f"  logged policy: {result.logged:.5g}")
    for value in result.values:
        click.echo(f"  {value.method:<6} {value.value:.5g} ({value.low:.5g} … {value.high:.5g}), se {value.se:.2g}")
    click.echo(
        f"  weights: mean {result.mean_weight:.3g}, largest {result.largest_weight:.3g}, "
        f"effective rows {result.values[0].effective_sample_size:,.0f}"
    )
    click.echo("  clip      snips  effective rows  clipped")
    for row in result.clipping:
        value = row.value
        click.echo(
            f"  {row.clip:>5g} {value.value:>9.5g} {value.effective_sample_size:>15,.0f} {value.clipped_share:>8.2%}"
        )


def _verdict(result: Any) -> str:
    best = result.values[1]  # self-normalised: bounded, and the least surprising
    if not best.supported:
        return "cannot tell from this log"
    if best.low > result.logged:
        return f"better than what was logged: {best.value:.5g} against {result.logged:.5g}"
    if best.high < result.logged:
        return f"worse than what was logged: {best.value:.5g} against {result.logged:.5g}"
    return f"no difference found: {best.value:.5g} against {result.logged:.5g}"


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--treatment", required=True, help="The column that says which arm a unit was in.")
@click.option("--outcome", required=True, help="The column of the outcome: 0/1 or a number.")
@click.option("--treated", help="The treatment column's value for treated units (default: 1 or true).")
@click.option("--control", help="… and for control units (default: 0 or false).")
@click.option("--features", help="Columns to learn from, with commas (default: all others but --leave-out).")
@click.option("--leave-out", default="", help="Columns known only after the treatment: other outcomes, ids.")
@click.option("--groups", default=5, show_default=True, type=click.IntRange(2, 100), help="Groups of predicted uplift.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the held-out predictions there (CSV)."
)
@_format
def uplift(
    path: Path, treatment: str, outcome: str, treated: str | None, control: str | None, features: str | None,
    leave_out: str, groups: int, seed: int, out: Path | None, form: str,
) -> None:  # fmt: skip
    """Whom a treatment moves: a T-learner on one half of the units of PATH, judged on the other.

    PATH is a CSV or parquet file with a row per unit of a randomised experiment. Text columns become one column per
    value.
    """
    from experiments.uplift import fit_t_learner, uplift_quality

    frame = _frame(path)
    for name in (treatment, outcome):
        if name not in frame.columns:
            raise UnknownNameError("column", name, frame.columns, where=str(path))
    left_out = [name for name in leave_out.split(",") if name]
    chosen = features.split(",") if features else [
        name for name in frame.columns if name not in {treatment, outcome, *left_out}
    ]  # fmt: skip
    for name in [*chosen, *left_out]:
        if name not in frame.columns:
            raise UnknownNameError("column", name, frame.columns, where=str(path))
    arm = _arms(frame[treatment], treated, control, treatment)
    frame, arm = frame[arm >= 0].reset_index(drop=True), arm[arm >= 0]
    y = _numbers(frame[outcome], outcome)
    x = _matrix(frame, chosen)
    test = np.random.default_rng(seed).random(len(frame)) < 0.5
    learner = fit_t_learner(x[~test], arm[~test], y[~test], seed=seed)
    predicted = learner.uplift(x[test])
    quality = uplift_quality(predicted, arm[test], y[test], n_groups=groups)
    if out is not None:
        import pandas as pd

        from plait.files import write_atomically

        table = pd.DataFrame({"row": np.flatnonzero(test), "uplift": predicted, "treated": arm[test], outcome: y[test]})
        write_atomically(out, table.to_csv(index=False).encode())
    if form == "json":
        click.echo(_json({"n_units": len(frame), "n_judged": int(test.sum()), **asdict(quality)}))
        return
    whole = y[test & (arm == 1)].mean() - y[test & (arm == 0)].mean()
    click.echo(f"{path.name}: {len(frame):,} units, {int(test.sum()):,} judged; effect on all of them {whole:+.5g}")
    told = quality.trend_p_value < 0.05 and quality.qini_score > 0
    click.echo(
        f"=> {'the treatment moves some more than others: target the top' if told else 'no group to target found'}"
    )
    click.echo("  group (best predicted first)   effect   interval")
    for i, effect in enumerate(quality.groups, start=1):
        click.echo(f"  {i:>5}                       {effect.estimate:>+9.4f}   {effect.low:+.4f} … {effect.high:+.4f}")
    click.echo(f"  Qini {quality.qini_score:.5g} per unit; p that the effect does not fall {quality.trend_p_value:.2g}")


def _frame(path: Path) -> Any:
    import duckdb

    from experiments.report_events import quote

    if not path.is_file():
        raise DataError(f"no file {path}")
    with duckdb.connect() as db:
        try:
            return db.execute(f"SELECT * FROM {quote(str(path))}").df()
        except duckdb.Error as error:
            raise DataError(f"{path} is neither CSV nor parquet that can be read: {error}") from error


def _arms(column: Any, treated: str | None, control: str | None, name: str) -> np.ndarray:
    """1 treated, 0 control, -1 neither. Text is compared as it stands in the file."""
    texts = column.astype(str)
    lower = texts.str.lower()
    one = texts == treated if treated is not None else lower.isin(["1", "1.0", "true"])
    zero = texts == control if control is not None else lower.isin(["0", "0.0", "false"])
    for found, option, wanted in ((one, "--treated", treated or "1"), (zero, "--control", control or "0")):
        if not found.any():
            values = ", ".join(map(repr, sorted(texts.unique())[:10]))
            raise DataError(f"no unit has {name} = {wanted!r}; it holds {values}; say which with {option}")
    return np.where(one, 1, np.where(zero, 0, -1))


def _numbers(column: Any, name: str) -> np.ndarray:
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} units have no finite {name!r}; leave them out")
    return values


def _matrix(frame: Any, chosen: list[str]) -> np.ndarray:
    import pandas as pd

    if not chosen:
        raise SpecError("no column is left to learn from; name some with --features")
    encoded = pd.get_dummies(frame[chosen])
    if encoded.shape[1] > 1000:
        wide = max(chosen, key=lambda name: frame[name].nunique() if frame[name].dtype == object else 0)
        raise DataError(f"column {wide!r} has {frame[wide].nunique():,} values; leave it out with --leave-out")
    return encoded.to_numpy(dtype=np.float64)


def _json(value: Any) -> str:
    """JSON for programs: what is not finite is null."""

    def plain(each: Any) -> Any:
        if isinstance(each, dict):
            return {key: plain(one) for key, one in each.items()}
        if isinstance(each, list | tuple):
            return [plain(one) for one in each]
        if isinstance(each, np.generic):
            each = each.item()
        return None if isinstance(each, float) and not math.isfinite(each) else each

    return json.dumps(plain(value), indent=2)
