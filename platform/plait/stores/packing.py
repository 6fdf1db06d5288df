"""The packed row: all features of one entity in one view as one string of bytes.

    word 0      fingerprint of the row's schema (names and types of its features)
    word 1      event timestamp, int64 microseconds UTC
    word 2      created timestamp, the same; the smallest int64 where there is none
    words 3…    validity, one bit a feature, 64 a word
    words …     one slot a feature: the value itself, or where in the tail its bytes are (offset, then length, uint32)
    tail        strings, bytes, lists, protos

All little-endian, in words of 8 bytes, so that a batch of rows is one integer matrix: numpy reads the header, the
validity and every number of 200 rows in a handful of calls, and Arrow arrays are views on the result. A row carries its
schema's fingerprint, so rows written before a view gained, lost or retyped a feature are read by the schema they were
written in.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from feast.value_type import ValueType

from plait.errors import StoreError
from plait.stores.values import Storage, retype, storage_of

NO_CREATED = -(2**63)
HEADER_WORDS = 3
_CUT_SHORT = "a stored row ends before its values do; materialize the view again"


@dataclass(frozen=True)
class Feature:
    """One stored feature."""

    name: str
    value_type: ValueType

    def __hash__(self) -> int:
        return hash(self.name)  # reads look plans up by their features; an enum hashes slowly

    @cached_property
    def storage(self) -> Storage:
        return storage_of(self.value_type)


@dataclass(frozen=True)
class RowSchema:
    """The features of a row, by name: Feast lists them in an order of its own, which may differ between processes."""

    features: tuple[Feature, ...]

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features]
        if names != sorted(set(names)):
            raise StoreError(f"a row schema has unique features in order of name, not {names}")

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @classmethod
    def of(cls, features: Mapping[str, ValueType]) -> RowSchema:
        return _schema_of(tuple(sorted(features.items())))

    @cached_property
    def text(self) -> str:
        """The schema as JSON, in which stores keep it."""
        return json.dumps([[feature.name, feature.value_type.name] for feature in self.features])

    @classmethod
    def from_text(cls, text: str) -> RowSchema:
        return cls(tuple(Feature(name, ValueType[kind]) for name, kind in json.loads(text)))

    @cached_property
    def fingerprint(self) -> bytes:
        """8 bytes that stand for this schema in every row; equal in every process and release."""
        return hashlib.blake2b(self.text.encode(), digest_size=8, person=b"plait-row").digest()

    @cached_property
    def positions(self) -> dict[str, int]:
        return {feature.name: position for position, feature in enumerate(self.features)}

    @cached_property
    def validity_words(self) -> int:
        return -(-len(self.features) // 64)

    @cached_property
    def words(self) -> int:
        """Length of the fixed part in words."""
        return HEADER_WORDS + self.validity_words + len(self.features)

    @cached_property
    def null_row(self) -> bytes:
        """A row of this schema in which everything is missing."""
        return self.fingerprint + bytes(8 * self.words - 8)


@lru_cache(maxsize=512)
def _schema_of(features: tuple[tuple[str, ValueType], ...]) -> RowSchema:
    return RowSchema(tuple(Feature(name, value_type) for name, value_type in features))


# Packing ----------------------------------------------------------------------------------------------------------


def pack(schema: RowSchema, columns: Sequence[pa.Array], event_us: np.ndarray, created_us: np.ndarray) -> list[bytes]:
    """Rows of `columns`, which are in the schema's order and conformed (see values.conform).

    event_us, created_us: int64, shape (n_rows,).
    """
    n_rows = len(event_us)
    words = np.zeros((n_rows, schema.words), dtype="<i8")
    words[:, 0] = np.frombuffer(schema.fingerprint, dtype="<i8")[0]
    words[:, 1] = event_us
    words[:, 2] = created_us
    valid = np.zeros((n_rows, 64 * schema.validity_words), dtype=bool)
    first_slot = HEADER_WORDS + schema.validity_words
    tails: list[list[Any]] = []
    tail_end = np.full(n_rows, 8 * schema.words, dtype=np.int64)
    for position, (feature, column) in enumerate(zip(schema.features, columns, strict=True)):
        slot = words[:, first_slot + position]
        storage = feature.storage
        if storage.in_word and not column.null_count:
            valid[:, position] = True
            slot[:] = _words_of(column, storage)
            continue
        present = _validity(column)
        valid[:, position] = present
        if storage.in_word:
            slot[:] = np.where(present, _words_of(column.fill_null(_filler(column.type)), storage), 0)
            continue
        pieces, lengths = _pieces_of(column, storage, present)
        slot[:] = np.where(present, tail_end | (lengths << 32), 0)
        tail_end += lengths
        tails.extend(pieces)
    if n_rows and tail_end.max() >= 2**31:
        raise StoreError(f"a row of {int(tail_end.max())} bytes is too large to store; 2 GiB is the limit")
    if schema.validity_words:
        bits = np.packbits(valid, axis=1, bitorder="little")
        words[:, HEADER_WORDS:first_slot] = np.ascontiguousarray(bits).view("<i8")
    fixed = words.view(f"V{8 * schema.words}").ravel().tolist()
    return [b"".join(parts) for parts in zip(fixed, *tails, strict=True)] if tails else fixed


def _validity(column: pa.Array) -> np.ndarray:
    if not column.null_count:
        return np.ones(len(column), dtype=bool)
    return column.is_valid().to_numpy(zero_copy_only=False)


def _words_of(column: pa.Array, storage: Storage) -> np.ndarray:
    """A scalar column without nulls as int64 words."""
    if storage.layout == "float":
        return _numpy(column).astype("<f8").view("<i8")
    if pa.types.is_timestamp(column.type):
        column = column.view(pa.int64())
    return _numpy(column).astype("<i8")


def _filler(arrow: pa.DataType) -> pa.Scalar:
    """Some value of a word's type, to stand where a null is while a column is moved."""
    return pa.scalar(0).cast(arrow)


