"""How long one assignment takes, and 100,000 at once, beside what others do in the same run.

    python benchmarks/assignment.py [--units 100000] [--json FILE]

The configuration: 10 layers of similar names, 3 experiments in each (30), two arms each, two thirds of them with a
condition of two leaves. Beside it, hash only (no layers, conditions, holdouts or reasons): GrowthBook's FNV-1a v1
and v2 and a sha256 (Statsig's way), in plain Python, for the same 10 layers with one bucket and one arm hash each;
and Plait's own hash alone, as the floor.
Then the same with a bandit in one of the layers: Thompson, and linear by a context of two numbers and a text (seen
before, and new in every request). Times are of this process's CPU clock, best of several rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.hashing import arm_bucket, bucket
from experiments.policy import ContextEncoder
from experiments.snapshot import Snapshot

LAYERS = [f"layer{i}" for i in range(10)]
AT = datetime(2026, 3, 1, tzinfo=UTC)
ATTRIBUTES = {"country": "SE", "age": 30, "app": "2.4.1", "scene": "home", "language": "sv"}


def configuration() -> dict[str, Any]:
    """10 layers, 30 experiments, conditions on 20 of them."""
    conditions = [
        None,
        {"all": [{"attribute": "country", "in": ["SE", "NO", "DK"]}, {"attribute": "age", "at_least": 18}]},
        {"any": [{"attribute": "app", "version_at_least": "2.4.0"}, {"attribute": "language", "equals": "fi"}]},
    ]
    parameters: dict[str, Any] = {}
    experiments: dict[str, Any] = {}
    for layer in LAYERS:
        parameters[f"{layer}.weight"] = {"type": "float", "default": 0.0}
        for k, condition in enumerate(conditions):
            experiment: dict[str, Any] = {
                "layer": layer,
                "state": "running",
                "buckets": f"{k * 3333}-{k * 3333 + 3332}",
                "arms": {
                    "control": {"weight": 50, "values": {f"{layer}.weight": 0.0}},
                    "treatment": {"weight": 50, "values": {f"{layer}.weight": 1.0}},
                },
            }
            if condition:
                experiment["where"] = condition
            experiments[f"{layer}-{k}"] = experiment
    layers = {layer: {"unit": "user", "parameters": [f"{layer}.*"]} for layer in LAYERS}
    return {"parameters": parameters, "layers": layers, "experiments": experiments}


def with_bandit(method: str) -> Snapshot:
    """The same, one layer's three experiments replaced by a bandit of three arms over all of its buckets, learned."""
    document = configuration()
    layer, bandit = LAYERS[0], {"method": method, "floor": 2}
    arms = {name: {"weight": w, "values": {f"{layer}.weight": w}} for name, w in (("a", 40), ("b", 30), ("c", 30))}
    learned: dict[str, Any] = {name: {"best": w / 100} for name, w in (("a", 60), ("b", 30), ("c", 10))}
    fields = {"age": {"scale": 20, "center": 40}, "hour": {"scale": 12}, "country": {"categories": ["SE", "NO", "DK"]}}
    if method == "linear":
        bandit["context"] = fields
        for i, arm in enumerate(learned.values()):
            arm |= {"theta": [0.1, 0.02 * i, 0.01, 0.0, 0.03, 0.01], "covariance": (np.eye(6) * 0.001).tolist()}
    for k in range(3):
        del document["experiments"][f"{layer}-{k}"]
    document["experiments"]["bandit"] = {
        "layer": layer, "state": "running", "buckets": "all", "arms": arms, "bandit": bandit,
    }  # fmt: skip
    snapshot = Snapshot.of(document)
    spec = snapshot.spec.experiments["bandit"].bandit
    assert spec is not None
    signature = ContextEncoder(spec.context).signature()
    policy = {"method": method, "reward": "click", "arms": learned, "fields": signature}
    return snapshot.with_policies({"bandit": (1, policy)})


def fnv1a(text: str) -> int:
    """32-bit FNV-1a over code units, as GrowthBook's SDKs have it."""
    state = 0x811C9DC5
    for char in text:
        state = ((state ^ ord(char)) * 0x01000193) & 0xFFFFFFFF
    return state


def growthbook_v1(seed: str, unit: str) -> float:
    return fnv1a(unit + seed) % 1000 / 1000


def growthbook_v2(seed: str, unit: str) -> float:
    return fnv1a(str(fnv1a(seed + unit))) % 10000 / 10000


def sha256_bucket(salt: str, unit: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}.{unit}".encode()).digest()[:8], "big") % 10_000


