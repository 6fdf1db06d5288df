"""What `plait samples build` is told: labels, attribution, filters, split, negatives and weights, as frozen specs.

A spec comes from a YAML file or from flags, once, at the edge; every wrong key or value is a SpecError that says what
is allowed. `to_dict` is what the manifest keeps, and reading it back gives an equal spec.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import yaml

from plait.errors import SpecError, UnknownNameError

JOINS = ("auto", "request", "user_item")
TOUCHES = ("last", "any")
NEGATIVES = ("impressions", "uniform", "popularity", "in_batch", "hard")
WEIGHTS = ("none", "propensity", "position")
SPLITS = ("time", "user_time", "leave_one_out", "user")
IMMATURE = ("mark", "drop")
RESERVED = frozenset(
    {
        *("sample_id", "request_id", "user_id", "item_id", "event_timestamp", "timestamp", "scene", "position"),
        *("propensity", "weight", "split", "label_mature", "origin", "slot"),
    }
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSpec:
    """1 if feedback of one of `types` was attributed to the impression, else 0.

    min_value: only feedback whose value is at least this counts (like = rating >= 4). total: the values are summed
    first (dwell in pieces). window: the label's own attribution window, by default the spec's.
    """

    name: str
    types: tuple[str, ...]
    min_value: float | None = None
    total: bool = False
    window: timedelta | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name in RESERVED:
            raise SpecError(
                f"label {self.name!r} cannot be a column: use lower-case letters, digits and _, and none of "
                f"{', '.join(sorted(RESERVED))}"
            )
        if not self.types:
            raise SpecError(f"label {self.name!r} names no feedback type; write for instance {self.name}=click")
        if self.total and self.min_value is None:
            raise SpecError(f"label {self.name!r} sums values but has no min_value to compare the sum with")
        _positive(self.window, f"label {self.name!r}: window")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributionSpec:
    """Which impression a feedback belongs to.

    join: "request" by (request_id, item_id); "user_item" by (user_id, item_id); "auto" by request where the feedback
    names an impression we have, else by user and item. touch: the last impression in the window, or any in it.
    skew: how far a feedback's clock may be behind its impression's.
    """

    join: str = "auto"
    touch: str = "last"
    window: timedelta = timedelta(days=1)
    skew: timedelta = timedelta(0)

    def __post_init__(self) -> None:
        _one_of("attribution join", self.join, JOINS)
        _one_of("attribution touch", self.touch, TOUCHES)
        _positive(self.window, "attribution window")
        if self.skew < timedelta(0):
            raise SpecError(f"attribution skew is {self.skew}; it cannot be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterSpec:
    """Which impressions to leave out. None switches a filter off.

    max_per_day: users with more impressions than this on any UTC day are bots, as are users with at least
    bot_min_impressions of which a share above max_click_rate bears the first label. A session ends after
    session_gap without impressions; those shorter or longer than the bounds go. min_user / min_item: users and items
    with fewer impressions go (one pass). scenes: keep only these.
    """

    max_per_day: int | None = None
    max_click_rate: float | None = None
    bot_min_impressions: int = 20
    session_gap: timedelta = timedelta(minutes=30)
    min_session: int | None = None
    max_session: int | None = None
    min_user: int | None = None
    min_item: int | None = None
    scenes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_per_day", "min_session", "max_session", "min_user", "min_item", "bot_min_impressions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"filter {name} is {value}; give a count of at least 1, or leave it out")
        if self.max_click_rate is not None and not 0 < self.max_click_rate <= 1:
            raise SpecError(f"filter max_click_rate is {self.max_click_rate}; give a share in (0, 1]")
        _positive(self.session_gap, "filter session_gap")


@dataclass(frozen=True, kw_only=True, slots=True)
class NegativeSpec:
    """Where rows with label 0 come from.

    impressions: those shown and not clicked, all of them. hard: at most `per_positive` of those, per positive, from
    the positive's own request or, if that holds none, from the same user's other requests of the same split. uniform,
    popularity: `per_positive` items of the catalogue, never one the user ever gave a positive on; popularity draws
    with weight count**exponent over the training positives. in_batch: items of other positives in a random group of
    about `batch` positives. keep_impressions keeps the unclicked impressions beside drawn negatives.
    """

    kind: str = "impressions"
    per_positive: int = 4
    exponent: float = 0.75
    batch: int = 64
    keep_impressions: bool = False

    def __post_init__(self) -> None:
        _one_of("kind of negatives", self.kind, NEGATIVES)
        if not 1 <= self.per_positive <= 1000:
            raise SpecError(f"negatives per_positive is {self.per_positive}; give 1 to 1000")
        if not 0 <= self.exponent <= 2:
            raise SpecError(f"negatives exponent is {self.exponent}; give 0 (uniform) to 2")
        if not 2 <= self.batch <= 100_000:
            raise SpecError(f"negatives batch is {self.batch}; give 2 to 100000")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """Sample weights, float32. propensity: min(1 / logged propensity, clip), rows without one weigh 1.

    position: positives weigh min(position ** eta, clip), the inverse of an examination probability position ** -eta
    (Joachims et al., WSDM 2017); negatives weigh 1. normalise: divide by the training split's mean, so that a learning
    rate means the same with and without weights.
    """

    kind: str = "none"
    clip: float = 10.0
    eta: float = 1.0
    normalise: bool = True

    def __post_init__(self) -> None:
        _one_of("kind of weights", self.kind, WEIGHTS)
        if not self.clip >= 1:
            raise SpecError(f"weights clip is {self.clip}; give at least 1")
        if not 0 <= self.eta <= 5:
            raise SpecError(f"weights eta is {self.eta}; give 0 to 5")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSpec:
    """Which rows train, validate and test.

    time: by two moments that leave the shares of rows before, between and after them. user_time: the same within
    each user. leave_one_out: each user's last request is test, the one before valid (users with fewer than three
    requests only train). user: every user is wholly in one part, drawn by hash.
    """

    kind: str = "time"
    train: float = 0.8
    valid: float = 0.1

    def __post_init__(self) -> None:
        _one_of("split", self.kind, SPLITS)
        if not (self.train > 0 and self.valid >= 0 and self.train + self.valid <= 1):
            raise SpecError(
                f"split shares train={self.train} valid={self.valid} are not shares: train above 0, the sum at most 1; "
                "the rest is test"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSpec:
    """Everything `plait samples build` needs. The first label is the one negatives, bots and weights look at."""

    name: str = "default"
    labels: tuple[LabelSpec, ...] = field(default_factory=lambda: (LabelSpec(name="click", types=("click",)),))
    attribution: AttributionSpec = field(default_factory=AttributionSpec)
    filters: FilterSpec = field(default_factory=FilterSpec)
    negatives: NegativeSpec = field(default_factory=NegativeSpec)
    weights: WeightSpec = field(default_factory=WeightSpec)
    split: SplitSpec = field(default_factory=SplitSpec)
    immature: str = "mark"
    seed: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise SpecError(f"samples name {self.name!r} cannot be a folder; use letters, digits, '_', '-' and '.'")
        if not self.labels:
            raise SpecError("samples need at least one label; write for instance click=click")
        names = [label.name for label in self.labels]
        if len(set(names)) < len(names):
            raise SpecError(f"labels {', '.join(names)} are not unique; rename one")
        _one_of("treatment of immature samples", self.immature, IMMATURE)
        if not 0 <= self.seed < 1 << 32:
            raise SpecError(f"seed {self.seed} is not in [0, 2**32)")

    @property
    def label(self) -> str:
        return self.labels[0].name

    def window(self, label: LabelSpec) -> timedelta:
        return label.window or self.attribution.window

    def to_dict(self) -> dict[str, Any]:
        """JSON- and YAML-ready; `from_dict` of it is equal to this spec."""
        return _plain(self)


def read_spec(path: Path) -> SampleSpec:
    """The spec a YAML file declares. Raises SpecError naming the file and the key that is wrong."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise SpecError(f"no sample specification {path}; see docs/samples.md for one to copy") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    return from_dict(loaded or {}, where=str(path))