def _numpy(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _pieces_of(column: pa.Array, storage: Storage, present: np.ndarray) -> tuple[list[list[Any]], np.ndarray]:
    """Lists (one or more) of n_rows byte pieces that make up each row's part of the tail, and its length."""
    if storage.layout == "fixed_list":
        assert storage.item is not None
        offsets = _offsets(column)
        values = column.values
        if pa.types.is_timestamp(values.type):
            values = values.view(pa.int64())
        data = memoryview(_numpy(values).astype(storage.item).tobytes())
        return _cut(data, offsets * storage.item.itemsize, present)
    if storage.layout == "binary_list":
        return _string_list_pieces(column, present)
    data, offsets = _binary(column)
    return _cut(data, offsets, present)


def _string_list_pieces(column: pa.Array, present: np.ndarray) -> tuple[list[list[Any]], np.ndarray]:
    """Three pieces a row: how many strings, their lengths, their bytes."""
    offsets = _offsets(column)
    data, ends = _binary(column.values)
    counts = np.where(present, np.diff(offsets), 0)
    empty = [b""] * len(column)
    heads: list[Any] = np.ascontiguousarray(counts.astype("<u4")).view("V4").tolist()
    heads = [head if here else b"" for head, here in zip(heads, present.tolist(), strict=True)] if len(column) else []
    if not len(column.values):
        return [heads, empty, empty], np.where(present, 4, 0)
    lengths_data = memoryview(np.diff(ends).astype("<u4").tobytes())
    length_pieces, length_sizes = _cut(lengths_data, offsets * 4, present)
    data_pieces, data_sizes = _cut(data, ends[offsets], present)
    return [heads, *length_pieces, *data_pieces], np.where(present, 4, 0) + length_sizes + data_sizes


def _offsets(column: pa.Array) -> np.ndarray:
    return column.offsets.to_numpy().astype(np.int64)


def _binary(column: pa.Array) -> tuple[memoryview, np.ndarray]:
    """Bytes of a string or binary array, and where its values begin and end: shape (n + 1,)."""
    if pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type):
        column = column.cast(pa.binary())
    _, offsets, data = column.buffers()
    if offsets is None or not len(column):
        return memoryview(b""), np.zeros(len(column) + 1, dtype=np.int64)
    where = np.frombuffer(offsets, dtype="<i4", count=len(column) + 1, offset=4 * column.offset).astype(np.int64)
    return memoryview(data if data is not None else b""), where


