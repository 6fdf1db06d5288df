"""Online reads, stock Feast beside Plait's packed rows: one user and 200 items x 20 features over 3 views; 1 x 10.

    python benchmarks/online_read.py [--entities 20000] [--rounds 100] [--stores sqlite,redis]

Stock is `get_online_features(...).to_dict()`, the fastest of Feast's own ways. Plait is OnlineReader.read for the
ranking request (what the server calls) and read_views for the single entity: typed Arrow columns with validity. The
third line is Feast's API on Plait's store. Each case runs in a process of its own; both sides read the same values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent))
from online_stores import CASES, open_store, run_cases, without_torch

VIEWS = {"user_a": ("user_id", 6), "item_a": ("item_id", 7), "item_b": ("item_id", 7), "single": ("user_id", 10)}
RANKED = ("user_a", "item_a", "item_b")
N_ITEMS = 200


def declarations() -> list[Any]:
    from feast import Entity, FeatureService, FeatureView, Field, FileSource
    from feast.types import Float64, Int64
    from feast.value_type import ValueType

    entities = {k: Entity(name=k, join_keys=[k], value_type=ValueType.INT64) for k in ("user_id", "item_id")}
    views = []
    for name, (key, n_features) in VIEWS.items():
        fields = [Field(name=f"{name}_{i}", dtype=Int64 if i % 2 else Float64) for i in range(n_features)]
        views.append(
            FeatureView(
                name=name,
                entities=[entities[key]],
                ttl=timedelta(days=3650),
                schema=[Field(name=key, dtype=Int64), *fields],
                source=FileSource(path="unused.parquet", timestamp_field="event_timestamp"),
            )
        )
    service = FeatureService(name="ranking", features=[view for view in views if view.name in RANKED])
    return [*entities.values(), *views, service]


def rows_of(view: str, n_entities: int) -> pa.Table:
    key, n_features = VIEWS[view]
    rng = np.random.default_rng(sum(view.encode()))
    columns: dict[str, Any] = {key: np.arange(n_entities)}
    for i in range(n_features):
        columns[f"{view}_{i}"] = rng.integers(0, 1000, n_entities) if i % 2 else rng.random(n_entities)
    moment = pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * n_entities, pa.timestamp("us", tz="UTC"))
    return pa.table({**columns, "event_timestamp": moment})


def fill(store: Any, n_entities: int) -> None:
    from feast.utils import _convert_arrow_to_proto
    from feast.value_type import ValueType

    store.apply(declarations())
    online = store._get_provider().online_store
    for name, (key, _) in VIEWS.items():
        view, table = store.get_feature_view(name), rows_of(name, n_entities)
        if hasattr(online, "write_columns"):
            online.write_columns(store.config, view, table)
            continue
        for start in range(0, n_entities, 5_000):
            rows = _convert_arrow_to_proto(table.slice(start, 5_000), view, {key: ValueType.INT64})
            online.online_write_batch(store.config, view, rows, None)


def timed(call: Callable[[int], Any], rounds: int) -> dict[str, float]:
    for seed in range(5):
        call(seed)
    walls = []
    cpu = time.process_time()
    for seed in range(rounds):
        began = time.perf_counter()
        call(seed)
        walls.append(time.perf_counter() - began)
    cpu = (time.process_time() - cpu) / rounds
    return {"median_ms": statistics.median(walls) * 1e3, "min_ms": min(walls) * 1e3, "cpu_ms": cpu * 1e3}


def case(kind: str, impl: str, folder: Path, port: int | None, n_entities: int, rounds: int) -> dict[str, Any]:
    store = open_store(kind, impl, folder, port)
    fill(store, n_entities)
    items = [np.random.default_rng(seed).integers(0, n_entities, N_ITEMS) for seed in range(rounds)]
    refs = [f"{name}:{name}_{i}" for name in RANKED for i in range(VIEWS[name][1])]
    single = [f"single:single_{i}" for i in range(VIEWS["single"][1])]

    def feast_ranking(seed: int) -> dict[str, Any]:
        rows = {"user_id": [seed] * N_ITEMS, "item_id": items[seed].tolist()}
        return store.get_online_features(features=refs, entity_rows=rows).to_dict()

    def feast_single(seed: int) -> dict[str, Any]:
        return store.get_online_features(features=single, entity_rows=[{"user_id": seed}]).to_dict()

    answer = feast_ranking(0)
    check = sum(value for ref in refs for value in answer[ref.partition(":")[2]])
    result: dict[str, Any] = {
        "check": check,
        "feast_ranking": timed(feast_ranking, rounds),
        "feast_single": timed(feast_single, rounds * 5) if rounds * 5 <= n_entities else timed(feast_single, rounds),
    }
    if impl == "plait":
        from plait.online import OnlineReader
        from plait.service import resolve_service
        from plait.stores.keys import StoredView
        from plait.stores.online_base import ViewRead

        online, now = store._get_provider().online_store, datetime(2026, 2, 1, tzinfo=UTC)
        reader = OnlineReader(store, resolve_service(store, "ranking"))
        tables = [pa.table({"item_id": chosen}) for chosen in items]
        view = StoredView.of(store.config, store.get_feature_view("single"))
        features = view.features([ref.partition(":")[2] for ref in single])

        def ranking(seed: int) -> Any:
            return reader.read({"user_id": seed}, tables[seed], context={}, now=now)

        def one(seed: int) -> Any:
            read = ViewRead(view=view, features=features, keys={"user_id": [seed]})
            return online.read_views(store.config, [read], now=now)

        rows = ranking(0)
        ours = sum(sum(column.to_pylist()) for column in rows.candidates.columns)
        ours += N_ITEMS * sum(column.to_pylist()[0] for column in rows.request.columns)
        if abs(ours - check) > 1e-6 * abs(check):
            raise SystemExit(f"the two ways of reading disagree: {ours} and {check}")
        result["ranking"], result["single"] = timed(ranking, rounds), timed(one, rounds)
    return result


def report(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    print(f"{'':44} {'median ms':>10} {'min ms':>8} {'cpu ms':>8}")
    for kind in dict.fromkeys(kind for kind, _ in results):
        stock, plait = results[kind, "stock"], results[kind, "plait"]
        if abs(stock["check"] - plait["check"]) > 1e-6 * abs(stock["check"]):
            raise SystemExit(f"{kind}: stock and plait read different values")
        for name, label in (("ranking", f"1 user + {N_ITEMS} items x 20, 3 views"), ("single", "1 entity x 10")):
            lines = {
                "stock get_online_features": stock[f"feast_{name}"],
                "plait": plait[name],
                "plait's store, Feast's API": plait[f"feast_{name}"],
            }
            print(f"{kind}: {label}")
            for title, times in lines.items():
                print(f"  {title:42} {times['median_ms']:10.3f} {times['min_ms']:8.3f} {times['cpu_ms']:8.3f}")
            base, ours = stock[f"feast_{name}"], plait[name]
            ratios = [base[column] / ours[column] for column in ("median_ms", "min_ms", "cpu_ms")]
            print(f"  {'ratio stock / plait':42} {ratios[0]:9.1f}x {ratios[1]:7.1f}x {ratios[2]:7.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--stores", default="sqlite,redis")
    parser.add_argument("--case", nargs=4, metavar=("KIND", "IMPL", "FOLDER", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        without_torch()
        kind, impl, folder, port = arguments.case
        port_number = int(port) if port.isdigit() else None
        print(json.dumps(case(kind, impl, Path(folder), port_number, arguments.entities, arguments.rounds)))
        return
    passed_on = ["--entities", str(arguments.entities), "--rounds", str(arguments.rounds)]
    cases = [pair for pair in CASES if pair[0] in arguments.stores.split(",")]
    report(run_cases(__file__, passed_on, cases))


if __name__ == "__main__":
    main()
