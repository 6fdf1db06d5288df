"""What can be aggregated: one small frozen dataclass per kind of feature.

Each one becomes a column per window (`user_ratings_7d`, `user_ratings_all`), except LastTime and LastN, which look at
all time and keep their name. `where` is a condition on the event's columns (see `where.py`); `of` names a column.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from plait.errors import SpecError, UnknownNameError


@dataclass(frozen=True)
class _Feature:
    name: str
    where: str | None = field(default=None, kw_only=True)
    kind: ClassVar[str]
    windowed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SpecError(f"feature name {self.name!r} is not a plain name; use letters, digits and _")
        if self.name.endswith("_y"):
            raise SpecError(f"feature name {self.name!r} ends in _y, which Feast's own DuckDB store drops; rename it")


@dataclass(frozen=True)
class Count(_Feature):
    """Number of events; 0 when there is none. Int64."""

    kind: ClassVar[str] = "count"


@dataclass(frozen=True)
class _OfColumn(_Feature):
    of: str = field(kw_only=True)


@dataclass(frozen=True)
class Sum(_OfColumn):
    """Sum of `of`, kept in millionths (exact, whatever the order); 0.0 when there is no value. Float64."""

    kind: ClassVar[str] = "sum"


@dataclass(frozen=True)
class Mean(_OfColumn):
    """Mean of `of` over the events that have a value; null when there is none. Float64."""

    kind: ClassVar[str] = "mean"


@dataclass(frozen=True)
class Min(_OfColumn):
    """Least `of`; null when there is none. Float64."""

    kind: ClassVar[str] = "min"


@dataclass(frozen=True)
class Max(_OfColumn):
    """Greatest `of`; null when there is none. Float64."""

    kind: ClassVar[str] = "max"


@dataclass(frozen=True)
class DistinctCount(_OfColumn):
    """Number of different values of `of`, null not among them; 0 when there is none. Int64."""

    kind: ClassVar[str] = "distinct"


@dataclass(frozen=True)
class Rate(_Feature):
    """Share of events that satisfy `where`, pulled towards `prior` by `strength` imaginary events. Float64.

    (hits + prior * strength) / (events + strength). Without a prior: hits / events, null when there is no event.
    """

    prior: float | None = field(default=None, kw_only=True)
    strength: float | None = field(default=None, kw_only=True)
    kind: ClassVar[str] = "rate"

    def __post_init__(self) -> None:
        _Feature.__post_init__(self)
        if self.where is None:
            raise SpecError(f"rate {self.name!r} needs where=, the condition whose share it is")
        if self.prior is None:
            if self.strength is not None:
                raise SpecError(f"rate {self.name!r} has strength= but no prior= to pull towards")
            return
        if not 0 <= self.prior <= 1:
            raise SpecError(f"rate {self.name!r}: prior {self.prior} is no share; give 0 to 1")
        if self.strength is None:
            object.__setattr__(self, "strength", 10.0)
        elif not self.strength > 0:
            raise SpecError(f"rate {self.name!r}: strength {self.strength} must be above 0")


@dataclass(frozen=True)
class LastTime(_Feature):
    """Time of the latest event, in whole unix seconds; null before the first. Int64."""

    kind: ClassVar[str] = "last_time"
    windowed: ClassVar[bool] = False


@dataclass(frozen=True)
class LastN(_OfColumn):
    """The last `n` values of `of`, oldest first, in the order in which they became known. Array of `of`'s type.

    Lists live in a view of their own: mixed with windows, every expiry would repeat the whole list.
    """

    n: int = field(kw_only=True)
    kind: ClassVar[str] = "last_n"
    windowed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _Feature.__post_init__(self)
        if self.where is not None:
            raise SpecError(f"list {self.name!r} takes no where=; filter the events: feedback(…, where=…)")
        if not 1 <= self.n <= 10_000:
            raise SpecError(f"list {self.name!r}: n is {self.n}; give 1 to 10000")


Feature = Count | Sum | Mean | Min | Max | DistinctCount | Rate | LastTime | LastN
_KINDS: dict[str, type[Feature]] = {
    cls.kind: cls for cls in (Count, Sum, Mean, Min, Max, DistinctCount, Rate, LastTime, LastN)
}


def feature_to_dict(feature: Feature) -> dict[str, Any]:
    """JSON-ready; settings that were left out stay out."""
    given = {name: value for name, value in asdict(feature).items() if value is not None}
    return {"kind": feature.kind, **given}


def feature_from_dict(values: dict[str, Any]) -> Feature:
    """Inverse of feature_to_dict. Raises UnknownNameError for a kind that does not exist."""
    settings = dict(values)
    kind = settings.pop("kind", "")
    if kind not in _KINDS:
        raise UnknownNameError("aggregate", kind, _KINDS)
    return _KINDS[kind](**settings)