def _cut(data: memoryview, offsets: np.ndarray, present: np.ndarray) -> tuple[list[list[Any]], np.ndarray]:
    starts = offsets[:-1]
    lengths = np.where(present, offsets[1:] - starts, 0)
    ends = (starts + lengths).tolist()
    return [[data[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]], lengths


# Unpacking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Rows as columns: one array per wanted feature, null where the row, the feature or the value is missing.

    Features held as protos come as binary arrays of serialized protos.
    """

    arrays: list[pa.Array]
    event_us: np.ndarray  # int64 (n,); 0 where not found
    found: np.ndarray  # bool (n,); a row is stored, expired or not
    expired: np.ndarray  # bool (n,)


def unpack(
    rows: Sequence[bytes | None],
    wanted: tuple[Feature, ...],
    schemas: Mapping[bytes, RowSchema],
    *,
    oldest_us: int | None,
) -> Unpacked:
    """The `wanted` features of `rows` (None: no such row), typed as wanted whatever schema each row was written in.

    schemas: every fingerprint that occurs. oldest_us: rows with an event timestamp before it have expired.
    """
    fingerprints = {row[:8] for row in rows if row is not None}
    if not fingerprints:
        n_rows = len(rows)
        nothing = np.zeros(n_rows, dtype=bool)
        arrays = [pa.nulls(n_rows, feature.storage.arrow) for feature in wanted]
        return Unpacked(arrays, np.zeros(n_rows, dtype=np.int64), nothing, nothing)
    if len(fingerprints) == 1:
        return _unpack_alike(rows, wanted, schemas[fingerprints.pop()], oldest_us)
    return _unpack_mixed(rows, wanted, schemas, oldest_us)


def _unpack_mixed(
    rows: Sequence[bytes | None],
    wanted: tuple[Feature, ...],
    schemas: Mapping[bytes, RowSchema],
    oldest_us: int | None,
) -> Unpacked:
    """Rows of several schemas: each kind by itself, then put back in order."""
    kinds: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(row[:8] if row is not None else b"", []).append(index)
    parts = [unpack([rows[index] for index in group], wanted, schemas, oldest_us=oldest_us) for group in kinds.values()]
    order = np.argsort(np.concatenate([np.asarray(group) for group in kinds.values()]), kind="stable")
    take = pa.array(order)
    arrays = [pa.concat_arrays([part.arrays[column] for part in parts]).take(take) for column in range(len(wanted))]
    return Unpacked(
        arrays,
        np.concatenate([part.event_us for part in parts])[order],
        np.concatenate([part.found for part in parts])[order],
        np.concatenate([part.expired for part in parts])[order],
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to read where, for one pair of stored schema and wanted features."""

    positions: np.ndarray  # (k,) position in the row of each wanted feature that the row has
    slots: np.ndarray  # (k,) its word
    stored: tuple[tuple[ValueType, Storage] | None, ...]  # per wanted feature, as the row has it; None: it lacks it
    wanted: tuple[tuple[ValueType, Storage], ...]
    has_tail: bool
    header: struct.Struct  # header and validity of one row
    # Per wanted feature: the word of its validity, the bit in it, its slot, and (type, values per word). Empty unless
    # all wanted are words of the wanted type that Arrow can view in place.
    single: tuple[tuple[int, int, int, tuple[pa.DataType, int]], ...]


@lru_cache(maxsize=512)
def _plan(schema: RowSchema, wanted: tuple[Feature, ...]) -> _Plan:
    held = [schema.positions.get(feature.name) for feature in wanted]
    stored = [None if position is None else schema.features[position] for position in held]
    positions = np.array([position for position in held if position is not None], dtype=np.intp)
    return _Plan(
        positions=positions,
        slots=positions + HEADER_WORDS + schema.validity_words,
        stored=tuple((feature.value_type, feature.storage) if feature else None for feature in stored),
        wanted=tuple((feature.value_type, feature.storage) for feature in wanted),
        has_tail=not all(feature.storage.in_word for feature in schema.features),
        header=struct.Struct(f"<{HEADER_WORDS + schema.validity_words}q"),
        single=_single(schema, held, wanted),
    )


def _single(schema: RowSchema, held: Sequence[int | None], wanted: Sequence[Feature]) -> tuple[Any, ...]:
    first_slot = HEADER_WORDS + schema.validity_words
    single = []
    for position, feature in zip(held, wanted, strict=True):
        arrow = feature.storage.arrow
        same = position is not None and schema.features[position] == feature
        if position is None or not same or not feature.storage.in_word or pa.types.is_float32(arrow):
            return ()
        place = (HEADER_WORDS + position // 64, position % 64, first_slot + position)
        single.append((*place, (arrow, _values_per_word(arrow))))
    return tuple(single)


def _unpack_one(row: bytes, plan: _Plan, oldest_us: int | None) -> Unpacked:
    """A single row of plain values: its arrays are views on the row, as most of a small read's cost is in calls."""
    header = plan.header.unpack_from(row)
    expired = oldest_us is not None and header[1] < oldest_us
    buffer = pa.py_buffer(row)
    arrays = []
    for word, bit, slot, (arrow, per_word) in plan.single:
        if expired or not header[word] >> bit & 1:
            arrays.append(_one_null(arrow))
        else:
            arrays.append(pa.Array.from_buffers(arrow, 1, [None, buffer], 0, slot * per_word))
    return Unpacked(arrays, np.array(header[1:2]), np.array([True]), np.array([expired]))


@lru_cache
def _one_null(arrow: pa.DataType) -> pa.Array:
    return pa.nulls(1, arrow)


def _values_per_word(arrow: pa.DataType) -> int:
    """How many values of a type lie in a word, of which the first is the one that is stored there."""
    return 64 // arrow.bit_width


def _unpack_alike(
    rows: Sequence[bytes | None], wanted: tuple[Feature, ...], schema: RowSchema, oldest_us: int | None
) -> Unpacked:
    plan = _plan(schema, wanted)
    n_rows, size = len(rows), 8 * schema.words
    if plan.single and n_rows == 1 and rows[0] is not None and len(rows[0]) >= size:
        return _unpack_one(rows[0], plan, oldest_us)
    found = np.array([row is not None for row in rows])
    null_row = schema.null_row
    full = [row or null_row for row in rows]
    fixed = b"".join([row[:size] for row in full] if plan.has_tail else full)
    if len(fixed) != n_rows * size:
        raise StoreError(f"a stored row is not of its schema's {size} bytes; materialize the view again")
    words = np.frombuffer(fixed, dtype="<i8").reshape(n_rows, schema.words)
    event_us = words[:, 1]
    expired = found & (event_us < oldest_us) if oldest_us is not None else np.zeros(n_rows, dtype=bool)

    first_slot = HEADER_WORDS + schema.validity_words
    bits = np.unpackbits(
        np.ascontiguousarray(words[:, HEADER_WORDS:first_slot]).view(np.uint8), axis=1, bitorder="little"
    )
    valid = bits.T[plan.positions].astype(bool)  # (k, n)
    if oldest_us is not None:
        valid &= ~expired
    values = np.ascontiguousarray(words.T[plan.slots])  # (k, n)
    null_counts = (n_rows - valid.sum(axis=1)).tolist()
    validity = np.packbits(valid, axis=1, bitorder="little")

    arrays = []
    row_number = 0
    for (value_type, storage), stored in zip(plan.wanted, plan.stored, strict=True):
        if stored is None:
            arrays.append(pa.nulls(n_rows, storage.arrow))
            continue
        stored_type, stored_as = stored
        n_nulls = null_counts[row_number]
        mask = pa.py_buffer(validity[row_number]) if n_nulls else None
        column = values[row_number]
        if stored_as.in_word:
            array = _scalar_array(column, stored_as, mask, n_nulls)
        else:
            array = _tail_array(full, column, valid[row_number], stored_as, mask, n_nulls)
        if stored_type is not value_type:
            array = retype(array, stored_type, value_type)
        arrays.append(array)
        row_number += 1
    return Unpacked(arrays, event_us.copy(), found, expired)


def _scalar_array(column: np.ndarray, storage: Storage, mask: pa.Buffer | None, n_nulls: int) -> pa.Array:
    arrow, n_rows = storage.arrow, len(column)
    if storage.layout == "float":
        column = column.view("<f8")
        if pa.types.is_float32(arrow):
            column = column.astype("<f4")
    elif pa.types.is_int32(arrow):
        column = column.astype("<i4")
    elif pa.types.is_boolean(arrow):
        column = np.packbits(column.astype(bool), bitorder="little")
    return pa.Array.from_buffers(arrow, n_rows, [mask, pa.py_buffer(column)], n_nulls)


def _tail_array(
    rows: Sequence[bytes], slots: np.ndarray, valid: np.ndarray, storage: Storage, mask: pa.Buffer | None, n_nulls: int
) -> pa.Array:
    places = np.where(valid, slots, 0)
    starts = places & 0xFFFFFFFF
    lengths = places >> 32
    pieces = [row[a:b] for row, a, b in zip(rows, starts.tolist(), (starts + lengths).tolist(), strict=True)]
    ends = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    data = b"".join(pieces)
    if len(data) != ends[-1]:
        raise StoreError(_CUT_SHORT)
    if storage.layout == "binary_list":
        return _string_lists(pieces, data, ends, storage, mask, n_nulls)
    if storage.layout == "fixed_list":
        assert storage.item is not None
        items = np.frombuffer(data, dtype=storage.item)
        element = storage.arrow.value_type
        plain = np.packbits(items, bitorder="little") if pa.types.is_boolean(element) else items
        child = pa.Array.from_buffers(element, len(items), [None, pa.py_buffer(plain)], 0)
        offsets = pa.py_buffer((ends // storage.item.itemsize).astype("<i4"))
        return pa.Array.from_buffers(storage.arrow, len(rows), [mask, offsets], n_nulls, children=[child])
    small = pa.string() if storage.arrow == pa.large_string() else storage.arrow
    array = pa.Array.from_buffers(
        small, len(rows), [mask, pa.py_buffer(ends.astype("<i4")), pa.py_buffer(data)], n_nulls
    )
    return array if small == storage.arrow else array.cast(storage.arrow)


def _string_lists(
    pieces: Sequence[bytes], data: bytes, ends: np.ndarray, storage: Storage, mask: pa.Buffer | None, n_nulls: int
) -> pa.Array:
    """Lists of strings from rows' pieces (see _string_list_pieces); `data` is the pieces joined, cut at `ends`."""
    raw = np.frombuffer(data, dtype=np.uint8)
    sizes = np.diff(ends)
    starts = ends[:-1]
    counts = np.zeros(len(pieces), dtype=np.int64)
    held = sizes > 0
    if (sizes[held] < 4).any():
        raise StoreError(_CUT_SHORT)
    counts[held] = _uint32_at(raw, starts[held])
    heads = np.where(held, 4 + 4 * counts, 0)
    if (heads > sizes).any():
        raise StoreError(_CUT_SHORT)
    firsts = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum(counts, out=firsts[1:])
    places = np.repeat(starts + 4 - 4 * firsts[:-1], counts) + 4 * np.arange(firsts[-1])
    item_ends = np.zeros(len(places) + 1, dtype=np.int64)
    np.cumsum(_uint32_at(raw, places), out=item_ends[1:])
    if not np.array_equal(np.diff(item_ends[firsts]), sizes - heads):
        raise StoreError(_CUT_SHORT)
    text = b"".join([piece[head:] for piece, head in zip(pieces, heads.tolist(), strict=True)])
    buffers = [None, pa.py_buffer(item_ends.astype("<i4")), pa.py_buffer(text)]
    items = pa.Array.from_buffers(storage.arrow.value_type, len(places), buffers, 0)
    offsets = pa.py_buffer(firsts.astype("<i4"))
    return pa.Array.from_buffers(storage.arrow, len(pieces), [mask, offsets], n_nulls, children=[items])


def _uint32_at(raw: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The little-endian uint32 that begin at `places` of `raw` bytes, aligned or not."""
    return np.ascontiguousarray(raw[places[:, None] + np.arange(4)]).view("<u4").ravel()
