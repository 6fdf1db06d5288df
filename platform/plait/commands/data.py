"""`plait data`: bring a data set into the home as event tables."""

from __future__ import annotations

from pathlib import Path

import click

from plait.data.tables import Prepared, clear, prepared
from plait.errors import DataError, SpecError
from plait.progress import progress_bar
from plait.settings import Home, find_home

SOURCES = ("movielens-100k", "movielens-1m", "synthetic")


@click.group()
def data() -> None:
    """Data sets as event tables: impressions, feedback, users, items.

    Each table is a folder of parquet files in .plait/events/, which all later steps read. PLAIT_HOME names another
    folder than .plait/.

    \b
    plait data prepare synthetic                  # nothing to download
    plait data prepare movielens-100k             # real ratings
    plait data import feedback clicks.parquet     # your own events

    Next: `plait features build` and `plait samples build`.
    """


@data.command()
@click.argument("source", type=click.Choice(SOURCES))
@click.option("--path", type=click.Path(path_type=Path), help="A folder that holds the data set already.")
@click.option(
    "--holdout",
    type=click.FloatRange(0, 0.9),
    default=0.1,
    show_default=True,
    help="Share of the data, the latest, that simulated users will live through; the home's clock is set to its start.",
)
@click.option("--replace", is_flag=True, help="Throw the home's events, features, samples and data sets away first.")
@click.option("--users", type=click.IntRange(1), default=2_000, show_default=True, help="synthetic: users")
@click.option("--items", type=click.IntRange(20), default=500, show_default=True, help="synthetic: items")
@click.option("--requests", type=click.IntRange(1), default=20_000, show_default=True, help="synthetic: slates of 10")
@click.option("--days", type=click.IntRange(1), default=60, show_default=True, help="synthetic: length of time")
@click.option("--seed", type=int, default=0, show_default=True, help="synthetic: seed")
def prepare(
    source: str,
    path: Path | None,
    holdout: float,
    replace: bool,
    users: int,
    items: int,
    requests: int,
    days: int,
    seed: int,
) -> None:
    """Write SOURCE into the home's event tables.

    \b
    movielens-100k   downloaded (5 MB) and checked, or from --path (ml-100k.inter, .user, .item)
    movielens-1m     from --path (GroupLens' ratings.dat, users.dat, movies.dat; or ratings.parquet)
    synthetic        generated: impressions, clicks, purchases of which the truth is known

    A rating is an impression with a "rating" event; 4 or 5 stars are a "click" as well.

    \b
    plait data prepare movielens-100k
    plait data prepare movielens-1m --path ~/ml-1m --replace
    plait data prepare synthetic --requests 5000 --seed 7

    The past goes to .plait/events/, the held-out future to .plait/holdout/, which `plait simulate` reads. A home holds
    one data set: asking for the same again only prints it, and another, or other options, need --replace.

    Next: `plait features build`.
    """
    home = find_home()
    present = prepared(home)
    if present and not replace:
        if present.source.split("(")[0] != source:
            raise DataError(f"the home {home.root} already holds {present.source}; --replace throws it away first")
        return _tell(present)
    if replace:
        clear(home)
    return _tell(_prepare(home, source, path, holdout, users, items, requests, days, seed))


