"""What Plait's online stores share: Feast's interface and typed columnar reads and writes over packed rows.

A backend brings a few small methods (what to fetch, put, drop and remember). The rule by which rows replace one
another is the same in all: a row with an older event timestamp never overwrites a newer one; of equal event timestamps
the newer created timestamp wins (none counts as the oldest); of equal both, the later write.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from feast import utils
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.online_stores.online_store import OnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey as EntityKeyProto
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

from plait.clock import Clock
from plait.errors import StoreError
from plait.settings import Home
from plait.stores.keys import Key, StoredView, to_us
from plait.stores.packing import NO_CREATED, Feature, RowSchema, Unpacked, pack, unpack
from plait.stores.values import MOMENT, array_to_protos, conform, protos_column, protos_to_array

if TYPE_CHECKING:
    from feast import Entity, FeatureView
    from feast.repo_config import RepoConfig

EVENT_TIMESTAMP = "event_timestamp"
CREATED = "created"
FeastRow = tuple[EntityKeyProto, dict[str, ValueProto], datetime, datetime | None]
ReadRow = tuple[datetime | None, dict[str, ValueProto] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRead:
    """One view's part of a read: `keys` maps each join key to its values, all equally long; repeats are welcome."""

    view: StoredView
    features: tuple[Feature, ...]
    keys: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewColumns:
    """What a read found, row for row as asked.

    columns: one array per feature, null where the row is missing or expired or the value is null.
    event_us: int64, microseconds UTC, 0 where there is no row. found: a row is stored. expired: it outlived its ttl.
    """

    columns: dict[str, pa.Array]
    event_us: np.ndarray
    found: np.ndarray
    expired: np.ndarray

    @property
    def table(self) -> pa.Table:
        return pa.table(self.columns)


