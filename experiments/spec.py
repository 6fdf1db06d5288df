"""What a configuration says, as frozen dataclasses; `experiments.validate` makes them from YAML or JSON.

A domain is a share of traffic and holds layers; a layer owns parameters and holds experiments and nested domains by
bucket ranges; a launch layer moves defaults for everyone; an experiment has arms with parameter values. Shares
(traffic, weights) are parts per 10,000; ranges are half-open [first, end) pairs of buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from experiments.conditions import Condition
from experiments.hashing import N_BUCKETS
from plait.errors import SpecError

ROOT = "default"
"""The domain that is everybody."""

Ranges = tuple[tuple[int, int], ...]
State = Literal["draft", "running", "stopped"]
BanditMethod = Literal["thompson", "linear", "linucb"]
ParameterType = Literal["string", "int", "float", "bool", "list", "model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A knob that code reads. Type "model" is a text that names a registered model ("deepfm", "deepfm:3").

    Empty text, for no model, is only a value where it is the default.
    """

    name: str
    type: ParameterType
    default: Any
    allowed: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    description: str = ""

    def complaint(self, value: Any) -> str | None:
        """Why `value` cannot be a value of this parameter; None if it can."""
        if not _TYPE_TESTS[self.type](value):
            return f"{value!r} is not of type {self.type}"
        if self.type == "model" and not value and self.default:
            return "'' names no model; only a parameter whose default is empty may be empty"
        if self.allowed is not None and value not in self.allowed:
            return f"{value!r} is not among the allowed {list(self.allowed)!r}"
        if self.minimum is not None and value < self.minimum:
            return f"{value!r} is below the minimum {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:
            return f"{value!r} is above the maximum {self.maximum:g}"
        return None


_TYPE_TESTS = {
    "string": lambda v: isinstance(v, str),
    "model": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < float("inf"),
    "list": lambda v: isinstance(v, (list, tuple)) and all(isinstance(item, (str, int, float, bool)) for item in v),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """A share of `layer`'s buckets, divided anew by the layers inside it."""

    name: str
    layer: str
    ranges: Ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Owner of `parameters` within its domain. `unit`: the kind of id that decides. launch: it moves defaults."""

    name: str
    unit: str
    parameters: tuple[str, ...]
    domain: str = ROOT
    launch: bool = False
    salt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """`parts` per 10,000 of an experiment's units, the values they get, and the testers who always get this arm."""

    name: str
    parts: int
    values: Mapping[str, Any]
    testers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextField:
    """An attribute that a contextual bandit reads: a number as (x - center) / scale, or one of `categories`."""

    name: str
    center: float = 0.0
    scale: float = 1.0
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandit:
    """How an experiment's arms are drawn by what they earned. The arms' weights are what it starts from.

    reward: the event type that pays 1 to a decision. floor: parts per 10,000 that every arm keeps. wait: a decision
    counts once it is that old. width: standard deviation of one reward, as linear methods take it.
    """

    method: BanditMethod
    reward: str
    floor: int
    by_request: bool = True
    half_life: timedelta | None = None
    wait: timedelta = timedelta(minutes=1)
    width: float = 0.5
    context: tuple[ContextField, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Owns `ranges` of its layer; the first `traffic` parts per 10,000 of them are in use (a ramp moves that)."""

    name: str
    layer: str
    state: State
    ranges: Ranges
    arms: tuple[Arm, ...]
    where: Condition
    salt: str
    traffic: int = N_BUCKETS
    start: datetime | None = None
    end: datetime | None = None
    ramp: tuple[tuple[datetime, int], ...] = ()
    group: str | None = None
    group_ranges: Ranges = ()
    requires: tuple[tuple[str, frozenset[str]], ...] = ()
    sticky: bool = False
    control: str = ""
    owner: str = ""
    description: str = ""
    metrics: tuple[str, ...] = ()
    primary: str | None = None
    guardrails: tuple[str, ...] = ()
    bandit: Bandit | None = None

    def __post_init__(self) -> None:
        if (total := sum(arm.parts for arm in self.arms)) != N_BUCKETS:
            raise SpecError(
                f"the weights of {self.name} add up to {total / 100:g} %, not 100 %; give the rest to the control arm"
            )

    @property
    def parameters(self) -> frozenset[str]:
        """Every parameter that one of the arms sets: using one of them is an exposure."""
        return frozenset(name for arm in self.arms for name in arm.values)

    def traffic_at(self, at: datetime) -> int:
        """Parts per 10,000 of the owned buckets in use at `at` (aware); 0 before the start and from the end on."""
        if (self.start and at < self.start) or (self.end and at >= self.end):
            return 0
        if not self.ramp:
            return self.traffic
        return max((parts for when, parts in self.ramp if when <= at), default=0)

    def open_ranges(self, traffic: int) -> Ranges:
        """The owned buckets in use at this traffic: always the left part, so that more traffic only adds."""
        left = -(-sum(end - first for first, end in self.ranges) * traffic // N_BUCKETS)
        ranges = []
        for first, end in self.ranges:
            taken = min(left, end - first)
            if taken > 0:
                ranges.append((first, first + taken))
            left -= taken
        return tuple(ranges)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdout:
    """Units kept from every experiment and launch. With `layer`: buckets of that layer, its parameters only.
    Without: buckets of its own, over `layers` (all of them when None)."""

    name: str
    ranges: Ranges
    unit: str
    salt: str
    layer: str | None = None
    layers: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Experiments of any layers of which a unit takes part in at most one: each owns ranges of the group's buckets."""

    name: str
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentsSpec:
    """A whole valid configuration. enabled=False is the switch that turns every experiment and launch off."""

    enabled: bool = True
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    domains: Mapping[str, Domain] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    experiments: Mapping[str, Experiment] = field(default_factory=dict)
    holdouts: Mapping[str, Holdout] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)

    def depth(self, layer: str) -> int:
        """How many domains the layer is nested in; 0 in the default domain."""
        depth, domain = 0, self.layers[layer].domain
        while domain != ROOT:
            depth, domain = depth + 1, self.layers[self.domains[domain].layer].domain
        return depth
