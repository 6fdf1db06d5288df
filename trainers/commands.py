"""`plait train` and `plait evaluate`."""

from __future__ import annotations

import os

# before torch is imported by anything: idle OpenMP threads that spin slow a shared machine several times over
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import time
import uuid
from pathlib import Path

import click

from plait.clock import Clock
from plait.errors import DataError, RegistryError
from plait.offline.dataset import Dataset
from plait.settings import Home, find_home
from trainers.config import CONFIGS, ModelSpec, load_spec
from trainers.report import beaten, measures_table


@click.command()
@click.argument("model")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: training.epochs=3.")
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="A training set's folder. [default: the model's, built if missing]",
)
@click.option("--samples", default="default", show_default=True, help="Samples to build the training set from.")
@click.option("--alias", default="champion", show_default=True, help="Alias that the new version gets; '' for none.")
@click.option("--require-better", is_flag=True, help="Do not register a model that a baseline beats.")
def train(
    model: str, overrides: tuple[str, ...], dataset: Path | None, samples: str, alias: str, require_better: bool
) -> None:
    """Train MODEL (a name in trainers/configs, or a YAML file), verify its artifact and register it.

    Encoders are fitted on the training split only, training stops by the validation split, and the measures are
    those of the test split, beside two baselines counted on the training split.
    """
    from plait.models import ModelRegistry
    from plait.service import open_store, resolve_service
    from trainers.pipeline import train_model

    home = find_home().create()
    spec = load_spec(model, overrides, config_folders(home))
    store = open_store(home)
    service = resolve_service(store, spec.feature_service)
    data = open_dataset(home, spec, dataset, samples)
    rows = data.manifest.rows
    click.echo(
        f"{spec.name}: {spec.algorithm} on {spec.feature_service}, label {spec.label!r}, {data.folder.name} "
        f"({rows['train']:,} train, {rows['valid']:,} valid, {rows['test']:,} test rows)"
    )
    start = time.monotonic()
    trained = train_model(spec, service, data, now=Clock.of(home).now())
    took = time.monotonic() - start
    click.echo(measures_table({spec.name: trained.metrics, **trained.manifest.baselines}))
    faults = beaten(trained.metrics, trained.manifest.baselines)
    for fault in faults:
        click.echo(f"warning: {fault}", err=True)
    if faults and require_better:
        raise DataError(f"{spec.name} does not beat its baselines and is not registered")
    staged = home.models / f".staged-{spec.name}-{uuid.uuid4().hex[:8]}"
    trained.write(staged)
    version = ModelRegistry(home).register(spec.name, staged, alias=alias or None)
    history = trained.manifest.history
    steps = f"{len(history)} {next(iter(history[-1]))}s"  # 4 epochs, 176 rounds
    click.echo(
        f"trained in {took:.1f} s ({steps}), conversion exact to "
        f"{trained.metrics['conversion_difference']:.1g}; registered {version}" + (f" as {alias}" if alias else "")
    )


@click.command()
@click.argument("model")
@click.option(
    "--dataset", type=click.Path(path_type=Path), help="A training set's folder. [default: the one it was trained on]"
)
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def evaluate(model: str, dataset: Path | None, split: str, as_json: bool) -> None:
    """Score MODEL (NAME, NAME:VERSION or NAME@ALIAS) on the test split, beside the baselines, in segments.

    The AUC has a 95 % bootstrap interval that draws whole users.
    """
    from plait.artifacts import load_artifact
    from plait.models import ModelRegistry
    from trainers.evaluation import evaluate_artifact

    home = find_home()
    version = ModelRegistry(home).resolve(model)
    artifact = load_artifact(version.path, threads=2)
    folder = dataset or home.datasets / artifact.manifest.dataset
    if dataset is None and not folder.is_dir():
        raise RegistryError(f"{version} was trained on {folder}, which is gone; name another with --dataset")
    result = evaluate_artifact(artifact, Dataset.open(folder), split=split)
    if as_json:
        click.echo(json.dumps({"model": version.name, "version": version.version, **result.to_dict()}, indent=2))
        return
    click.echo(f"{version} on the {split} split of {folder.name}: {result.rows:,} rows, ndcg by {result.group}")
    click.echo(measures_table({str(version): result.metrics, **result.baselines}))
    low, high = result.auc.low, result.auc.high
    click.echo(f"\nAUC {result.auc.value:.4f}, 95 % interval [{low:.4f}, {high:.4f}] over users")
    click.echo("\nsegments:")
    click.echo(measures_table({f"{name} ({n:,})": measures for name, (n, measures) in result.segments.items()}))


def config_folders(home: Home) -> tuple[Path, ...]:
    """Where model configurations are looked for: the project's own first, then those that came with the package."""
    return (home.project / "trainers" / "configs", CONFIGS)


def open_dataset(home: Home, spec: ModelSpec, folder: Path | None, samples: str) -> Dataset:
    """The training set in `folder`, or the model's own, built if it is missing."""
    if folder is not None:
        return Dataset.open(folder)
    from tqdm import tqdm

    from plait.offline.build import build_dataset

    with tqdm(desc="training set", unit="rows", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return build_dataset(home, spec.feature_service, label=spec.label, samples=samples, progress=progress)
