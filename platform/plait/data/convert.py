"""One column of a user's file in the type that an event table wants, or an error that names the row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from plait.data.tables import TIMESTAMP
from plait.errors import DataError

UNITS = ("s", "ms", "us", "ns")
_MICROS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_LATEST_US = 230 * 365.25 * 86_400e6


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch of rows stands: its file (or table), and how many of that file's rows came before it."""

    file: str
    before: int = 0

    def row(self, index: int) -> str:
        """How to say where row `index` of the batch is; rows count from 1, without a CSV file's header."""
        return f"{self.file}, row {self.before + index + 1}"


def convert(column: Any, wanted: pa.DataType, name: str, unit: str, place: Place) -> Any:
    """`column` as `wanted`: numbers of `unit` or ISO 8601 text (UTC unless it says otherwise) as timestamps, JSON text
    as lists, empty text as null.

    Raises DataError naming the column, its type, the wanted one and the first row that cannot be converted.
    """
    given = column.type
    try:
        return _cast(column, wanted, unit)
    except (pa.ArrowException, ValueError, TypeError) as error:
        at, value = _first_bad(column, wanted, unit)
        reason = str(error).splitlines()[0][:200]
        raise DataError(
            f"{place.row(at)}: {name} is {value!r} ({given}) and cannot become {wanted}: {reason}"
        ) from error


def _first_bad(column: Any, wanted: pa.DataType, unit: str) -> tuple[int, Any]:
    """The first row that cannot be cast, by halving."""
    low, high = 0, len(column)  # rows before `low` can be cast, and those before `high` cannot
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _cast(column.slice(low, middle - low), wanted, unit)
            low = middle
        except (pa.ArrowException, ValueError, TypeError):
            high = middle
    return low, column[low].as_py()


def _cast(column: Any, wanted: pa.DataType, unit: str) -> Any:
    given = column.type
    if isinstance(given, pa.UuidType):  # which Arrow would turn into text byte by byte
        return pa.array([None if id_ is None else str(id_) for id_ in column.to_pylist()], pa.string()).cast(wanted)
    text = pa.types.is_string(given) or pa.types.is_large_string(given)
    if text:  # an empty id is no id, and an empty number none
        column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, given), column)
    if given == wanted:
        return column
    if pa.types.is_list(wanted):
        return _nested(column, wanted)
    if not pa.types.is_timestamp(wanted) or pa.types.is_timestamp(given):
        return column.cast(wanted)
    if pa.types.is_null(given):
        return column.cast(wanted)
    if text:
        return _times(column, unit)
    if pa.types.is_floating(given) or pa.types.is_integer(given):
        return _moments(column, unit)
    if pa.types.is_date(given):
        return column.cast(pa.timestamp("us")).cast(wanted)
    raise pa.ArrowNotImplementedError(f"times are numbers, ISO 8601 text or timestamps, not {given}")


def _moments(numbers: Any, unit: str) -> Any:
    """Times since 1970 in `unit`. Raises ValueError for one so late that the unit must be another."""
    ends = pc.min_max(numbers).as_py()
    if ends["max"] is not None and max(abs(ends["min"]), abs(ends["max"])) * _MICROS[unit] > _LATEST_US:
        raise ValueError(
            f"in {unit} since 1970 that is after the year 2200: give the numbers' unit (--unit ms, us or ns)"
        )
    if pa.types.is_floating(numbers.type):
        return pc.round(pc.multiply(numbers, _MICROS[unit])).cast(pa.int64()).cast(TIMESTAMP)
    return numbers.cast(pa.int64()).cast(pa.timestamp(unit, tz="UTC")).cast(TIMESTAMP, safe=False)


def _times(column: Any, unit: str) -> Any:
    """Numbers written as text, ISO 8601 with an offset, and without one (UTC, as all times here), in any mixture."""
    out = pa.nulls(len(column), TIMESTAMP)
    whole = pc.match_substring_regex(column, r"^\s*[+-]?\d+\s*$")
    number = pc.match_substring_regex(column, r"^\s*[+-]?(\d+\.\d*|\.?\d+)([eE][+-]?\d+)?\s*$")
    zoned = pc.match_substring_regex(column, r"\d[T ].*(Z|[+-]\d\d(:?\d\d)?)$")

    def some(mask: Any) -> Any:
        return pc.if_else(mask, column, pa.scalar(None, column.type))

    if pc.any(whole).as_py():
        out = pc.coalesce(_moments(pc.utf8_trim_whitespace(some(whole)).cast(pa.int64()), unit), out)
    fraction = pc.and_(number, pc.invert(whole))
    if pc.any(fraction).as_py():
        out = pc.coalesce(_moments(pc.utf8_trim_whitespace(some(fraction)).cast(pa.float64()), unit), out)
    if pc.any(zoned).as_py():
        out = pc.coalesce(some(zoned).cast(TIMESTAMP), out)
    plain = pc.invert(pc.or_(number, zoned))
    if pc.any(plain).as_py():
        out = pc.coalesce(some(plain).cast(pa.timestamp("us")).cast(TIMESTAMP), out)
    return out


def _nested(column: Any, wanted: pa.DataType) -> Any:
    """Lists (of arms): as they are, or as JSON text. Fields that a source does not give are null."""
    if pa.types.is_null(column.type):
        return column.cast(wanted)
    values = column.to_pylist()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        values = [None if value is None else json.loads(value) for value in values]
    if pa.types.is_struct(wanted.value_type):
        known = {wanted.value_type.field(i).name for i in range(wanted.value_type.num_fields)}
        for value in values:
            for entry in value or ():
                if not isinstance(entry, dict) or (extra := set(entry) - known):
                    what = f"has {', '.join(sorted(extra))}" if isinstance(entry, dict) else f"is {entry!r}"
                    raise ValueError(f"an entry {what}; entries have {', '.join(sorted(known))}")
    return pa.array(values, wanted)