def from_dict(values: Mapping[str, Any], *, where: str = "samples") -> SampleSpec:
    """A spec from nested plain values; durations may be written 30m, 12h, 7d, or in seconds."""
    if not isinstance(values, Mapping):
        raise SpecError(f"{where}: expected keys and values, got {type(values).__name__}")
    values = dict(values)
    labels = values.pop("labels", None)
    parts: dict[str, Any] = {}
    if labels is not None:
        parts["labels"] = tuple(_labels(labels, where))
    nested = {
        "attribution": AttributionSpec,
        "filters": FilterSpec,
        "negatives": NegativeSpec,
        "weights": WeightSpec,
        "split": SplitSpec,
    }
    for key, cls in nested.items():
        if key in values:
            parts[key] = _build(cls, values.pop(key), f"{where}: {key}")
    return _build(SampleSpec, {**values, **parts}, where)


def parse_label(text: str) -> LabelSpec:
    """A label from the command line: NAME, NAME=TYPE, NAME=TYPE>=VALUE, NAME=sum(TYPE)>=VALUE; types join with |.

    >>> parse_label("like=rating>=4").min_value
    4.0
    """
    pattern = r"(\w+)(?:=(sum\()?([\w|]+)(\))?(?:>=(-?\d+(?:\.\d+)?))?)?"
    match = re.fullmatch(pattern, text.replace(" ", ""))
    if match is None or bool(match[2]) != bool(match[4]):
        raise SpecError(
            f"label {text!r} is none of NAME, NAME=TYPE, NAME=TYPE>=VALUE, NAME=sum(TYPE)>=VALUE "
            "(for instance like=rating>=4)"
        )
    return LabelSpec(
        name=match[1],
        types=tuple((match[3] or match[1]).split("|")),
        min_value=None if match[5] is None else float(match[5]),
        total=bool(match[2]),
    )


