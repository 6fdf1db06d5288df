"""How each Feast value type is held in a packed row and in Arrow, and how values move between types.

Three layouts, chosen so that what a model reads most costs least:

- word: the value is the row's own 8-byte slot (integers, booleans and microseconds as int64, floats as float64)
- bytes: the slot says where in the row's tail the bytes are (strings, bytes, lists of numbers, lists of strings)
- proto: as bytes, holding a serialized feast.types.Value; for maps, sets, structs and nested lists, which are rare

Timestamps are kept in microseconds, finer than the seconds of Feast's protos, so that a value read online equals the
value read offline.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

import numpy as np
import pyarrow as pa
from feast.protos.feast.types import Value_pb2
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.types import from_feast_to_pyarrow_type, from_value_type
from feast.value_type import ValueType

from plait.errors import StoreError

Layout = Literal["int", "float", "binary", "fixed_list", "binary_list", "proto"]
NULL_SECONDS = int(np.datetime64("NaT").astype(np.int64))  # how Feast writes a missing moment into a proto
US = 1_000_000


@dataclass(frozen=True, slots=True)
class Storage:
    """One value type's layout. `arrow` is what readers get; `item` the stored dtype of a fixed list's elements."""

    layout: Layout
    arrow: pa.DataType
    field: str = ""  # of feast.types.Value
    item: np.dtype[Any] | None = None

    @property
    def in_word(self) -> bool:
        return self.layout in ("int", "float")


MOMENT = pa.timestamp("us", tz="UTC")
STORAGES: dict[ValueType, Storage] = {
    ValueType.INT32: Storage("int", pa.int32(), "int32_val"),
    ValueType.INT64: Storage("int", pa.int64(), "int64_val"),
    ValueType.BOOL: Storage("int", pa.bool_(), "bool_val"),
    ValueType.UNIX_TIMESTAMP: Storage("int", MOMENT, "unix_timestamp_val"),
    ValueType.FLOAT: Storage("float", pa.float32(), "float_val"),
    ValueType.DOUBLE: Storage("float", pa.float64(), "double_val"),
    ValueType.STRING: Storage("binary", pa.string(), "string_val"),
    ValueType.BYTES: Storage("binary", pa.binary(), "bytes_val"),
    ValueType.PDF_BYTES: Storage("binary", pa.binary(), "bytes_val"),
    ValueType.IMAGE_BYTES: Storage("binary", pa.binary(), "bytes_val"),
    ValueType.JSON: Storage("binary", pa.large_string(), "json_val"),
    ValueType.UUID: Storage("binary", pa.string(), "uuid_val"),
    ValueType.TIME_UUID: Storage("binary", pa.string(), "time_uuid_val"),
    ValueType.DECIMAL: Storage("binary", pa.string(), "decimal_val"),
    ValueType.INT32_LIST: Storage("fixed_list", pa.list_(pa.int32()), "int32_list_val", np.dtype("<i4")),
    ValueType.INT64_LIST: Storage("fixed_list", pa.list_(pa.int64()), "int64_list_val", np.dtype("<i8")),
    ValueType.FLOAT_LIST: Storage("fixed_list", pa.list_(pa.float32()), "float_list_val", np.dtype("<f4")),
    ValueType.DOUBLE_LIST: Storage("fixed_list", pa.list_(pa.float64()), "double_list_val", np.dtype("<f8")),
    ValueType.BOOL_LIST: Storage("fixed_list", pa.list_(pa.bool_()), "bool_list_val", np.dtype("u1")),
    ValueType.UNIX_TIMESTAMP_LIST: Storage("fixed_list", pa.list_(MOMENT), "unix_timestamp_list_val", np.dtype("<i8")),
    ValueType.STRING_LIST: Storage("binary_list", pa.list_(pa.string()), "string_list_val"),
    ValueType.BYTES_LIST: Storage("binary_list", pa.list_(pa.binary()), "bytes_list_val"),
}
_TEXT = {ValueType.JSON, ValueType.UUID, ValueType.TIME_UUID, ValueType.DECIMAL}
_DICTS = {ValueType.MAP, ValueType.MAP_LIST, ValueType.STRUCT, ValueType.STRUCT_LIST}  # Feast takes JSON for these
_MAYBE_NULL = (
    ValueType.JSON_LIST,
    ValueType.VALUE_LIST,
    ValueType.VALUE_SET,
    ValueType.MAP_LIST,
    ValueType.STRUCT_LIST,
)
_NULL_ELEMENT = "a list holds a null element, which no Feast value type can; drop or fill such elements"
_LIST_MESSAGES = {
    "int32_list_val": Value_pb2.Int32List,
    "int64_list_val": Value_pb2.Int64List,
    "float_list_val": Value_pb2.FloatList,
    "double_list_val": Value_pb2.DoubleList,
    "bool_list_val": Value_pb2.BoolList,
    "unix_timestamp_list_val": Value_pb2.Int64List,
    "string_list_val": Value_pb2.StringList,
    "bytes_list_val": Value_pb2.BytesList,
}


def storage_of(value_type: ValueType) -> Storage:
    """The storage of a value type; every type has one, what is not listed above is held as a proto."""
    known = STORAGES.get(value_type)
    if known is not None:
        return known
    if value_type in (ValueType.UNKNOWN, ValueType.NULL):
        raise StoreError(f"a feature of type {value_type.name} cannot be stored; give the field a type in feature_repo")
    return Storage("proto", pa.binary())


# Arrow -> stored arrays -------------------------------------------------------------------------------------------


def conform(column: pa.ChunkedArray | pa.Array, value_type: ValueType, *, name: str) -> pa.Array:
    """`column` as one array of the type's stored Arrow form; nulls stay nulls.

    Raises StoreError if values do not fit (a fraction in an integer feature, a null inside a list).
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of no chunks, before pyarrow 20
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    storage = storage_of(value_type)
    if storage.in_word and array.type.equals(storage.arrow):
        return array  # most features, and most of a push's cost is in calls
    if array.null_count == len(array):
        return pa.nulls(len(array), pa.string() if value_type in _TEXT else storage.arrow)
    try:
        if storage.layout == "proto" or (value_type in _TEXT and not _is_text(array.type)):
            return _to_protos_or_text(array, value_type)
        target = pa.string() if value_type in _TEXT else storage.arrow
        if array.type.equals(target):
            stored = array
        elif _has_moments(target) and pa.types.is_integer(_element(array.type)):
            for type_ in (pa.int64(), pa.timestamp("s", tz="UTC"), MOMENT):  # Feast's integers are seconds
                array = array.cast(pa.list_(type_) if _is_list(target) else type_)
            stored = array
        else:
            # Only moments may lose precision: parquet by pandas holds nanoseconds, of which we keep microseconds.
            stored = array.cast(target, safe=not _has_moments(target))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError, AssertionError, KeyError) as error:
        raise StoreError(
            f"feature {name!r} is declared {value_type.name} and came as {column.type}: {error}; "
            "make the declared type and the source agree"
        ) from error
    if pa.types.is_list(stored.type) and stored.flatten().null_count:
        raise StoreError(f"feature {name!r}: {_NULL_ELEMENT}")
    return stored