class PackedOnlineStore(OnlineStore):
    """Feast's online store over packed rows."""

    def __init__(self) -> None:
        self._schemas: dict[bytes, RowSchema] = {}  # content-addressed: what is in here never goes stale
        self._clock: tuple[tuple[float, int] | None, Clock] = (None, Clock())

    # What a backend brings --------------------------------------------------------------------------------------

    @abstractmethod
    def fetch(
        self, config: RepoConfig, wanted: Sequence[tuple[StoredView, list[Key | None]]]
    ) -> list[list[bytes | None]]:
        """Rows of several views in one round trip; None where there is none."""

    @abstractmethod
    def put(
        self,
        config: RepoConfig,
        view: StoredView,
        keys: Sequence[Key],
        event_us: np.ndarray,
        created_us: np.ndarray,
        rows: Sequence[bytes],
    ) -> None:
        """Store rows, each unless a newer one is there; all that is stored is whole, also when this fails."""

    @abstractmethod
    def load_schemas(self, config: RepoConfig) -> dict[bytes, str]:
        """JSON of every schema that rows in the store were written in, by fingerprint."""

    @abstractmethod
    def ensure(self, config: RepoConfig, views: Sequence[StoredView]) -> None:
        """Make room for the views; what they hold stays, unless their join keys changed."""

    @abstractmethod
    def drop(self, config: RepoConfig, tables: Sequence[str]) -> None:
        """Delete all rows of the named tables."""

    @abstractmethod
    def finished_batches(self, config: RepoConfig, view: StoredView) -> set[bytes]:
        """Digests noted since they were last forgotten: what an interrupted materialization had stored."""

    @abstractmethod
    def note_batch(self, config: RepoConfig, view: StoredView, digest: bytes) -> None:
        """Remember that the batch of this digest is stored."""

    @abstractmethod
    def forget_batches(self, config: RepoConfig, view: StoredView) -> None:
        """The materialization is complete."""

    @abstractmethod
    def home(self, config: RepoConfig) -> Path | None:
        """Folder in which a clock.json may lie."""

    # Reading columns --------------------------------------------------------------------------------------------

    def read_views(
        self, config: RepoConfig, reads: Sequence[ViewRead], *, now: datetime | None = None
    ) -> list[ViewColumns]:
        """Features of many entities of several views, typed and with validity, in one round trip.

        now: aware; decides what has outlived its ttl. None: the home's clock. Raises StoreError.
        """
        now = now or self.now(config)
        rows = self.fetch(config, [(read.view, read.view.keys_of_columns(read.keys)) for read in reads])
        return [
            _columns(read.features, self._unpack(config, read.view, read.features, found, now))
            for read, found in zip(reads, rows, strict=True)
        ]

    def read_columns(
        self,
        config: RepoConfig,
        table: FeatureView,
        keys: Mapping[str, Any] | pa.Table,
        features: Sequence[str] | None = None,
        *,
        now: datetime | None = None,
    ) -> ViewColumns:
        """One view's features of many entities; `keys` are columns of join key values, features default to all."""
        view = StoredView.of(config, table)
        columns = {name: keys[name] for name in keys.column_names} if isinstance(keys, pa.Table) else keys
        read = ViewRead(view=view, features=view.features(features), keys=columns)
        return self.read_views(config, [read], now=now)[0]

    def _unpack(
        self,
        config: RepoConfig,
        view: StoredView,
        features: tuple[Feature, ...],
        rows: Sequence[bytes | None],
        now: datetime,
    ) -> Unpacked:
        oldest_us = view.oldest_us(now)
        try:
            return unpack(rows, features, self._schemas, oldest_us=oldest_us)
        except KeyError:
            # Written by another process in a schema not met before.
            for fingerprint, text in self.load_schemas(config).items():
                self._schemas[fingerprint] = RowSchema.from_text(text)
        try:
            return unpack(rows, features, self._schemas, oldest_us=oldest_us)
        except KeyError as error:
            raise StoreError(
                f"view {view.name}: a stored row is of schema {error.args[0].hex()}, which the store does not know; "
                "the row was not written by Plait or is corrupt: materialize the view again"
            ) from error

    # Writing columns --------------------------------------------------------------------------------------------

    def write_columns(
        self,
        config: RepoConfig,
        table: FeatureView | StoredView,
        rows: pa.Table | pa.RecordBatch,
        *,
        event_timestamp: str = EVENT_TIMESTAMP,
        created: str = CREATED,
    ) -> int:
        """Store columns: join keys, every feature of the view, its event timestamps and perhaps created timestamps.

        event_timestamp, created: names of those columns; the second may be absent, and so may the key that Feast gives
        to a view without entities. Returns how many rows were offered (those older than what is stored change nothing).
        Raises StoreError.
        """
        view = table if isinstance(table, StoredView) else StoredView.of(config, table)
        names = rows.schema.names
        lacking = [name for name in (*view.schema.positions, event_timestamp) if name not in names]
        if lacking:
            raise StoreError(
                f"view {view.name}: the rows lack {', '.join(lacking)}; a row is written whole, "
                "so send a null for what is not known"
            )
        keys_given = {name: rows[name] for name, _ in view.join_keys if name in names}
        if not keys_given and view.without_entities:
            keys_given[DUMMY_ENTITY_ID] = pa.array([DUMMY_ENTITY_VAL] * len(rows))
        keys = view.keys_of_columns(keys_given)
        columns = [conform(rows[f.name], f.value_type, name=f.name) for f in view.schema.features]
        created_us = _moments(rows[created] if created in names else None, len(rows))
        self._write(config, view, keys, columns, _moments(rows[event_timestamp]), created_us)
        return len(rows)

    def _write(
        self,
        config: RepoConfig,
        view: StoredView,
        keys: Sequence[Key | None],
        columns: Sequence[pa.Array],
        event_us: np.ndarray,
        created_us: np.ndarray,
    ) -> None:
        whole = [key for key in keys if key is not None]
        if len(whole) != len(keys):
            raise StoreError(f"view {view.name}: {len(keys) - len(whole)} rows have a null join key; leave them out")
        if not whole:
            return
        if (event_us == NO_CREATED).any():
            raise StoreError(f"view {view.name}: a row has no event timestamp; leave it out or date it")
        rows = pack(view.schema, columns, event_us, created_us)
        self._schemas[view.schema.fingerprint] = view.schema
        self.put(config, view, whole, event_us, created_us, rows)

    # Feast's interface --------------------------------------------------------------------------------------------

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's write, row by row protos; a row must hold every feature of the view."""
        view = StoredView.of(config, table)
        for _, values, _, _ in data:
            lacking = [feature.name for feature in view.schema.features if feature.name not in values]
            if lacking:
                raise StoreError(
                    f"view {view.name}: a row lacks {', '.join(lacking)}; a row is written whole, "
                    "so send a null for what is not known"
                )
        columns = [
            protos_to_array((values[f.name] for _, values, _, _ in data), f.value_type, name=f.name)
            for f in view.schema.features
        ]
        event_us = np.array([to_us(moment) for _, _, moment, _ in data], dtype=np.int64)
        created_us = np.array(
            [NO_CREATED if created is None else to_us(created) for _, _, _, created in data], dtype=np.int64
        )
        keys = view.keys_of_protos([entity_key for entity_key, _, _, _ in data])
        self._write(config, view, keys, columns, event_us, created_us)
        if progress:
            progress(len(data))

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKeyProto],
        requested_features: list[str] | None = None,
    ) -> list[ReadRow]:
        """Feast's read: (event timestamp, values) per entity; (None, None) if there is no row or it has expired."""
        return self._read_protos(config, [(table, entity_keys, requested_features)])[0]

    def _read_protos(
        self, config: RepoConfig, reads: Sequence[tuple[FeatureView, Sequence[EntityKeyProto], Sequence[str] | None]]
    ) -> list[list[ReadRow]]:
        now = self.now(config)
        views = [StoredView.of(config, table) for table, _, _ in reads]
        fetched = self.fetch(
            config, [(view, view.keys_of_protos(keys)) for view, (_, keys, _) in zip(views, reads, strict=True)]
        )
        return [
            _feast_rows(view.features(names), self._unpack(config, view, view.features(names), rows, now))
            for view, rows, (_, _, names) in zip(views, fetched, reads, strict=True)
        ]

    def _read_features_per_fv(
        self,
        config: RepoConfig,
        grouped_refs: list[Any],
        join_key_values: dict[str, Any],
        entity_name_to_join_key_map: dict[str, str],
        online_features_response: Any,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        """All views of a get_online_features in one round trip; Feast's default makes one each."""
        unique = [
            utils._get_unique_entities(table, join_key_values, entity_name_to_join_key_map) for table, _ in grouped_refs
        ]
        reads = [
            (table, utils._get_entity_key_protos(entities), names)
            for (table, names), (entities, _, _) in zip(grouped_refs, unique, strict=True)
        ]
        for (table, names), (_, indexes, length), rows in zip(
            grouped_refs, unique, self._read_protos(config, reads), strict=True
        ):
            utils._populate_response_from_feature_data(
                names,
                rows,
                indexes,
                online_features_response,
                full_feature_names,
                table,
                length,
                include_feature_view_version_metadata,
            )

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Make room for the views to keep and drop the others; a view in both lists (one that changed kind) is kept."""
        kept = [StoredView.of(config, view) for view in tables_to_keep]
        self.ensure(config, kept)
        stay = {view.table for view in kept}
        gone = [StoredView.of(config, view).table for view in tables_to_delete]
        self.drop(config, [table for table in gone if table not in stay])

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Drop the tables of the views; other projects in the same store stay."""
        self.drop(config, [StoredView.of(config, view).table for view in tables])

    def _is_versioned_read_supported(self) -> bool:
        return True  # each version of a view is a table of its own

    # Time -----------------------------------------------------------------------------------------------------------

    def now(self, config: RepoConfig) -> datetime:
        """The home's clock, which may replay history; the wall's where there is no clock.json."""
        root = self.home(config)
        if root is None:
            return datetime.now(UTC)
        home = Home(project=root, root=root)
        try:
            stat = home.clock_file.stat()
        except FileNotFoundError:
            return datetime.now(UTC)
        stamp = (stat.st_mtime, stat.st_ino)
        if self._clock[0] != stamp:
            self._clock = (stamp, Clock.of(home))
        return self._clock[1].now()


def _columns(features: tuple[Feature, ...], unpacked: Unpacked) -> ViewColumns:
    columns = {feature.name: array for feature, array in zip(features, unpacked.arrays, strict=True)}
    for feature in features:
        if feature.storage.layout == "proto":
            columns[feature.name] = protos_column(columns[feature.name], feature.value_type, name=feature.name)
    return ViewColumns(columns=columns, event_us=unpacked.event_us, found=unpacked.found, expired=unpacked.expired)


def _feast_rows(features: tuple[Feature, ...], unpacked: Unpacked) -> list[ReadRow]:
    names = [feature.name for feature in features]
    protos = [
        array_to_protos(array, feature.value_type) for feature, array in zip(features, unpacked.arrays, strict=True)
    ]
    served = (unpacked.found & ~unpacked.expired).tolist()
    rows: list[ReadRow] = []
    for index, (here, event_us) in enumerate(zip(served, unpacked.event_us.tolist(), strict=True)):
        if not here:
            rows.append((None, None))
            continue
        moment = _EPOCH + timedelta(microseconds=event_us)
        rows.append((moment, {name: column[index] for name, column in zip(names, protos, strict=True)}))
    return rows


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAIVE_MOMENT = pa.timestamp("us")


def _moments(column: pa.ChunkedArray | pa.Array | None, n_rows: int = 0) -> np.ndarray:
    """A timestamp column as int64 microseconds; without a zone it is UTC; NO_CREATED where null or no column."""
    if column is None:
        return np.full(n_rows, NO_CREATED, dtype=np.int64)
    if not pa.types.is_timestamp(column.type) and not pa.types.is_null(column.type):
        raise StoreError(f"a timestamp column came as {column.type}; it must be a timestamp")
    if column.type not in (MOMENT, _NAIVE_MOMENT):
        column = column.cast(MOMENT, safe=False)
    if column.null_count:
        column = column.cast(pa.int64()).fill_null(NO_CREATED)
    return column.to_numpy().view(np.int64)
