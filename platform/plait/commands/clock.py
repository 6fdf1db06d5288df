"""`plait clock`: the home's present."""

from __future__ import annotations

import click

from plait.clock import Clock
from plait.settings import find_home


@click.command()
def clock() -> None:
    """Print the home's present time, ready for Feast's commands.

    A home that replays a historical data set lives in that data's past:

        feast materialize 1990-01-01T00:00:00 $(plait clock)
    """
    click.echo(Clock.of(find_home()).now().strftime("%Y-%m-%dT%H:%M:%S"))
