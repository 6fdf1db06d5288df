"""Encoders agree with loops that are too simple to be wrong, and one row is encoded as a million are."""

from __future__ import annotations

import math
import struct
from collections import Counter
from pathlib import Path

import mmh3
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.encoders import (
    Bag,
    Bucketize,
    Column,
    CrossSpec,
    Drop,
    EncoderSet,
    Hash,
    MultiHot,
    Raw,
    Scale,
    Vector,
    Vocabulary,
)
from plait.encoders.arrays import cross_keys, dtype_of, keys_of, murmur3_32_of_int64
from plait.errors import ArtifactError, DataError, SpecError, UnknownNameError

INTS = st.lists(st.one_of(st.none(), st.integers(-5, 5), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=40)
TEXTS = st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "", "ä", "日本"]), st.text(max_size=5)), min_size=1)
FLOATS = st.lists(st.one_of(st.none(), st.floats(width=32), st.floats(-3, 3)), min_size=1, max_size=40)
LISTS = st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 6)), max_size=6)), min_size=1)


def fitted(values: list, dtype: pa.DataType, encoding, train: list | None = None) -> tuple[EncoderSet, pa.Table]:
    """An encoder of the one candidate column x, fitted on `train` (default: the values), and the values as a table."""
    fit_on = pa.table({"x": pa.array(values if train is None else train, dtype)})
    encoders = EncoderSet.fit(fit_on, [Column(name="x", dtype=dtype, side="candidate")], {"x": encoding})
    return encoders, pa.table({"x": pa.array(values, dtype)})


def naive_ids(values: list, train: list, min_count: int, max_size: int | None) -> list[int]:
    counts = Counter(value for value in train if value is not None)
    known = sorted((v for v, n in counts.items() if n >= min_count), key=lambda v: (-counts[v], v))[:max_size]
    ids = {value: i + 2 for i, value in enumerate(known)}
    return [0 if value is None else ids.get(value, 1) for value in values]


@given(INTS, INTS, st.integers(1, 3), st.sampled_from([None, 1, 3]))
def test_a_vocabulary_of_integers_counts_like_a_loop(values, train, min_count, max_size):
    encoding = Vocabulary(min_count=min_count, max_size=max_size)
    encoders, table = fitted(values, pa.int64(), encoding, train)
    assert encoders.encode_rows(table)["candidate_ids"][:, 0].tolist() == naive_ids(values, train, min_count, max_size)


@given(TEXTS, TEXTS, st.integers(1, 3), st.sampled_from([None, 1, 3]))
def test_a_vocabulary_of_text_counts_like_a_loop(values, train, min_count, max_size):
    encoding = Vocabulary(min_count=min_count, max_size=max_size)
    encoders, table = fitted(values, pa.string(), encoding, train)
    # arrow sorts text by its UTF-8 bytes, which is code point order, as python does
    assert encoders.encode_rows(table)["candidate_ids"][:, 0].tolist() == naive_ids(values, train, min_count, max_size)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.integers(0, 2**32 - 1))
def test_the_vectorised_murmur3_is_mmh3(values, seed):
    wanted = [mmh3.hash(struct.pack("<q", value), seed, signed=False) for value in values]
    assert murmur3_32_of_int64(np.array(values, np.int64), seed=seed).tolist() == wanted


@given(INTS, st.integers(1, 100))
def test_hashed_integers_fall_into_their_bucket(values, buckets):
    encoders, table = fitted(values, pa.int64(), Hash(buckets=buckets))
    wanted = [0 if v is None else 1 + mmh3.hash(struct.pack("<q", v), 0, signed=False) % buckets for v in values]
    assert encoders.encode_rows(table)["candidate_ids"][:, 0].tolist() == wanted


@given(TEXTS, st.integers(1, 100), st.integers(0, 9))
def test_hashed_text_falls_into_its_bucket(values, buckets, seed):
    encoders, table = fitted(values, pa.string(), Hash(buckets=buckets, seed=seed))
    wanted = [0 if v is None else 1 + mmh3.hash(v, seed, signed=False) % buckets for v in values]
    assert encoders.encode_rows(table)["candidate_ids"][:, 0].tolist() == wanted