def parse_duration(value: str | float | timedelta) -> timedelta:
    """30s, 15m, 12h, 7d, 2w or a number of seconds.

    >>> parse_duration("12h")
    datetime.timedelta(seconds=43200)
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, bool):
        raise SpecError(f"{value!r} is not a duration; write 30s, 15m, 12h, 7d or 2w")
    if isinstance(value, int | float):
        return timedelta(seconds=value)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", str(value).strip())
    if match is None:
        raise SpecError(f"{value!r} is not a duration; write 30s, 15m, 12h, 7d or 2w")
    return timedelta(seconds=float(match[1]) * _UNITS[match[2]])


Spec = TypeVar("Spec")


def _build(cls: type[Spec], values: Any, where: str) -> Spec:
    if not isinstance(values, Mapping):
        raise SpecError(f"{where}: expected keys and values, got {values!r}")
    fields = {each.name: each for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise UnknownNameError("key", str(key), fields, where=where)
        kind = str(fields[key].type)
        if "timedelta" in kind and value is not None:
            value = parse_duration(value)
        elif kind.startswith("tuple[str"):
            value = (value,) if isinstance(value, str) else tuple(value)
        elif not _fits(kind, value):
            raise SpecError(f"{where}: {key} is {value!r}, which is not of type {kind}")
        given[key] = value
    try:
        return cls(**given)
    except TypeError as error:
        raise SpecError(f"{where}: {error}") from error
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def _fits(kind: str, value: Any) -> bool:
    if value is None:
        return "None" in kind
    if isinstance(value, bool):
        return kind.startswith("bool")
    if kind.startswith("int"):
        return isinstance(value, int)
    if kind.startswith("float"):
        return isinstance(value, int | float)
    if kind.startswith("str"):
        return isinstance(value, str)
    return True


def _labels(values: Any, where: str) -> list[LabelSpec]:
    """Either a list of the command line's texts, or NAME: {types, min_value, total, window}."""
    if isinstance(values, Mapping):
        values = [{"name": name, **(rest or {})} for name, rest in values.items()]
    if not isinstance(values, list | tuple):
        raise SpecError(f"{where}: labels is {values!r}; give a list such as [click, like=rating>=4]")
    out = []
    for value in values:
        if isinstance(value, LabelSpec):
            out.append(value)
        elif isinstance(value, str):
            out.append(parse_label(value))
        else:
            label = {"types": value.get("name", ""), **value} if isinstance(value, Mapping) else value
            out.append(_build(LabelSpec, label, f"{where}: labels"))
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value


def _one_of(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnknownNameError(kind, value, known)


def _positive(value: timedelta | None, what: str) -> None:
    if value is not None and value <= timedelta(0):
        raise SpecError(f"{what} is {value}; give more than nothing, for instance 1d")
