"""`plait serve` and `plait simulate`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from plait.errors import DataError, PlaitError
from plait.settings import find_home


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--workers",
    default=max(1, min(2, os.cpu_count() or 1)),
    show_default=True,
    type=click.IntRange(1, 256),
    help="Processes; requests run in parallel across them.",
)
@click.option(
    "--threads", default=4, show_default=True, type=click.IntRange(1, 64), help="Requests at a time in one worker."
)
@click.option("--access-log", is_flag=True, help="One JSON line per request on stderr.")
@click.option(
    "--require-keys",
    is_flag=True,
    help="Every request but probes and /metrics needs an API key (`plait keys`); without it only changes do.",
)
def serve(host: str, port: int, workers: int, threads: int, access_log: bool, require_keys: bool) -> None:
    """Serve predictions over HTTP until Ctrl-C or SIGTERM; requests in flight are answered first."""
    from serving.launcher import serve_forever

    if not require_keys and host not in ("127.0.0.1", "::1", "localhost"):
        _say(
            f"note: whoever reaches {host} may ask for predictions, post events and see what serves; see --require-keys"
        )
    serve_forever(
        find_home(), host=host, port=port, workers=workers, threads=threads, access_log=access_log, say=_say,
        require_keys=require_keys,
    )  # fmt: skip


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="A running server.")
@click.option(
    "--users", "n_users", default=50, show_default=True, type=click.IntRange(1), help="Held-out users to send."
)
@click.option("--visits", "n_visits", default=1, show_default=True, type=click.IntRange(1), help="Visits per user.")
@click.option("--seconds", type=click.FloatRange(0.1), help="Keep visiting for this long instead of --visits.")
@click.option("--slate", default=10, show_default=True, type=click.IntRange(1), help="Items shown per visit.")
@click.option(
    "--candidates",
    "n_candidates",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Items to rank per visit.",
)
@click.option(
    "--others",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0.0, 0.99),
    help="Rating data: share of the candidates that the user never rated, and so never clicks.",
)
@click.option(
    "--position-bias",
    type=click.FloatRange(0.0),
    help="Position k is looked at with chance k^-b; 0 looks at all. Default: 0, or as synthetic data has it.",
)
@click.option("--concurrency", default=4, show_default=True, type=click.IntRange(1, 256), help="Visits at a time.")
@click.option("--scene", default="home", show_default=True)
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def simulate(
    url: str,
    n_users: int,
    n_visits: int,
    seconds: float | None,
    slate: int,
    n_candidates: int,
    others: float,
    position_bias: float | None,
    concurrency: int,
    scene: str,
    seed: int,
    as_json: bool,
) -> None:
    """Send held-out users to a running server; they click by their real ratings, and their feedback is posted.

    Each held-out rating answers once: a user who has answered all comes no more.
    """
    import requests
    from tqdm import tqdm

    from serving.holdout import read_tastes
    from serving.simulator import Plan, RequestsHttp, Simulator

    plan = Plan(
        url=url, scene=scene, n_users=n_users, n_visits=n_visits, seconds=seconds, slate=slate,
        n_candidates=n_candidates, position_bias=position_bias, concurrency=concurrency, seed=seed,
    )  # fmt: skip
    tastes = read_tastes(find_home(), others=others)
    try:
        session = requests.Session()
        session.trust_env = False
        session.get(f"{url.rstrip('/')}/healthz", timeout=5).raise_for_status()
    except requests.RequestException as error:
        raise DataError(f"no server answers at {url} ({type(error).__name__}); start one with `plait serve`") from error
    total = None if seconds is not None else min(n_users, len(tastes.users)) * n_visits
    with tqdm(total=total, unit="visit", desc="simulate", file=sys.stderr) as bar:
        simulator = Simulator(plan, tastes, lambda: RequestsHttp(url, plan.timeout_s))
        outcome = simulator.run(lambda: bar.update() and None)
    click.echo(json.dumps(outcome.to_json(), indent=2) if as_json else summary(outcome.to_json()))
    if outcome.n_requests and outcome.n_errors >= outcome.n_requests:
        raise PlaitError(f"every request failed: {dict(outcome.errors)}")


def summary(result: dict[str, Any]) -> str:
    """The outcome as a small table."""
    latency = result["latency_ms"]

    def ms(name: str) -> str:
        return "-" if latency[name] is None else f"{latency[name]:.1f}"

    n_errors = sum(result["errors"].values())
    lines = [
        f"requests  {result['requests']:,} in {result['seconds']:.1f} s, {n_errors} errors"
        + (f" ({', '.join(f'{n}x {what}' for what, n in result['errors'].items())})" if n_errors else ""),
        f"latency   p50 {ms('p50')} ms, p95 {ms('p95')} ms, p99 {ms('p99')} ms",
        f"shown     {result['impressions']:,} items; "
        + (", ".join(f"{n:,} {kind}s" for kind, n in sorted(result["events"].items())) or "no feedback"),
        f"models    {', '.join(f'{name} {n:,}' for name, n in sorted(result['models'].items())) or 'none'}",
    ]
    if result["degraded"]:
        lines.append(f"degraded  {', '.join(f'{why} {n:,}' for why, n in sorted(result['degraded'].items()))}")
    if result["arms"]:
        lines.append("")
        lines.append(
            f"{'layer':<10} {'experiment':<24} {'arm':<16} {'requests':>9} {'clicks':>8} {'clicks/request':>15}"
        )
        for arm in result["arms"]:
            rate = arm["clicks"] / arm["requests"] if arm["requests"] else 0.0
            lines.append(
                f"{arm['layer']:<10} {arm['experiment']:<24} {arm['arm']:<16} "
                f"{arm['requests']:>9,} {arm['clicks']:>8,} {rate:>15.4f}"
            )
    return "\n".join(lines)
