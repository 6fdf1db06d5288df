"""The training loop of neural models."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from plait.encoders import EncoderSet
from trainers.config import DeepFMTraining
from trainers.data import Encoded
from trainers.fitted import Fitted
from trainers.metrics import auc_score, log_loss
from trainers.neural.deepfm import DeepFM, SideSums
from trainers.neural.export import export_deepfm
from trainers.neural.table import RowWiseAdagrad, TouchedRows

_PREDICT_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Tensors:
    """A split as tensors that share the encoded arrays' memory."""

    arrays: dict[str, Tensor]
    labels: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows: Encoded) -> Tensors:
        arrays = {name: torch.from_numpy(array) for name, array in rows.arrays.items()}
        return cls(arrays, torch.from_numpy(rows.labels), torch.from_numpy(rows.weights))

    def take(self, rows: Tensor) -> Tensors:
        arrays = {name: array.index_select(0, rows) for name, array in self.arrays.items()}
        return Tensors(arrays, self.labels[rows], self.weights[rows])

    def __len__(self) -> int:
        return len(self.labels)


def fit_deepfm(
    spec: DeepFMTraining, encoders: EncoderSet, train: Encoded, valid: Encoded, *, progress: bool = True
) -> Fitted:
    """Train until validation log loss stops falling; the best epoch's weights are exported."""
    torch.set_num_threads(spec.threads or min(8, os.cpu_count() or 1))
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = DeepFM(encoders, spec, generator=generator)
        history = _train(model, spec, Tensors.of(train), valid, generator, progress=progress)

    def predict(arrays: dict[str, np.ndarray]) -> npt.NDArray[np.float64]:
        return predict_deepfm(model, arrays)

    sample = {name: array[:3] for name, array in valid.arrays.items()}
    return Fitted(model=export_deepfm(model, encoders, sample), predict=predict, history=tuple(history))


def _train(
    model: DeepFM,
    spec: DeepFMTraining,
    train: Tensors,
    valid: Encoded,
    generator: torch.Generator,
    *,
    progress: bool,
) -> list[dict[str, Any]]:
    dense = torch.optim.Adam(model.parameters(), lr=spec.learning_rate)
    rows = RowWiseAdagrad(model.table, learning_rate=spec.table_learning_rate, l2=spec.l2)
    history: list[dict[str, Any]] = []
    best, best_loss, stale = copy.deepcopy(model.state_dict()), float("inf"), 0
    for epoch in range(1, spec.epochs + 1):
        model.train()
        total = 0.0
        n_batches = -(-len(train) // spec.batch_size)
        batches = batches_of(train, spec.batch_size, generator)
        for batch in tqdm(
            batches,
            total=n_batches,
            desc=f"epoch {epoch}/{spec.epochs}",
            disable=None if progress else True,
            leave=False,
        ):
            total += train_step(model, batch, dense, rows) * len(batch)
        probabilities = predict_deepfm(model, valid.arrays)
        metrics = {
            "epoch": epoch,
            "train_log_loss": total / len(train),
            "valid_log_loss": log_loss(valid.labels, probabilities),
            "valid_auc": auc_score(valid.labels, probabilities),
        }
        history.append(metrics)
        if progress:
            tqdm.write(
                f"  epoch {epoch}: valid log loss {metrics['valid_log_loss']:.4f}, AUC {metrics['valid_auc']:.4f}"
            )
        stale += 1
        if metrics["valid_log_loss"] < best_loss:
            best, best_loss, stale = copy.deepcopy(model.state_dict()), metrics["valid_log_loss"], 0
        if stale >= spec.patience:
            break
    model.load_state_dict(best)
    model.eval()
    return history


def batches_of(train: Tensors, size: int, generator: torch.Generator) -> Iterator[Tensors]:
    """All rows once, in a random order, `size` at a time (the last batch may be smaller)."""
    order = torch.randperm(len(train), generator=generator)
    for start in range(0, len(train), size):
        yield train.take(order[start : start + size])


def train_step(model: DeepFM, batch: Tensors, dense: torch.optim.Optimizer, rows: RowWiseAdagrad) -> float:
    """One step on one batch; returns its weighted mean log loss before the step."""
    lookups = {name: net.lookups(batch.arrays) for name, net in model.sides.items()}  # type: ignore[operator]
    flat = [ids.reshape(-1) for found in lookups.values() for ids in found]
    touched = TouchedRows(model.table, torch.cat(flat)) if flat else None
    embedded = iter(touched.embed().split([len(ids) for ids in flat]) if touched else ())
    sums: list[SideSums] = []
    for name, net in model.sides.items():
        shaped = [next(embedded).view(*ids.shape, -1) for ids in lookups[name]]
        sums.append(net(shaped, batch.arrays))
    losses = functional.binary_cross_entropy_with_logits(
        model.combine(sums), batch.labels, batch.weights, reduction="sum"
    )
    loss = losses / batch.weights.sum().clamp(min=1e-12)
    dense.zero_grad(set_to_none=True)
    loss.backward()
    dense.step()
    if touched:
        rows.step(touched)
    return float(loss.detach())


@torch.inference_mode()
def predict_deepfm(model: DeepFM, arrays: dict[str, np.ndarray]) -> npt.NDArray[np.float64]:
    """(n,) click probabilities of encoded rows; both sides must have n rows."""
    model.eval()
    n = len(next(iter(arrays.values())))
    parts = []
    for start in range(0, n, _PREDICT_ROWS):
        piece = {name: torch.from_numpy(array[start : start + _PREDICT_ROWS]) for name, array in arrays.items()}
        parts.append(torch.sigmoid(model(piece).double()))
    return torch.cat(parts).numpy()