def _has_moments(target: pa.DataType) -> bool:
    return pa.types.is_timestamp(_element(target))


def _element(arrow: pa.DataType) -> pa.DataType:
    return arrow.value_type if _is_list(arrow) else arrow


def _is_list(arrow: pa.DataType) -> bool:
    return pa.types.is_list(arrow) or pa.types.is_large_list(arrow) or pa.types.is_fixed_size_list(arrow)


def _is_text(arrow: pa.DataType) -> bool:
    return pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_null(arrow)


def _to_protos_or_text(array: pa.Array, value_type: ValueType) -> pa.Array:
    if not _may_hold(array.type, value_type):
        raise TypeError(f"{array.type} holds no such values")
    values = array.to_pylist(maps_as_pydicts="strict")
    if value_type not in _MAYBE_NULL and any(isinstance(value, list) and None in value for value in values):
        raise ValueError(_NULL_ELEMENT)  # Feast would write an empty text, or the text "None"
    protos = python_values_to_proto_values(values, value_type)
    return protos_to_array(protos, value_type, name=value_type.name)


def _may_hold(arrow: pa.DataType, value_type: ValueType) -> bool:
    """False where Feast would make something up: a set of a text's letters, a struct around a number."""
    as_json = _is_text(arrow) and value_type in _DICTS
    if value_type.name.endswith(("_LIST", "_SET")):
        return _is_list(arrow) or as_json
    return value_type not in _DICTS or pa.types.is_struct(arrow) or pa.types.is_map(arrow) or as_json


