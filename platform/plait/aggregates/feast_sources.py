"""The one factory of Plait's batch sources: the class that the project's offline store reads, on the same table.

Feast's offline stores take a source class each: DuckDB a FileSource, Spark a SparkSource. Declarations call
`table_source` and need no change when `offline_store.type` in feature_store.yaml changes; `feast apply` does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from plait.errors import SettingsError
from plait.settings import find_home

if TYPE_CHECKING:
    from feast.data_source import DataSource

CREATED = "created"
EVENT_TIMESTAMP = "event_timestamp"
_SPARK_STORES = ("spark", "feast.infra.offline_stores.contrib.spark_offline_store.spark.SparkOfflineStore")


def home_path(*parts: str) -> str:
    """A path below the home as Feast is told it: relative to the project, absolute if PLAIT_HOME moves the home."""
    return "/".join([os.environ.get("PLAIT_HOME") or ".plait", *parts])


def table_source(name: str, path: str, *, field_mapping: Mapping[str, str] | None = None) -> DataSource:
    """Feast's source for a folder of parquet parts with event_timestamp and created.

    A SparkSource if feature_store.yaml's offline store is Feast's Spark store, else a FileSource. path: relative to the
    project, absolute, or (for Spark) a URI. field_mapping: a column's own name → its name in Feast, where they differ;
    the two timestamps may differ too. Raises SettingsError if feature_store.yaml cannot be read.
    """
    mapping = dict(field_mapping or {})
    config = _feature_store_yaml()
    if config is None or _offline_store(config) not in _SPARK_STORES:
        from feast import FileSource

        return FileSource(
            name=name,
            path=path,
            timestamp_field=EVENT_TIMESTAMP,
            created_timestamp_column=CREATED,
            field_mapping=mapping,
        )
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource

    # Spark resolves a relative path against its own working directory, or the cluster's file system.
    place = path if "://" in path else f"{(config.parent / path).resolve()}"
    return SparkSource(
        name=name,
        path=place,
        file_format="parquet",
        timestamp_field=EVENT_TIMESTAMP,
        created_timestamp_column=CREATED,
        field_mapping=mapping,
    )


def _feature_store_yaml() -> Path | None:
    """The configuration Feast would read here; None outside any project (declarations made in a script)."""
    if named := os.environ.get("FEAST_FS_YAML_FILE_PATH"):
        return Path(named).resolve()
    try:
        return find_home().project / "feature_store.yaml"
    except SettingsError:
        return None


def _offline_store(config: Path) -> str | None:
    try:
        content = yaml.safe_load(os.path.expandvars(config.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{config} cannot be read: {error}") from error
    store = content.get("offline_store") if isinstance(content, dict) else None
    # Feast takes a type alone, too.
    return store.get("type") if isinstance(store, dict) else store
