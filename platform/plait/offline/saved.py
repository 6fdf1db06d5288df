"""Registers a dataset as a Feast saved dataset, so that `feast ui` and `store.get_saved_dataset(name)` know it."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from plait.errors import PlaitError, StoreError
from plait.offline.dataset import Dataset
from plait.offline.retrieval import streams
from plait.offline.splits import PARTS

if TYPE_CHECKING:
    from feast import FeatureStore
    from feast.saved_dataset import SavedDataset, SavedDatasetStorage

_DATA_HASH = "plait.data_hash"


def saved_name(dataset: Dataset) -> str:
    """The dataset's name in Feast's registry."""
    return dataset.folder.name.replace("-", "_")


def register_dataset(store: FeatureStore, dataset: Dataset) -> None:
    """Put the dataset's place, features, keys and hashes into Feast's registry, under its folder's name.

    Nothing is done if it is there. Feast's own create_saved_dataset would run the whole retrieval a second time to
    write a copy. Raises StoreError if the registry cannot take it; the dataset itself is complete.
    """
    from feast.errors import SavedDatasetNotFound

    try:
        with suppress(SavedDatasetNotFound):
            known = store.registry.get_saved_dataset(saved_name(dataset), store.project, allow_cache=False)
            if known.tags.get(_DATA_HASH) == dataset.manifest.data_hash:
                return
        store.registry.apply_saved_dataset(_saved(store, dataset), store.project, commit=True)
    except PlaitError:  # of the dataset's own parts
        raise
    except Exception as error:  # whatever the registry's database or file raises
        raise StoreError(
            f"{dataset.folder} is complete, but Feast's registry did not take it as a saved dataset: {error}; "
            "it can be trained on, and the same command registers it once the registry answers"
        ) from error


def _saved(store: FeatureStore, dataset: Dataset) -> SavedDataset:
    from feast.saved_dataset import SavedDataset

    manifest = dataset.manifest
    saved = SavedDataset(
        name=saved_name(dataset),
        features=[f"{feature.view}:{feature.name}" for feature in manifest.features],
        join_keys=["user_id", "item_id"],
        storage=_storage(store, dataset.folder),
        tags={
            _DATA_HASH: manifest.data_hash,
            "plait.samples_hash": manifest.samples_hash,
            "plait.label": manifest.label,
            "plait.folder": dataset.folder.name,
        },
        feature_service_name=manifest.feature_service,
    )
    saved.min_event_timestamp, saved.max_event_timestamp = _range(dataset)
    return saved


def _storage(store: FeatureStore, folder: Path) -> SavedDatasetStorage:
    """Where the rows are, in the words of the project's offline store, which is what reads them back."""
    if type(store.config.offline_store).__name__ == "SparkOfflineStoreConfig":
        from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SavedDatasetSparkStorage

        # Of the storage's table, query and path Feast 0.67 reads back a table only: of the others it makes a source
        # without a name, which it refuses. Spark takes files for a table, but Feast cuts a table's name at its dots, so
        # those of the path (and whatever else needs quotes) become the pattern's "any one character".
        place = "".join(each if each.isalnum() or each in "/_-" else "?" for each in str(folder.resolve()))
        return SavedDatasetSparkStorage(table=f"parquet.{place}/*/*")
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    # Plait's offline store reads all parts below a folder, the stock one only what a pattern names.
    return SavedDatasetFileStorage(path=str(folder if streams(store) else folder / "*" / "*.parquet"))


def _range(dataset: Dataset) -> tuple[datetime, datetime]:
    lows, highs = [], []
    for part in PARTS:
        for batch in dataset.split(part).batches(["event_timestamp"]):
            if batch.num_rows:
                ends = pc.min_max(batch.column(0)).as_py()
                lows.append(ends["min"])
                highs.append(ends["max"])
    return min(lows), max(highs)
