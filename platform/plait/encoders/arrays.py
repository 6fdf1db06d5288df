"""Arrow columns as numpy arrays, and the hashes that encoders share.

Everything here is vectorised, and gives the same answer for one row as for a million.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from plait.errors import DataError, SpecError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

# Above this many rows it pays to look each distinct string up once.
_DICTIONARY_ROWS = 512
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_NULL_KEY = 0x6E756C6C


def columns(table: pa.Table, wanted: Sequence[tuple[str, pa.DataType]]) -> list[pa.Array]:
    """The named columns of `table`, each as one array of its type.

    Raises DataError if the table lacks a column or its values do not fit the type without loss.
    """
    batches = table.to_batches()
    if len(batches) != 1:
        batches = table.combine_chunks().to_batches() or [_empty(table.schema)]
    batch, schema = batches[0], table.schema
    found = []
    for name, dtype in wanted:
        position = schema.get_field_index(name)
        if position < 0:
            raise DataError(f"the rows have no column {name!r}; they have: {', '.join(table.column_names)}")
        array = batch.column(position)
        found.append(array if array.type == dtype else _cast(array, name, dtype))
    return found


def column(table: pa.Table, name: str, dtype: pa.DataType) -> pa.Array:
    """One column, as `columns` gives it."""
    return columns(table.select([name]) if name in table.column_names else table, [(name, dtype)])[0]


def _cast(array: pa.Array, name: str, dtype: pa.DataType) -> pa.Array:
    try:
        return array.cast(dtype)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise DataError(f"column {name!r} is {array.type} and does not fit {dtype}: {error}") from error


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def values_and_nulls(array: pa.Array) -> tuple[IntArray, BoolArray | None]:
    """The values of an integer or boolean column, and where it is null (None: nowhere). Nulls read as 0."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if array.null_count == 0:
        return array.to_numpy().astype(np.int64), None
    nulls = nulls_of(array)
    values = np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())
    numbers = values[array.offset : array.offset + len(array)].astype(np.int64)
    numbers[nulls] = 0
    return numbers, nulls


def nulls_of(array: pa.Array) -> BoolArray:
    """Where a column with at least one null is null."""
    # Arrow's kernels cost 10 us a call, more than all other work on a request's column; its buffers cost nothing.
    bits = np.unpackbits(np.frombuffer(array.buffers()[0], np.uint8), bitorder="little")
    return bits[array.offset : array.offset + len(array)] == 0


def floats(array: pa.Array) -> npt.NDArray[np.float64]:
    """The values of a number or boolean column as float64; null is NaN."""
    if pa.types.is_boolean(array.type):  # with nulls, numpy would make objects of them
        array = array.cast(pa.int8())
    return np.asarray(array.to_numpy(zero_copy_only=False), np.float64)


def map_strings(array: pa.Array, function: Callable[[str | None], int], *, dtype: type = np.int64) -> npt.NDArray[Any]:
    """`function` of every string or null; called once per distinct one when there are many."""
    if len(array) <= _DICTIONARY_ROWS:
        return np.array([function(s) for s in array.to_pylist()], dtype)
    encoded = array.dictionary_encode()
    mapped: npt.NDArray[Any] = np.array([*map(function, encoded.dictionary.to_pylist()), function(None)], dtype)
    indices: npt.NDArray[Any] = pc.fill_null(encoded.indices, len(mapped) - 1).to_numpy()
    return mapped[indices]


def murmur3_32_of_int64(values: IntArray, *, seed: int = 0) -> npt.NDArray[np.uint32]:
    """murmur3_x86_32 of each value's 8 little-endian bytes, as `mmh3.hash(value_bytes, seed, signed=False)`.

    Source: Appleby, MurmurHash3 (public domain reference code).
    """
    words = np.ascontiguousarray(values, np.int64).view(np.uint32).reshape(-1, 2)  # little-endian hosts only
    hashed = np.full(len(words), seed, np.uint32)
    for word in (words[:, 0], words[:, 1]):
        k = word * np.uint32(0xCC9E2D51)
        k = (k << np.uint32(15)) | (k >> np.uint32(17))
        hashed ^= k * np.uint32(0x1B873593)
        hashed = (hashed << np.uint32(13)) | (hashed >> np.uint32(19))
        hashed = hashed * np.uint32(5) + np.uint32(0xE6546B64)
    hashed ^= np.uint32(8)
    hashed ^= hashed >> np.uint32(16)
    hashed *= np.uint32(0x85EBCA6B)
    hashed ^= hashed >> np.uint32(13)
    hashed *= np.uint32(0xC2B2AE35)
    hashed ^= hashed >> np.uint32(16)
    return hashed


def mix64(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit words in which every input bit moves about half of the output bits.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    z = keys + _GOLDEN_GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keys_of(array: pa.Array) -> npt.NDArray[np.uint64]:
    """A 64-bit key of every value of an integer, boolean or string column; null has a key of its own."""
    if is_text(array.type):
        return mix64(map_strings(array, _text_key, dtype=np.uint64))
    values, nulls = values_and_nulls(array)
    keys = mix64(values.view(np.uint64))
    if nulls is not None:
        keys[nulls] = mix64(np.array([2**64 - 1 - _NULL_KEY], np.uint64))[0]
    return keys


def cross_keys(left: npt.NDArray[np.uint64], right: npt.NDArray[np.uint64]) -> IntArray:
    """One 64-bit key per pair of `keys_of` values: (a, b) and (b, a) differ. A single row on a side is repeated.

    Rows with equal pairs have equal keys; different pairs collide with probability 2^-64 each.
    """
    mixed: npt.NDArray[np.uint64] = mix64(mix64(left) + right * np.uint64(0xD6E8FEB86659FD93))
    return mixed.view(np.int64)


@lru_cache(maxsize=1 << 16)
def _text_key(text: str | None) -> int:
    return _NULL_KEY if text is None else mmh3.hash64(text, signed=False)[0]


def is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def is_list(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_list(dtype) or pa.types.is_large_list(dtype))


def is_number(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_boolean(dtype))


def dtype_text(dtype: pa.DataType) -> str:
    """A type as `dtype_of` reads it: int64, double, string, list<item: int64>, …"""
    return str(dtype)


def dtype_of(text: str) -> pa.DataType:
    """The type that `dtype_text` wrote. Raises SpecError for anything else.

    >>> dtype_of("list<int64>").value_type
    DataType(int64)
    """
    if match := re.fullmatch(r"list<(?:\w+: )?(.+?)(?: not null)?>", text):
        return pa.list_(dtype_of(match[1]))
    if match := re.fullmatch(r"timestamp\[(\w+)(?:, tz=(.+))?\]", text):
        return pa.timestamp(match[1], match[2])
    try:
        return pa.type_for_alias(text)
    except ValueError as error:
        raise SpecError(f"{text!r} is no column type; use int64, double, bool, string or list<…> of these") from error
