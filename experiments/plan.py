"""A configuration compiled for one stretch of time: per layer a table bucket → owner, per experiment a table → arm.

Schedules (start, end, ramp) only change at known moments, so between two of them who owns a bucket is fixed. A plan is
built once per stretch and then read by every request: a lookup, not a computation.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from experiments.conditions import Test
from experiments.hashing import N_BUCKETS, salt_prefix
from experiments.policy import Policy, initial_policy
from experiments.prerequisites import evaluation_order
from experiments.spec import ROOT, Experiment, ExperimentsSpec, Holdout, Ranges

Table = bytes | array  # type: ignore[type-arg]
REQUEST = "request"
HELD, OPEN = "holdout", "open"
"""The two arms of a holdout: kept from experiments, and everybody else (the group to compare with)."""


@dataclass(frozen=True, slots=True)
class PlannedArm:
    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlannedBandit:
    """Arms are drawn by the experiment's policy, `initial` until there is one, from the hash of a `drawn_by` id."""

    drawn_by: str
    initial: Policy
    reads: frozenset[str]  # attributes


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """An experiment or holdout that can own buckets, ready to decide. `enrolling` is False where only units that are
    already in (sticky) may stay. Orders: `rank` says whose values win (higher), `order` who is decided first."""

    name: str
    layer: str
    unit_kind: str
    rank: int
    order: int
    arms: tuple[PlannedArm, ...]
    parameters: frozenset[str]
    test: Test | None = None
    attributes: frozenset[str] = frozenset()
    arm_prefix: bytes = b""
    arm_table: Table = b""
    group: tuple[str, bytes, bytes] | None = None  # unit kind, prefix, one byte per bucket: 1 = own
    requires: tuple[tuple[str, frozenset[str]], ...] = ()
    sticky: bool = False
    enrolling: bool = True
    is_holdout: bool = False
    bandit: PlannedBandit | None = None
    plain: bool = False  # nothing but a condition to test: no group, prerequisite, stickiness or bandit


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """`table[bucket]` indexes `owners`: None (free), an Owner, or the name of a nested domain."""

    name: str
    unit_kind: str
    domain: str | None
    prefix: bytes
    table: Table
    owners: tuple[Owner | str | None, ...]
    open_holdouts: tuple[Owner, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class GlobalHoldout:
    owner: Owner
    prefix: bytes
    table: bytes
    layers: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything assignment reads. Layers come parents first. `testers`: (unit kind, unit) → forced (owner, arm)s."""

    since: datetime
    until: datetime
    kinds: tuple[str, ...]
    layers: tuple[PlannedLayer, ...]
    holdouts: tuple[GlobalHoldout, ...]
    experiments: Mapping[str, Owner]
    testers: Mapping[tuple[str, str], tuple[tuple[Owner, PlannedArm], ...]]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def build_plan(spec: ExperimentsSpec, since: datetime, until: datetime) -> Plan:
    """The plan for moments in [since, until), a stretch without an edge of any schedule inside it."""
    defaults = {name: parameter.default for name, parameter in spec.parameters.items()}
    if not spec.enabled:
        return Plan(since, until, (), (), (), {}, {}, defaults)
    layers = sorted(spec.layers.values(), key=lambda layer: (not layer.launch, spec.depth(layer.name)))
    ranks = {layer.name: i for i, layer in enumerate(layers)}
    order = evaluation_order(spec)
    live = [e for e in spec.experiments.values() if e.state != "stopped" and not (e.end and since >= e.end)]
    owners = {e.name: _owner(spec, e, ranks[e.layer], order[e.name]) for e in live}
    planned = tuple(_layer(spec, layer.name, owners, ranks[layer.name], defaults, since) for layer in layers)
    holdouts = tuple(_global_holdout(spec, h, len(layers)) for h in spec.holdouts.values() if h.layer is None)
    testers: dict[tuple[str, str], tuple[tuple[Owner, PlannedArm], ...]] = {}
    for experiment in live:
        owner = owners[experiment.name]
        for arm, planned_arm in zip(experiment.arms, owner.arms, strict=True):
            for unit in arm.testers:
                key = (owner.unit_kind, unit)
                testers[key] = (*testers.get(key, ()), (owner, planned_arm))
    kinds = {layer.unit_kind for layer in planned} | {h.owner.unit_kind for h in holdouts}
    kinds |= {owner.group[0] for owner in owners.values() if owner.group}
    kinds |= {owner.bandit.drawn_by for owner in owners.values() if owner.bandit}
    return Plan(since, until, tuple(sorted(kinds)), planned, holdouts, owners, testers, defaults)


def edges(spec: ExperimentsSpec) -> list[datetime]:
    """The moments at which some schedule changes who is in, in order."""
    moments: set[datetime] = set()
    for experiment in spec.experiments.values():
        if experiment.state == "running":
            moments.update(when for when in (experiment.start, experiment.end) if when)
            moments.update(when for when, _ in experiment.ramp)
    return sorted(moments)


def _owner(spec: ExperimentsSpec, experiment: Experiment, rank: int, order: int) -> Owner:
    group = None
    if experiment.group is not None:
        named = spec.groups[experiment.group]
        group = (named.unit, salt_prefix("group", named.name), _marks(experiment.group_ranges))
    first, shares = 0, []
    for i, arm in enumerate(experiment.arms):
        shares.append((((first, first + arm.parts),), i))
        first += arm.parts
    unit_kind = spec.layers[experiment.layer].unit
    bandit = None
    if experiment.bandit is not None:
        drawn_by = REQUEST if experiment.bandit.by_request else unit_kind
        reads = frozenset(each.name for each in experiment.bandit.context)
        bandit = PlannedBandit(drawn_by, initial_policy(experiment), reads)
    return Owner(
        name=experiment.name,
        layer=experiment.layer,
        unit_kind=unit_kind,
        rank=rank,
        order=order,
        arms=tuple(PlannedArm(arm.name, arm.values) for arm in experiment.arms),
        parameters=experiment.parameters,
        test=experiment.where.test if experiment.where.attributes else None,
        attributes=experiment.where.attributes,
        arm_prefix=salt_prefix("arm", experiment.salt),
        arm_table=_table(shares),
        group=group,
        requires=experiment.requires,
        sticky=experiment.sticky,
        bandit=bandit,
        plain=not (experiment.sticky or experiment.requires or group or bandit),
    )


def _layer(
    spec: ExperimentsSpec, name: str, owners: Mapping[str, Owner], rank: int, defaults: Mapping[str, Any], at: datetime
) -> PlannedLayer:
    layer = spec.layers[name]
    found: list[Owner | str | None] = [None]
    shares: list[tuple[Ranges, int]] = []

    def give(owner: Owner | str, ranges: Ranges) -> None:
        found.append(owner)
        shares.append((ranges, len(found) - 1))

    for domain in spec.domains.values():
        if domain.layer == name:
            give(domain.name, domain.ranges)
    layer_defaults = {parameter: defaults[parameter] for parameter in layer.parameters}
    open_holdouts = []
    for holdout in spec.holdouts.values():
        if holdout.layer == name:
            owner = _holdout_owner(holdout, rank, frozenset(layer.parameters), layer_defaults)
            give(owner, holdout.ranges)
            open_holdouts.append(owner)
    for experiment in spec.experiments.values():
        if experiment.layer != name or experiment.state != "running" or experiment.name not in owners:
            continue
        owner = owners[experiment.name]
        traffic = experiment.traffic_at(at)
        if experiment.sticky and not (experiment.start and at < experiment.start):
            give(_closed(owner), experiment.ranges)
        if traffic:
            give(owner, experiment.open_ranges(traffic))
    prefix = salt_prefix(layer.salt)
    domain_name = None if layer.domain == ROOT else layer.domain
    return PlannedLayer(name, layer.unit, domain_name, prefix, _table(shares), tuple(found), tuple(open_holdouts))


def _closed(owner: Owner) -> Owner:
    """The same experiment where traffic does not reach: stored units stay, nobody enters."""
    values = {name: getattr(owner, name) for name in Owner.__slots__}
    return Owner(**{**values, "enrolling": False})


def _holdout_owner(holdout: Holdout, rank: int, parameters: frozenset[str], values: Mapping[str, Any]) -> Owner:
    return Owner(
        name=holdout.name,
        layer=holdout.layer or "",
        unit_kind=holdout.unit,
        rank=rank,
        order=-1,
        arms=(PlannedArm(HELD, values), PlannedArm(OPEN, {})),
        parameters=parameters,
        is_holdout=True,
    )


def _global_holdout(spec: ExperimentsSpec, holdout: Holdout, rank: int) -> GlobalHoldout:
    layers = holdout.layers if holdout.layers is not None else frozenset(spec.layers)
    parameters = frozenset(parameter for layer in layers for parameter in spec.layers[layer].parameters)
    owner = _holdout_owner(holdout, rank, parameters, {})
    return GlobalHoldout(owner, salt_prefix("holdout", holdout.salt), _marks(holdout.ranges), layers)


def _marks(ranges: Ranges) -> bytes:
    return bytes(_table([(ranges, 1)]))


def _table(shares: Sequence[tuple[Ranges, int]]) -> Table:
    """10,000 entries: the index given to each range, later ones over earlier ones, 0 elsewhere."""
    largest = max((index for _, index in shares), default=0)
    table: Any = bytearray(N_BUCKETS) if largest < 256 else array("H", bytes(2 * N_BUCKETS))
    for ranges, index in shares:
        for first, end in ranges:
            cells: Iterable[int] = [index] * (end - first)
            table[first:end] = bytes(cells) if largest < 256 else array("H", cells)
    return bytes(table) if largest < 256 else table
