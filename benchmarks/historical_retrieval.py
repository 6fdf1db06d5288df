"""Historical retrieval: Feast's DuckDB offline store against Plait's, the same repo and the same data in one run.

    python benchmarks/historical_retrieval.py            both scenarios below, a few minutes
    python benchmarks/historical_retrieval.py --huge     20M entity rows x 3 views x 20M rows, Plait alone, streamed

Scenarios: "wide", 1M entity rows x 3 views of 1M rows with 10 rows a key; "deep", 30k entity rows x 1 view of 1M rows
with 1,000 rows a key. Each side runs in a process of its own, so that its peak memory is its own; the results are
compared cell by cell. `--rows` scales all of it down for a quick look.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import duckdb
import pyarrow.parquet as pq

SPAN_US = 100 * 86_400 * 1_000_000  # a hundred days of history
STORES = {"stock": "duckdb", "plait": "plait.stores.offline.AsofDuckDBOfflineStore"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """`n_entities` rows joined to `n_views` views of `n_rows` rows, `per_key` of them a key."""

    name: str
    n_entities: int
    n_views: int
    n_rows: int
    per_key: int
    n_features: int = 10
    goal: float | None = None

    @property
    def title(self) -> str:
        return (
            f"{self.name}: {self.n_entities:,} entity rows x {self.n_views} view(s) x {self.n_rows:,} rows, "
            f"{self.per_key:,} rows a key, {self.n_features} features a view"
        )


def scenarios(rows: int) -> list[Scenario]:
    return [
        Scenario(name="wide", n_entities=rows, n_views=3, n_rows=rows, per_key=10, goal=6.0),
        Scenario(name="deep", n_entities=max(1, rows * 3 // 100), n_views=1, n_rows=rows, per_key=1_000, goal=15.0),
    ]


def generate(scenario: Scenario, folder: Path, *, seed: float = 0.5) -> None:
    """Entity rows and one parquet file a view, drawn uniformly; `rid` numbers the entity rows."""
    n_keys = max(1, scenario.n_rows // scenario.per_key)
    key = f"(random() * {n_keys})::BIGINT"
    moment = f"make_timestamptz(1704067200000000 + (random() * {SPAN_US})::BIGINT)"
    with duckdb.connect(config={"threads": 1, "memory_limit": "1GB", "temp_directory": str(folder / "tmp")}) as db:
        db.execute(f"SELECT setseed({seed})")
        for v in range(scenario.n_views):
            features = ", ".join(
                f"(random() * 100)::{'FLOAT' if i % 2 else 'BIGINT'} AS v{v}_f{i}" for i in range(scenario.n_features)
            )
            db.execute(
                f"COPY (SELECT *, event_timestamp AS created FROM (SELECT {key} AS k{v}, {moment} AS event_timestamp, "
                f"{features} FROM range({scenario.n_rows}))) TO '{folder}/view{v}.parquet'"
            )
        keys = ", ".join(f"{key} AS k{v}" for v in range(scenario.n_views))
        db.execute(
            f"COPY (SELECT range AS rid, {keys}, {moment} AS event_timestamp, (random() * 2)::BIGINT AS click "
            f"FROM range({scenario.n_entities})) TO '{folder}/entities.parquet'"
        )


def open_store(scenario: Scenario, folder: Path, side: str, options: dict[str, Any]) -> Any:
    """A store of one side with the scenario's views applied."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.repo_config import RepoConfig
    from feast.types import Float32, Int64

    repo = folder / side
    repo.mkdir(exist_ok=True)
    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            provider="local",
            registry=str(repo / "registry.db"),
            offline_store={"type": STORES[side], **options},
            online_store={"type": "sqlite", "path": str(repo / "online.db")},
            entity_key_serialization_version=3,
            repo_path=repo,
        )
    )
    objects: list[Any] = []
    for v in range(scenario.n_views):
        entity = Entity(name=f"k{v}", join_keys=[f"k{v}"], value_type=ValueType.INT64)
        schema = [Field(name=f"k{v}", dtype=Int64)]
        schema += [Field(name=f"v{v}_f{i}", dtype=Float32 if i % 2 else Int64) for i in range(scenario.n_features)]
        source = FileSource(
            name=f"source{v}",
            path=str(folder / f"view{v}.parquet"),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )
        objects += [entity, FeatureView(name=f"view{v}", entities=[entity], schema=schema, source=source, ttl=None)]
    store.apply(objects)
    return store


def refs(scenario: Scenario) -> list[str]:
    return [f"view{v}:v{v}_f{i}" for v in range(scenario.n_views) for i in range(scenario.n_features)]


def peak_mb() -> int:
    """Peak resident memory of this process in MB."""
    # Not by getrusage on Linux: there a child inherits its parent's peak.
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(row for row in status.read_text().splitlines() if row.startswith("VmHWM")).split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 * 1024)  # macOS counts bytes


def run_side(scenario: Scenario, folder: Path, side: str, repeat: int) -> dict[str, float]:
    """Retrieve `repeat` times in this process: seconds and CPU seconds of the fastest, memory before and at the peak.

    Writes the result aside.
    """
    store = open_store(scenario, folder, side, {})
    entities = pq.read_table(folder / "entities.parquet").to_pandas()
    before, times = peak_mb(), []
    for _ in range(repeat):
        result = None  # the last one's memory is not this one's
        started, cpu = time.perf_counter(), time.process_time()
        result = store.get_historical_features(entities, refs(scenario)).to_arrow()
        times.append((time.perf_counter() - started, time.process_time() - cpu))
    report = {
        "seconds": min(seconds for seconds, _ in times),
        "cpu_s": min(cpu_s for _, cpu_s in times),
        "before_mb": before,
        "peak_mb": peak_mb(),
    }
    pq.write_table(result, folder / f"{side}.parquet")
    return report


