"""What a model must beat: smoothed click rates of the item and of the user, counted on the training split alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

PRIOR_ROWS = 10.0


@dataclass(frozen=True, slots=True)
class RateBaseline:
    """Predicts (clicks + k p) / (rows + k) of a row's `key`, where p is the overall rate; p for a key never seen."""

    key: str
    keys: npt.NDArray[np.int64]
    rates: npt.NDArray[np.float64]
    overall: float

    @classmethod
    def fit(cls, train: pa.Table, key: str, label: str, *, prior_rows: float = PRIOR_ROWS) -> RateBaseline:
        """train: the training split with integer columns `key` and `label`; `prior_rows` is k, in rows."""
        labels = train.column(label).to_numpy().astype(np.float64)
        overall = float(labels.mean())
        keys, index = np.unique(train.column(key).to_numpy(), return_inverse=True)
        rows, clicks = np.bincount(index), np.bincount(index, labels)
        return cls(key, keys, (clicks + prior_rows * overall) / (rows + prior_rows), overall)

    def predict(self, rows: pa.Table) -> npt.NDArray[np.float64]:
        wanted = rows.column(self.key).to_numpy()
        known = self.knows(wanted)
        positions = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(known, self.rates[positions], self.overall)

    def knows(self, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which keys were in the training split."""
        return np.isin(wanted, self.keys)


def fit_baselines(train: pa.Table, label: str) -> dict[str, RateBaseline]:
    """The two baselines that every report prints."""
    return {
        "popularity": RateBaseline.fit(train, "item_id", label),
        "user mean": RateBaseline.fit(train, "user_id", label),
    }
