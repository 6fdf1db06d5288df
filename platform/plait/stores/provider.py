"""Feast's provider for Plait's stores: what is pushed reaches the online store as columns.

Feast's own makes a proto of every value on the way. Without that a push is more than twice as fast, and moments keep
their microseconds, as when they are materialized; everything else is Feast's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from feast.feature_view import DUMMY_ENTITY_ID
from feast.infra.passthrough_provider import PassthroughProvider
from feast.types import Map

from plait.errors import StoreError
from plait.stores.online_base import PackedOnlineStore

if TYPE_CHECKING:
    from feast import FeatureView


class ColumnarProvider(PassthroughProvider):
    """`provider:` of feature_store.yaml; see the module. With another online store it is Feast's own."""

    def ingest_df(self, feature_view: Any, df: pd.DataFrame, field_mapping: dict[str, str] | None = None) -> None:
        """Stores a frame of join keys, features and timestamps, under the names of the view's source or the view's own.

        Raises StoreError, and has stored nothing, if a column is missing, twice there, or of values that do not fit.
        """
        online, source = self.online_store, getattr(feature_view, "batch_source", None)  # on-demand views have none
        if not isinstance(online, PackedOnlineStore) or source is None:
            super().ingest_df(feature_view, df, field_mapping)
            return
        renamed = source.field_mapping or {}
        event_timestamp, created = (
            renamed.get(name, name) for name in (source.timestamp_field, source.created_timestamp_column or "")
        )
        batch = batch_of(feature_view, df, renamed, moments=[name for name in (event_timestamp, created) if name])
        online.write_columns(self.repo_config, feature_view, batch, event_timestamp=event_timestamp, created=created)


def batch_of(
    view: FeatureView, frame: pd.DataFrame, renamed: dict[str, str], *, moments: Sequence[str]
) -> pa.RecordBatch:
    """The view's join keys and features and the columns `moments` out of a frame, as write_columns takes them."""
    fields = [field for field in (*view.entity_columns, *view.features) if field.name != DUMMY_ENTITY_ID]
    wanted = dict.fromkeys([*(field.name for field in fields), *moments])

    columns = _columns(view.name, frame, renamed)
    if not columns.keys() >= wanted.keys():  # the key may be the frame's index
        frame = frame.reset_index()
        columns = _columns(view.name, frame, renamed)
    lacking = [name for name in wanted if name not in columns]
    if lacking:
        raise StoreError(
            f"view {view.name}: the rows lack {', '.join(lacking)}; they have {', '.join(map(str, frame.columns))}"
        )
    try:
        arrays = {field.name: (_maps if field.dtype == Map else _array)(frame[columns[field.name]]) for field in fields}
        arrays |= {name: _moments(frame[columns[name]]) for name in moments}
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"view {view.name}: {error}; nothing was stored") from error
    return pa.RecordBatch.from_pydict(arrays)


def _columns(view: str, frame: pd.DataFrame, renamed: dict[str, str]) -> dict[str, str]:
    """The frame's own name of each column, by its name in the view."""
    columns = {renamed.get(name, name): name for name in frame.columns}
    if len(columns) != frame.shape[1]:
        raise StoreError(
            f"view {view}: two columns of the rows are one in the view; they came as "
            f"{', '.join(map(str, frame.columns))}, and the source renames {renamed}"
        )
    return columns


def _array(series: pd.Series) -> pa.Array:
    """A column as Arrow, NaN and NaT as nulls; by way of numpy where that is the same, at a third of the cost."""
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "iufb":
        return pa.array(series.to_numpy(), from_pandas=True)
    if series.dtype.kind == "M":
        return pa.array(series.to_numpy(dtype="M8[us]"))  # in UTC
    return pa.array(series, from_pandas=True)


def _maps(series: pd.Series) -> pa.Array:
    """Dicts as JSON, which Feast takes for a map too: Arrow would give each the keys of all."""
    return pa.array([json.dumps(value) if isinstance(value, dict) else value for value in series], from_pandas=True)


def _moments(series: pd.Series) -> pa.Array:
    """A column of moments; what is no timestamp yet, such as text from JSON, is read as Feast reads it."""
    return _array(series if series.dtype.kind == "M" else pd.to_datetime(series, utc=True))