# Feast's protos <-> stored arrays ---------------------------------------------------------------------------------


def protos_to_array(protos: Iterable[ValueProto], value_type: ValueType, *, name: str) -> pa.Array:
    """Feast values of one feature as a stored array; an unset proto is a null. Raises StoreError on another type."""
    storage = storage_of(value_type)
    values = [_from_proto(proto, storage, value_type, name) for proto in protos]
    if storage.layout == "proto":
        return pa.array(values, pa.binary())
    target = pa.string() if value_type in _TEXT else storage.arrow
    return pa.array(values, target)


def _from_proto(proto: ValueProto, storage: Storage, value_type: ValueType, name: str) -> Any:
    came = proto.WhichOneof("val")
    if came is None or came == "null_val":
        return None
    if storage.layout == "proto":
        return proto.SerializeToString(deterministic=True)
    if came != storage.field:
        if value_type in _TEXT and came == "string_val":
            return proto.string_val
        raise StoreError(
            f"feature {name!r} is declared {value_type.name} and came as {came}; push values of the declared type"
        )
    value = getattr(proto, came)
    if value_type is ValueType.UNIX_TIMESTAMP:
        return None if value == NULL_SECONDS else value * US
    if value_type is ValueType.UNIX_TIMESTAMP_LIST:
        return [second * US for second in value.val]
    return list(value.val) if storage.layout in ("fixed_list", "binary_list") else value


def array_to_protos(array: pa.Array, value_type: ValueType) -> list[ValueProto]:
    """The inverse of protos_to_array for an array as a reader gives it; moments lose what is below a second."""
    storage = storage_of(value_type)
    if storage.layout == "proto":
        return [ValueProto() if value is None else ValueProto.FromString(value) for value in array.to_pylist()]
    if value_type is ValueType.UNIX_TIMESTAMP:
        array = array.cast(pa.int64())
    elif value_type is ValueType.UNIX_TIMESTAMP_LIST:
        array = array.cast(pa.list_(pa.int64()))
    make = _proto_maker(storage.field, value_type)
    return [ValueProto() if value is None else make(value) for value in array.to_pylist()]


