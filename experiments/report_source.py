"""Where a report's plan and metrics come from: the configuration store, else the log alone."""

from __future__ import annotations

from pathlib import Path

from experiments.hashing import N_BUCKETS
from experiments.metrics import DEFAULT_METRICS, MetricSet, load_metrics
from experiments.plan import HELD, OPEN
from experiments.report_events import event_views, quote
from experiments.report_plan import Plan, plan_from_log
from experiments.spec import Experiment, Holdout
from plait.database import has_database
from plait.errors import SpecError, UnknownNameError
from plait.settings import Home


def project_metrics(home: Home, path: Path | None = None) -> MetricSet:
    """The metrics of `path`, else of the project's experiments/metrics.yaml, else those that come with the package."""
    own = home.project / "experiments" / "metrics.yaml"
    return load_metrics(path or (own if own.is_file() else DEFAULT_METRICS))


def find_plan(home: Home, experiment: str) -> Plan:
    """The plan of `experiment`: declared in the configuration store, or reconstructed from the log.

    Raises UnknownNameError, with a suggestion, if neither knows it.
    """
    with event_views(home.events, "exposures") as db:
        versions = [
            row[0]
            for row in db.execute(
                f"SELECT DISTINCT config_version FROM exposures WHERE experiment = {quote(experiment)} ORDER BY 1"
            ).fetchall()
        ]
        plan = _declared(home, experiment, [version for version in versions if version is not None])
        if plan is not None:
            return plan
        if not versions:
            logged = {row[0] for row in db.execute("SELECT DISTINCT experiment FROM exposures").fetchall()}
            known = logged | _declared_names(home)
            raise UnknownNameError("experiment", experiment, known, where="the log and the configuration")
        row = db.execute(f"""
            SELECT layer, unit_kind, list(DISTINCT arm ORDER BY arm) FROM exposures
            WHERE experiment = {quote(experiment)} GROUP BY 1, 2 ORDER BY count(*) DESC LIMIT 1""").fetchone()
    assert row is not None
    layer, unit_kind, arms = row
    if len(arms) < 2:
        raise SpecError(f"experiment {experiment!r}: the log holds one arm only, {arms[0]!r}; nothing can be compared")
    return plan_from_log(experiment, layer=layer, unit_kind=unit_kind, arms=tuple(arms))


def _declared(home: Home, experiment: str, versions: list[int]) -> Plan | None:
    """The plan over the configuration versions seen in the log and the live one; None if none declares it."""
    from experiments.source import Source
    from experiments.store import ConfigStore
    from experiments.validate import load

    if not has_database(home):
        return None
    store = ConfigStore.at(home)
    try:
        head = store.head()
        if head is None:
            return None
        wanted = sorted({version for version in versions if version <= head.version} | {head.version})
        declared = []
        holdouts = []
        for version in wanted:
            document = head.document if version == head.version else store.get(version).document
            spec = load(Source(dict(document)))
            if experiment in spec.experiments:
                declared.append((version, spec.experiments[experiment], spec))
            elif experiment in spec.holdouts:
                holdouts.append((version, spec.holdouts[experiment]))
    finally:
        store.close()
    if holdouts and not declared:
        return _plan_of_holdout(holdouts)
    if not declared:
        return None
    _, newest, spec = declared[-1]
    names = list(dict.fromkeys(arm.name for _, one, _ in declared for arm in one.arms))
    control = newest.control or newest.arms[0].name
    weights: dict[int | None, dict[str, float]] = {
        version: {arm.name: float(arm.parts) for arm in one.arms} for version, one, _ in declared
    }
    weights[None] = {arm.name: float(arm.parts) for arm in newest.arms}
    return Plan(
        experiment=experiment,
        layer=newest.layer,
        unit_kind=spec.layers[newest.layer].unit,
        arms=(control, *(name for name in names if name != control)),
        weights=weights,
        state=newest.state,
        metrics=newest.metrics,
        primary=newest.primary,
        guardrails=newest.guardrails,
        bandit=newest.bandit is not None,
    )


def _plan_of_holdout(declared: list[tuple[int, Holdout]]) -> Plan:
    """Held-out units are the control, everybody else is the treatment: everything that was shipped to them."""
    held = {version: sum(end - first for first, end in holdout.ranges) for version, holdout in declared}
    weights: dict[int | None, dict[str, float]] = {
        version: {HELD: float(n), OPEN: float(N_BUCKETS - n)} for version, n in held.items()
    }
    version, newest = declared[-1]
    weights[None] = weights[version]
    return Plan(
        experiment=newest.name, layer=newest.layer or "", unit_kind=newest.unit, arms=(HELD, OPEN), weights=weights
    )


def find_bandit(home: Home, experiment: str) -> tuple[Experiment, int | None] | None:
    """The bandit of that name in the live configuration and its policy's version; None if it is no bandit."""
    from experiments.policy_store import PolicyStore
    from experiments.source import Source
    from experiments.store import ConfigStore
    from experiments.validate import load

    if not has_database(home):
        return None
    store = ConfigStore.at(home)
    try:
        head = store.head()
        found = load(Source(dict(head.document))).experiments.get(experiment) if head else None
        if found is None or found.bandit is None:
            return None
        live = PolicyStore(store.engine).keys([experiment])
        return found, live[0][1] if live else None
    finally:
        store.close()


def _declared_names(home: Home) -> set[str]:
    from experiments.store import ConfigStore

    if not has_database(home):
        return set()
    store = ConfigStore.at(home)
    try:
        head = store.head()
    finally:
        store.close()
    return set(head.document.get("experiments") or {}) | set(head.document.get("holdouts") or {}) if head else set()
