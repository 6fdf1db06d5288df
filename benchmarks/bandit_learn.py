"""How long learning takes from a log of N decisions, and how much memory.

    python benchmarks/bandit_learn.py [--decisions 2000000] [--json FILE]

A bandit of three arms; one in ten decisions earns. Thompson; by unit; linear over a few contexts; linear where every
decision has a context of its own. Each case in a process of its own, so that the peak memory is its own. Wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import duckdb  # noqa: E402

from experiments.learn import learn  # noqa: E402
from experiments.snapshot import Snapshot  # noqa: E402

UNTIL = datetime(2026, 4, 1, tzinfo=UTC)
FEW, OWN = {"country": {"categories": ["SE", "NO", "DK"]}}, {"age": {"scale": 20, "center": 40}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "thompson": ("few", {"method": "thompson", "half_life": "7d"}),
    "thompson by unit": ("few", {"method": "thompson", "half_life": "7d", "by": "unit"}),
    "linear, few contexts": ("few", {"method": "linear", "half_life": "7d", "context": FEW}),
    "linear, a context each": ("own", {"method": "linear", "half_life": "7d", "context": OWN}),
}


def write_log(folder: Path, n: int, contexts: str) -> None:
    """Event tables of n decisions over 30 days of n / 20 users."""
    json_text = {
        "few": "'{\"country\":\"' || ['SE','NO','DK','FI'][1 + i % 4] || '\"}'",
        "own": "'{\"age\":' || (18 + 60 * random()) || '}'",
    }[contexts]
    with duckdb.connect() as db:
        for table in ("exposures", "feedback"):
            (folder / table).mkdir(parents=True)
        at = "TIMESTAMPTZ '2026-03-01' + i * (INTERVAL 30 DAY / $n)"
        db.execute(
            f"""COPY (SELECT {at} AS timestamp, 'r' || i AS request_id, 'user' AS unit_kind,
                             (i * 7919 % greatest($n // 20, 1))::VARCHAR AS unit, 'p' AS layer, 'e' AS experiment,
                             ['a','b','c'][1 + i % 3] AS arm, 1::BIGINT AS config_version, false AS forced,
                             false AS counterfactual, 1.0 / 3 AS propensity, {json_text} AS context
                      FROM range($n) t(i)) TO '{folder}/exposures/part.parquet'""",
            {"n": n},
        )
        db.execute(
            f"""COPY (SELECT 'e' || i AS event_id, 'click' AS type, 'r' || i AS request_id, i AS user_id,
                             NULL::VARCHAR AS session_id, NULL::VARCHAR AS device_id, 1::BIGINT AS item_id,
                             {at} AS timestamp, NULL::DOUBLE AS value, {at} AS created
                      FROM range(0, $n, 10) t(i)) TO '{folder}/feedback/part.parquet'""",
            {"n": n},
        )


def one(folder: Path, bandit: dict[str, Any]) -> dict[str, float]:
    arms = {arm: {"weight": w, "values": {"p.x": i}} for i, (arm, w) in enumerate((("a", 34), ("b", 33), ("c", 33)))}
    document = {
        "parameters": {"p.x": {"type": "int", "default": 0}},
        "layers": {"p": {"unit": "user", "parameters": ["p.*"]}},
        "experiments": {"e": {"layer": "p", "state": "running", "buckets": "all", "arms": arms, "bandit": bandit}},
    }
    experiment = Snapshot.of(document).spec.experiments["e"]
    started = time.perf_counter()
    learned = learn(folder, experiment, UNTIL)
    seconds = time.perf_counter() - started
    assert learned.document is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"s": seconds, "peak_mb": peak, "decisions": learned.counts.decisions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=2_000_000)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one(args.folder, CASES[args.case][1])))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for contexts in ("few", "own"):
            write_log(Path(temporary) / contexts, args.decisions, contexts)
        for case, (contexts, _) in CASES.items():
            command = [sys.executable, __file__, "--case", case, "--folder", str(Path(temporary) / contexts)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[case] = json.loads(done.stdout)
            print(f"{results[case]['s']:8.2f} s  {results[case]['peak_mb']:8.0f} MB  {case}")
    if args.json:
        args.json.write_text(json.dumps({"decisions": args.decisions, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
