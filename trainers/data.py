"""Splits of a training set as a trainer takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from plait.encoders import EncoderSet
from plait.errors import DataError, UnknownNameError
from plait.offline.dataset import Dataset


def read_split(data: Dataset, split: str, label: str) -> pa.Table:
    """All rows of train, valid or test, in time order. Raises DataError if there are none, UnknownNameError if the
    training set has no such label."""
    if label not in data.manifest.labels:
        raise UnknownNameError("label", label, data.manifest.labels, where=str(data.folder))
    table = data.split(split).to_table()
    if len(table) == 0:
        raise DataError(f"the {split} split of {data.folder} has no rows; build samples with other --shares")
    return table


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded arrays of n rows, with labels (n,) float32 in {0, 1} and weights (n,) float32."""

    arrays: dict[str, np.ndarray]
    labels: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, rows: pa.Table, encoders: EncoderSet, label: str) -> Encoded:
        """Raises DataError if a label is not 0 or 1."""
        labels = rows.column(label).combine_chunks()
        values = labels.to_numpy(zero_copy_only=False)
        if labels.null_count or not set(np.unique(values)) <= {0, 1}:
            raise DataError(f"label {label!r} must be 0 or 1 in every row, to train a model of click probabilities")
        weights = rows.column("weight").to_numpy() if "weight" in rows.column_names else np.ones(len(rows))
        return cls(encoders.encode_rows(rows), values.astype(np.float32), weights.astype(np.float32))

    def __len__(self) -> int:
        return len(self.labels)


def ranking_groups(rows: pa.Table) -> tuple[npt.NDArray[Any], str]:
    """What to rank within, and its name: the request where requests hold slates, else (one row each) the user."""
    if "request_id" in rows.column_names:
        requests = np.unique(rows.column("request_id").to_numpy(), return_inverse=True)[1]
        if len(rows) >= 2 * (requests.max() + 1):
            return requests, "request"
    return rows.column("user_id").to_numpy(), "user"
