"""Latency, CPU and memory of /v1/predict on the project's own models, over HTTP.

    python benchmarks/predict_latency.py [--requests 1000] [--candidates 100] [--concurrency 1 8] [--model NAME]

Starts `plait serve` on a free loopback port, warms it up, sends requests for random known users and movies, and prints:
latency seen by the client, CPU of the server's process tree per request, the server's own time by stage (wall clock,
from its /metrics), resident memory per process, and CPU by stage (measured in this process). A machine that does other
work shows in the latencies, hardly in the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import Any

import duckdb
import numpy as np
import orjson
import requests

from plait.settings import Home, find_home
from serving.lean import go_lean

TICKS = os.sysconf("SC_CLK_TCK")
STAGES = ("parse", "assign", "features", "score", "log", "total")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--requests", type=int, default=1000)
    options.add_argument("--candidates", type=int, default=100)
    options.add_argument("--top-k", type=int, default=10)
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--threads", type=int, default=4)
    options.add_argument("--model", help="NAME or NAME:VERSION instead of the assigned models")
    options.add_argument("--url", help="measure a server that runs already (no CPU, no memory)")
    args = options.parse_args()
    go_lean()  # before Feast is imported here, for the stages measured in this process
    home = find_home()
    bodies = make_bodies(home, args.requests, args.candidates, args.top_k, args.model)
    if args.url:
        for concurrency in args.concurrency:
            print_run(args.url, bodies, concurrency, pids=[])
        return
    server, url = start_server(home, args.workers, args.threads)
    try:
        send(url, bodies[:100], 2)
        pids = tree(server.pid)
        for concurrency in args.concurrency:
            print_run(url, bodies, concurrency, pids)
        for pid in pids:
            rss, pss = memory_mb(pid)
            print(f"process {pid} ({'server' if pid == server.pid else 'worker'}): RSS {rss:.0f} MB, PSS {pss:.0f} MB")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    print_cpu_by_stage(home, bodies)


def make_bodies(home: Home, n: int, n_candidates: int, top_k: int, model: str | None) -> list[bytes]:
    """Requests for random known users, each with random known items; the same ones every time."""
    with duckdb.connect() as db:
        users, items = (
            db.sql(f"SELECT DISTINCT {key} FROM read_parquet('{home.events}/{kind}/*.parquet')").fetchnumpy()[key]
            for key, kind in (("user_id", "users"), ("item_id", "items"))
        )
    rng = np.random.default_rng(0)
    users, items = np.sort(np.asarray(users)), np.sort(np.asarray(items))
    bodies = []
    for _ in range(n):
        body = {
            "scene": "home",
            "entities": {"user_id": int(rng.choice(users))},
            "candidate_ids": rng.choice(items, min(n_candidates, len(items)), replace=False).tolist(),
            "top_k": top_k,
        }
        bodies.append(json.dumps({**body, "model": model} if model else body).encode())
    return bodies


def start_server(home: Home, workers: int, threads: int) -> tuple[subprocess.Popen[bytes], str]:
    """A server of our own, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plait = Path(sys.executable).with_name("plait")
    command = [str(plait), "serve", "--port", str(port), "--workers", str(workers), "--threads", str(threads)]
    started = time.monotonic()
    server = subprocess.Popen(command, cwd=home.project)
    url = f"http://127.0.0.1:{port}"
    while time.monotonic() - started < 120 and server.poll() is None:
        try:
            if requests.get(f"{url}/readyz", timeout=5).status_code == 200:
                print(f"ready after {time.monotonic() - started:.1f} s")
                return server, url
        except requests.ConnectionError:
            pass  # not listening yet: the loop's deadline decides
        time.sleep(0.1)
    server.kill()
    raise SystemExit("the server did not become ready")


