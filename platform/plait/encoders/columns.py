"""Fitted encoders: each turns one Arrow column into one numpy array, by data it holds and nothing else.

Shapes: n rows, L longest list of the batch, w outputs of a column, V rows of an id table.
An id table's row 0 stands for null (and pads lists), row 1 for a value unknown to a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plait.encoders.arrays import (
    FloatArray,
    IntArray,
    floats_and_missing,
    is_list,
    is_text,
    map_strings,
    murmur3_32_of_int64,
    values_and_nulls,
)
from plait.encoders.specs import Bucketize, MultiHot, Scale, Vector
from plait.errors import DataError

MISSING_ID, UNKNOWN_ID, FIRST_KNOWN_ID = 0, 1, 2


class VocabularyTable:
    """Known values in id order: the value at position i has id i + 2."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self.size = len(values) + FIRST_KNOWN_ID
        if is_text(values.type):
            self._ids = {value: i + FIRST_KNOWN_ID for i, value in enumerate(values.to_pylist())}
            return
        numbers = values.cast(pa.int64()).to_numpy() if len(values) else np.empty(0, np.int64)
        order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[order]
        self._sorted_ids = order.astype(np.int64) + FIRST_KNOWN_ID

    @classmethod
    def fit(cls, array: pa.Array | pa.ChunkedArray, *, min_count: int, max_size: int | None) -> VocabularyTable:
        """The values seen at least `min_count` times, most frequent first (ties: smaller value first)."""
        counts = pc.value_counts(array.drop_null())
        values, seen = counts.field("values"), counts.field("counts")
        kept = pc.greater_equal(seen, min_count)
        table = pa.table({"value": values.filter(kept), "count": seen.filter(kept)})
        table = table.sort_by([("count", "descending"), ("value", "ascending")]).slice(0, max_size)
        return cls(table.column("value").combine_chunks())

    def ids(self, array: pa.Array) -> IntArray:
        """(n,) ids of the values of a column."""
        if is_text(array.type):
            known = self._ids
            return map_strings(array, lambda s: known.get(s, UNKNOWN_ID), dtype=np.int64, null=MISSING_ID)
        values, nulls = values_and_nulls(array)
        ids = self.ids_of_int64(values.astype(np.int64))
        if nulls is not None:
            ids[nulls] = MISSING_ID
        return ids

    def ids_of_int64(self, values: IntArray) -> IntArray:
        if not len(self._sorted):
            return np.full(len(values), UNKNOWN_ID, np.int64)
        positions = np.searchsorted(self._sorted, values)
        positions[positions == len(self._sorted)] = 0
        return np.where(self._sorted[positions] == values, self._sorted_ids[positions], UNKNOWN_ID)


