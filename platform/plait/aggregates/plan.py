"""What a spec needs computed, and how its features follow from it.

Every windowed feature is a function of a few measures (integers that add up, so that an event is added when it enters
a window and subtracted when it leaves) and, for least and greatest, of extremes. Sums are kept in millionths as
64-bit integers: addition is then exact and in no order, and DuckDB, Spark, increments and the stream agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from plait.aggregates.features import Count, DistinctCount, Feature, LastN, LastTime, Max, Mean, Min, Rate, Sum
from plait.aggregates.spec import ALL_TIME, AggregateSpec

SCALE = 1_000_000
# Greatest magnitude of one value that is summed: in millionths it is still a float64 that holds every integer exactly.
LIMIT = 1e9
FOREVER = 2**62
US_PER_S = 1_000_000


@dataclass(frozen=True)
class Measure:
    """An integer per event that adds up. kind: count (1), valid (1 if `of` has a value), sum (`of` in millionths)."""

    kind: str
    of: str | None
    where: str | None


@dataclass(frozen=True)
class Extreme:
    """op: least or greatest. of: a column, or None for the event's own time (LastTime)."""

    op: str
    of: str | None
    where: str | None


@dataclass(frozen=True)
class Distinct:
    of: str
    where: str | None


@dataclass(frozen=True)
class Plan:
    """The parts of a spec, in a fixed order: measure i is column `_m<i>`, extreme i `_x<i>`, distinct i `_d<i>`."""

    spec: AggregateSpec

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        found: dict[Measure, None] = {}
        for feature in self.spec.features:
            match feature:
                case Count():
                    found[Measure("count", None, feature.where)] = None
                case Rate():
                    found[Measure("count", None, None)] = None
                    found[Measure("count", None, feature.where)] = None
                case Sum():
                    found[Measure("sum", feature.of, feature.where)] = None
                case Mean():
                    found[Measure("sum", feature.of, feature.where)] = None
                    found[Measure("valid", feature.of, feature.where)] = None
        return tuple(found)

    @cached_property
    def extremes(self) -> tuple[Extreme, ...]:
        return tuple(dict.fromkeys(e for feature in self.spec.features if (e := self.extreme_of(feature))))

    @staticmethod
    def extreme_of(feature: Feature) -> Extreme | None:
        match feature:
            case Min():
                return Extreme("least", feature.of, feature.where)
            case Max():
                return Extreme("greatest", feature.of, feature.where)
            case LastTime():
                return Extreme("greatest", None, feature.where)
        return None

    @cached_property
    def distincts(self) -> tuple[Distinct, ...]:
        return tuple(dict.fromkeys(Distinct(f.of, f.where) for f in self.spec.features if isinstance(f, DistinctCount)))

    @cached_property
    def lists(self) -> tuple[LastN, ...]:
        return tuple(feature for feature in self.spec.features if isinstance(feature, LastN))

    @property
    def longest_us(self) -> int:
        return max(self.spec.bounded_us, default=0)

    def features(
        self, read: Callable[[str], Any], if_else: Callable[[Any, Any, Any], Any], real: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """Feature columns by name.

        read(name) gives the value of `_m<i>_<window>`, `_x<i>_<window>` or `_d<i>_<window>`; if_else(condition, a, b)
        chooses; real(value) makes a float64 of it (Spark would divide integers by decimals). All are the engine's for
        the batch and Python's for the stream: the arithmetic is written once.
        """
        columns: dict[str, Any] = {}
        for feature in self.spec.features:
            for window in self.spec.windows if feature.windowed else (ALL_TIME,):
                name = f"{feature.name}_{window}" if feature.windowed else feature.name
                columns[name] = self._value(feature, window, read, if_else, real)
        return columns

    def _value(
        self,
        feature: Feature,
        window: str,
        read: Callable[[str], Any],
        if_else: Callable[[Any, Any, Any], Any],
        real: Callable[[Any], Any],
    ) -> Any:
        def measure(kind: str, of: str | None, where: str | None) -> Any:
            return read(f"_m{self.measures.index(Measure(kind, of, where))}_{window}")

        match feature:
            case Count():
                return measure("count", None, feature.where)
            case Sum():
                return real(measure("sum", feature.of, feature.where)) / float(SCALE)
            case Mean():
                n = measure("valid", feature.of, feature.where)
                total = real(measure("sum", feature.of, feature.where)) / float(SCALE)
                return if_else(n > 0, lambda: total / real(n), None)
            case Rate():
                hits, n = measure("count", None, feature.where), measure("count", None, None)
                if feature.prior is None or feature.strength is None:
                    return if_else(n > 0, lambda: real(hits) / real(n), None)
                return (real(hits) + feature.prior * feature.strength) / (real(n) + feature.strength)
            case DistinctCount():
                return read(f"_d{self.distincts.index(Distinct(feature.of, feature.where))}_{window}")
        extreme = self.extreme_of(feature)
        assert extreme is not None  # every kind is matched above or is an extreme
        return read(f"_x{self.extremes.index(extreme)}_{window}")
