"""Declarations of encodings: defaults from the type, and clear errors for what cannot be."""

from __future__ import annotations

import pyarrow as pa
import pytest

from plait.encoders import (
    Bag,
    Column,
    CrossSpec,
    Drop,
    Hash,
    MultiHot,
    Raw,
    Scale,
    Vocabulary,
    default_encoding,
    parse_cross,
    parse_encoding,
)
from plait.errors import SpecError, UnknownNameError


@pytest.mark.parametrize(
    ("name", "dtype", "is_key", "neural", "tree"),
    [
        ("user_id", pa.int64(), True, Vocabulary(), Drop()),
        ("studio_id", pa.int64(), False, Vocabulary(), Drop()),
        ("gender", pa.string(), False, Vocabulary(), Vocabulary()),
        ("age", pa.int64(), False, Scale(), Raw()),
        ("rate", pa.float64(), False, Scale(), Raw()),
        ("seen", pa.bool_(), False, Scale(), Raw()),
        ("genres", pa.list_(pa.string()), False, Bag(), MultiHot()),
        ("history", pa.list_(pa.int64()), False, Bag(last=50), MultiHot()),
    ],
)
def test_a_column_that_is_not_mentioned_gets_its_types_default(name, dtype, is_key, neural, tree):
    column = Column(name=name, dtype=dtype, side="request")
    assert default_encoding(column, "neural", is_key=is_key) == neural
    assert default_encoding(column, "linear", is_key=is_key) == neural
    assert default_encoding(column, "tree", is_key=is_key) == tree


@pytest.mark.parametrize("dtype", [pa.timestamp("us"), pa.list_(pa.float64()), pa.list_(pa.list_(pa.int64()))])
def test_a_type_without_an_encoder_is_refused_with_a_way_out(dtype):
    with pytest.raises(SpecError, match="drop"):
        default_encoding(Column(name="x", dtype=dtype, side="request"), "neural", is_key=False)


def test_settings_override_what_an_encoding_presets():
    assert parse_encoding("h", "sequence", where="m.yaml") == Bag(last=50)
    assert parse_encoding("h", {"encode": "sequence", "last": 5}, where="m.yaml") == Bag(last=5)
    assert parse_encoding("x", "log1p", where="m.yaml") == Scale(log1p=True)
    assert parse_encoding("x", {"encode": "scale", "clip": 4}, where="m.yaml") == Scale(clip=4.0)
    assert parse_encoding("x", {"encode": "scale", "clip": "1e-3"}, where="m.yaml") == Scale(clip=0.001)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("vocabluary", UnknownNameError, "m.yaml: column 'x': no encoding 'vocabluary'; did you mean 'vocabulary'?"),
        ({"encode": "vocabulary", "mincount": 2}, UnknownNameError, "no setting 'mincount'; did you mean 'min_count'?"),
        ({"encode": "vocabulary", "min_count": "2"}, SpecError, "min_count is '2'; it must be of type int"),
        ({"encode": "vocabulary", "min_count": True}, SpecError, "min_count is True"),
        ({"encode": "vocabulary", "min_count": 0}, SpecError, "min_count is 0; it must be at least 1"),
        ({"encode": "hash"}, SpecError, "buckets must be given"),
        ({"encode": "bucketize", "boundaries": [2, 1]}, SpecError, "strictly increasing"),
        ({"encode": "scale", "method": "robust"}, SpecError, "must be standard or minmax"),
        ({"encode": "scale", "clip": float("nan")}, SpecError, "clip is nan"),
        ({"encode": "pool", "pool": "max"}, SpecError, "must be mean or sum"),
        ({"min_count": 2}, SpecError, "write an encoding"),
        (7, SpecError, "write an encoding"),
    ],
)
def test_a_wrong_encoding_names_the_file_and_the_column(value, error, message):
    with pytest.raises(error, match=r"m\.yaml: column 'x'") as caught:
        parse_encoding("x", value, where="m.yaml")
    assert message in str(caught.value)


def test_a_cross_is_written_with_a_hash_sign():
    assert parse_cross("a#b", where="m") == CrossSpec(left="a", right="b")
    hashed = parse_cross({"cross": "a # b", "encode": "hash", "buckets": 9}, where="m")
    assert hashed == CrossSpec(left="a", right="b", into=Hash(buckets=9))


@pytest.mark.parametrize("value", ["a", "a#", "a#b#c", 3, {"encode": "hash"}, {"cross": "a#b", "encode": "scale"}])
def test_what_is_no_cross_is_refused(value):
    with pytest.raises(SpecError, match="cross"):
        parse_cross(value, where="m")


def test_a_column_cannot_be_crossed_with_itself():
    with pytest.raises(SpecError, match="itself"):
        parse_cross("a#a", where="m")
