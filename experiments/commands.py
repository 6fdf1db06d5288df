"""`plait experiments`: the configuration's life from the command line. `report`, `power` and `learn` are elsewhere."""

from __future__ import annotations

import json
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plait.errors import SpecError
from plait.settings import Home, author_name, find_home

if TYPE_CHECKING:
    from experiments.problems import Problem
    from experiments.source import Source
    from experiments.store import ConfigStore, ConfigVersion

_LATE = {
    "report": ("report_commands", "report"),
    "power": ("report_commands", "power"),
    "learn": ("learn_commands", "learn_command"),
    "policies": ("learn_commands", "policies_command"),
    "interleaving": ("beyond_commands", "interleaving"),
    "offpolicy": ("beyond_commands", "offpolicy"),
    "uplift": ("beyond_commands", "uplift"),
}


class _Experiments(click.Group):
    """Some commands bring scipy and matplotlib: they are imported only when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_LATE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LATE:
            module, name = _LATE[cmd_name]
            return getattr(import_module(f"experiments.{module}"), name)  # type: ignore[no-any-return]
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Experiments)
def experiments() -> None:
    """Layered experiments: declare them in experiments/*.yaml, apply them, see who gets what, read the verdict.

    A change is validated as a whole, kept as a new version, and live in every server within two seconds.
    """


_folder = click.argument("folder", type=click.Path(path_type=Path, file_okay=True), required=False)
_author = click.option("--author", help="Who makes the change (default: PLAIT_AUTHOR, else the login name).")
_note = click.option("--note", default="", help="Why, for the history.")
_no_models = click.option("--no-models", is_flag=True, help="Do not check model names against the registry.")


@experiments.command()
@_folder
@_no_models
def validate(folder: Path | None, no_models: bool) -> None:
    """Check FOLDER (default: the project's experiments/) or one file; every fault with its file and line."""
    home = find_home()
    source = _read(home, folder)
    warnings = _check(source, _models(home, no_models))
    counts = {name: len(source.document.get(name) or {}) for name in ("parameters", "layers", "experiments")}
    _show_warnings(warnings)
    click.echo(f"valid: {', '.join(f'{n} {name}' for name, n in counts.items())}")


@experiments.command()
@_folder
@click.option("--against", type=int, help="A version (default: the live one).")
def diff(folder: Path | None, against: int | None) -> None:
    """What applying FOLDER would change."""
    from experiments.diff import diff_documents

    home = find_home()
    store = _store(home)
    source = _read(home, folder)
    base = store.get(against) if against is not None else store.head()
    lines = diff_documents(base.document if base else {}, source.document)
    _show_diff(lines)
    if not lines:
        click.echo(f"no difference from version {base.version}" if base else "no difference: both are empty")


@experiments.command()
@_folder
@_author
@_note
@_no_models
@click.option("--expect", type=int, help="The version your files are based on; another live version is an error.")
def apply(folder: Path | None, author: str | None, note: str, no_models: bool, expect: int | None) -> None:
    """Make FOLDER (default: the project's experiments/) the live configuration."""
    home = find_home()
    store = _store(home)
    source = _read(home, folder)
    models = _models(home, no_models)
    _show_warnings(_check(source, models))
    head = store.head()
    if expect is None and head is not None and head.origin != "apply" and head.document != source.document:
        raise SpecError(
            f"version {head.version} was made by {head.author} ({head.origin}: {head.note or 'no note'}) and is not in "
            f"these files; take it over (`plait experiments show`), or overwrite it with --expect {head.version}"
        )
    expected = expect if expect is not None else (head.version if head else 0)
    made = store.apply(source, author=author_name(author), expected=expected, models=models, note=note, origin="apply")
    if head is not None and made.version == head.version:
        click.echo(f"version {head.version} already says this; nothing to do")
        return
    _report(made)


@experiments.command()
@click.argument("version", type=int)
@_author
@_note
@_no_models
def rollback(version: int, author: str | None, note: str, no_models: bool) -> None:
    """Make VERSION's configuration live again, as a new version."""
    home = find_home()
    _report(_store(home).rollback(version, author=author_name(author), models=_models(home, no_models), note=note))


@experiments.command()
@click.argument("experiment", required=False)
@click.option(
    "--all", "everything", is_flag=True, help="Every experiment and launch: all parameters at their defaults."
)
@_author
@_note
def kill(experiment: str | None, everything: bool, author: str | None, note: str) -> None:
    """Stop EXPERIMENT (and what requires it) at once; its units fall back to the defaults within two seconds."""
    if (experiment is None) != everything:
        raise click.UsageError("name one experiment, or give --all")
    _report(_store(find_home()).kill(experiment, author=author_name(author), note=note))


@experiments.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_(as_json: bool) -> None:
    """Layers with their experiments: state, share of the layer in use now, unit, arms."""
    from experiments.overview import overview
    from experiments.store import LiveConfig

    home = find_home()
    live = LiveConfig(_store(home))
    layers = overview(live.snapshot.spec, _now(home))
    if as_json:
        click.echo(json.dumps({"version": live.snapshot.version, "source": live.source, "layers": layers}, indent=2))
        return
    click.echo(f"version {live.snapshot.version} (from {live.source})")
    if not live.snapshot.spec.enabled:
        click.echo("switched off as a whole (enabled: false): defaults serve")
    for layer in layers:
        kind = "launch layer" if layer["launch"] else "layer"
        click.echo(
            f"\n{kind} {layer['name']}  by {layer['unit']}, in {layer['domain']}, {layer['free_percent']:g} % free"
        )
        for each in layer["owners"]:
            arms = "  ".join(f"{name} {weight:g}" for name, weight in each["arms"].items())
            arms += f"  ({each['bandit']} bandit)" if each.get("bandit") else ""
            click.echo(
                f"  {each['kind']:<10} {each['name']:<32} {each['state']:<8} {each['in_use_percent']:>6g} %  {arms}"
            )


@experiments.command()
@click.argument("unit")
@click.option(
    "--kind", "kinds", multiple=True, help="Kind of unit UNIT is (default: all); or KIND=ID for a further one."
)
@click.option(
    "--attribute", "-a", "pairs", multiple=True, help="NAME=VALUE of the unit; numbers and true/false are read."
)
@click.option("--at", help="At another moment: 2026-03-01T08:00 (UTC).")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(unit: str, kinds: tuple[str, ...], pairs: tuple[str, ...], at: str | None, as_json: bool) -> None:
    """What UNIT gets, layer by layer: bucket, experiment, arm, parameters, and why."""
    from dataclasses import asdict

    from experiments.store import LiveConfig

    home = find_home()
    live = LiveConfig(_store(home))
    units: dict[str, str] | str = unit
    if kinds:
        units = {kind.partition("=")[0]: kind.partition("=")[2] or unit for kind in kinds}
    found = live.snapshot.explain(units, dict(map(_pair, pairs)), _moment(at) or _now(home))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    click.echo(f"unit {unit!r} under version {found.version} (from {live.source})")
    for name, held in found.holdouts.items():
        click.echo(f"  global holdout {name}: {'held out' if held else 'not held out'}")
    for layer in found.layers:
        where = "" if layer.bucket is None else f" bucket {layer.bucket}"
        arm = f" → {layer.experiment}.{layer.arm}{' (forced)' if layer.forced else ''}" if layer.arm else ""
        click.echo(f"  {layer.layer} ({layer.unit_kind}){where}{arm}: {layer.why}")
        for name, value in layer.parameters.items():
            click.echo(f"      {name} = {json.dumps(value, ensure_ascii=False)}")
    click.echo("  values: " + json.dumps(dict(found.values), ensure_ascii=False))


@experiments.command()
@click.option("--limit", default=20, show_default=True, help="How many of the newest.")
@click.option("--diffs", is_flag=True, help="With what each changed.")
def history(limit: int, diffs: bool) -> None:
    """Versions, newest first: when, who, how and why."""
    versions = _store(find_home()).history(limit)
    if not versions:
        click.echo("no version was applied yet; `plait experiments apply` makes the first", err=True)
    for each in versions:
        when = f"{each.created:%Y-%m-%d %H:%M:%S}Z"
        click.echo(f"{each.version:>5}  {when}  {each.origin:<8} {each.author}  {each.note}".rstrip())
        if diffs:
            _show_diff(each.diff, indent="       ")


@experiments.command()
@click.argument("version", type=int, required=False)
def show(version: int | None) -> None:
    """The live (or one) VERSION as YAML, ready to be saved into experiments/."""
    import yaml

    store = _store(find_home())
    found = store.get(version) if version is not None else store.head()
    if found is None:
        raise SpecError("no version was applied yet; `plait experiments apply` makes the first")
    click.echo(f"# version {found.version}, {found.created:%Y-%m-%d %H:%M:%S}Z, by {found.author}: {found.note}")
    click.echo(yaml.safe_dump(dict(found.document), sort_keys=False, allow_unicode=True, width=110), nl=False)


@experiments.command()
@click.option("--older-than", "days", default=30.0, show_default=True, type=click.FloatRange(0), help="Days over.")
@click.option("--dry-run", is_flag=True, help="Only say what would be forgotten.")
def prune(days: float, dry_run: bool) -> None:
    """Forget the sticky arms of experiments that have been stopped, ended or removed for --older-than days."""
    from datetime import timedelta

    from experiments.prune import prunable
    from experiments.prune import prune as forget
    from plait.clock import Clock

    home = find_home()
    store = _store(home)
    found = prunable(store, older_than=timedelta(days=days), replay=Clock.of(home).offset)
    for each in found:
        since = f"over since {each.over_since:%Y-%m-%d %H:%M}Z" if each.over_since else "in no version that is kept"
        click.echo(f"{each.experiment}: {each.n_rows:,} units, {since}")
    if not dry_run:
        click.echo(f"{forget(store, found):,} sticky arms forgotten")


@experiments.command()
def schema() -> None:
    """The JSON Schema of the configuration, for editors."""
    from experiments.shape import schema as read_schema

    click.echo(json.dumps(read_schema(), indent=2))


# -- helpers ----------------------------------------------------------------------------------------------------


def _store(home: Home) -> ConfigStore:
    from experiments.store import ConfigStore

    return ConfigStore.at(home)


def _now(home: Home) -> datetime:
    from plait.clock import Clock

    return Clock.of(home).now()


def _read(home: Home, path: Path | None) -> Source:
    from experiments.source import read_file, read_folder

    path = path or home.project / "experiments"
    return read_file(path) if path.is_file() else read_folder(path)


def _check(source: Source, models: set[str] | None) -> list[Problem]:
    """The warnings; ConfigError if there are faults."""
    from experiments.problems import ConfigError
    from experiments.validate import check

    _, problems = check(source, models=models)
    if faults := [problem for problem in problems if not problem.warning]:
        raise ConfigError(faults)
    return problems


def _models(home: Home, unchecked: bool) -> set[str] | None:
    """Everything a parameter of type model may say; None if that is not to be checked, or nothing is registered yet."""
    if unchecked:
        return None
    from plait.models import ModelRegistry

    names = ModelRegistry(home).references()
    if not names:
        click.echo("warning: no model is registered yet, so model names were not checked", err=True)
        return None
    return names


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise SpecError(f"--attribute {text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _moment(text: str | None) -> datetime | None:
    from experiments.conditions import moment

    if text is None:
        return None
    when = moment(text)
    if when is None:
        raise SpecError(f"--at {text!r} is not a moment such as 2026-03-01T08:00")
    return when


def _show_warnings(warnings: list[Problem]) -> None:
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


def _show_diff(lines: Any, indent: str = "") -> None:
    colours = {"+": "green", "-": "red", "~": "yellow"}
    for line in lines:
        click.secho(indent + line, fg=colours.get(line[:1]))


def _report(made: ConfigVersion) -> None:
    _show_diff(made.diff)
    click.echo(f"version {made.version} is live; running servers follow within two seconds")
