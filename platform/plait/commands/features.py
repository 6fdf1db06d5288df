"""`plait features`: compute aggregates into feature tables; stream new events into the online store."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

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
def build(engine: str, views: tuple[str, ...], full: bool, until: datetime | None, memory: str | None) -> None:
    """Bring the feature tables up to now.

    What a server logged meanwhile is moved into the event tables first. Only new events are read, and old ones that
    can still leave a window. Then `feast apply` and `feast materialize` as usual.

    \b
    Prints a line per view: what it did, the rows written, the time.
      full       computed from all events: the first time, with --full, or
                 because the declaration or a file of events changed
      increment  added what changed since the last build
      retile     the same, and recomputed keys whose history late files changed
      current    nothing to do
    """
    from plait.aggregates.build import build_view
    from plait.aggregates.discover import declared_aggregates
    from plait.eventlog import roll
    from plait.offline.engine import quiet_ibis

    home = find_home().create()
    end = until.replace(tzinfo=UTC) if until else Clock.of(home).now()
    specs = declared_aggregates(home, views)
    quiet_ibis()
    roll(home)
    for spec in specs:
        with tqdm(desc=spec.name, unit="shard", leave=False, disable=None) as bar:

            def on_shard(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)
                bar.refresh()

            report = build_view(home, spec, until=end, engine=engine, memory=memory, full=full, on_shard=on_shard)
        retiled = f", {report.retiled_keys:,} keys re-tiled for late events" if report.retiled_keys else ""
        click.echo(f"{report.view:<20} {report.mode:<10} {report.rows:>12,} rows  {report.seconds:6.1f} s{retiled}")


@features.command()
@click.option(
    "--from",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of event segments or parquet files.  [default: the server's own event log]",
)
@click.option("--once/--follow", "once", default=True, show_default=True, help="Stop after what is there, or stay.")
@click.option("--view", "views", multiple=True, help="Only this view; may be given more than once.")
@click.option("--table", default="feedback", show_default=True, help="Event table that parquet files belong to.")
@click.option(
    "--poll", "poll_s", type=click.FloatRange(0.05), default=0.5, show_default=True, help="Seconds between looks."
)
@click.option("--source", type=click.Choice(["folder", "spark"]), default="folder", show_default=True)
def stream(folder: Path | None, once: bool, views: tuple[str, ...], table: str, poll_s: float, source: str) -> None:
    """Update online values from events as they arrive.

    Reads what is appended to a folder, moves the running aggregates of the users and items concerned, and pushes their
    rows through Feast; with --follow also when events leave a window. Needs `feast apply`; starting again is safe.
    """
    from plait.aggregates.discover import registered_aggregates
    from plait.aggregates.follow import follow, follow_spark
    from plait.aggregates.stream import push_through, stream_updater
    from plait.eventlog.rolling import log_folder
    from plait.offline.engine import quiet_ibis
    from plait.service import open_store

    home = find_home()
    specs = registered_aggregates(home, views)
    quiet_ibis()
    folder = folder or log_folder(home)
    total: Counter[str] = Counter()
    with stream_updater(home, specs, push_through(open_store(home))) as updater:
        steps = (
            follow_spark(updater, folder, clock=Clock.of(home), table=table, once=once, poll_s=poll_s)
            if source == "spark"
            else follow(updater, home, folder, clock=Clock.of(home), table=table, once=once, poll_s=poll_s)
        )
        try:
            for step in steps:
                total.update(step.pushed)
                if step.n_events or any(step.pushed.values()):
                    pushed = ", ".join(f"{name} {n:,}" for name, n in step.pushed.items() if n) or "no row"
                    click.echo(f"{step.n_events:,} new events; pushed {pushed} in {step.seconds:.2f} s")
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
    click.echo(f"pushed {sum(total.values()):,} rows in all")