@data.command("import")
@click.argument("table", type=click.Choice(["impressions", "feedback", "users", "items"]))
@click.argument("source")
@click.option("--format", "form", help="parquet, csv, jsonl, delta, iceberg or sql; default: as the name tells.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="item_id=sku; repeat for several.")
@click.option("--constant", "constants", multiple=True, metavar="OURS=VALUE", help="scene=home; repeat for several.")
@click.option("--unit", default="s", show_default=True, help="Of timestamps that are numbers: s, ms or us.")
@click.option("--query", help="Databases: SQL to run.")
@click.option("--table", "source_table", help="Databases: the table to read whole.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Delta: a storage option of deltalake; Iceberg: a property of pyiceberg's catalog or FileIO. Repeat for "
    "several; better leave secrets to the environment.",
)
def import_(
    table: str,
    source: str,
    form: str | None,
    columns: tuple[str, ...],
    constants: tuple[str, ...],
    unit: str,
    query: str | None,
    source_table: str | None,
    options: tuple[str, ...],
) -> None:
    """Read your own events from SOURCE into an event TABLE.

    \b
    SOURCE is one of
      a file or a folder of parts         .parquet, .csv, .tsv, .jsonl, .ndjson, .json (lines); text also with .gz
      a Delta or Iceberg table            a folder, or s3://, gs://, az://, abfss:// with --format
      iceberg://CATALOG/NAMESPACE.TABLE   a table of a catalog in pyiceberg's configuration
      a database's SQLAlchemy URL         with --table or --query

    \b
    plait data import impressions shown.parquet
    plait data import feedback clicks.csv --column item_id=sku --constant type=click --unit ms
    plait data import items sqlite:///shop.db --table products --column item_id=id
    plait data import feedback s3://lake/clicks --format delta --option AWS_REGION=eu-west-1
    plait data import items iceberg://prod/shop.items --column item_id=id

    \b
    Columns that SOURCE must have, unless --column or --constant gives them; others of the event table may be there:
      impressions   timestamp, user_id, item_id
      feedback      type, timestamp, user_id
      users         user_id, event_timestamp
      items         item_id, event_timestamp

    Writes one file, .plait/events/TABLE/import-*.parquet; importing the same source again replaces it. The clock is
    then the wall's, unless the home replays a prepared data set.

    Next: `plait samples build`, when there are impressions and feedback.
    """
    from plait.data.readers import ImportSpec, import_table

    spec = ImportSpec(
        kind=table,
        source=source,
        format=form,
        columns=_pairs(columns, "--column"),
        constants=_pairs(constants, "--constant"),
        unit=unit,
        query=query,
        table=source_table,
        options=_pairs(options, "--option", shown=False),
    )
    with progress_bar(f"import {table}", unit=" rows", scale=True) as progress:
        # No reader knows how many rows will come before it has read them.
        done = import_table(find_home().create(), spec, progress=lambda rows: progress("", rows, None))
    click.echo(f"{done.kind}: {done.rows:,} rows in {done.path}")


def _pairs(texts: tuple[str, ...], option: str, *, shown: bool = True) -> dict[str, str]:
    """shown: whether an error may repeat the text, which is no secret."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise SpecError(f"{option} {text!r}: write NAME=VALUE" if shown else f"{option}: write KEY=VALUE")
        pairs[name] = value
    return pairs


def _prepare(
    home: Home,
    source: str,
    path: Path | None,
    holdout: float,
    users: int,
    items: int,
    requests: int,
    days: int,
    seed: int,
) -> Prepared:
    if source == "synthetic":
        from plait.data.synthetic import SyntheticSpec, prepare_synthetic

        spec = SyntheticSpec(n_users=users, n_items=items, n_requests=requests, days=days, seed=seed)
        with progress_bar(source, unit=" requests", scale=True) as progress:
            return prepare_synthetic(home, spec, holdout=holdout, progress=progress)
    from plait.data.movielens import prepare_1m, prepare_100k

    prepare = prepare_100k if source == "movielens-100k" else prepare_1m
    with progress_bar(source, unit="step") as progress:
        return prepare(home, path=path, holdout=holdout, progress=progress)


def _tell(done: Prepared) -> None:
    verb = "already there" if done.reused else "prepared"
    click.echo(f"{done.source}: {verb}")
    for name, n in done.rows.items():
        click.echo(f"  {name:<12} {n:>10,} rows, and {done.holdout_rows[name]:,} held out")
    click.echo(f"  the past ends, and the home's clock began, at {done.cutoff:%Y-%m-%d %H:%M} UTC")