@given(FLOATS, st.lists(st.floats(-3, 3), unique=True, max_size=5).map(lambda cuts: tuple(sorted(cuts))))
def test_a_number_falls_into_the_bucket_above_every_boundary_it_reaches(values, boundaries):
    encoders, table = fitted(values, pa.float64(), Bucketize(boundaries=boundaries or (0.0,)))
    cuts = boundaries or (0.0,)
    wanted = [0 if v is None or math.isnan(v) else 1 + sum(v >= cut for cut in cuts) for v in values]
    assert encoders.encode_rows(table)["candidate_ids"][:, 0].tolist() == wanted


def test_quantile_buckets_hold_about_equally_many_rows():
    values = np.random.default_rng(0).exponential(size=10_000).tolist()
    encoders, table = fitted(values, pa.float64(), Bucketize(buckets=8))
    counts = np.bincount(encoders.encode_rows(table)["candidate_ids"][:, 0])
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 1250) <= 2).all()


@given(FLOATS, FLOATS, st.booleans(), st.sampled_from(["standard", "minmax"]))
def test_scaling_is_the_formula_in_its_docstring(values, train, log1p, method):
    encoders, table = fitted(values, pa.float64(), Scale(log1p=log1p, method=method, clip=3.0), train)
    transform = (lambda x: math.copysign(math.log1p(abs(x)), x)) if log1p else (lambda x: x)
    seen = np.array([transform(v) for v in train if v is not None and math.isfinite(v)])
    got = encoders.encode_rows(table)["candidate_values"]
    missing = [v is None or math.isnan(v) for v in values]
    assert got.shape[1] == 1 + any(v is None or math.isnan(v) for v in train)
    for row, value, is_missing in zip(got, values, missing, strict=True):
        if got.shape[1] == 2:
            assert row[1] == is_missing
        if is_missing or not len(seen):
            assert not is_missing or row[0] == 0.0
            continue
        if method == "minmax":
            span = seen.max() - seen.min()
            wanted = min(max((transform(value) - seen.min()) / (span or 1.0), 0.0), 1.0)
        else:
            deviation = seen.std()
            deviation = deviation if deviation > 1e-12 * max(1.0, abs(seen.mean())) else 1.0
            wanted = min(max((transform(value) - seen.mean()) / deviation, -3.0), 3.0)
        assert row[0] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@given(FLOATS)
def test_raw_numbers_pass_through_and_null_is_nan(values):
    encoders, table = fitted(values, pa.float64(), Raw())
    wanted = np.array([np.nan if v is None else v for v in values], np.float64).astype(np.float32)
    np.testing.assert_array_equal(encoders.encode_rows(table)["candidate_values"][:, 0], wanted)


@given(LISTS, st.sampled_from([None, 1, 3]))
def test_a_list_becomes_the_ids_of_its_end_padded_by_zero(values, last):
    encoders, table = fitted(values, pa.list_(pa.int64()), Bag(last=last))
    elements = [element for value in values for element in value or []]
    got = encoders.encode_rows(table)["candidate_bag_x"]
    assert got.shape[1] >= 1
    for row, value in zip(got.tolist(), values, strict=True):
        kept = (value or [])[-(last or 99) :]
        wanted = naive_ids(kept, elements, 1, None)
        assert row == wanted + [0] * (len(row) - len(wanted))


@given(LISTS)
def test_multi_hot_marks_what_a_list_holds(values):
    encoders, table = fitted(values, pa.list_(pa.int64()), MultiHot(max_size=3))
    elements = [element for value in values for element in value or []]
    got = encoders.encode_rows(table)["candidate_values"]
    for row, value in zip(got, values, strict=True):
        marked = set(naive_ids([element for element in value or [] if element is not None], elements, 1, 3)) or {0}
        assert set(np.flatnonzero(row)) == marked
        assert set(row.tolist()) <= {0.0, 1.0}


