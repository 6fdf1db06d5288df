"""Encoders: the columns of a feature service as the arrays a model reads; the same code for training and serving."""

from plait.encoders.encoder_set import SIDES, EncoderSet, Field
from plait.encoders.specs import (
    Bag,
    Bucketize,
    Column,
    CrossSpec,
    Drop,
    Encoding,
    Hash,
    InputColumn,
    MultiHot,
    Raw,
    Scale,
    Vector,
    Vocabulary,
    default_encoding,
    parse_cross,
    parse_encoding,
)

__all__ = [
    "SIDES",
    "Bag",
    "Bucketize",
    "Column",
    "CrossSpec",
    "Drop",
    "EncoderSet",
    "Encoding",
    "Field",
    "Hash",
    "InputColumn",
    "MultiHot",
    "Raw",
    "Scale",
    "Vector",
    "Vocabulary",
    "default_encoding",
    "parse_cross",
    "parse_encoding",
]
