"""Rows a second from a training set on disk into torch batches: 26 ids + 13 floats, shuffled, batch 4096.

    python benchmarks/dataset_read.py [--rows 2000000] [--threads 2]

Beside it, reading the same rows already held in memory: torch's DataLoader over a TensorDataset (what the click
libraries do), and pandas (shuffle, then slice). Each runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

IDS = tuple(f"id_{i:02d}" for i in range(26))
FLOATS = tuple(f"x_{i:02d}" for i in range(13))
BATCH = 4096
BUFFER = 262_144


def make(folder: Path, rows: int, seed: int = 1) -> None:
    """A dataset of log-uniform ids below 1,000,000 and normal floats, written as `plait dataset build` does."""
    from plait.offline.dataset import MANIFEST, DatasetManifest, FeatureColumn
    from plait.offline.parts import PartWriter, content_hash

    rng = np.random.default_rng(seed)
    schema = pa.schema([("click", pa.int8()), *((n, pa.int64()) for n in IDS), *((n, pa.float32()) for n in FLOATS)])
    writer = PartWriter(folder / "train", schema, root=folder)
    for start in range(0, rows, 500_000):
        n = min(500_000, rows - start)
        columns = [pa.array(rng.integers(0, 2, n), pa.int8())]
        columns += [pa.array(np.exp(rng.uniform(0, np.log(1_000_000), n)).astype(np.int64)) for _ in IDS]
        columns += [pa.array(rng.normal(size=n).astype(np.float32)) for _ in FLOATS]
        writer.write(pa.Table.from_arrays(columns, schema=schema))
    parts = tuple(writer.close())
    features = [FeatureColumn(name=f.name, view="made", dtype=str(f.type), side="request") for f in list(schema)[1:]]
    manifest = DatasetManifest(
        key="",
        data_hash=content_hash(parts),
        feature_service="made",
        features=tuple(features),
        transforms={},
        derived_keys={},
        label="click",
        labels=("click",),
        samples="made",
        samples_hash="",
        split={},
        rows={"train": rows, "valid": 0, "test": 0},
        positives={"click": {"train": 0, "valid": 0, "test": 0}},
        schema={f.name: str(f.type) for f in schema},
        parts=parts,
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())


def plait_batches(folder: Path, seed: int, *, pack: bool = True) -> Iterator[int]:
    from plait.offline.batches import ReadSpec
    from plait.offline.dataset import Dataset
    from plait.offline.torch_reader import TorchBatches

    packed = {"ids": IDS, "floats": FLOATS} if pack else None
    spec = ReadSpec(batch_rows=BATCH, columns=("click", *IDS, *FLOATS), shuffle_rows=BUFFER, seed=seed, pack=packed)
    for batch in TorchBatches(Dataset.open(folder).split("train"), spec):
        yield len(batch["click"])


def plait_columns(folder: Path, seed: int) -> Iterator[int]:
    yield from plait_batches(folder, seed, pack=False)


def plait_workers(folder: Path, seed: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    from plait.offline.batches import ReadSpec
    from plait.offline.dataset import Dataset
    from plait.offline.torch_reader import TorchBatches

    spec = ReadSpec(
        batch_rows=BATCH,
        columns=("click", *IDS, *FLOATS),
        shuffle_rows=BUFFER,
        seed=seed,
        pack={"ids": IDS, "floats": FLOATS},
    )
    reader = TorchBatches(Dataset.open(folder).split("train"), spec)
    for batch in DataLoader(reader, batch_size=None, num_workers=2):
        yield len(batch["click"])


def tensor_dataset(folder: Path, seed: int) -> Iterator[int]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from plait.offline.dataset import Dataset

    table = Dataset.open(folder).split("train").to_table()
    ids = torch.from_numpy(np.stack([table.column(name).to_numpy() for name in IDS], axis=1))
    floats = torch.from_numpy(np.stack([table.column(name).to_numpy() for name in FLOATS], axis=1))
    label = torch.from_numpy(table.column("click").to_numpy().copy())
    del table
    torch.manual_seed(seed)
    yield 0  # what came before is loading; the peers' clock starts here
    for _, _, click in DataLoader(TensorDataset(ids, floats, label), batch_size=BATCH, shuffle=True):
        yield len(click)


def pandas_slices(folder: Path, seed: int) -> Iterator[int]:
    import pandas as pd
    import torch

    frame = pd.concat([pd.read_parquet(file) for file in sorted((folder / "train").glob("*.parquet"))])
    yield 0
    frame = frame.sample(frac=1, random_state=seed)
    for start in range(0, len(frame), BATCH):
        rows = frame.iloc[start : start + BATCH]
        torch.from_numpy(rows[list(IDS)].to_numpy())
        torch.from_numpy(rows[list(FLOATS)].to_numpy())
        yield len(torch.from_numpy(rows["click"].to_numpy()))


PEER = "torch DataLoader over a TensorDataset in memory"
READERS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "plait, matrices": plait_batches,
    "plait, a tensor a column": plait_columns,
    "plait, matrices, DataLoader with 2 workers": plait_workers,
    PEER: tensor_dataset,
    "pandas, shuffled and sliced in memory": pandas_slices,
}


def measure(name: str, folder: Path, seed: int) -> dict[str, float]:
    """The better of three epochs: rows a second, rows a second counting the loading into memory, rows a CPU second."""
    best: dict[str, float] = {}
    for epoch in range(3):
        total = 0
        begin, cpu_begin = time.perf_counter(), cpu_seconds()
        loaded, cpu_loaded = begin, cpu_begin
        for n in READERS[name](folder, seed + epoch):
            if n == 0:
                loaded, cpu_loaded = time.perf_counter(), cpu_seconds()
            total += n
        end = time.perf_counter()
        got = {
            "rows_per_s": total / (end - loaded),
            "from_disk": total / (end - begin),
            "per_cpu_s": total / (cpu_seconds() - cpu_loaded),
        }
        best = {key: max(value, best.get(key, 0.0)) for key, value in got.items()}
    best["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return best


def cpu_seconds() -> float:
    """Of this process and of the workers that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.folder, seed=1)))
        return
    with tempfile.TemporaryDirectory(prefix="plait-read-") as temporary:
        folder = Path(temporary) / "made"
        make(folder, args.rows)
        size_mb = sum(file.stat().st_size for file in folder.rglob("*.parquet")) / 1e6
        print(
            f"{args.rows:,} rows of 26 int64 ids and 13 float32, {size_mb:,.0f} MB of parquet, {args.threads} threads"
        )
        found = {}
        for name in READERS:
            command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
            env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "ARROW_NUM_THREADS": str(args.threads)}
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
            found[name] = json.loads(out.splitlines()[-1])
        base = found[PEER]["from_disk"]
        print("      rows/s  from disk  ratio  rows/CPU s   peak MB")
        for name, got in found.items():
            numbers = f"{got['rows_per_s']:>12,.0f} {got['from_disk']:>10,.0f} {got['from_disk'] / base:>5.1f}x"
            print(f"{numbers} {got['per_cpu_s']:>11,.0f} {got['peak_mb']:>9,.0f}  {name}")
        print(f"ratio: against {PEER}, both from disk")


if __name__ == "__main__":
    main()