def test_a_sliced_list_column_is_read_from_its_own_offset():
    values = [[1, 2], None, [3], [], [1, 1, 4]]
    encoders, table = fitted(values, pa.list_(pa.int64()), Bag())
    whole = encoders.encode_rows(table)["candidate_bag_x"]
    sliced = encoders.encode_rows(table.slice(2))["candidate_bag_x"]
    np.testing.assert_array_equal(sliced, whole[2:])


def test_a_vector_must_have_the_declared_width():
    encoders, table = fitted([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float64()), Vector(width=2))
    assert encoders.encode_rows(table)["candidate_values"].tolist() == [[1, 2], [0, 0], [3, 4]]
    with pytest.raises(DataError, match="a vector of 3 numbers"):
        encoders.encode_rows(pa.table({"x": [[1.0, 2.0, 3.0]]}))


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["a", "b", "ab", None])), min_size=1))
def test_a_cross_gives_one_key_per_pair_and_tells_the_order(pairs):
    left = pa.array([a for a, _ in pairs], pa.int64())
    right = pa.array([b for _, b in pairs], pa.string())
    keys = cross_keys(keys_of(left), keys_of(right)).tolist()
    assert len(set(keys)) == len(set(pairs))
    key_of = dict(zip(pairs, keys, strict=True))
    assert [key_of[pair] for pair in pairs] == keys
    assert not set(keys) & set(cross_keys(keys_of(right), keys_of(left)).tolist())


def test_crosses_of_a_grid_do_not_collide():
    a, b = np.meshgrid(np.arange(700), np.arange(700))
    keys = cross_keys(keys_of(pa.array(a.ravel())), keys_of(pa.array(b.ravel())))
    assert len(np.unique(keys)) == 490_000


def test_null_and_zero_and_the_empty_text_have_different_keys():
    numbers = keys_of(pa.array([0, None, -1], pa.int64()))
    texts = keys_of(pa.array(["", None, "null"], pa.string()))
    assert len({*numbers.tolist()}) == 3
    assert len({*texts.tolist()}) == 3


COLUMNS = (
    Column(name="user_id", dtype=pa.int64(), side="request"),
    Column(name="age", dtype=pa.int64(), side="request"),
    Column(name="history", dtype=pa.list_(pa.int64()), side="request"),
    Column(name="item_id", dtype=pa.int64(), side="candidate"),
    Column(name="genres", dtype=pa.list_(pa.string()), side="candidate"),
    Column(name="genre", dtype=pa.string(), side="candidate"),
    Column(name="rate", dtype=pa.float64(), side="candidate"),
    Column(name="seen", dtype=pa.bool_(), side="candidate"),
)
ENCODINGS = {
    "user_id": Vocabulary(),
    "age": Bucketize(buckets=4),
    "history": Bag(last=3, share="item_id"),
    "item_id": Vocabulary(min_count=2),
    "genres": MultiHot(),
    "genre": Hash(buckets=8),
    "rate": Scale(),
    "seen": Raw(),
}
CROSSES = (CrossSpec(left="user_id", right="genre"), CrossSpec(left="user_id", right="age", into=Hash(buckets=50)))


def random_rows(n: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    genres = np.array(["drama", "comedy", "war", None], object)
    return pa.table(
        {
            "user_id": pa.array(rng.integers(0, 20, n)),
            "age": pa.array(rng.integers(18, 80, n), mask=rng.random(n) < 0.1),
            "history": pa.array(
                [None if rng.random() < 0.1 else rng.integers(0, 40, rng.integers(0, 6)).tolist() for _ in range(n)],
                pa.list_(pa.int64()),
            ),
            "item_id": pa.array(rng.integers(0, 40, n)),
            "genres": pa.array(
                [rng.choice(genres, rng.integers(0, 3)).tolist() for _ in range(n)], pa.list_(pa.string())
            ),
            "genre": pa.array(rng.choice(genres, n).tolist(), pa.string()),
            "rate": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.2),
            "seen": pa.array(rng.random(n) < 0.5),
        }
    )


def all_kinds(train: pa.Table) -> EncoderSet:
    return EncoderSet.fit(train, COLUMNS, ENCODINGS, CROSSES)


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
        assert got[name].dtype == array.dtype


