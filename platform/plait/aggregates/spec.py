"""The declaration of one feature table: which events, by which key, in which windows, how often.

An AggregateSpec is what a feature view carries in its tag `plait.aggregate`, so that the build, the stream and
whoever holds the registry read the same words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from plait.aggregates.features import (
    DistinctCount,
    Feature,
    LastN,
    Max,
    Mean,
    Min,
    Sum,
    feature_from_dict,
    feature_to_dict,
)
from plait.aggregates.where import columns_of
from plait.errors import SpecError, UnknownNameError

TAG = "plait.aggregate"
# Part of the hash: raise it when the same declaration comes to mean other values, and tables rebuild themselves.
_MEANING = 1
_UNITS_US = {"m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000, "w": 7 * 86_400_000_000}
PERIODS_US: Mapping[str, int] = MappingProxyType({"event": 1, "hour": _UNITS_US["h"], "day": _UNITS_US["d"]})
ALL_TIME = "all"
ATTRIBUTE_KEYS = MappingProxyType({"items": "item_id", "users": "user_id"})


def window_us(window: str) -> int | None:
    """Length of a window in microseconds; None for "all".

    >>> window_us("7d")
    604800000000
    """
    if window == ALL_TIME:
        return None
    match = re.fullmatch(r"([1-9]\d*)([mhdw])", window)
    if match is None:
        raise SpecError(f"window {window!r} is none; write a number and m, h, d or w, like '7d', or 'all'")
    return int(match[1]) * _UNITS_US[match[2]]


@dataclass(frozen=True, kw_only=True)
class EventSource:
    """Events of one table below `events/`.

    types: keep these of the table's `type` column (empty: all). where: a condition on the columns. id: columns that
    together name an event; the same one twice counts once. attributes: further columns taken from the item or user
    as it was known at the time of the event, {"genre": "items.genres"}; a list attribute makes one event per element.
    An event from before the first row of its item counts from when that row was known.
    """

    table: str
    types: tuple[str, ...] = ()
    where: str | None = None
    id: tuple[str, ...] = ("event_id",)
    time: str = "timestamp"
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.table):
            raise SpecError(f"event table {self.table!r} is not the name of a folder below events/")
        if not self.id:
            raise SpecError(f"{self.table}: id= names no column; say which columns name an event")
        columns_of(self.where)
        for name, reference in self.attributes.items():
            table, _, column = reference.partition(".")
            if table not in ATTRIBUTE_KEYS or not column:
                raise SpecError(
                    f"{self.table}: attribute {name}={reference!r} must be 'items.COLUMN' or 'users.COLUMN'"
                )

    @property
    def attribute_tables(self) -> tuple[str, ...]:
        return tuple(sorted({reference.partition(".")[0] for reference in self.attributes.values()}))

    def attributes_of(self, table: str) -> dict[str, str]:
        """Attribute → column of one of the attribute tables."""
        split = {name: reference.partition(".") for name, reference in self.attributes.items()}
        return {name: column for name, (of, _, column) in split.items() if of == table}

    def to_dict(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "types": list(self.types),
            "where": self.where,
            "id": list(self.id),
            "time": self.time,
            "attributes": dict(self.attributes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EventSource:
        lists = {name: tuple(values[name]) for name in ("types", "id")}
        return cls(**{**values, **lists})


def feedback(*types: str, where: str | None = None, **attributes: str) -> EventSource:
    """Feedback events of these types: feedback("rating"), feedback("click", genre="items.genres")."""
    return EventSource(table="feedback", types=types, where=where, attributes=attributes)


def impressions(*, where: str | None = None, **attributes: str) -> EventSource:
    """Everything that was shown, one event per request and item."""
    return EventSource(table="impressions", id=("request_id", "item_id"), where=where, attributes=attributes)


@dataclass(frozen=True, kw_only=True)
class AggregateSpec:
    """One feature table. Windows are sorted by length, "all" last; see docs/features.md for what a row means."""

    name: str
    keys: tuple[str, ...]
    events: EventSource
    windows: tuple[str, ...]
    cadence: str
    features: tuple[Feature, ...]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SpecError(f"view name {self.name!r} is not a plain name; use letters, digits and _")
        if self.cadence not in PERIODS_US:
            raise UnknownNameError("cadence", self.cadence, PERIODS_US, where=self.name)
        if not self.keys:
            raise SpecError(f"{self.name}: no entity; an aggregate needs at least one key")
        if not self.features:
            raise SpecError(f"{self.name}: no feature; give features=[Count(…), …]")
        self._sort_windows()
        lists = [feature for feature in self.features if isinstance(feature, LastN)]
        if lists and len(lists) != len(self.features):
            raise SpecError(
                f"{self.name}: {lists[0].name!r} is a list beside other aggregates; "
                "put LastN features in a view of their own"
            )
        if any(feature.windowed for feature in self.features) and not self.windows:
            raise SpecError(f"{self.name}: no window; give windows=['1d', '7d', 'all'] or some of them")
        for feature in self.features:
            columns_of(feature.where)
        names = self.columns
        if twice := {name for name in names if names.count(name) > 1}:
            raise SpecError(f"{self.name}: two features are called {sorted(twice)[0]!r}; rename one")
        if clash := set(names) & {*self.keys, "event_timestamp", "created"}:
            raise SpecError(f"{self.name}: a feature cannot be called {sorted(clash)[0]!r}; rename it")

    def _sort_windows(self) -> None:
        lengths = {window: window_us(window) for window in self.windows}
        period = PERIODS_US[self.cadence]
        for window, length in lengths.items():
            if length is not None and length % period:
                raise SpecError(f"{self.name}: window {window!r} is no whole number of {self.cadence}s, its cadence")
        bounded = {window: length for window, length in lengths.items() if length is not None}
        ordered = sorted(bounded, key=bounded.__getitem__) + [ALL_TIME] * (ALL_TIME in lengths)
        if len(set(bounded.values())) != len(bounded) or len(ordered) != len(self.windows):
            raise SpecError(f"{self.name}: windows {', '.join(self.windows)} hold the same length twice")
        object.__setattr__(self, "windows", tuple(ordered))

    @property
    def period_us(self) -> int:
        return PERIODS_US[self.cadence]

    @cached_property
    def bounded_us(self) -> tuple[int, ...]:
        """Lengths of the windows that end, ascending: the index in it is the window's number everywhere."""
        return tuple(length for window in self.windows if (length := window_us(window)) is not None)

    @property
    def is_list(self) -> bool:
        return isinstance(self.features[0], LastN)

    @property
    def columns(self) -> list[str]:
        """The feature table's columns, in order."""
        names = []
        for feature in self.features:
            names += [f"{feature.name}_{window}" for window in self.windows] if feature.windowed else [feature.name]
        return names

    @property
    def source_columns(self) -> set[str]:
        """Columns of the events (attributes included) that keys, features and conditions read."""
        wanted = set(self.keys) | columns_of(self.events.where)
        for feature in self.features:
            wanted |= columns_of(feature.where)
            if isinstance(feature, (Sum, Mean, Min, Max, DistinctCount, LastN)):
                wanted.add(feature.of)
        return wanted

    def to_json(self) -> str:
        return json.dumps(
            {
                "name": self.name,
                "keys": list(self.keys),
                "events": self.events.to_dict(),
                "windows": list(self.windows),
                "cadence": self.cadence,
                "features": [feature_to_dict(feature) for feature in self.features],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> AggregateSpec:
        """Inverse of to_json. Raises SpecError if the text is not one."""
        try:
            values = json.loads(text)
            return cls(
                name=values["name"],
                keys=tuple(values["keys"]),
                events=EventSource.from_dict(values["events"]),
                windows=tuple(values["windows"]),
                cadence=values["cadence"],
                features=tuple(feature_from_dict(feature) for feature in values["features"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"not the declaration of an aggregate ({error!r}): {text[:200]}") from error

    @property
    def hash(self) -> str:
        """Changes when the table's values may change; the build then starts over."""
        return hashlib.sha256(f"{_MEANING}:{self.to_json()}".encode()).hexdigest()
