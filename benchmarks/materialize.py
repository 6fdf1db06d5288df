"""Materialization and push, stock Feast beside Plait's engine and stores: time and peak memory.

    python benchmarks/materialize.py [--rows 100000] [--features 10] [--stores sqlite,redis]

`store.materialize` of one view over one parquet file with one row a key; stock is Feast's DuckDB offline store, local
engine and SQLite or Redis store. Each case runs in a process of its own, without torch, for its peak resident memory;
"before" is what the process held when materialization began (Python, Feast, the registry). Push is one row: Feast's
`store.push` on both sides, and Plait's own columnar write.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
from online_stores import CASES, open_store, peak_mb, quiet, run_cases, without_torch

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def make_source(path: Path, n_rows: int, n_features: int) -> None:
    rng = np.random.default_rng(1)
    columns: dict[str, Any] = {"user_id": rng.permutation(n_rows)}
    for i in range(n_features):
        columns[f"f{i}"] = rng.integers(0, 1000, n_rows) if i % 2 else rng.random(n_rows)
    moments = pa.array([T0] * n_rows, pa.timestamp("us", tz="UTC"))
    pq.write_table(pa.table({**columns, "event_timestamp": moments, "created": moments}), path)


def case(kind: str, impl: str, folder: Path, port: int | None, n_rows: int, n_features: int) -> dict[str, Any]:
    from feast import Entity, FeatureView, Field, FileSource, PushSource
    from feast.types import Float64, Int64
    from feast.value_type import ValueType

    path = folder.parent / "source.parquet"
    if not path.exists():
        make_source(path, n_rows, n_features)
    source = FileSource(path=str(path), timestamp_field="event_timestamp", created_timestamp_column="created")
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    fields = [Field(name=f"f{i}", dtype=Int64 if i % 2 else Float64) for i in range(n_features)]
    view = FeatureView(
        name="stats",
        entities=[user],
        ttl=timedelta(days=3650),
        schema=[Field(name="user_id", dtype=Int64), *fields],
        source=PushSource(name="pushed", batch_source=source),
    )
    store = open_store(kind, impl, folder, port)
    store.apply([user, view])
    store._get_provider().online_store  # noqa: B018, connects outside the clock on both sides
    before = peak_mb()
    began, cpu = time.perf_counter(), time.process_time()
    with quiet():
        store.materialize(T0 - timedelta(days=1), T0 + timedelta(days=1))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = peak_mb()
    last = n_rows - 1
    answer = store.get_online_features(features=["stats:f0", "stats:f1"], entity_rows=[{"user_id": last}]).to_dict()
    result = {"seconds": seconds, "cpu_s": cpu, "before_mb": before, "peak_mb": peak, "check": answer["f0"][0]}
    result["push_ms"] = push_ms(store, n_features, columnar=False)
    if impl == "plait":
        result["write_columns_ms"] = push_ms(store, n_features, columnar=True)
    if kind == "sqlite":
        result["disk_mb"] = sum(file.stat().st_size for file in folder.glob("online.db*")) / 1e6
    return result


def push_ms(store: Any, n_features: int, *, columnar: bool, rounds: int = 100) -> float:
    view = store.get_feature_view("stats")
    online = store._get_provider().online_store
    walls = []
    for i in range(rounds):
        moment = T0 + timedelta(days=2, seconds=i)
        values: dict[str, Any] = {f"f{k}": [i if k % 2 else float(i)] for k in range(n_features)}
        table = pa.table(
            {"user_id": [7], **values, "event_timestamp": pa.array([moment], pa.timestamp("us", tz="UTC"))}
        )
        table = table.append_column("created", table["event_timestamp"])
        frame = table.to_pandas()
        began = time.perf_counter()
        if columnar:
            online.write_columns(store.config, view, table)
        else:
            store.push("pushed", frame)
        walls.append(time.perf_counter() - began)
    return statistics.median(walls) * 1e3


def report(results: dict[tuple[str, str], dict[str, Any]], n_rows: int, n_features: int) -> None:
    print(f"materialize {n_rows:,} rows x {n_features} features")
    print(f"{'':8} {'':8} {'seconds':>8} {'us/row':>8} {'peak MB':>8} {'before':>8} {'added':>8} {'push ms':>8}")
    for (kind, impl), r in results.items():
        added = r["peak_mb"] - r["before_mb"]
        print(
            f"{kind:8} {impl:8} {r['seconds']:8.2f} {r['seconds'] / n_rows * 1e6:8.1f} {r['peak_mb']:8.0f} "
            f"{r['before_mb']:8.0f} {added:8.0f} {r['push_ms']:8.2f}"
        )
    for kind in dict.fromkeys(kind for kind, _ in results):
        stock, plait = results[kind, "stock"], results[kind, "plait"]
        if stock["check"] != plait["check"]:
            raise SystemExit(f"{kind}: stock and plait stored different values")
        added = [r["peak_mb"] - r["before_mb"] for r in (stock, plait)]
        print(
            f"{kind}: {stock['seconds'] / plait['seconds']:.1f}x faster, peak memory "
            f"{plait['peak_mb'] / stock['peak_mb']:.2f} of stock's ({added[1] / added[0]:.2f} of what it added); "
            f"push {stock['push_ms'] / plait['push_ms']:.1f}x faster by Feast's push, "
            f"{plait['write_columns_ms']:.2f} ms by write_columns"
        )
        if "disk_mb" in plait:
            print(f"{kind}: {plait['disk_mb']:.1f} MB on disk, stock {stock['disk_mb']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--stores", default="sqlite,redis")
    parser.add_argument("--case", nargs=4, metavar=("KIND", "IMPL", "FOLDER", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        without_torch()
        kind, impl, folder, port = arguments.case
        port_number = int(port) if port.isdigit() else None
        print(json.dumps(case(kind, impl, Path(folder), port_number, arguments.rows, arguments.features)))
        return
    passed_on = ["--rows", str(arguments.rows), "--features", str(arguments.features)]
    cases = [pair for pair in CASES if pair[0] in arguments.stores.split(",")]
    report(run_cases(__file__, passed_on, cases), arguments.rows, arguments.features)


if __name__ == "__main__":
    main()
