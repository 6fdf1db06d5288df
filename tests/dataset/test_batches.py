"""Reading a dataset into batches: every row once, in any sharding; shuffled and packed; into torch and trees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import DataError, SpecError, UnknownNameError
from plait.offline.batches import BatchReader, Ragged, ReadSpec, to_numpy
from plait.offline.dataset import Dataset, Split
from plait.offline.parts import PartWriter

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("click", pa.int8()),
        ("weight", pa.float32()),
        ("x", pa.float32()),
        ("n", pa.int64()),
        ("recent", pa.list_(pa.int64())),
        ("genre", pa.string()),
    ]
)
SIZES = (70, 30, 0, 100, 37)  # rows of the row groups
N = sum(SIZES)


def rows_of(start: int, n: int) -> pa.Table:
    row = np.arange(start, start + n)
    return pa.Table.from_arrays(
        [
            pa.array(row),
            pa.array(row % 2, pa.int8()),
            pa.array(1 + row % 3, pa.float32()),
            pa.array([None if i % 7 == 0 else i / 2 for i in row.tolist()], pa.float32()),
            pa.array([None if i % 5 == 0 else i for i in row.tolist()], pa.int64()),
            pa.array([None if i % 11 == 0 else list(range(i, i + i % 4)) for i in row.tolist()], pa.list_(pa.int64())),
            pa.array([f"g{i % 3}" for i in row.tolist()]),
        ],
        schema=SCHEMA,
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Two files with row groups of unequal sizes."""
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("rows")
    start, files = 0, []
    for i, groups in enumerate((SIZES[:2], SIZES[2:])):
        files.append(folder / f"part-{i}.parquet")
        with pq.ParquetWriter(files[-1], SCHEMA) as writer:
            for n in groups:
                writer.write_table(rows_of(start, n))
                start += n
    return Split("train", tuple(files), N, SCHEMA)


def read(split: Split, epoch: int = 0, **spec) -> list[dict]:
    spec = {"columns": ("row", "recent"), **spec}
    return list(BatchReader(split, ReadSpec(**spec), encode=None).epoch(epoch))


def rows_in(batches: list[dict]) -> list[int]:
    return [int(row) for batch in batches for row in batch["row"]]


@settings(max_examples=60, deadline=None)
@given(
    batch_rows=st.integers(1, 300),
    shuffle_rows=st.sampled_from([0, 1, 50, 1000]),
    shards=st.integers(1, 7),
    seed=st.integers(0, 3),
    drop_last=st.booleans(),
    even=st.booleans(),
)
def test_shards_together_read_every_row_once(split, batch_rows, shuffle_rows, shards, seed, drop_last, even) -> None:
    spec = {"batch_rows": batch_rows, "shuffle_rows": shuffle_rows, "shards": shards, "seed": seed}
    spec |= {"drop_last": drop_last, "even": even}
    seen: Counter[int] = Counter()
    for shard in range(shards):
        reader = BatchReader(split, ReadSpec(shard=shard, columns=("row", "recent"), **spec))
        batches = list(reader.epoch(1))
        assert len(batches) == len(reader)
        assert all(len(batch["row"]) == batch_rows for batch in batches[: -1 if batches else None])
        if even:
            assert reader.n_rows == N // shards
        for batch in batches:
            for i, row in enumerate(batch["row"].tolist()):
                ragged = batch["recent"]
                values = ragged.values[ragged.offsets[i] : ragged.offsets[i + 1]].tolist()
                assert values == ([] if row % 11 == 0 else list(range(row, row + row % 4)))
        seen.update(rows_in(batches))
    assert not seen or max(seen.values()) == 1
    lost = N - sum(seen.values())
    assert lost <= (shards * (batch_rows - 1) if drop_last else 0) + (shards - 1 if even else 0)


def test_without_shuffling_rows_come_in_order(split: Split) -> None:
    assert rows_in(read(split, batch_rows=64)) == list(range(N))


def test_an_epoch_is_another_order_and_the_same_again(split: Split) -> None:
    first, again, other = (rows_in(read(split, epoch, batch_rows=32, shuffle_rows=80)) for epoch in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(N))