@pytest.mark.parametrize("seed", range(5))
def test_a_request_is_encoded_as_its_rows_are_in_training(seed):
    """One request row and N candidates give the arrays of the same N rows, the request's repeated."""
    encoders = all_kinds(random_rows(300, 0))
    candidates = random_rows(25, seed)
    request = random_rows(1, seed + 100)
    served = encoders.encode(request, candidates)
    repeated = pa.table(
        {c.name: request.column(c.name).take(pa.array([0] * 25)) for c in COLUMNS if c.side == "request"}
    )
    rows = pa.table({**{n: repeated.column(n) for n in repeated.column_names},
                     **{c.name: candidates.column(c.name) for c in COLUMNS if c.side == "candidate"}})  # fmt: skip
    trained = encoders.encode_rows(rows)
    assert {name: len(array) for name, array in served.items() if name.startswith("request_")} == {
        name: 1 for name in trained if name.startswith("request_")
    }
    assert_same({name: np.broadcast_to(a, trained[name].shape) for name, a in served.items()}, trained)


@pytest.mark.parametrize("seed", range(3))
def test_many_rows_are_encoded_like_each_alone(seed):
    """Above a few hundred rows text goes through a dictionary; the answers are the same."""
    encoders = all_kinds(random_rows(300, 0))
    rows = random_rows(700, seed)
    together = encoders.encode_rows(rows)
    for i in (0, 17, 699):
        for name, array in encoders.encode_rows(rows.slice(i, 1)).items():
            width = array.shape[1]
            np.testing.assert_array_equal(array[0], together[name][i, :width])
            assert not together[name][i, width:].any()


def test_saved_encoders_encode_like_the_fitted_ones(tmp_path: Path):
    encoders = all_kinds(random_rows(300, 0))
    encoders.save(tmp_path / "encoders")
    loaded = EncoderSet.load(tmp_path / "encoders")
    assert_same(loaded.encode_rows(random_rows(100, 1)), encoders.encode_rows(random_rows(100, 1)))
    assert loaded.input_names() == encoders.input_names()
    assert [path.suffix for path in (tmp_path / "encoders").iterdir() if path.suffix not in (".json", ".arrow")] == []


def test_what_is_not_in_the_training_split_is_unknown():
    """Nothing of later rows leaks into the encoders: their new values share the unknown id."""
    encoders = all_kinds(random_rows(300, 0))
    rows = random_rows(3, 1).set_column(0, "user_id", pa.array([999, 1000, 1001]))
    assert (encoders.encode_rows(rows)["request_ids"][:, 0] == 1).all()
    scale = encoders.values["rate"]
    assert scale.shift == pytest.approx(np.nanmean(random_rows(300, 0).column("rate").to_pandas()))


def test_fields_that_share_a_vocabulary_give_equal_ids():
    encoders = all_kinds(random_rows(300, 0))
    rows = random_rows(40, 2)
    rows = rows.set_column(2, "history", pa.array([[i] for i in rows.column("item_id").to_pylist()]))
    arrays = encoders.encode_rows(rows)
    position = next(f.position for f in encoders.side_fields("candidate", "id") if f.name == "item_id")
    np.testing.assert_array_equal(arrays["request_bag_history"][:, 0], arrays["candidate_ids"][:, position])
    assert "history" not in encoders.table_sizes()


def test_every_id_is_below_the_size_of_its_table():
    encoders = all_kinds(random_rows(300, 0))
    sizes = encoders.table_sizes()
    arrays = encoders.encode_rows(random_rows(500, 3))
    for field in encoders.fields:
        if field.kind != "value":
            name = f"{field.side}_ids" if field.kind == "id" else f"{field.side}_bag_{field.name}"
            ids = arrays[name][:, field.position] if field.kind == "id" else arrays[name]
            assert ids.min() >= 0 and ids.max() < sizes[field.table], field.name


def test_a_dropped_column_is_not_asked_for():
    encoders = EncoderSet.fit(random_rows(50, 0), COLUMNS, {**ENCODINGS, "genres": Drop()}, CROSSES)
    assert "genres" not in [column.name for column in encoders.inputs]
    encoders.encode_rows(random_rows(5, 1).drop_columns(["genres"]))