def ten_layers(layer_hash: Callable[[str, str], float], arm_hash: Callable[[str, str], float]) -> Callable[[str], None]:
    """The hashing of one assignment over the ten layers: a bucket and an arm in each."""
    salts = [(layer, f"{layer}-0") for layer in LAYERS]

    def assign(unit: str) -> None:
        for layer, experiment in salts:
            layer_hash(layer, unit)
            arm_hash(experiment, unit)

    return assign


def microseconds(call: Callable[[str], object], *, n: int = 2000, rounds: int = 7) -> float:
    """Best CPU time per call over rounds of n different units."""
    units = [str(10_000_000 + i) for i in range(n)]
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for unit in units:
            call(unit)
        best = min(best, time.process_time() - start)
    return best / n * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000, help="rows of the vectorised run")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()

    started = time.process_time()
    snapshot = Snapshot.of(configuration())
    compile_ms = (time.process_time() - started) * 1e3

    def assign(unit: str) -> object:
        return snapshot.assign({"user": unit}, ATTRIBUTES, AT)

    def assign_and_read(unit: str) -> object:
        assignment = snapshot.assign({"user": unit}, ATTRIBUTES, AT)
        for layer in LAYERS:
            assignment[f"{layer}.weight"]
        return assignment.exposures()

    thompson, linear, hours = with_bandit("thompson"), with_bandit("linear"), count()

    def assign_thompson(unit: str) -> object:
        return thompson.assign({"user": unit, "request": unit}, ATTRIBUTES, AT)

    seen = {**ATTRIBUTES, "hour": 7}

    def assign_linear(unit: str) -> object:
        return linear.assign({"user": unit, "request": unit}, seen, AT)

    def assign_linear_new(unit: str) -> object:
        return linear.assign({"user": unit, "request": unit}, {**ATTRIBUTES, "hour": next(hours) / 7}, AT)

    one = {
        "plait: assign, 10 layers, 30 experiments, conditions": microseconds(assign),
        "plait: the same + read 10 parameters + exposures": microseconds(assign_and_read),
        "plait: assign, a Thompson bandit in one layer": microseconds(assign_thompson),
        "plait: assign, a linear bandit in one layer, context seen": microseconds(assign_linear),
        "plait: assign, a linear bandit in one layer, context new": microseconds(assign_linear_new),
        "plait: its two hashes x 10, salts not prepared": microseconds(ten_layers(bucket, arm_bucket)),
        "GrowthBook v2 (FNV-1a twice) x 2 x 10, hashes only": microseconds(ten_layers(growthbook_v2, growthbook_v2)),
        "GrowthBook v1 (FNV-1a) x 2 x 10, hashes only": microseconds(ten_layers(growthbook_v1, growthbook_v1)),
        "sha256 x 2 x 10, hashes only": microseconds(ten_layers(sha256_bucket, sha256_bucket)),
    }
    units = [str(i) for i in range(args.units)]
    attributes = {name: [value] * args.units for name, value in ATTRIBUTES.items()}
    seconds = float("inf")
    for _ in range(3):
        started = time.process_time()
        batch = snapshot.assign_many({"user": units}, attributes, AT)
        seconds = min(seconds, time.process_time() - started)
    started = time.process_time()
    values = {layer: batch.values(f"{layer}.weight") for layer in LAYERS}
    values_s = time.process_time() - started
    sample = range(0, args.units, max(args.units // 500, 1))
    for row in sample:  # the fast number is only worth something if it is the same assignment
        single = snapshot.assign({"user": units[row]}, ATTRIBUTES, AT)
        assert all(values[layer][row] == single.values[f"{layer}.weight"] for layer in LAYERS)
    started = time.process_time()
    for unit in units[: args.units // 10]:
        growthbook_ten(unit)
    growthbook_s = (time.process_time() - started) * 10

    print(f"Python {platform.python_version()} on {platform.machine()}; compiled in {compile_ms:.0f} ms\n")
    for name, us in one.items():
        print(f"{us:8.1f} us  {name}")
    print(f"\n{args.units:,} units x {len(LAYERS)} layers:")
    print(f"{seconds:8.3f} s   plait: assign_many, conditions included")
    print(f"{values_s:8.3f} s   plait: the values of all {len(LAYERS)} parameters")
    print(f"{growthbook_s:8.3f} s   GrowthBook v2 hashes in plain Python (a tenth of them, times ten)")
    if args.json:
        vectorised = {"assign_many": seconds, "values": values_s, "growthbook_v2": growthbook_s}
        args.json.write_text(json.dumps({"us": one, "s": vectorised, "units": args.units}, indent=2) + "\n")


growthbook_ten = ten_layers(growthbook_v2, growthbook_v2)

if __name__ == "__main__":
    main()
