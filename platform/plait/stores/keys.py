"""Where a row is found: the values of a view's join keys as one integer or one string of bytes.

A view belongs to one set of join keys, so only the values need to be in the key. One integer join key stays an integer
(SQLite finds rows by it fastest); one text is its UTF-8 bytes; several are length-prefixed parts in order of name, so
that ("ab", "c") and ("a", "bc") differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from feast.feature_view import DUMMY_ENTITY_ID
from feast.infra.online_stores.helpers import compute_versioned_name
from feast.protos.feast.types.EntityKey_pb2 import EntityKey as EntityKeyProto
from feast.value_type import ValueType

from plait.errors import StoreError, UnknownNameError
from plait.stores.packing import Feature, RowSchema

if TYPE_CHECKING:
    from feast import FeatureView
    from feast.repo_config import RepoConfig

Key = int | bytes
_KINDS = {
    ValueType.INT32: "int",
    ValueType.INT64: "int",
    ValueType.UNIX_TIMESTAMP: "int",
    ValueType.STRING: "text",
    ValueType.BYTES: "bytes",
}
_ARROW = {"int": pa.int64(), "text": pa.string(), "bytes": pa.binary()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredView:
    """What a store needs to know of a feature view."""

    name: str
    table: str  # unique in the store: project, view and, where Feast versions views online, version
    join_keys: tuple[tuple[str, str], ...]  # (name, kind) in order of name
    schema: RowSchema
    ttl_us: int | None

    @classmethod
    def of(cls, config: RepoConfig, view: FeatureView) -> StoredView:
        """Raises StoreError if a join key or feature is of a type that cannot be stored."""
        keys = []
        for field in sorted(view.entity_columns, key=lambda field: field.name):
            value_type = field.dtype.to_value_type()
            if value_type not in _KINDS:
                raise StoreError(
                    f"view {view.name}: join key {field.name!r} is {value_type.name}; "
                    f"a join key is one of {', '.join(kind.name for kind in _KINDS)}"
                )
            keys.append((field.name, _KINDS[value_type]))
        if not keys:  # without entities: Feast hides the key that it gave the view where it lists views
            keys.append((DUMMY_ENTITY_ID, "text"))
        ttl = getattr(view, "ttl", None)
        versioned = config.registry.enable_online_feature_view_versioning
        return cls(
            name=view.name,
            # Feast's own "project_view" makes one table of a_b + c and a + b_c; a project's name never has a dot.
            table=f"{config.project}.{compute_versioned_name(view, versioned)}",
            join_keys=tuple(keys),
            schema=RowSchema.of({field.name: field.dtype.to_value_type() for field in view.features}),
            ttl_us=ttl // timedelta(microseconds=1) if ttl else None,  # Feast: no ttl and 0 both mean for ever
        )

    @property
    def integer_key(self) -> bool:
        return len(self.join_keys) == 1 and self.join_keys[0][1] == "int"

    @property
    def without_entities(self) -> bool:
        """Feast gives such a view a key of its own, the same for all rows."""
        return [name for name, _ in self.join_keys] == [DUMMY_ENTITY_ID]

    @property
    def key_signature(self) -> str:
        """Views whose signature changes cannot find their old rows any more."""
        return "int" if self.integer_key else ",".join(f"{name}:{kind}" for name, kind in self.join_keys)

    def features(self, names: Sequence[str] | None = None) -> tuple[Feature, ...]:
        """The named features, in that order; all of them, in order of name, if None."""
        if names is None:
            return self.schema.features
        positions = self.schema.positions
        for name in names:
            if name not in positions:
                raise UnknownNameError("feature", name, positions, where=f"view {self.name}")
        return tuple(self.schema.features[positions[name]] for name in names)

    def oldest_us(self, now: datetime) -> int | None:
        """Rows with an event timestamp before this moment have outlived the view's ttl at `now`."""
        return None if self.ttl_us is None else to_us(now) - self.ttl_us

    # Keys ---------------------------------------------------------------------------------------------------------

    def keys_of_columns(self, columns: Mapping[str, Any]) -> list[Key | None]:
        """Keys of rows given as columns of join key values (Arrow); None where a join key is null."""
        parts = [self._plain(columns, name, kind) for name, kind in self.join_keys]
        if len(parts) == 1:
            return _encode_single(parts[0], self.join_keys[0][1])
        kinds = [kind for _, kind in self.join_keys]
        return [
            None if any(value is None for value in row) else _encode_parts(row, kinds)
            for row in zip(*parts, strict=True)
        ]

    def keys_of_protos(self, entity_keys: Sequence[EntityKeyProto]) -> list[Key | None]:
        columns: dict[str, list[Any]] = {name: [] for name, _ in self.join_keys}
        for entity_key in entity_keys:
            values = dict(zip(entity_key.join_keys, entity_key.entity_values, strict=True))
            for name, column in columns.items():
                if name not in values:
                    raise StoreError(f"view {self.name}: the entity key lacks join key {name!r}, has {sorted(values)}")
                came = values[name].WhichOneof("val")
                column.append(None if came is None else getattr(values[name], came))
        return self.keys_of_columns(columns)

    def _plain(self, columns: Mapping[str, Any], name: str, kind: str) -> list[Any]:
        """One join key's values as Python ints, strs or bytes."""
        if name not in columns:
            raise StoreError(f"view {self.name} is keyed by {[key for key, _ in self.join_keys]}; {name!r} is missing")
        column = columns[name]
        if kind == "int" and isinstance(column, list) and all(type(value) is int and _fits(value) for value in column):
            return column  # what a single read costs is by the call: Arrow would double it
        try:
            if isinstance(column, list):
                column = pa.array(column, _ARROW[kind])
            if isinstance(column, pa.ChunkedArray):
                column = column.combine_chunks()
            if kind == "int" and pa.types.is_timestamp(column.type):
                column = column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
            if column.type != _ARROW[kind]:
                column = column.cast(_ARROW[kind])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, TypeError, OverflowError) as error:
            raise StoreError(f"view {self.name}: join key {name!r} holds {kind} values: {error}") from error
        if kind == "int" and not column.null_count:
            return column.to_numpy().tolist()
        return column.to_pylist()


def _encode_single(values: list[Any], kind: str) -> list[Key | None]:
    if kind != "text":
        return values
    return [None if value is None else value.encode() for value in values]


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _encode_parts(values: Sequence[Any], kinds: Sequence[str]) -> bytes:
    parts = []
    for value, kind in zip(values, kinds, strict=True):
        raw = value.to_bytes(8, "big", signed=True) if kind == "int" else value.encode() if kind == "text" else value
        parts.append(len(raw).to_bytes(4, "big") + raw)
    return b"".join(parts)


def to_us(moment: datetime) -> int:
    """Microseconds since 1970 of a moment; without a zone it is UTC, as Feast has it."""
    return (moment.replace(tzinfo=None) - (moment.utcoffset() or timedelta(0)) - _EPOCH) // timedelta(microseconds=1)


_EPOCH = datetime(1970, 1, 1)
