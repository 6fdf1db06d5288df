"""Samples a second of DeepFM training: Plait's touched-rows Adagrad against plain torch with dense Adam, in one run.

    python benchmarks/train_deepfm.py [--ids 1000000] [--steps 60] [--json FILE]

26 id columns with `--ids` ids in all (log-uniform draws), 13 numbers, dim 16, MLP 400-400, batch 4096, float32, two
threads. Both train the same network, from the same arrays, with the same batches; they differ in the update alone: one
table whose touched rows are stepped, against torch's own way, one nn.Embedding trained by Adam over every row.
Times are of whole steps (batch selection included); the two are interleaved in blocks so that a busy machine
slows both. "best" is the fastest tenth of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.encoders import Column, EncoderSet, Field
from plait.encoders.columns import HashTable, ScaleValues
from trainers.config import DeepFMTraining
from trainers.neural.deepfm import DeepFM
from trainers.neural.table import RowWiseAdagrad
from trainers.neural.training import Tensors, train_step

N_IDS, N_VALUES = 26, 13


def layout(ids: int) -> EncoderSet:
    """Encoders of the benchmark's shape: 26 hashed columns, 13 scaled numbers; 12 id columns belong to the request."""
    import pyarrow as pa

    sizes = np.full(N_IDS, ids // N_IDS)
    fields, columns, tables, values = [], [], {}, {}
    for i in range(N_IDS):
        side = "request" if i < 12 else "candidate"
        position = i if i < 12 else i - 12
        fields.append(Field(name=f"c{i}", side=side, kind="id", position=position, table=f"c{i}"))
        columns.append(Column(name=f"c{i}", dtype=pa.int64(), side=side))
        tables[f"c{i}"] = HashTable(int(sizes[i]) - 1)
    for i in range(N_VALUES):
        fields.append(Field(name=f"x{i}", side="candidate", kind="value", position=i))
        columns.append(Column(name=f"x{i}", dtype=pa.float64(), side="candidate"))
        values[f"x{i}"] = ScaleValues(0.0, 1.0, -8.0, 8.0, False, False)
    return EncoderSet(columns, fields, tables, values)


def data(encoders: EncoderSet, rows: int) -> Tensors:
    """Log-uniform ids (a few very common, most rare) and normal numbers."""
    rng = np.random.default_rng(0)
    sizes = list(encoders.table_sizes().values())
    ids = np.stack([np.exp(rng.random(rows) * np.log(size)).astype(np.int64) - 1 for size in sizes], axis=1)
    arrays = {
        "request_ids": torch.from_numpy(np.ascontiguousarray(ids[:, :12])),
        "candidate_ids": torch.from_numpy(np.ascontiguousarray(ids[:, 12:])),
        "candidate_values": torch.from_numpy(rng.normal(size=(rows, N_VALUES)).astype(np.float32)),
    }
    labels = torch.from_numpy((rng.random(rows) < 0.3).astype(np.float32))
    return Tensors(arrays, labels, torch.ones(rows))


class Plain(nn.Module):
    """The same network as torch's own parts make it: one nn.Embedding, dense gradients, Adam over everything."""

    def __init__(self, encoders: EncoderSet, spec: DeepFMTraining) -> None:
        super().__init__()
        sizes = torch.tensor([0, *encoders.table_sizes().values()])
        self.register_buffer("offsets", sizes.cumsum(0)[:-1])
        self.offsets: Tensor
        self.table = nn.Embedding(int(sizes.sum()), 1 + spec.dim)
        nn.init.normal_(self.table.weight, 0.0, 0.01)
        first, second = spec.hidden
        self.values = nn.Linear(N_VALUES, 1)
        self.mlp = nn.Sequential(
            nn.Linear(N_IDS * spec.dim + N_VALUES, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(),
            nn.Linear(second, 1),
        )  # fmt: skip

    def forward(self, arrays: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([arrays["request_ids"], arrays["candidate_ids"]], dim=1) + self.offsets
        rows = self.table(ids)
        embedding, values = rows[:, :, 1:], arrays["candidate_values"]
        pairs = 0.5 * (embedding.sum(1).square() - embedding.square().sum(1)).sum(1, keepdim=True)
        deep = self.mlp(torch.cat([embedding.flatten(1), values], dim=1))
        logits: Tensor = rows[:, :, 0].sum(1, keepdim=True) + self.values(values) + pairs + deep
        return logits.squeeze(1)


def plain_step(model: Plain, batch: Tensors, optimizer: torch.optim.Optimizer) -> None:
    loss = functional.binary_cross_entropy_with_logits(model(batch.arrays), batch.labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def timed(
    step: Callable[[Tensors], object], rows: Tensors, batch: int, steps: int, rng: torch.Generator
) -> list[float]:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step(rows.take(torch.randint(len(rows), (batch,), generator=rng)))
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    spec = DeepFMTraining(dim=16, hidden=(400, 400), dropout=0.0, batch_size=options.batch)
    encoders = layout(options.ids)
    rows = data(encoders, 200_000)
    ours = DeepFM(encoders, spec, generator=rng)
    dense, touched = torch.optim.Adam(ours.parameters(), lr=0.001), RowWiseAdagrad(ours.table, learning_rate=0.02)
    plain = Plain(encoders, spec)
    adam = torch.optim.Adam(plain.parameters(), lr=0.001)

    contenders: dict[str, Callable[[Tensors], object]] = {
        "plait": lambda batch: train_step(ours, batch, dense, touched),
        "dense adam": lambda batch: plain_step(plain, batch, adam),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        timed(step, rows, options.batch, 3, rng)
    for _ in range(5):
        for name, step in contenders.items():
            times[name] += timed(step, rows, options.batch, max(1, options.steps // 5), rng)
    result = {
        name: {
            "median": options.batch / float(np.median(taken)),
            "best": options.batch / float(np.quantile(taken, 0.1)),
        }
        for name, taken in times.items()
    }
    print(f"{options.ids:,} ids, batch {options.batch}, {options.threads} threads; samples/s")
    for name, rates in result.items():
        print(f"  {name:<12} median {rates['median']:>10,.0f}   best {rates['best']:>10,.0f}")
    for kind in ("median", "best"):
        print(f"  ratio ({kind}): {result['plait'][kind] / result['dense adam'][kind]:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"ids": options.ids, "batch": options.batch, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