@dataclass(frozen=True, slots=True)
class HashTable:
    """ids 1 … buckets by murmur3_32; nothing is fitted."""

    buckets: int
    seed: int = 0

    @property
    def size(self) -> int:
        return self.buckets + 1

    def ids(self, array: pa.Array) -> IntArray:
        if is_text(array.type):
            buckets, seed = self.buckets, self.seed
            return map_strings(
                array, lambda s: 1 + mmh3.hash(s, seed, signed=False) % buckets, dtype=np.int64, null=MISSING_ID
            )
        values, nulls = values_and_nulls(array)
        ids = self.ids_of_int64(values.astype(np.int64))
        if nulls is not None:
            ids[nulls] = MISSING_ID
        return ids

    def ids_of_int64(self, values: IntArray) -> IntArray:
        return 1 + (murmur3_32_of_int64(values, seed=self.seed) % np.uint32(self.buckets)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class BucketTable:
    """ids 1 … len(boundaries) + 1; missing → 0."""

    boundaries: np.ndarray

    @property
    def size(self) -> int:
        return len(self.boundaries) + 2

    @classmethod
    def fit(cls, array: pa.Array, spec: Bucketize) -> BucketTable:
        """Boundaries as declared, else the distinct inner quantiles of the column's finite values."""
        if spec.boundaries:
            return cls(np.array(spec.boundaries, np.float64))
        values, missing = floats_and_missing(array)
        present = values[np.isfinite(values) & (True if missing is None else ~missing)]
        if not len(present):
            return cls(np.empty(0, np.float64))
        # "lower" keeps boundaries at values that occur, so that integers are cut at integers
        cuts = np.quantile(present, np.arange(1, spec.buckets) / spec.buckets, method="lower")
        return cls(np.unique(cuts))

    def ids(self, array: pa.Array) -> IntArray:
        values, missing = floats_and_missing(array)
        ids = np.searchsorted(self.boundaries, values, side="right") + 1
        if missing is not None:
            ids[missing] = MISSING_ID
        return ids


IdTable = VocabularyTable | HashTable | BucketTable


@dataclass(frozen=True, slots=True)
class ScaleValues:
    """(n, 1) or, with the indicator, (n, 2) floats: x (or sign(x) log1p|x|) less `shift`, times `factor`, cut."""

    shift: float
    factor: float
    low: float
    high: float
    log1p: bool
    indicator: bool

    @property
    def width(self) -> int:
        return 2 if self.indicator else 1

    @classmethod
    def fit(cls, array: pa.Array, spec: Scale) -> ScaleValues:
        values, missing = floats_and_missing(array)
        present = values[np.isfinite(values) & (True if missing is None else ~missing)]
        present = _signed_log1p(present) if spec.log1p else present
        indicator = bool(missing is not None) if spec.indicator is None else spec.indicator
        if not len(present):
            return cls(0.0, 1.0, -spec.clip, spec.clip, spec.log1p, indicator)
        if spec.method == "minmax":
            span = float(present.max() - present.min())
            return cls(float(present.min()), 1 / span if span > 0 else 1.0, 0.0, 1.0, spec.log1p, indicator)
        mean, deviation = float(present.mean()), float(present.std())
        constant = deviation <= 1e-12 * max(1.0, abs(mean))
        return cls(mean, 1.0 if constant else 1 / deviation, -spec.clip, spec.clip, spec.log1p, indicator)

    def values(self, array: pa.Array) -> FloatArray:
        values, missing = floats_and_missing(array)
        out = np.zeros((len(array), self.width), np.float32)
        scaled = (_signed_log1p(values) if self.log1p else values) - self.shift
        scaled *= self.factor
        np.clip(scaled, self.low, self.high, out=scaled)
        if missing is not None:
            scaled[missing] = 0.0
            if self.indicator:
                out[:, 1] = missing
        out[:, 0] = scaled
        return out


@dataclass(frozen=True, slots=True)
class RawValues:
    """(n, 1) floats, NaN where missing."""

    width: int = 1

    def values(self, array: pa.Array) -> FloatArray:
        values, nulls = values_and_nulls(array)
        out = values.astype(np.float32)[:, None]
        if nulls is not None:
            out[nulls] = np.nan
        return out


@dataclass(frozen=True, slots=True)
class VectorValues:
    """(n, width) floats, zeros where null."""

    width: int

    @classmethod
    def fit(cls, spec: Vector) -> VectorValues:
        return cls(spec.width)

    def values(self, array: pa.Array) -> FloatArray:
        starts, lengths, flat = list_parts(array)
        out = np.zeros((len(array), self.width), np.float32)
        present = lengths > 0
        if (lengths[present] != self.width).any():
            wrong = int(lengths[present & (lengths != self.width)][0])
            raise DataError(f"a vector of {wrong} numbers came where the model was fitted on {self.width}")
        numbers, _ = floats_and_missing(flat)
        if present.any():
            out[present] = numbers[starts[present][:, None] + np.arange(self.width)]
        return out


@dataclass(frozen=True, slots=True)
class MultiHotValues:
    """(n, V) floats: column 0 is 1 for null or empty, 1 for any unknown value, the others one known value each."""

    table: VocabularyTable

    @property
    def width(self) -> int:
        return self.table.size

    @classmethod
    def fit(cls, array: pa.Array, spec: MultiHot) -> MultiHotValues:
        flat = array.flatten() if is_list(array.type) else array
        return cls(VocabularyTable.fit(flat, min_count=spec.min_count, max_size=spec.max_size))

    def values(self, array: pa.Array) -> FloatArray:
        out = np.zeros((len(array), self.width), np.float32)
        if is_list(array.type):
            ids = padded_ids(array, self.table, last=None)
            out[np.arange(len(array))[:, None], ids] = 1.0
            out[:, MISSING_ID] = (ids == MISSING_ID).all(axis=1)
        else:
            out[np.arange(len(array)), self.table.ids(array)] = 1.0
        return out


ValueEncoder = ScaleValues | RawValues | VectorValues | MultiHotValues


def list_parts(array: pa.Array) -> tuple[IntArray, IntArray, pa.Array]:
    """Where each row's list starts, how long it is (null: 0), and all elements in one array."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    return starts, lengths, array.flatten()  # flatten leaves null lists out, whatever lies below them


def padded_ids(array: pa.Array, table: IdTable, *, last: int | None) -> IntArray:
    """(n, L) ids of each list's last `last` elements, in their order, padded by 0 on the right; L is at least 1."""
    starts, lengths, flat = list_parts(array)
    kept = lengths if last is None else np.minimum(lengths, last)
    width = max(1, int(kept.max(initial=0)))
    out = np.zeros((len(array), width), np.int64)
    total = int(kept.sum())
    if total:
        columns = np.arange(total) - np.repeat(np.cumsum(kept) - kept, kept)
        source = np.repeat(starts + lengths - kept, kept) + columns
        elements = flat if total == len(flat) else flat.take(pa.array(source))
        out[np.repeat(np.arange(len(array)), kept), columns] = table.ids(elements)
    return out


def _signed_log1p(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def table_state(table: IdTable) -> dict[str, Any]:
    """What an id table is, as JSON; a vocabulary's values are saved beside it."""
    if isinstance(table, HashTable):
        return {"kind": "hash", "buckets": table.buckets, "seed": table.seed}
    if isinstance(table, BucketTable):
        return {"kind": "buckets", "boundaries": table.boundaries.tolist()}
    return {"kind": "vocabulary", "size": table.size}


def value_state(encoder: ValueEncoder) -> dict[str, Any]:
    """What a value encoder is, as JSON; a multi-hot's vocabulary is saved beside it."""
    if isinstance(encoder, ScaleValues):
        return {"kind": "scale", **{name: getattr(encoder, name) for name in ScaleValues.__slots__}}
    if isinstance(encoder, RawValues):
        return {"kind": "raw"}
    if isinstance(encoder, VectorValues):
        return {"kind": "vector", "width": encoder.width}
    return {"kind": "multi_hot", "size": encoder.table.size}


def table_from(state: Mapping[str, Any], vocabulary: pa.Array | None) -> IdTable:
    if state["kind"] == "hash":
        return HashTable(state["buckets"], state["seed"])
    if state["kind"] == "buckets":
        return BucketTable(np.array(state["boundaries"], np.float64))
    return VocabularyTable(vocabulary)


def values_from(state: Mapping[str, Any], vocabulary: pa.Array | None) -> ValueEncoder:
    if state["kind"] == "scale":
        return ScaleValues(**{name: state[name] for name in ScaleValues.__slots__})
    if state["kind"] == "raw":
        return RawValues()
    if state["kind"] == "vector":
        return VectorValues(state["width"])
    return MultiHotValues(VocabularyTable(vocabulary))
