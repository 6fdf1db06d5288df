"""Real feature stores in a temporary folder: the same registry read through Feast's DuckDB store and through ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

OURS = "plait.stores.offline.AsofDuckDBOfflineStore"


@dataclass
class Repo:
    """A folder with feature tables, a registry, and stores that read them."""

    path: Path
    stores: dict[tuple[str, str], Any] = field(default_factory=dict)

    def write(self, name: str, table: pa.Table, **options: Any) -> str:
        """Write a table below data/; its absolute path, since the stock store looks for others in the cwd."""
        path = self.path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **options)
        return str(path)

    def store(self, type_: str = OURS, **options: Any) -> Any:
        """A FeatureStore over this repo's registry with the given offline store."""
        from feast import FeatureStore
        from feast.repo_config import RepoConfig

        key = (type_, repr(sorted(options.items())))
        if key not in self.stores:
            config = RepoConfig(
                project="test",
                provider="local",
                registry=str(self.path / "registry.db"),
                offline_store={"type": type_, **options},
                online_store={"type": "sqlite", "path": str(self.path / "online.db")},
                entity_key_serialization_version=3,
                repo_path=self.path,
            )
            self.stores[key] = FeatureStore(config=config)
        return self.stores[key]

    def apply(self, objects: list[Any]) -> None:
        """Register the objects and the entities that the views name, for every store of this repo."""
        from feast import Entity, FeatureView

        entities = {
            field.name: Entity(name=field.name, join_keys=[field.name], value_type=field.dtype.to_value_type())
            for view in objects
            if isinstance(view, FeatureView)
            for field in view.schema
            if field.name in view.entities
        }
        self.store().apply([*entities.values(), *objects])
        for store in self.stores.values():
            store.refresh_registry()


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path)


@pytest.fixture
def fresh_repo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Repo]:
    """A new repo at each call, for examples that a property test makes up."""
    return lambda: Repo(tmp_path_factory.mktemp("repo"))


@pytest.fixture
def view() -> Callable[..., Any]:
    """A feature view on a parquet source: view("stats", path, keys={"user_id": "Int64"}, features={"a": "Int64"})."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType, types

    value_types = {"Int64": ValueType.INT64, "String": ValueType.STRING, "Int32": ValueType.INT32}

    def dtype(name: str) -> Any:
        return types.Array(getattr(types, name[6:-1])) if name.startswith("Array(") else getattr(types, name)

    def make(
        name: str,
        path: str,
        *,
        keys: Mapping[str, str] | None = None,
        features: Mapping[str, str],
        ttl: Any = None,
        created: str = "",
        timestamp: str = "event_timestamp",
        **source: Any,
    ) -> Any:
        keys = {"user_id": "Int64"} if keys is None else keys
        return FeatureView(
            name=name,
            entities=[Entity(name=key, join_keys=[key], value_type=value_types[kind]) for key, kind in keys.items()],
            schema=[Field(name=n, dtype=dtype(kind)) for n, kind in {**keys, **features}.items()],
            ttl=ttl,
            source=FileSource(
                name=f"{name}_source",
                path=path,
                timestamp_field=timestamp,
                created_timestamp_column=created,
                **source,
            ),
        )

    return make
