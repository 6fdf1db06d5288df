"""`plait samples`: impressions joined to feedback into labelled samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from plait.errors import SpecError
from plait.offline import spec as specs
from plait.progress import beside_bars, progress_bar
from plait.settings import find_home


@click.group()
def samples() -> None:
    """Join impressions to feedback into labelled samples, split in time.

    \b
    plait samples build      # .plait/events/ into .plait/samples/default/
    plait samples show       # what is in it

    PLAIT_HOME names another folder than .plait/. Next: `plait dataset build MODEL`, which adds the model's features.
    """


@samples.command()
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="YAML file with any of the choices below.")
@click.option("--name", help="Folder below samples/ to write (default: default).")
@click.option(
    "--label", "labels", multiple=True, help="click, like=rating>=4, long=sum(dwell)>=30; repeat for several."
)
@click.option("--join", type=click.Choice(specs.JOINS), help="How feedback finds its impression.")
@click.option("--touch", type=click.Choice(specs.TOUCHES), help="Credit the last impression in the window, or any.")
@click.option("--window", help="Attribution window: 30m, 12h, 7d (default 1d).")
@click.option("--split", type=click.Choice(specs.SPLITS), help="How rows become train, valid and test.")
@click.option("--shares", metavar="TRAIN,VALID", help="Shares of the rows to train and validate on (default: 0.8,0.1).")
@click.option("--negatives", help="impressions, or KIND:PER_POSITIVE with uniform, popularity, in_batch or hard.")
@click.option("--weights", type=click.Choice(specs.WEIGHTS), help="Sample weights.")
@click.option("--immature", type=click.Choice(specs.IMMATURE), help="Samples younger than the window: mark or drop.")
@click.option("--scene", "scenes", multiple=True, help="Keep only this scene; repeat for several.")
@click.option("--seed", type=int, help="Fixes every draw.")
@click.option("--engine", type=click.Choice(("duckdb", "spark")), default="duckdb", show_default=True)
@click.option("--memory", help="DuckDB's memory limit before it spills to disk, such as 2GB.")
def build(spec_file: Path | None, engine: str, memory: str | None, **flags: Any) -> None:
    """Write samples/NAME: one row per impression with its labels, a weight and a split.

    Reads impressions, feedback and items of .plait/events/, into which it first moves what a server logged meanwhile.
    Writes parquet files and manifest.json to .plait/samples/NAME/, in the place of what was there. Prints how many
    rows each step left. Flags win over the file of --spec.

    \b
    plait samples build
    plait samples build --name liked --label "like=rating>=4" --window 7d
    plait samples build --negatives uniform:4 --split user_time --shares 0.7,0.2

    Next: `plait dataset build MODEL`, with --samples NAME unless it is default.
    """
    from plait.eventlog import roll
    from plait.offline.samples import Step, build_samples

    spec, home = merged_spec(spec_file, flags), find_home()
    roll(home)

    def report(step: Step) -> None:
        with beside_bars():
            click.echo(f"  {step.table:<12} {step.rows:>12,}  {step.step}")

    with progress_bar("samples", unit="stage") as progress:
        manifest = build_samples(home, spec, engine=engine, memory=memory, report=report, progress=progress)
    for part, rows in manifest.rows.items():
        rates = ", ".join(f"{name} {counts[part] / rows:.2%}" for name, counts in manifest.positives.items() if rows)
        click.echo(f"  {part:<12} {rows:>12,}  {rates}")
    if manifest.immature:
        click.echo(f"  {manifest.immature:,} samples are younger than the attribution window: label_mature is false")
    click.echo(f"samples/{manifest.name} ({manifest.data_hash[:12]})")


@samples.command()
@click.argument("name", default="default")
def show(name: str) -> None:
    """Print the manifest of samples/NAME (default: default) as JSON.

    It tells the choices they were built with, the rows each step left, and rows and positives of each split.

    \b
    plait samples show
    plait samples show liked

    Reads .plait/samples/NAME/manifest.json. Next: `plait dataset build MODEL`.
    """
    from plait.offline.samples import read_manifest

    manifest = read_manifest(find_home().samples / name)
    click.echo(json.dumps(dataclasses.asdict(manifest), indent=2))


def merged_spec(spec_file: Path | None, flags: dict[str, Any]) -> specs.SampleSpec:
    """The file's spec with the given flags laid over it."""
    spec = specs.read_spec(spec_file) if spec_file else specs.SampleSpec()
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    top: dict[str, Any] = {name: given[name] for name in ("name", "immature", "seed") if name in given}
    if "labels" in given:
        top["labels"] = tuple(specs.parse_label(text) for text in given["labels"])
    attribution: dict[str, Any] = {name: given[name] for name in ("join", "touch") if name in given}
    if "window" in given:
        attribution["window"] = specs.parse_duration(given["window"])
    top["attribution"] = dataclasses.replace(spec.attribution, **attribution)
    if "scenes" in given:
        top["filters"] = dataclasses.replace(spec.filters, scenes=tuple(given["scenes"]))
    if "split" in given or "shares" in given:
        split: dict[str, Any] = {"kind": given.get("split", spec.split.kind)}
        if "shares" in given:
            split |= _shares(given["shares"])
        top["split"] = dataclasses.replace(spec.split, **split)
    if "weights" in given:
        top["weights"] = dataclasses.replace(spec.weights, kind=given["weights"])
    if "negatives" in given:
        top["negatives"] = dataclasses.replace(spec.negatives, **_negatives(given["negatives"]))
    return dataclasses.replace(spec, **top)


def _shares(text: str) -> dict[str, float]:
    try:
        train, valid = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SpecError(f"--shares {text!r}: write two shares, for instance 0.8,0.1; the rest tests") from error
    return {"train": train, "valid": valid}


def _negatives(text: str) -> dict[str, Any]:
    kind, _, count = text.partition(":")
    if not count:
        return {"kind": kind}
    if not count.isdigit():
        raise SpecError(f"--negatives {text!r}: write KIND:NUMBER, for instance uniform:4")
    return {"kind": kind, "per_positive": int(count)}