def test_a_buffer_of_all_rows_shuffles_uniformly(split: Split) -> None:
    first = np.array([rows_in(read(split, epoch, batch_rows=N, shuffle_rows=N))[0] for epoch in range(300)])
    # The first row of an epoch falls in each quarter of the rows about equally often.
    counts = np.bincount(first * 4 // N, minlength=4)
    assert counts.min() > 300 / 4 - 35


def test_packed_columns_stand_side_by_side(split: Split) -> None:
    spec = {"columns": ("row", "x", "weight", "n"), "pack": {"floats": ("x", "weight")}, "shuffle_rows": 100}
    for batch in read(split, batch_rows=50, **spec):
        assert set(batch) == {"row", "floats", "n"}
        assert batch["floats"].dtype == np.float32
        assert batch["floats"].flags.c_contiguous
        np.testing.assert_array_equal(batch["floats"][:, 1], 1 + batch["row"] % 3)
        np.testing.assert_array_equal(np.isnan(batch["floats"][:, 0]), batch["row"] % 7 == 0)
        np.testing.assert_array_equal(batch["n"], np.where(batch["row"] % 5 == 0, -1, batch["row"]))


def test_an_encoder_sees_arrow_tables_and_its_arrays_are_batched(split: Split) -> None:
    def encode(table: pa.Table) -> dict[str, np.ndarray]:
        codes = table.column("genre").combine_chunks().dictionary_encode()
        words = np.array(codes.dictionary.to_pylist())[codes.indices.to_numpy()]
        return {"row": table.column("row").to_numpy(), "genre": np.char.replace(words, "g", "").astype(np.int64)}

    spec = ReadSpec(batch_rows=16, columns=("row", "genre"), shuffle_rows=90)
    for batch in BatchReader(split, spec, encode=encode).epoch():
        np.testing.assert_array_equal(batch["genre"], batch["row"] % 3)


def test_an_encoder_that_loses_rows_is_caught(split: Split) -> None:
    reader = BatchReader(split, ReadSpec(batch_rows=8), encode=lambda table: {"row": np.arange(3)})
    with pytest.raises(DataError, match="3 rows of 'row' for"):
        list(reader.epoch())


def test_strings_without_an_encoder_are_refused_by_name(split: Split) -> None:
    with pytest.raises(DataError, match="column 'genre' is string"):
        read(split, batch_rows=8, columns=("genre",))


def test_an_unknown_column_suggests_the_nearest(split: Split) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'recent'"):
        BatchReader(split, ReadSpec(batch_rows=8, columns=("recnt",)))


@pytest.mark.parametrize("spec", [{"batch_rows": 0}, {"batch_rows": 1, "shard": 2, "shards": 2}])
def test_an_impossible_reading_is_refused(spec: dict) -> None:
    with pytest.raises(SpecError):
        ReadSpec(**spec)


def test_a_part_corrupted_after_opening_is_named(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, SCHEMA)
    writer.write(rows_of(0, 50))
    (part,) = writer.close()
    file = tmp_path / part.path
    split = Split("train", (file,), 50, SCHEMA)
    reader = BatchReader(split, ReadSpec(batch_rows=8, columns=("row",)))
    content = bytearray(file.read_bytes())
    content[4:80] = bytes(76)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000\.parquet cannot be read"):
        list(reader.epoch())


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=12), st.randoms(use_true_random=False))
def test_taking_rows_of_lists_agrees_with_python(lists: list[list[int]], random) -> None:
    ragged = to_numpy(pa.array([None, *lists], pa.list_(pa.int64())).slice(1))
    assert isinstance(ragged, Ragged)
    rows = [random.randrange(len(lists)) for _ in range(5)] if lists else []
    taken = ragged.take(np.array(rows, dtype=np.int64))
    got = [taken.values[a:b].tolist() for a, b in zip(taken.offsets[:-1], taken.offsets[1:], strict=True)]
    assert got == [lists[row] for row in rows]


def test_torch_reads_every_row_once_over_ranks_and_workers(split: Split) -> None:
    from torch.utils.data import DataLoader

    from plait.offline.torch_reader import TorchBatches

    spec = ReadSpec(batch_rows=16, columns=("row", "recent", "x"), shuffle_rows=60)
    seen: Counter[int] = Counter()
    for rank in range(2):
        reader = TorchBatches(split, spec, rank=rank, world=2)
        reader.set_epoch(3)
        for batch in DataLoader(reader, batch_size=None, num_workers=2):
            values, offsets = batch["recent"]
            for i, row in enumerate(batch["row"].tolist()):
                assert values[offsets[i] : offsets[i + 1]].tolist() == (
                    [] if row % 11 == 0 else list(range(row, row + row % 4))
                )
            seen.update(batch["row"].tolist())
    assert seen == Counter(range(N))


