"""Rows that a graph must reproduce: real ones, ones standing on the model's own thresholds, and ones full of nulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from plait.artifacts import GOLDEN_SCORE
from plait.encoders import SIDES, EncoderSet
from plait.encoders.columns import RawValues
from trainers.fitted import Fitted

_THRESHOLDS_PER_COLUMN = 3


def golden_rows(rows: pa.Table, encoders: EncoderSet, fitted: Fitted, *, n: int = 64, seed: int = 17) -> pa.Table:
    """Raw rows with the trainer's own score of each in `golden_score`.

    `n` rows drawn from `rows`; then one row per raw float column and picked threshold, standing on it; then one row
    with that column null for every column that may be, and one that is null in all but the join keys.
    """
    names = [item.name for item in encoders.inputs]
    picked = np.sort(np.random.default_rng(seed).permutation(len(rows))[:n])
    real = rows.select(names).take(pa.array(picked))
    base = real.slice(0, 1).to_pylist()[0]
    extra = [{**base, name: value} for name, values in _raw_thresholds(encoders, fitted).items() for value in values]
    extra += [{**base, name: None} for name in names]
    extra.append(dict.fromkeys(names))
    table = pa.concat_tables([real, pa.Table.from_pylist(extra, schema=real.schema)]).combine_chunks()
    scores = fitted.predict(encoders.encode_rows(table))
    return table.append_column(GOLDEN_SCORE, pa.array(scores, pa.float64()))


def standing_on_thresholds(
    arrays: Mapping[str, np.ndarray], thresholds: Mapping[str, Mapping[int, npt.NDArray[np.float32]]], *, seed: int
) -> dict[str, np.ndarray]:
    """The same encoded rows with, in every row, about a third of the split columns standing exactly on one of the
    model's thresholds and a tenth missing (NaN); arrays of ids are left alone."""
    rng = np.random.default_rng(seed)
    moved: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        moved[name] = array.copy()
        if array.dtype.kind != "f":
            continue
        for column, values in thresholds.get(name, {}).items():
            draw = rng.random(len(array))
            moved[name][:, column] = np.where(draw < 0.35, rng.choice(values, len(array)), array[:, column])
            moved[name][draw > 0.9, column] = np.nan
    return moved


def _raw_thresholds(encoders: EncoderSet, fitted: Fitted) -> dict[str, list[float]]:
    """A few thresholds of each column that reaches the model unchanged and can hold them (a float column)."""
    dtypes = {item.name: item.dtype for item in encoders.inputs}
    found: dict[str, list[float]] = {}
    for side in SIDES:
        by_column: Mapping[int, Any] = fitted.thresholds.get(f"{side}_values", {})
        for field in encoders.side_fields(side, "value"):
            raw = isinstance(encoders.values[field.name], RawValues) and pa.types.is_floating(dtypes[field.name])
            if raw and field.position in by_column:
                values = by_column[field.position]
                step = max(1, len(values) // _THRESHOLDS_PER_COLUMN)
                found[field.name] = [float(value) for value in values[::step][:_THRESHOLDS_PER_COLUMN]]
    return found
