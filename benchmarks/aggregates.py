"""Aggregates over millions of synthetic events: time, peak memory, and what a further day costs.

    python benchmarks/aggregates.py --events 5000000 --events 15000000 --events 50000000 --memory 2GB

Events: 180 days, a user for every 100 events, an item for every 1,000, both skewed. Each build runs in a process of
its own; its peak resident size is the operating system's count.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import duckdb

DAYS = 180
START = datetime(2024, 1, 1, tzinfo=UTC)
VIEWS = ("user_event", "item_day")


def generate(folder: Path, n_events: int, *, first_day: int, days: int, seed: float) -> None:
    """A part of feedback per 5M events, in order of time, from `first_day` on."""
    folder.mkdir(parents=True, exist_ok=True)
    users, items = max(n_events // 100, 10), max(n_events // 1000, 10)
    part = 5_000_000
    start_us = int(START.timestamp()) * 1_000_000
    with duckdb.connect() as db:
        db.execute(f"SELECT setseed({seed})")
        for begin in range(0, n_events, part):
            end = min(begin + part, n_events)
            db.execute(
                f"""COPY (
                    SELECT 'e{first_day}-' || i AS event_id, 'rating' AS type, NULL::VARCHAR AS request_id,
                        (pow(random(), 2) * {users})::BIGINT AS user_id,
                        (pow(random(), 3) * {items})::BIGINT AS item_id,
                        make_timestamptz({start_us}::BIGINT + {first_day} * 86400000000::BIGINT
                            + (i * ({days} * 86400000000.0 / {n_events}))::BIGINT) AS timestamp,
                        (1 + floor(random() * 5))::DOUBLE AS value, NULL::TIMESTAMPTZ AS created
                    FROM range({begin}, {end}) r(i)
                ) TO '{folder / f"{first_day:03d}-{begin:012d}.parquet"}' (FORMAT parquet, COMPRESSION zstd)"""
            )


def measure(root: Path, view: str, end_day: int, memory: str) -> dict[str, float]:
    """One build in a process of its own."""
    command = [sys.executable, __file__, "--child", str(root), view, str(end_day), memory]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(root: Path, view: str, end_day: int, memory: str) -> None:
    """The measured process: build one view, print what it took."""
    from plait.aggregates import AggregateSpec, Count, Mean, Rate, feedback
    from plait.aggregates.build import build_view
    from plait.settings import Home

    key, cadence = {"user_event": ("user_id", "event"), "item_day": ("item_id", "day")}[view]
    features = (Count("n"), Mean("mean", of="value"), Rate("good", where="value >= 4", prior=0.5))
    windows = ("1d", "7d", "30d", "all")
    spec = AggregateSpec(
        name=view, keys=(key,), events=feedback("rating"), windows=windows, cadence=cadence, features=features
    )
    started = time.monotonic()
    report = build_view(Home(project=root, root=root), spec, until=START + timedelta(days=end_day), memory=memory)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"mode": report.mode, "rows": report.rows, "seconds": seconds, "peak_gb": peak}))


@click.command()
@click.option("--events", "sizes", type=int, multiple=True, default=(5_000_000, 15_000_000, 50_000_000))
@click.option("--memory", default="2GB", show_default=True, help="DuckDB's limit.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the data lies meanwhile.")
@click.option("--child", "as_child", nargs=4, type=str, hidden=True)
def main(sizes: tuple[int, ...], memory: str, folder: Path | None, as_child: tuple[str, str, str, str] | None) -> None:
    """Build two views whole, then by one more day, for each size."""
    if as_child:
        root, view, end_day, limit = as_child
        child(Path(root), view, int(end_day), limit)
        return
    click.echo(f"{'events':>12} {'view':<11} {'build':<10} {'rows':>13} {'seconds':>8} {'events/s':>10} {'peak GB':>8}")
    for n_events in sizes:
        root = Path(tempfile.mkdtemp(prefix="plait-aggregates-", dir=folder))
        try:
            generate(root / "events" / "feedback", n_events, first_day=0, days=DAYS, seed=0.1)
            whole = {view: measure(root, view, DAYS, memory) for view in VIEWS}
            generate(root / "events" / "feedback", n_events // DAYS, first_day=DAYS, days=1, seed=0.2)
            day = {view: measure(root, view, DAYS + 1, memory) for view in VIEWS}
            for view in VIEWS:
                for n, got in ((n_events, whole[view]), (n_events // DAYS, day[view])):
                    click.echo(
                        f"{n:>12,} {view:<11} {got['mode']:<10} {got['rows']:>13,} {got['seconds']:>8.1f} "
                        f"{n / got['seconds']:>10,.0f} {got['peak_gb']:>8.2f}"
                    )
        finally:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
