"""`plait models`: look at the registry and move its aliases."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from plait.models import CHAMPION, ModelRegistry, ModelVersion
from plait.settings import author_name, find_home


@click.group()
def models() -> None:
    """The model registry: versions, aliases, metrics, lineage.

    A model is named NAME (its champion), NAME:VERSION or NAME@ALIAS.
    """


@models.command("list")
@click.argument("name", required=False)
def list_models(name: str | None) -> None:
    """Every version (of NAME), newest last, with its test metrics."""
    registry = ModelRegistry(find_home())
    names = [name] if name else registry.names()
    if not names:
        click.echo("no model is registered yet; `plait train MODEL` makes one", err=True)
    for each in names:
        for model in registry.versions(each):
            click.echo(_line(model))


@models.command()
@click.argument("model")
def show(model: str) -> None:
    """Everything that is known of MODEL, as JSON: service, features, config, data hash, metrics, library versions, and
    who moved the name's aliases when."""
    registry = ModelRegistry(find_home())
    found = registry.resolve(model)
    record: dict[str, object] = {
        "name": found.name,
        "version": found.version,
        "path": str(found.path),
        "aliases": found.aliases,
    }
    moves = [asdict(move) | {"moved": move.moved.isoformat()} for move in registry.moves(found.name)]
    record |= {"created": found.created.isoformat(), "alias_moves": moves}
    click.echo(json.dumps(record | {**found.manifest}, indent=2))


@models.command()
@click.argument("model")
@click.option("--alias", default=CHAMPION, show_default=True, help="The alias to move.")
def promote(model: str, alias: str) -> None:
    """Point an alias at MODEL (NAME:VERSION); running servers follow within seconds."""
    registry = ModelRegistry(find_home())
    found = registry.resolve(model)
    click.echo(_line(registry.promote(found.name, found.version, alias, author=author_name())))


@models.command()
@click.argument("name")
@click.option("--alias", default=CHAMPION, show_default=True, help="The alias to move back.")
def rollback(name: str, alias: str) -> None:
    """Point an alias of NAME back at the version it named before."""
    click.echo(_line(ModelRegistry(find_home()).rollback(name, alias)))


@models.command()
@click.argument("model")
def verify(model: str) -> None:
    """Load MODEL's artifact, check every file's checksum and reproduce its golden rows."""
    from plait.artifacts import load_artifact

    found = ModelRegistry(find_home()).resolve(model)
    load_artifact(found.path, verify=True)
    click.echo(f"{found} is whole and reproduces its golden rows")


def _line(model: ModelVersion) -> str:
    test = model.metrics.get("test", model.metrics)
    shown = ("auc", "log_loss", "ece", "calibration", "ndcg@10")
    numbers = "  ".join(f"{key} {test[key]:.4f}" for key in shown if isinstance(test.get(key), float))
    aliases = "".join(f" @{alias}" for alias in model.aliases)
    return f"{model.name}:{model.version}{aliases}  {model.created:%Y-%m-%d %H:%M}  {numbers}"
