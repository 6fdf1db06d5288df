"""`plait experiments learn`: bandits' policies from the event log, once or again and again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import datetime

import click

from experiments.learn import Learned, learn
from experiments.live import LiveConfig
from experiments.policy import Policy, compile_policy, initial_policy
from experiments.policy_store import PolicyStore
from experiments.spec import Experiment, ExperimentsSpec
from plait.errors import PlaitError, SpecError, UnknownNameError
from plait.settings import Home, find_home

_ROLL_EVERY_S = 600.0
"""While following: a roll writes a part per worker, and every half minute would be too many files."""


@click.command("learn")
@click.argument("experiment", required=False)
@click.option("--follow", is_flag=True, help="Go on, again every --every, until interrupted.")
@click.option("--every", default="30s", show_default=True, help="With --follow: a span such as 30s or 5m.")
@click.option("--dry-run", is_flag=True, help="Show what would be learned; write nothing.")
@click.option("--author", help="Who learns (default: PLAIT_AUTHOR, else the login name).")
def learn_command(experiment: str | None, follow: bool, every: str, dry_run: bool, author: str | None) -> None:
    """Update the policy of EXPERIMENT (default: of every running bandit) from what its arms earned.

    Each run computes the policies anew from the whole log, so running it twice, or again after a crash, counts
    nothing twice. Servers follow within two seconds.
    """
    from experiments.metrics import duration
    from experiments.store import ConfigStore
    from plait.settings import author_name

    home = find_home()
    every_s = duration(every, "--every").total_seconds()
    if follow and every_s < 1:
        raise SpecError(f"--every {every}: at least 1s")
    name = author_name(author)
    store = ConfigStore.at(home)
    live = LiveConfig(store)
    policies = PolicyStore(store.engine)
    try:
        if not follow:
            run_once(home, live.snapshot.spec, policies, experiment, author=name, dry_run=dry_run)
            return
        wanted(live.snapshot.spec, experiment)  # a wrong name is told at once; later a bandit may come and go
        rolled = -math.inf
        while True:
            try:
                live.poll()
                due = time.monotonic() - rolled >= _ROLL_EVERY_S
                run_once(home, live.snapshot.spec, policies, experiment, author=name, dry_run=dry_run, rolling=due)
                rolled = time.monotonic() if due else rolled
            except PlaitError as error:
                click.echo(f"{error}; trying again in {every}", err=True)
            time.sleep(every_s)
    except KeyboardInterrupt:
        click.echo("stopped; nothing is lost, the next run reads the log again")
    finally:
        live.close()
        store.close()


@click.command("policies")
@click.argument("experiment")
@click.option("--limit", default=20, show_default=True, help="How many of the newest.")
def policies_command(experiment: str, limit: int) -> None:
    """What EXPERIMENT's bandit has learned, newest first: when, from how much, and each arm's weighted rewards."""
    from experiments.store import ConfigStore

    store = ConfigStore.at(find_home())
    try:
        versions = PolicyStore(store.engine).history(experiment, limit)
    finally:
        store.close()
    if not versions:
        click.echo(f"{experiment} has no policy yet; `plait experiments learn` makes the first", err=True)
    for each in versions:
        arms = []
        for name, arm in each.document["arms"].items():
            best = f" P(best) {arm['best']:.1%}" if "best" in arm else ""
            arms.append(f"{name} {arm['successes']:,.1f}/{arm['trials']:,.1f}{best}")
        click.echo(
            f"{each.version:>5}  {each.created:%Y-%m-%d %H:%M:%S}Z  {each.author}  "
            f"{each.document['decisions']:,} decisions  {'  '.join(arms)}"
        )


def run_once(
    home: Home,
    spec: ExperimentsSpec,
    policies: PolicyStore,
    experiment: str | None,
    *,
    author: str,
    dry_run: bool = False,
    rolling: bool = True,
) -> dict[str, int | None]:
    """Learn each wanted bandit from the log as it is now; experiment → its policy's version (None: no decision).

    rolling: move the log into the event tables first, else read its tail where it lies.
    """
    from plait.clock import Clock
    from plait.eventlog import roll, unrolled

    if rolling:
        roll(home)
    tail = unrolled(home)
    now = Clock.of(home).now()
    versions: dict[str, int | None] = {}
    for each in wanted(spec, experiment):
        learned = learn(home.events, each, now, tail=tail)
        versions[each.name] = None
        outcome = "no policy yet; the weights serve"
        policy = initial_policy(each)
        if learned.document is not None:
            version, outcome = _keep(policies, each, learned, author=author, now=now, dry_run=dry_run)
            versions[each.name] = version
            policy = compile_policy(each, version, learned.document)
        for line in lines(each, learned, policy, outcome):
            click.echo(line)
    return versions


def wanted(spec: ExperimentsSpec, experiment: str | None) -> list[Experiment]:
    """The bandits to learn. Raises UnknownNameError, or SpecError where there is none."""
    bandits = [each for each in spec.experiments.values() if each.bandit is not None]
    if experiment is not None:
        if experiment not in spec.experiments:
            raise UnknownNameError("experiment", experiment, spec.experiments)
        found = spec.experiments[experiment]
        if found.bandit is None:
            raise SpecError(
                f"{experiment} is no bandit, it has a fixed split; bandits: "
                f"{', '.join(each.name for each in bandits) or 'none'}"
            )
        return [found]
    running = [each for each in bandits if each.state == "running"]
    if not running:
        raise SpecError("no experiment that is running has a `bandit` block; docs/experiments.md, Bandits, shows one")
    return running


def _keep(
    policies: PolicyStore, experiment: Experiment, learned: Learned, *, author: str, now: datetime, dry_run: bool
) -> tuple[int, str]:
    assert learned.document is not None
    if dry_run:
        live = policies.get(experiment.name)
        same = live is not None and live.document == learned.document
        version = live.version if live else 0
        return version + (not same), f"policy {version} already says this" if same else f"would be policy {version + 1}"
    version, new = policies.put(experiment.name, learned.document, author=author, at=now)
    return version, f"policy {version}" if new else f"policy {version} already says this"


def lines(experiment: Experiment, learned: Learned, policy: Policy, outcome: str) -> Iterator[str]:
    """What was learned, for a terminal."""
    counts = learned.counts
    yield f"{experiment.name}: {outcome} ({counts.decisions:,} decisions)"
    if learned.document is not None:
        contextual = experiment.bandit is not None and experiment.bandit.method != "thompson"
        shares = None if contextual else policy.shares({})
        for i, arm in enumerate(experiment.arms):
            stats = learned.document["arms"][arm.name]
            n, paid = stats["trials"], stats["successes"]
            earned = f"earned {paid / n:.4f} over a weight of {n:,.1f}" if n > 0 else "not tried yet"
            share = "by context" if shares is None else f"{shares[i]:.1%}"
            yield f"  {arm.name:<24} {share:>10}   {earned}"
    if learned.without_context:
        yield f"  {learned.without_context:,} decisions had no usable context: nothing is learned from those"
    if counts.unusable:
        yield f"  {counts.unusable:,} exposures are left out: an arm that is not configured, or no usable propensity"
