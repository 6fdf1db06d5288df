"""A dataset as xgboost's DataIter (external memory, QuantileDMatrix) and as lightgbm's Sequence.

Both see one float32 matrix a block, NaN where a value is missing; strings and lists need an `encode` that turns a
table into such a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xgboost as xgb

from plait.errors import DataError
from plait.offline.dataset import Split, corrupt_part

Encode = Callable[[pa.Table], np.ndarray]  # (rows of the table, n_columns) float32


class FeatureMatrix:
    """The rows of a split as float32, a row group at a time; the last group read is kept."""

    def __init__(self, split: Split, columns: Sequence[str], *, encode: Encode | None = None) -> None:
        self.split, self.columns, self.encode = split, split.check_columns(columns), encode
        self.groups: list[tuple[Path, int]] = []
        sizes = [0]
        for file in split.files:
            with corrupt_part(file):
                metadata = pq.read_metadata(file)
            for group in range(metadata.num_row_groups):
                self.groups.append((file, group))
                sizes.append(metadata.row_group(group).num_rows)
        self.starts = np.cumsum(sizes)
        self._kept: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def table(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Row group `index` with the named columns."""
        file, group = self.groups[index]
        with corrupt_part(file), pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(group, columns=list(columns)).select(list(columns))

    def block(self, index: int) -> np.ndarray:
        """Row group `index` as a matrix."""
        if self._kept is None or self._kept[0] != index:
            table = self.table(index, self.columns)
            self._kept = (index, (self.encode or plain_matrix)(table))
        return self._kept[1]

    def column(self, name: str) -> np.ndarray:
        """One numeric column, whole, as float32: a label or the weights."""
        (name,) = self.split.check_columns([name])
        return plain_matrix(self.split.to_table([name]))[:, 0]


def plain_matrix(table: pa.Table) -> np.ndarray:
    """Numbers and booleans as float32 (rows, columns), nulls as NaN. Raises DataError for other types."""
    matrix = np.empty((table.num_rows, table.num_columns), dtype=np.float32)
    for i, name in enumerate(table.column_names):
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise DataError(f"column {name!r} is {kind}, which is no number: give an `encode`, or leave it out")
        matrix[:, i] = table.column(name).cast(pa.float32(), safe=False).to_numpy()
    return matrix


class XGBoostBlocks(xgb.DataIter):
    """For xgb.QuantileDMatrix(blocks), or xgb.ExtMemQuantileDMatrix(blocks) with `cache_prefix` to spill to."""

    def __init__(
        self,
        split: Split,
        columns: Sequence[str],
        label: str,
        *,
        weight: str | None = None,
        encode: Encode | None = None,
        cache_prefix: str | None = None,
    ) -> None:
        split.check_columns([label, *([weight] if weight else [])])
        self.matrix = FeatureMatrix(split, columns, encode=encode)
        self.label, self.weight = label, weight
        self.at = 0
        super().__init__(cache_prefix=cache_prefix)

    def reset(self) -> None:
        self.at = 0

    def next(self, input_data: Callable[..., Any]) -> bool:
        if self.at == len(self.matrix.groups):
            return False
        sides = [self.label, *([self.weight] if self.weight else [])]
        beside = plain_matrix(self.matrix.table(self.at, sides))
        given = {"weight": beside[:, 1]} if self.weight else {}
        names = None if self.matrix.encode else list(self.matrix.columns)
        input_data(data=self.matrix.block(self.at), label=beside[:, 0], feature_names=names, **given)
        self.at += 1
        return True


class LightGBMRows(lgb.Sequence):
    """For lgb.Dataset(rows, label=rows.label, weight=rows.weight): LightGBM bins it batch by batch."""

    def __init__(
        self,
        split: Split,
        columns: Sequence[str],
        label: str,
        *,
        weight: str | None = None,
        encode: Encode | None = None,
        batch_size: int = 65_536,
    ) -> None:
        self.matrix = FeatureMatrix(split, columns, encode=encode)
        self.label = self.matrix.column(label)
        self.weight = self.matrix.column(weight) if weight else None
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, index: int | slice | list[int]) -> np.ndarray:
        """One row (n_columns,) float64 for an int, else rows (n, n_columns)."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._rows(np.arange(start, stop, step))
        if isinstance(index, list):
            return self._rows(np.asarray(index, dtype=np.int64))
        return self._rows(np.array([index], dtype=np.int64))[0]

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) == 0:
            return np.empty((0, len(self.matrix.columns)), dtype=np.float64)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        groups = np.searchsorted(self.matrix.starts, rows, side="right") - 1
        out: np.ndarray | None = None
        for group in np.unique(groups):
            block = self.matrix.block(int(group))
            mine = groups == group
            if out is None:
                out = np.empty((len(rows), block.shape[1]), dtype=np.float64)
            out[mine] = block[rows[mine] - self.matrix.starts[group]]
        assert out is not None
        return out
