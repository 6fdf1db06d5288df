"""Fitted encoders: each turns one Arrow column into one numpy array, by data it holds and nothing else.

Shapes: n rows, L longest list of the batch, w outputs of a column, V rows of an id table.
An id table's row 0 stands for null (and pads lists), row 1 for a value unknown to a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plait.encoders.arrays import (
    FloatArray,
    IntArray,
    floats,
    is_list,
    is_text,
    map_strings,
    murmur3_32_of_int64,
    nulls_of,
    values_and_nulls,
)
from plait.encoders.specs import Bucketize, MultiHot, Scale, Vector
from plait.errors import DataError

MISSING_ID, UNKNOWN_ID, FIRST_KNOWN_ID = 0, 1, 2


class _TextIds(dict[str | None, int]):
    """A dict that answers UNKNOWN_ID for any other text, without a call of ours for a known one."""

    def __missing__(self, key: str | None) -> int:
        return UNKNOWN_ID


class VocabularyTable:
    """Known values in id order: the value at position i has id i + 2."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self.size = len(values) + FIRST_KNOWN_ID
        if is_text(values.type):
            self._ids = _TextIds((value, i + FIRST_KNOWN_ID) for i, value in enumerate(values.to_pylist()))
            self._ids[None] = MISSING_ID
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
            return map_strings(array, self._ids.__getitem__)
        values, nulls = values_and_nulls(array)
        ids = self.ids_of_int64(values)
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
                array, lambda s: MISSING_ID if s is None else 1 + mmh3.hash(s, seed, signed=False) % buckets
            )
        values, nulls = values_and_nulls(array)
        ids = self.ids_of_int64(values)
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
        values = floats(array)
        present = values[np.isfinite(values)]
        if not len(present):
            return cls(np.empty(0, np.float64))
        # "lower" keeps boundaries at values that occur, so that integers are cut at integers
        cuts = np.quantile(present, np.arange(1, spec.buckets) / spec.buckets, method="lower")
        return cls(np.unique(cuts))

    def ids(self, array: pa.Array) -> IntArray:
        values = floats(array)
        ids = np.searchsorted(self.boundaries, values, side="right") + 1
        ids[np.isnan(values)] = MISSING_ID
        return ids


IdTable = VocabularyTable | HashTable | BucketTable


@dataclass(frozen=True, slots=True)
class ScaleValues:
    """x (or sign(x) log1p|x|) less `shift`, times `factor`, cut; missing → 0, and 1 in a second column on demand."""

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
        values = floats(array)
        present = values[np.isfinite(values)]
        present = _signed_log1p(present) if spec.log1p else present
        indicator = bool(np.isnan(values).any()) if spec.indicator is None else spec.indicator
        if not len(present):
            return cls(0.0, 1.0, -spec.clip, spec.clip, spec.log1p, indicator)
        if spec.method == "minmax":
            span = float(present.max() - present.min())
            return cls(float(present.min()), 1 / span if span > 0 else 1.0, 0.0, 1.0, spec.log1p, indicator)
        mean, deviation = float(present.mean()), float(present.std())
        constant = deviation <= 1e-12 * max(1.0, abs(mean))
        return cls(mean, 1.0 if constant else 1 / deviation, -spec.clip, spec.clip, spec.log1p, indicator)


@dataclass(frozen=True, slots=True)
class RawValues:
    """x as float32; missing → NaN."""

    width: int = 1


class NumberBlock:
    """The scaled and raw columns of one side, computed together: a request has many columns and few rows."""

    def __init__(self, columns: Sequence[tuple[str, int, ScaleValues | RawValues]]) -> None:
        """columns: (name, position of its first output, encoder)."""
        raw = ScaleValues(0.0, 1.0, -np.inf, np.inf, False, False)
        scales = [encoder if isinstance(encoder, ScaleValues) else raw for _, _, encoder in columns]
        self.names = [name for name, _, _ in columns]
        self._positions = np.array([position for _, position, _ in columns], np.int64)
        self._shift, self._factor, self._low, self._high = (
            np.array([getattr(scale, name) for scale in scales]) for name in ("shift", "factor", "low", "high")
        )
        self._missing = np.array([0.0 if isinstance(encoder, ScaleValues) else np.nan for _, _, encoder in columns])
        self._logs = np.flatnonzero([scale.log1p for scale in scales])
        self._indicators = np.flatnonzero([scale.indicator for scale in scales])

    def write(self, arrays: Mapping[str, pa.Array], out: FloatArray) -> None:
        """Fill these columns of `out`, (n, w) float32, from the columns `names` of a side."""
        block = np.empty((len(self.names), len(out)), np.float64)
        for i, name in enumerate(self.names):
            block[i] = floats(arrays[name])
        block = block.T
        missing = np.isnan(block)
        if len(self._logs):
            block[:, self._logs] = _signed_log1p(block[:, self._logs])
        block -= self._shift
        block *= self._factor
        np.clip(block, self._low, self._high, out=block)
        np.copyto(block, self._missing, where=missing)
        with np.errstate(over="ignore"):  # beyond float32 is infinite, to which trees have an answer
            out[:, self._positions] = block
        if len(self._indicators):
            out[:, self._positions[self._indicators] + 1] = missing[:, self._indicators]


@dataclass(frozen=True, slots=True)
class VectorValues:
    """(n, width) floats, zeros where null."""

    width: int

    @classmethod
    def fit(cls, spec: Vector) -> VectorValues:
        return cls(spec.width)

    def values(self, array: pa.Array) -> FloatArray:
        starts, lengths, elements = list_parts(array)
        out = np.zeros((len(array), self.width), np.float32)
        present = lengths > 0
        if (lengths[present] != self.width).any():
            wrong = int(lengths[present & (lengths != self.width)][0])
            raise DataError(f"a vector of {wrong} numbers came where the model was fitted on {self.width}")
        if present.any():
            numbers = np.nan_to_num(floats(elements))
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
    """Where each row's list starts, how long it is (null: 0), and the elements that the starts count in."""
    offsets = array.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(offsets)
    if array.null_count:
        lengths = np.where(nulls_of(array), 0, lengths)
    return offsets[:-1], lengths, array.values


def padded_ids(array: pa.Array, table: IdTable, *, last: int | None) -> IntArray:
    """(n, L) ids of each list's last `last` elements, in their order, padded by 0 on the right; L is at least 1."""
    starts, lengths, elements = list_parts(array)
    kept = lengths if last is None else np.minimum(lengths, last)
    width = max(1, int(kept.max(initial=0)))
    if len(array) == 1:
        found = table.ids(elements.slice(starts[0] + lengths[0] - kept[0], kept[0]))
        return np.zeros((1, 1), np.int64) if not len(found) else found[None, :]
    out = np.zeros((len(array), width), np.int64)
    total = int(kept.sum())
    if total:
        columns = np.arange(total) - np.repeat(np.cumsum(kept) - kept, kept)
        if total == array.offsets[len(array)].as_py() - starts[0]:  # nothing is left out between the lists
            elements = elements.slice(starts[0], total)
        else:
            elements = elements.take(pa.array(np.repeat(starts + lengths - kept, kept) + columns))
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