def _proto_maker(field: str, value_type: ValueType) -> Callable[[Any], ValueProto]:
    if value_type is ValueType.UNIX_TIMESTAMP:
        return lambda us: ValueProto(unix_timestamp_val=us // US)
    if value_type is ValueType.UNIX_TIMESTAMP_LIST:
        return lambda moments: ValueProto(unix_timestamp_list_val=Value_pb2.Int64List(val=[us // US for us in moments]))
    message = _LIST_MESSAGES.get(field)
    if message is None:
        return lambda value: ValueProto(**{field: value})
    return lambda value: ValueProto(**{field: message(val=value)})


def protos_column(array: pa.Array, value_type: ValueType, *, name: str) -> pa.Array:
    """A column of serialized protos as plain Arrow: Feast's own Arrow type of the value type where it has one.

    Feast's type of a map, a struct or a nested list is a stand-in: they get the type of the values that are here. Maps
    whose values share no type become structs of all their keys, null where a map has none. Raises StoreError where that
    is no type either.
    """
    protos = [None if value is None else ValueProto.FromString(value) for value in array.to_pylist()]
    values = [None if proto is None else _plain(_python(proto, value_type)) for proto in protos]
    try:
        if value_type not in _STAND_INS:
            return pa.array(values, from_feast_to_pyarrow_type(from_value_type(value_type)))
        if value_type in (ValueType.MAP, ValueType.MAP_LIST, ValueType.SCALAR_MAP):
            with suppress(pa.ArrowException):
                return pa.array(_pairs(values), _map_type(values))
        return pa.array(values)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"feature {name!r}: its {value_type.name} values share no Arrow type ({error}); "
            "store values of one type, or read it with get_online_features"
        ) from error


# Feast has no Arrow type of bytes, and those of the others hold texts.
_STAND_INS = {*_DICTS, ValueType.SCALAR_MAP, ValueType.VALUE_LIST, ValueType.VALUE_SET, ValueType.BYTES_SET}


def _python(proto: ValueProto, value_type: ValueType) -> Any:
    if value_type is ValueType.JSON_LIST:
        return list(proto.json_list_val.val)  # texts, as a Json feature is one
    return feast_value_type_to_python_type(proto, value_type)


def _plain(value: Any) -> Any:
    """What Arrow takes: UUIDs and decimals as the texts that Feast's types say; sets and keys, unordered, in order."""
    if isinstance(value, dict):
        return {key: _plain(value[key]) for key in sorted(value, key=repr)}
    if isinstance(value, (list, set)):
        return [_plain(item) for item in (sorted(value, key=repr) if isinstance(value, set) else value)]
    return str(value) if isinstance(value, (UUID, Decimal)) else value


def _map_type(values: list[Any]) -> pa.DataType:
    """The type of values in which every dict is a map; a text where there is no value to tell."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, dict) for value in present):
        keys = [_plain(key) for value in present for key in value]
        items = [item for value in present for item in value.values()]
        return pa.map_(pa.array(keys).type if keys else pa.string(), _map_type(items))
    if present and all(isinstance(value, list) for value in present):
        return pa.list_(_map_type([item for value in present for item in value]))
    return pa.array(present).type if present else pa.string()


def _pairs(value: Any) -> Any:
    """Dicts as the pairs that Arrow takes for maps of any key."""
    if isinstance(value, dict):
        return [(_plain(key), _pairs(item)) for key, item in value.items()]
    return [_pairs(item) for item in value] if isinstance(value, list) else value


# One type -> another, for rows written before a feature changed its type --------------------------------------------

_INT_RANGE = {ValueType.INT32: 2**31, ValueType.INT64: 2**63}
_ELEMENT = {
    ValueType.INT32_LIST: ValueType.INT32,
    ValueType.INT64_LIST: ValueType.INT64,
    ValueType.FLOAT_LIST: ValueType.FLOAT,
    ValueType.DOUBLE_LIST: ValueType.DOUBLE,
    ValueType.BOOL_LIST: ValueType.BOOL,
    ValueType.UNIX_TIMESTAMP_LIST: ValueType.UNIX_TIMESTAMP,
    ValueType.STRING_LIST: ValueType.STRING,
    ValueType.BYTES_LIST: ValueType.BYTES,
}


def retype(array: pa.Array, stored: ValueType, wanted: ValueType) -> pa.Array:
    """Values stored as one type, read as another: what the new type can say exactly is kept, the rest is null.

    A float read as float32 is rounded; an integer, a fraction or a text that does not fit becomes null, never a
    different value. Between a scalar and a list, or with a proto, everything is null.
    """
    target = storage_of(wanted).arrow
    values = [None if value is None else _retype(value, stored, wanted) for value in array.to_pylist()]
    return pa.array(values, target)


def _retype(value: Any, stored: ValueType, wanted: ValueType) -> Any:
    if stored in _ELEMENT and wanted in _ELEMENT:
        items = [_retype(item, _ELEMENT[stored], _ELEMENT[wanted]) for item in value]
        return None if any(item is None for item in items) else items
    numbers = {ValueType.INT32, ValueType.INT64, ValueType.FLOAT, ValueType.DOUBLE, ValueType.BOOL}
    if stored is ValueType.UNIX_TIMESTAMP and wanted is ValueType.INT64:
        return int(value.timestamp() // 1)
    if stored is ValueType.INT64 and wanted is ValueType.UNIX_TIMESTAMP:
        in_reach = abs(value) < 2**33
        return datetime.fromtimestamp(value, UTC) if in_reach else None
    if stored in numbers and wanted in numbers:
        return _renumber(value, wanted)
    texts = {ValueType.STRING, ValueType.BYTES, *_TEXT, ValueType.PDF_BYTES, ValueType.IMAGE_BYTES}
    if stored in texts and wanted in texts:
        raw = value.encode() if isinstance(value, str) else value
        if pa.types.is_binary(storage_of(wanted).arrow):
            return raw
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return None
    return None


def _renumber(value: Any, wanted: ValueType) -> Any:
    if wanted is ValueType.DOUBLE:
        return float(value)
    if wanted is ValueType.FLOAT:
        try:
            return struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            return None
    if isinstance(value, float) and not value.is_integer():  # also NaN and the infinities
        return None
    whole = int(value)
    if wanted is ValueType.BOOL:
        return bool(whole) if whole in (0, 1) else None
    limit = _INT_RANGE[wanted]
    return whole if -limit <= whole < limit else None