def test_xgboost_learns_the_same_from_blocks_as_from_one_matrix(split: Split, tmp_path: Path) -> None:
    import xgboost as xgb

    from plait.offline.tree_readers import XGBoostBlocks, plain_matrix

    columns = ["x", "n"]
    settings_ = {"max_depth": 3, "nthread": 1, "seed": 1, "max_bin": 512}
    whole = split.to_table()
    matrix = xgb.QuantileDMatrix(
        plain_matrix(whole.select(columns)),
        label=plain_matrix(whole.select(["click"]))[:, 0],
        weight=plain_matrix(whole.select(["weight"]))[:, 0],
        feature_names=columns,
        max_bin=512,
    )
    blocks = xgb.QuantileDMatrix(XGBoostBlocks(split, columns, "click", weight="weight"), max_bin=512)
    spilled = xgb.ExtMemQuantileDMatrix(
        XGBoostBlocks(split, columns, "click", weight="weight", cache_prefix=str(tmp_path / "cache")), max_bin=512
    )
    expected = xgb.train(settings_, matrix, 5).predict(matrix)
    for other in (blocks, spilled):
        got = xgb.train(settings_, other, 5).predict(
            xgb.DMatrix(plain_matrix(whole.select(columns)), feature_names=columns)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    del blocks, spilled


def test_lightgbm_learns_the_same_from_a_sequence_as_from_one_matrix(split: Split) -> None:
    import lightgbm as lgb

    from plait.offline.tree_readers import LightGBMRows, plain_matrix

    rows = LightGBMRows(split, ["x", "n"], "click", weight="weight", batch_size=40)
    matrix = plain_matrix(split.to_table(["x", "n"])).astype(np.float64)
    np.testing.assert_array_equal(rows[3:150], matrix[3:150])
    np.testing.assert_array_equal(rows[[5, 200, 7]], matrix[[5, 200, 7]])
    np.testing.assert_array_equal(rows[-1], matrix[-1])
    with pytest.raises(IndexError):
        rows[N]
    params = {"objective": "binary", "num_threads": 1, "verbose": -1, "min_data_in_leaf": 5, "deterministic": True}
    made = [
        lgb.train(params, lgb.Dataset(data, label=rows.label, weight=rows.weight, params=params), 5)
        for data in (rows, matrix)
    ]
    np.testing.assert_allclose(made[0].predict(matrix), made[1].predict(matrix), rtol=1e-9)


def test_trees_refuse_columns_that_are_no_numbers(split: Split) -> None:
    from plait.offline.tree_readers import LightGBMRows

    with pytest.raises(DataError, match="column 'genre' is string"):
        LightGBMRows(split, ["genre"], "click")[0]


def test_readers_do_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, plait.offline.batches, plait.offline.card; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pandas_is_on_the_way_into_torch(split: Split) -> None:
    """A process in which pandas cannot be imported reads every row, lists included."""
    import subprocess
    import sys

    code = f"""
import sys

class NoPandas:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pandas":
            raise ImportError("pandas may not be imported here")

sys.meta_path.insert(0, NoPandas())
from pathlib import Path
import pyarrow.parquet as pq
from torch.utils.data import DataLoader
from plait.offline.batches import ReadSpec
from plait.offline.dataset import Split
from plait.offline.torch_reader import TorchBatches

files = tuple(map(Path, {[str(file) for file in split.files]!r}))
split = Split("train", files, {N}, pq.read_schema(files[0]))
spec = ReadSpec(batch_rows=16, columns=("row", "recent", "x"), shuffle_rows=60)
rows = [row for batch in DataLoader(TorchBatches(split, spec), batch_size=None) for row in batch["row"].tolist()]
assert sorted(rows) == list(range({N})), rows
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parts_have_fixed_boundaries_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.offline.parts.ROW_GROUP_ROWS", 16)
    monkeypatch.setattr("plait.offline.parts.PART_ROWS", 48)
    hashes = []
    for step in (1, 7, 100):
        writer = PartWriter(tmp_path / str(step), SCHEMA)
        for start in range(0, 100, step):
            writer.write(rows_of(start, min(step, 100 - start)))
        parts = writer.close()
        assert [part.rows for part in parts] == [48, 48, 4]
        hashes.append([part.sha256 for part in parts])
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset in"):
        Dataset.open(tmp_path)