def print_run(url: str, bodies: list[bytes], concurrency: int, pids: list[int]) -> None:
    cpu, stages, started = cpu_seconds(pids), stage_times(url), time.perf_counter()
    seconds, n_failed = send(url, bodies, concurrency)
    wall = time.perf_counter() - started
    cpu, after = cpu_seconds(pids) - cpu, stage_times(url)
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99]) * 1e3
    print(f"\n{len(bodies)} requests, {concurrency} at a time: {len(bodies) / wall:.0f}/s, {n_failed} failed")
    print(f"  latency   p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms")
    if pids:
        print(f"  CPU       {cpu / len(bodies) * 1e3:.2f} ms per request, all of the server's processes")
    parts = []
    for stage in STAGES:
        total, count = (a - b for a, b in zip(after[stage], stages[stage], strict=True))
        parts.append(f"{stage} {total / max(count, 1) * 1e3:.2f}")
    print(f"  stages    {', '.join(parts)} ms (mean, wall clock)")


def print_cpu_by_stage(home: Home, bodies: list[bytes]) -> None:
    """CPU of each stage, one request at a time in this process, nothing logged; without HTTP and Flask."""
    from serving.build import build_parts
    from serving.pipeline import Predictor
    from serving.queries import PredictQuery

    parts = build_parts(home, label="benchmark")
    predictor = Predictor(parts.pool, parts.experiments, NoLog(), parts.clock, parts.metrics, timer=time.process_time)
    totals: Counter[str] = Counter()
    for i, body in enumerate(bodies):
        started = time.process_time()
        query = PredictQuery.from_json(json.loads(body), parts.scenes)
        answer = predictor.predict(query, f"benchmark-{i}", parse_s=time.process_time() - started)
        if i >= 50:  # the first ones warm up
            totals.update(answer.stage_seconds)
    predictor.close()
    parts.close()
    n = max(1, len(bodies) - 50)
    print(f"CPU by stage, in process: {', '.join(f'{stage} {totals[stage] / n * 1e3:.2f}' for stage in STAGES)} ms")


class NoLog:
    """Encodes records as the event log does, and forgets them."""

    queue_length = 0

    def append(self, kind: str, records: Sequence[Mapping[str, Any]]) -> None:
        orjson.dumps([kind, list(records)])

    def enqueue(self, kind: str, records: Sequence[Mapping[str, Any]]) -> bool:
        self.append(kind, records)
        return True


def send(url: str, bodies: list[bytes], concurrency: int) -> tuple[np.ndarray, int]:
    """(seconds per request, how many did not answer 200)."""
    kept = local()

    def one(body: bytes) -> tuple[float, int]:
        if not hasattr(kept, "session"):
            kept.session = requests.Session()
            kept.session.trust_env = False
        started = time.perf_counter()
        response = kept.session.post(
            f"{url}/v1/predict", data=body, headers={"Content-Type": "application/json"}, timeout=30
        )
        return time.perf_counter() - started, response.status_code

    with ThreadPoolExecutor(concurrency) as executor:
        answers = list(executor.map(one, bodies))
    return np.array([seconds for seconds, _ in answers]), sum(status != 200 for _, status in answers)


def stage_times(url: str) -> dict[str, tuple[float, float]]:
    """(seconds, count) per stage so far, from /metrics."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"sum": 0.0, "count": 0.0})
    text = requests.get(f"{url}/metrics", timeout=10).text
    for what, stage, value in re.findall(r'plait_stage_seconds_(sum|count)\{stage="(\w+)"\} (\S+)', text):
        found[stage][what] = float(value)
    return {stage: (found[stage]["sum"], found[stage]["count"]) for stage in STAGES}


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in tree(int(child)))]


def cpu_seconds(pids: list[int]) -> float:
    """User and system time so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def memory_mb(pid: int) -> tuple[float, float]:
    """(resident, proportional) size; shared pages count in full in the first, by share in the second."""
    sizes = {"Rss": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name = line.split(":")[0]
        if name in sizes:
            sizes[name] = int(line.split()[1])
    return sizes["Rss"] / 1024, sizes["Pss"] / 1024


if __name__ == "__main__":
    main()
