"""Who owns what of each layer, as plain data: for `plait experiments list`, the admin API and the console."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from experiments.hashing import N_BUCKETS
from experiments.spec import Experiment, ExperimentsSpec, Ranges


def overview(spec: ExperimentsSpec, at: datetime) -> list[dict[str, Any]]:
    """Layers, launch layers first, each with what owns its buckets at `at`: JSON-ready.

    owners[*].ranges are [first, last] buckets, both included; in_use_percent is of the layer's buckets.
    """
    layers = sorted(spec.layers.values(), key=lambda layer: (not layer.launch, spec.depth(layer.name)))
    out = []
    for layer in layers:
        owners: list[dict[str, Any]] = []
        owners += [
            _owner("domain", domain.name, domain.ranges, domain.ranges)
            for domain in spec.domains.values()
            if domain.layer == layer.name
        ]
        owners += [
            _owner("holdout", holdout.name, holdout.ranges, holdout.ranges)
            for holdout in spec.holdouts.values()
            if holdout.layer == layer.name
        ]
        owners += [_experiment(e, at) for e in spec.experiments.values() if e.layer == layer.name]
        taken = sum(owner["percent"] for owner in owners if owner["state"] != "stopped")
        out.append(
            {
                "name": layer.name,
                "unit": layer.unit,
                "domain": layer.domain,
                "launch": layer.launch,
                "parameters": list(layer.parameters),
                "owners": owners,
                "free_percent": round(max(100 - taken, 0), 2),
            }
        )
    return out


def _experiment(experiment: Experiment, at: datetime) -> dict[str, Any]:
    traffic = experiment.traffic_at(at) if experiment.state == "running" else 0
    owner = _owner("experiment", experiment.name, experiment.ranges, experiment.open_ranges(traffic))
    return owner | {
        "state": experiment.state,
        "arms": {arm.name: arm.parts / 100 for arm in experiment.arms},
        "bandit": experiment.bandit.method if experiment.bandit else None,
        "traffic_percent": traffic / 100,
        "where": experiment.where.text,
        "sticky": experiment.sticky,
        "owner": experiment.owner,
        "description": experiment.description,
        "start": experiment.start.isoformat() if experiment.start else None,
        "end": experiment.end.isoformat() if experiment.end else None,
    }


def _owner(kind: str, name: str, ranges: Ranges, in_use: Ranges) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "state": "",
        "arms": {},
        "ranges": [[first, end - 1] for first, end in ranges],
        "percent": _percent(ranges),
        "in_use_percent": _percent(in_use),
    }


def _percent(ranges: Ranges) -> float:
    return round(100 * sum(end - first for first, end in ranges) / N_BUCKETS, 2)
