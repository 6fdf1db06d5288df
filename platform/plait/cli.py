"""The `plait` command: finds its subcommands by the entry-point group `plait.commands`.

A subcommand's module is imported only when that subcommand is asked for, so `plait --help` stays quick.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from plait.errors import PlaitError

_GROUP = "plait.commands"
# One line each, shown by `plait --help` without importing the (heavy) modules behind them.
_SUMMARIES = {
    "data": "Prepare a data set as event tables: movielens-100k, movielens-1m, synthetic, or your own files.",
    "features": "Compute aggregates into feature tables; stream new events into the online store.",
    "samples": "Join impressions to feedback into labelled samples, split in time.",
    "dataset": "Build a model's training set: samples joined to its feature service, point in time.",
    "train": "Train a model, verify its artifact and register it.",
    "evaluate": "Score a registered model on the test split, beside the baselines.",
    "models": "The model registry: list, show, promote, rollback, verify.",
    "serve": "Serve predictions over HTTP.",
    "simulate": "Send held-out users to a running server and post their feedback.",
    "experiments": "Layered experiments: validate, diff, apply, rollback, list, explain, report, power.",
    "keys": "API keys of the server: create, list, revoke.",
    "audit": "Rebuild logged live features offline and report which differ, and why.",
    "clock": "Print the home's present time (it replays when the data is historical).",
    "demo": "The whole loop on MovieLens-100K: data to a served, re-trained model.",
}


class LazyGroup(click.Group):
    """A click group whose commands are entry points."""

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        order = {name: i for i, name in enumerate(_SUMMARIES)}
        return sorted(self._entry_points(), key=lambda name: (order.get(name, len(order)), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = self._entry_points().get(cmd_name)
        return point.load() if point else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, _SUMMARIES.get(name, "")) for name in self.list_commands(ctx)]
        with formatter.section("Commands, in the order of the loop"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PlaitError as error:
            click.echo(f"plait: {error}", err=True)
            ctx.exit(2)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="plait")
def cli() -> None:
    """Features, training sets, models, serving and experiments around a Feast feature store.

    Run it from a project (a folder with feature_store.yaml). `plait COMMAND --help` explains each.
    """


def main() -> None:
    """Entry point of the console script."""
    try:
        cli(prog_name="plait")
    except BrokenPipeError:
        sys.exit(0)
