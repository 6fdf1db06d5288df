"""Moments as the aggregates reckon with them: int64 microseconds since 1970."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ibis

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from plait.offline.engine import Engine


@ibis.udf.scalar.builtin(name="epoch_us")
def _epoch_us(at: ibis.expr.datatypes.Timestamp(timezone="UTC")) -> int:  # type: ignore[valid-type, empty-body]
    """DuckDB's microseconds since 1970."""


@ibis.udf.scalar.builtin(name="unix_micros")
def _unix_micros(at: ibis.expr.datatypes.Timestamp(timezone="UTC")) -> int:  # type: ignore[valid-type, empty-body]
    """Spark's microseconds since 1970."""


def to_us(engine: Engine, column: ir.Value) -> ir.IntegerValue:
    """A timestamp as int64 microseconds since 1970."""
    return (_epoch_us if engine.name == "duckdb" else _unix_micros)(column)