def run_huge(scenario: Scenario, folder: Path, memory_limit: str, threads: int) -> dict[str, float]:
    """Stream a retrieval that does not fit into memory into parquet parts."""
    options = {"memory_limit": memory_limit, "threads": threads, "temp_directory": str(folder / "spill")}
    store = open_store(scenario, folder, "plait", options)
    before, started, cpu = peak_mb(), time.perf_counter(), time.process_time()
    job = store.get_historical_features(str(folder / "entities.parquet"), refs(scenario))
    parts = job.to_parquet(folder / "result")
    n_rows = sum(pq.ParquetFile(part).metadata.num_rows for part in parts)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "before_mb": before,
        "peak_mb": peak_mb(),
        "rows": n_rows,
        "parts": len(parts),
    }


def in_process(*arguments: str) -> dict[str, float]:
    """Run this file again with `arguments`; the last line it prints is its report."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def differing_cells(folder: Path) -> int:
    """Cells that differ between the two sides' results, both sorted by rid."""
    sides = [pq.read_table(folder / f"{side}.parquet").sort_by("rid") for side in STORES]
    if sides[0].schema != sides[1].schema or len(sides[0]) != len(sides[1]):
        raise click.ClickException(f"the results have different shapes: {sides[0].schema} and {sides[1].schema}")
    with duckdb.connect() as db:
        db.register("a", sides[0])
        db.register("b", sides[1])
        counts = ", ".join(f'count(*) FILTER (a."{c}" IS DISTINCT FROM b."{c}")' for c in sides[0].column_names)
        row = db.execute(f"SELECT {counts} FROM a JOIN b USING (rid)").fetchone()
    return sum(row or ())


def line(label: str, report: dict[str, float]) -> str:
    return (
        f"  {label:<6} {report['seconds']:8.2f} s  {report['cpu_s']:8.2f} s CPU   peak {report['peak_mb']:6,.0f} MB "
        f"(before the retrieval {report['before_mb']:,.0f} MB)"
    )


def compare(scenario: Scenario, folder: Path, repeat: int) -> None:
    click.echo(scenario.title)
    generate(scenario, folder)
    shape = [
        "--repeat",
        str(repeat),
        "--shape",
        json.dumps([scenario.n_entities, scenario.n_views, scenario.n_rows, scenario.per_key]),
    ]
    reports = {side: in_process("--side", side, "--folder", str(folder), *shape) for side in STORES}
    for side, report in reports.items():
        click.echo(line(side, report))
    stock, plait = reports["stock"], reports["plait"]
    goal = f" (goal {scenario.goal:g}x)" if scenario.goal else ""
    click.echo(
        f"  {stock['seconds'] / plait['seconds']:.1f}x faster{goal}, {stock['cpu_s'] / plait['cpu_s']:.1f}x less CPU, "
        f"{stock['peak_mb'] / plait['peak_mb']:.1f}x less memory; {differing_cells(folder)} cells differ"
    )


@click.command(help=__doc__)
@click.option("--rows", default=1_000_000, show_default=True, help="Rows a view; the rest scales along.")
@click.option("--scenario", "only", type=click.Choice(["wide", "deep"]), help="Run this one alone.")
@click.option("--repeat", default=3, show_default=True, help="Retrievals a side; the fastest counts.")
@click.option("--huge", is_flag=True, help="The out-of-core run: 20M x 3 views x 20M rows; needs 25 GB of disk.")
@click.option("--huge-rows", default=20_000_000, show_default=True, help="Rows of the out-of-core run.")
@click.option("--memory-limit", default="1200MB", show_default=True, help="DuckDB's share of the out-of-core run.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of the out-of-core run.")
@click.option("--keep", type=click.Path(path_type=Path), help="Use this folder and leave the data there.")
@click.option("--side", type=click.Choice([*STORES, "huge"]), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--shape", hidden=True)
def main(
    rows: int,
    only: str | None,
    repeat: int,
    huge: bool,
    huge_rows: int,
    memory_limit: str,
    threads: int,
    keep: Path | None,
    side: str | None,
    folder: Path | None,
    shape: str | None,
) -> None:
    if side is not None and folder is not None and shape is not None:
        warnings.simplefilter("ignore")
        n_entities, n_views, n_rows, per_key = json.loads(shape)
        scenario = Scenario(name=side, n_entities=n_entities, n_views=n_views, n_rows=n_rows, per_key=per_key)
        ran = (
            run_huge(scenario, folder, memory_limit, threads)
            if side == "huge"
            else run_side(scenario, folder, side, repeat)
        )
        click.echo(json.dumps(ran))
        return
    base = keep or Path(tempfile.mkdtemp(prefix="plait-bench-"))
    try:
        if huge:
            scenario = Scenario(name="huge", n_entities=huge_rows, n_views=3, n_rows=huge_rows, per_key=10)
            click.echo(scenario.title)
            base.mkdir(parents=True, exist_ok=True)
            if not (base / "entities.parquet").exists():
                generate(scenario, base)
            given = ["--memory-limit", memory_limit, "--threads", str(threads), "--folder", str(base)]
            report = in_process("--side", "huge", *given, "--shape", json.dumps([huge_rows, 3, huge_rows, 10]))
            click.echo(line("plait", report))
            click.echo(f"  {report['rows']:,.0f} rows in {report['parts']:.0f} parts, memory_limit {memory_limit}")
        else:
            for scenario in scenarios(rows):
                if only in (None, scenario.name):
                    (base / scenario.name).mkdir(parents=True, exist_ok=True)
                    compare(scenario, base / scenario.name, repeat)
    finally:
        if keep is None:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