def test_a_dropped_column_still_feeds_its_cross():
    encodings = {**ENCODINGS, "genre": Drop(), "user_id": Drop()}
    encoders = EncoderSet.fit(random_rows(50, 0), COLUMNS, encodings, CROSSES)
    assert {"genre", "user_id"} <= {column.name for column in encoders.inputs}


def test_integers_too_large_for_a_double_keep_their_own_id():
    big = 2**53
    values = [big, big + 1, None, big + 2]
    encoders, table = fitted(values, pa.int64(), Vocabulary())
    assert sorted(encoders.encode_rows(table)["candidate_ids"][:, 0].tolist()) == [0, 2, 3, 4]


def test_a_narrower_type_is_widened_and_another_kind_is_refused():
    encoders, _ = fitted([1, 2], pa.int64(), Vocabulary())
    narrow = pa.table({"x": pa.array([2, 1], pa.int32())})
    assert sorted(encoders.encode_rows(narrow)["candidate_ids"][:, 0].tolist()) == [2, 3]
    with pytest.raises(DataError, match="column 'x' is string and does not fit int64"):
        encoders.encode_rows(pa.table({"x": ["one"]}))


def test_a_column_of_nulls_only_is_encoded_as_missing():
    encoders, _ = fitted([1.0, 3.0], pa.float64(), Scale(indicator=True))
    assert encoders.encode_rows(pa.table({"x": pa.nulls(2)}))["candidate_values"].tolist() == [[0, 1], [0, 1]]


def test_a_missing_column_is_named():
    encoders, _ = fitted([1], pa.int64(), Vocabulary())
    with pytest.raises(DataError, match="no column 'x'; they have: y"):
        encoders.encode_rows(pa.table({"y": [1]}))


def test_request_rows_must_go_with_the_candidates():
    encoders = all_kinds(random_rows(50, 0))
    with pytest.raises(DataError, match="2 request rows for 5 candidates"):
        encoders.encode(random_rows(2, 1), random_rows(5, 1))


@pytest.mark.parametrize(
    ("encodings", "crosses", "error", "message"),
    [
        ({"x": Bag()}, (), SpecError, "column 'x' is int64, which `pool` cannot encode"),
        ({"x": Bag(), "y": Drop()}, (), UnknownNameError, "no column 'y'"),
        ({"x": Vocabulary(share="z")}, (), UnknownNameError, "shares with: no column 'z'"),
        ({"x": Vocabulary()}, (CrossSpec(left="x", right="xx"),), UnknownNameError, "no column 'xx'; did you mean 'x'"),
        ({"x": Drop()}, (), SpecError, "every column is dropped"),
        ({}, (), SpecError, "column 'x' has no encoding"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(encodings, crosses, error, message):
    column = Column(name="x", dtype=pa.int64(), side="candidate")
    with pytest.raises(error, match=message):
        EncoderSet.fit(pa.table({"x": [1, 2]}), [column], encodings, crosses)


def test_fitting_on_no_rows_is_refused():
    with pytest.raises(DataError, match="no rows"):
        fitted([], pa.int64(), Vocabulary())


@pytest.mark.parametrize("damage", ["missing", "cut", "not json"])
def test_damaged_encoders_are_an_artifact_error(tmp_path: Path, damage):
    all_kinds(random_rows(50, 0)).save(tmp_path)
    if damage == "missing":
        (tmp_path / "vocabulary-0.arrow").unlink()
    elif damage == "cut":
        content = (tmp_path / "vocabulary-0.arrow").read_bytes()
        (tmp_path / "vocabulary-0.arrow").write_bytes(content[: len(content) // 2])
    else:
        (tmp_path / "encoders.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        EncoderSet.load(tmp_path)


@settings(max_examples=20)
@given(st.sampled_from([pa.int64(), pa.float64(), pa.string(), pa.bool_(), pa.int8()]), st.integers(0, 2))
def test_a_type_is_read_back_from_its_text(dtype, depth):
    for _ in range(depth):
        dtype = pa.list_(dtype)
    assert dtype_of(str(dtype)) == dtype
