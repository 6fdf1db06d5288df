"""`plait dataset`: training sets, samples joined to a model's feature service."""

from __future__ import annotations

import click

from plait.errors import SpecError, UnknownNameError
from plait.progress import progress_bar
from plait.settings import find_home


@click.group()
def dataset() -> None:
    """Build a model's training set: samples joined to its feature service, point in time.

    \b
    plait dataset build deepfm     # .plait/samples/ and features into .plait/datasets/
    plait dataset list
    plait dataset show             # its data card: null rates, label rates, probable leaks

    PLAIT_HOME names another folder than .plait/. Next: `plait train MODEL`.
    """


@dataset.command()
@click.argument("model", required=False)
@click.option("--service", help="A feature service by name, instead of a model's.")
@click.option("--label", help="Another label of the samples than the model's.")
@click.option("--samples", default="default", show_default=True, help="Which samples/NAME to join.")
@click.option(
    "--engine", type=click.Choice(("duckdb", "spark")), help="Join on this engine, not by the project's offline store."
)
@click.option("--memory", help="What the engine may take, such as 4GB (DuckDB's limit, Spark's driver).")
@click.option(
    "--chunk-rows", default=1_000_000, show_default=True, help="Rows of one query, if the offline store cannot stream."
)
@click.option("--card/--no-card", default=True, show_default=True, help="Also write the data card.")
def build(
    model: str | None,
    service: str | None,
    label: str | None,
    samples: str,
    engine: str | None,
    memory: str | None,
    chunk_rows: int,
    card: bool,
) -> None:
    """Write datasets/SAMPLES-HASH for MODEL (trainers/configs/MODEL.yaml), or reuse it if it is there.

    Needs `plait samples build`, `plait features build` and `feast apply` before. Reads .plait/samples/ and
    .plait/features/; writes train, valid and test parquet files, manifest.json and the data card (card.md, card.json)
    to .plait/datasets/SAMPLES-HASH/. Other samples or features make another hash, so nothing is overwritten.

    \b
    plait dataset build deepfm
    plait dataset build lightgbm --samples liked --label like
    plait dataset build --service click_deepfm --engine duckdb --memory 4GB

    Next: `plait dataset show`, then `plait train MODEL`.
    """
    from plait.offline.build import build_dataset, read_model
    from plait.offline.card import card_warnings
    from plait.offline.engine import quiet_ibis

    if bool(model) == bool(service):
        raise SpecError("name one of MODEL and --service, for instance `plait dataset build deepfm`")
    if memory and not engine:
        raise SpecError(
            "--memory is for --engine; the offline store's limit is offline_store.memory_limit in feature_store.yaml"
        )
    if chunk_rows < 1:
        raise SpecError(f"--chunk-rows is {chunk_rows}; give at least 1")
    home = find_home()
    quiet_ibis()
    if model:
        data = read_model(home, model)
        service, label = data.feature_service, label or data.label
    joined = 0
    with progress_bar("join", unit="row", scale=True) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal joined
            joined = done
            bar("", done, total)

        built = build_dataset(
            home,
            str(service),
            label=label,
            samples=samples,
            engine=engine,
            memory=memory,
            chunk_rows=chunk_rows,
            progress=progress,
        )
    built_now = joined > 0
    click.echo(f"{'built' if built_now else 'reused'} {built.folder} ({built.manifest.data_hash[:12]})")
    for part, rows in built.manifest.rows.items():
        click.echo(f"  {part:<6} {rows:>12,} rows")
    click.echo(f"  {len(built.features)} features of {built.manifest.feature_service}")
    if card:
        for warning in card_warnings(built, label=label):
            click.echo(f"warning: {warning}", err=True)


@dataset.command("list")
def list_() -> None:
    """List the datasets, newest first: name, rows, features, when it was built.

    \b
    plait dataset list

    Reads .plait/datasets/*/manifest.json. Next: `plait dataset show NAME`.
    """
    from plait.offline.dataset import find_datasets

    for found in find_datasets(find_home().datasets):
        rows = sum(found.manifest.rows.values())
        created = found.manifest.created
        click.echo(f"{found.folder.name}  {rows:>12,} rows  {len(found.features):>3} features  {created}")


@dataset.command()
@click.argument("name", required=False)
@click.option("--label", help="Check for leaks of this label.  [default: that of the model it was first built for]")
def show(name: str | None, label: str | None) -> None:
    """Print the data card of dataset NAME (default: the newest).

    Null rates, cardinalities, the label's rate by day, each feature's AUC alone, and warnings of probable leaks.

    \b
    plait dataset show

    Reads .plait/datasets/NAME/ and writes card.md and card.json there. Next: `plait train MODEL`.
    """
    from plait.offline.card import write_card
    from plait.offline.dataset import find_datasets

    found = {each.folder.name: each for each in find_datasets(find_home().datasets)}
    name = name or next(iter(found), "")
    if name not in found:
        raise UnknownNameError("dataset", name, found)
    click.echo(write_card(found[name], label=label).to_markdown())
