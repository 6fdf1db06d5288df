"""A dataset as a torch IterableDataset. The one module of the hub that imports torch; nothing imports it for you."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from plait.offline.batches import BatchReader, Encode, Ragged, ReadSpec
from plait.offline.dataset import Split

TensorBatch = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


class TorchBatches(IterableDataset):
    """Ready batches of tensors: give it to DataLoader(batch_size=None, num_workers=…), or iterate it directly.

    A list column is a pair (values, offsets) with one offset more than rows. Rows are divided over the ranks of the
    process group (or `rank` of `world`) and over DataLoader's workers. Call set_epoch before each epoch.
    """

    def __init__(
        self,
        split: Split,
        spec: ReadSpec,
        *,
        encode: Encode | None = None,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        super().__init__()
        if rank is None or world is None:
            rank, world = _process_group()
        self.split, self.spec, self.encode, self.rank, self.world = split, spec, encode, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The shuffled order is drawn from (seed, epoch)."""
        self.epoch = epoch

    def reader(self) -> BatchReader:
        """The reader of this rank and worker."""
        worker = get_worker_info()
        workers, me = (worker.num_workers, worker.id) if worker else (1, 0)
        spec = dataclasses.replace(self.spec, shard=self.rank * workers + me, shards=self.world * workers)
        return BatchReader(self.split, spec, encode=self.encode)

    def __iter__(self) -> Iterator[TensorBatch]:
        for batch in self.reader().epoch(self.epoch):
            yield {name: _tensor(column) for name, column in batch.items()}


def _tensor(column: np.ndarray | Ragged) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if isinstance(column, Ragged):
        return _from_numpy(column.values), _from_numpy(column.offsets)
    return _from_numpy(column)


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    # Unshuffled batches are views of Arrow's memory, which is read-only; torch tensors never are.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _process_group() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
