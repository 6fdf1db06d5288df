"""`plait features`: compute aggregates into feature tables; stream new events into the online store."""

from __future__ import annotations

import click
from tqdm import tqdm

from plait.clock import Clock
from plait.settings import find_home


@click.group()
def features() -> None:
    """Feature tables and online values from events, by the aggregates declared in feature_repo."""


@features.command()
@click.option("--engine", type=click.Choice(["duckdb", "spark"]), default="duckdb", show_default=True)
@click.option("--view", "views", multiple=True, help="Only this view; may be given more than once.")
@click.option("--full", is_flag=True, help="Start over instead of adding what is new since the last build.")
@click.option("--until", type=click.DateTime(), help="Build up to this moment (UTC) instead of the home's now.")
@click.option("--memory", help="Memory limit, like 2GB; beyond it, DuckDB spills to disk.")
def build(engine: str, views: tuple[str, ...], full: bool, until: object, memory: str | None) -> None:
    """Bring the feature tables up to now.

    Only new events are read, and old ones that can still leave a window; a changed declaration, or a changed file of
    events, makes its table start over. Then `feast apply` and `feast materialize` as usual.
    """
    from plait.aggregates.build import build_view
    from plait.aggregates.discover import declared_aggregates

    home = find_home().create()
    end = _utc(until) or Clock.of(home).now()
    for spec in declared_aggregates(home, views):
        with tqdm(desc=spec.name, unit="shard", leave=False) as bar:

            def on_shard(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report = build_view(
                home, spec, until=end, engine=engine, memory=memory, full=full, on_shard=on_shard
            )
        retiled = f", {report.retiled_keys:,} keys re-tiled for late events" if report.retiled_keys else ""
        click.echo(f"{report.view:<20} {report.mode:<10} {report.rows:>12,} rows  {report.seconds:6.1f} s{retiled}")


def _utc(moment: object) -> object:
    from datetime import UTC, datetime

    return moment.replace(tzinfo=UTC) if isinstance(moment, datetime) else None
