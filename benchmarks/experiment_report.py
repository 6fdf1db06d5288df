"""How long a report takes over a large log, and how much memory it needs.

By default 10M exposures of 4M units, 2M outcomes, 5 metrics with CUPED, daily series and bootstrap.

    python benchmarks/experiment_report.py [--exposures N] [--outcomes N] [--units N] [--threads 2]

The log is made in a temporary folder with a known true effect; as many events again lie before exposure, for CUPED.
The report runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb

START = datetime(2026, 3, 1, tzinfo=UTC)
METRICS = {
    "analysis": {"alpha": 0.05, "bootstrap": 1000},
    "metrics": [
        {"name": "clicks_per_user", "type": "count", "event": "click", "role": "primary", "winsorize": 0.999},
        {"name": "clicked", "type": "proportion", "event": "click"},
        {"name": "revenue", "type": "mean", "event": "purchase", "winsorize": 0.9999},
        {
            "name": "purchases_per_click",
            "type": "ratio",
            "numerator": {"event": "purchase"},
            "denominator": {"event": "click"},
        },
        {"name": "second_week", "type": "retention", "event": "any", "from": "7d", "to": "14d", "role": "guardrail"},
    ],
}


def make_log(root: Path, *, n_exposures: int, n_outcomes: int, n_units: int) -> None:
    """Exposures over 14 days, outcomes to 30 days after and as many to 28 days before; treatment acts 2 % more."""
    start = int(START.timestamp())
    for table in ("exposures", "feedback"):
        (root / "events" / table).mkdir(parents=True)
    db = duckdb.connect()
    db.execute("SET memory_limit = '1500MB'; SET threads = 2; SET preserve_insertion_order = false")
    db.execute("SET TimeZone = 'UTC'")
    db.execute(f"SET temp_directory = '{root / 'scratch'}'")
    random = "(hash({} * 2654435761 + {}) % 1000003 / 1000003.0)"
    unit, arm = random.format("i", 1), "CASE hash({} + 77) % 2 WHEN 0 THEN 'control' ELSE 'treatment' END"
    parts = 8
    for part in range(parts):
        first, last = n_exposures * part // parts, n_exposures * (part + 1) // parts
        db.execute(f"""
            COPY (SELECT make_timestamptz(({start} + floor({random.format("u", 2)} * 14 * 86400)
                                           + (i % 7) * 3600)::BIGINT * 1000000) AS timestamp,
                         'r' || i AS request_id, 'user' AS unit_kind, u::VARCHAR AS unit, 'rank' AS layer,
                         'bench' AS experiment, {arm.format("u")} AS arm, 1::BIGINT AS config_version,
                         false AS forced, false AS counterfactual
                  FROM (SELECT i, CASE WHEN i < {n_units} THEN i ELSE floor({unit} * {n_units})::BIGINT END AS u
                        FROM range({first}, {last}) t(i)))
            TO '{root}/events/exposures/part-{part}.parquet' (COMPRESSION zstd)""")
    effect = f"CASE WHEN hash(u + 77) % 2 = 1 THEN {random.format('i', 9)} < 1 ELSE {random.format('i', 9)} < 0.98 END"
    for name, sign in (("after", 1), ("before", -1)):
        # Squaring makes some users far more active than others, the same ones before and after.
        user = f"floor(pow({random.format('i', 3 if sign > 0 else 4)}, 2) * {n_units})::BIGINT"
        late = f"{random.format('i', 5)} * {30 if sign > 0 else 28} * 86400"
        keep = f"WHERE {effect}" if sign > 0 else ""
        db.execute(f"""
            COPY (SELECT '{name}' || i AS event_id,
                         CASE i % 10 WHEN 0 THEN 'purchase' WHEN 1 THEN 'like' ELSE 'click' END AS type,
                         NULL::VARCHAR AS request_id, u AS user_id, i % 1000 AS item_id,
                         make_timestamptz(({start} + floor({random.format("u", 2)} * 14 * 86400)
                                           + {sign} * floor({late}) + {21600 if sign > 0 else 0})::BIGINT * 1000000)
                             AS timestamp,
                         CASE i % 10 WHEN 0 THEN 5 - 20 * ln(1 - {random.format("i", 6)}) END AS value,
                         timestamp AS created
                  FROM (SELECT i, {user} AS u FROM range({int(n_outcomes / (0.99 if sign > 0 else 1))}) t(i)) {keep})
            TO '{root}/events/feedback/{name}.parquet' (COMPRESSION zstd)""")
    db.close()


def run_report(root: Path, threads: int) -> None:
    """One report, timed; prints a JSON line. Runs in the child process."""
    from experiments.metrics import parse_metrics
    from experiments.report import build_report
    from plait.settings import Home

    began = time.perf_counter()
    home = Home(project=root, root=root)
    report = build_report(
        home, "bench", metrics=parse_metrics(METRICS), until=START + timedelta(days=50), threads=threads
    )
    seconds = time.perf_counter() - began
    lifts = {
        result.metric.name: round(comparison.deciding.estimate, 5)
        for result in report.metrics
        for comparison in result.comparisons
    }
    removed = {result.metric.name: round(result.variance_removed or 0, 3) for result in report.metrics}
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "cpu_seconds": round(sum(os.times()[:2]), 1),
                "units": sum(report.counts.units.values()),
                "exposures": report.counts.n_exposures,
                "lifts": lifts,
                "variance_removed": removed,
                "conclusion": report.conclusion.headline,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--exposures", type=int, default=10_000_000)
    parser.add_argument("--outcomes", type=int, default=2_000_000)
    parser.add_argument("--units", type=int, default=4_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Keep the log there and use it again.")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_report(args.child, args.threads)
        return
    with tempfile.TemporaryDirectory(prefix="plait-bench-") as scratch:
        root = args.folder or Path(scratch)
        if not (root / "events").exists():
            began = time.perf_counter()
            make_log(root, n_exposures=args.exposures, n_outcomes=args.outcomes, n_units=args.units)
            print(f"log made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        command = [sys.executable, __file__, "--child", str(root), "--threads", str(args.threads)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
