"""Registers a dataset as a Feast saved dataset, so that `feast ui` and `store.get_saved_dataset(name)` know it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from plait.offline.dataset import Dataset
from plait.offline.retrieval import streams
from plait.offline.splits import PARTS

if TYPE_CHECKING:
    from feast import FeatureStore
    from feast.saved_dataset import SavedDataset


def saved_name(dataset: Dataset) -> str:
    """The dataset's name in Feast's registry."""
    return dataset.folder.name.replace("-", "_")


def register_dataset(store: FeatureStore, dataset: Dataset) -> SavedDataset:
    """Put the dataset's place, features, keys and hashes into Feast's registry, under its folder's name.

    Feast's own create_saved_dataset would run the whole retrieval a second time to write a copy.
    """
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
    from feast.saved_dataset import SavedDataset

    manifest = dataset.manifest
    # Plait's offline store reads all parts below a folder, the stock one only what a pattern names.
    place = dataset.folder if streams(store) else dataset.folder / "*" / "*.parquet"
    saved = SavedDataset(
        name=saved_name(dataset),
        features=[f"{feature.view}:{feature.name}" for feature in manifest.features],
        join_keys=["user_id", "item_id"],
        storage=SavedDatasetFileStorage(path=str(place)),
        tags={
            "plait.data_hash": manifest.data_hash,
            "plait.samples_hash": manifest.samples_hash,
            "plait.label": manifest.label,
            "plait.folder": dataset.folder.name,
        },
        feature_service_name=manifest.feature_service,
    )
    saved.min_event_timestamp, saved.max_event_timestamp = _range(dataset)
    store.registry.apply_saved_dataset(saved, store.project, commit=True)
    return saved


def _range(dataset: Dataset) -> tuple[datetime, datetime]:
    lows, highs = [], []
    for part in PARTS:
        for batch in dataset.split(part).batches(["event_timestamp"]):
            if batch.num_rows:
                ends = pc.min_max(batch.column(0)).as_py()
                lows.append(ends["min"])
                highs.append(ends["max"])
    return min(lows), max(highs)
