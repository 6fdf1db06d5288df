"""How each column of a model is encoded: frozen declarations, with a default from the column's type.

A YAML value such as `{encode: vocabulary, min_count: 2}` (or just `vocabulary`) becomes one of these once, in
`parse_encoding`; a column that a configuration does not mention gets `default_encoding`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Protocol

import pyarrow as pa

from plait.encoders.arrays import is_list, is_number, is_text
from plait.errors import SpecError, UnknownNameError

Side = Literal["request", "candidate"]
Family = Literal["neural", "tree", "linear"]


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise SpecError(f"{name} is {value}; it must be at least {least}")


class InputColumn(Protocol):
    """A column that a model may read: plait.service.FeatureSpec is one."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> pa.DataType: ...
    @property
    def side(self) -> Side: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A plain InputColumn, for join keys and for what an artifact's manifest says."""

    name: str
    dtype: pa.DataType
    side: Side


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Value → id by frequency in the training split. null → 0, unknown or rarer than `min_count` → 1, known → 2, 3, …

    `share` names the column whose vocabulary (and embedding) this one uses instead of its own.
    """

    min_count: int = 1
    max_size: int | None = None
    share: str | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        _at_least("min_count", self.min_count, 1)
        _at_least("max_size", self.max_size, 1)
        _at_least("dim", self.dim, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hash:
    """Value → 1 + murmur3_32(value) mod `buckets`; null → 0. Needs no fitting and never meets an unknown value."""

    buckets: int
    seed: int = 0
    share: str | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        _at_least("buckets", self.buckets, 1)
        _at_least("dim", self.dim, 1)
        if self.buckets >= 2**31:
            raise SpecError(f"buckets is {self.buckets}; it must be below 2^31")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucketize:
    """Number → 1 + the index of its bucket; null and NaN → 0.

    Buckets are cut at `boundaries` (a value on a boundary belongs to the bucket above it), by default at the
    training split's quantiles.
    """

    buckets: int = 10
    boundaries: tuple[float, ...] = ()
    dim: int | None = None

    def __post_init__(self) -> None:
        _at_least("buckets", self.buckets, 2)
        _at_least("dim", self.dim, 1)
        if list(self.boundaries) != sorted(set(self.boundaries)) or not all(map(math.isfinite, self.boundaries)):
            raise SpecError(f"boundaries are {list(self.boundaries)}; they must be finite and strictly increasing")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Number → float: `standard` (x - mean) / deviation cut at ±`clip`, or `minmax` into [0, 1].

    With `log1p`, sign(x) log(1 + |x|) is scaled instead of x. null and NaN → 0 (the mean, or the minimum); `indicator`
    adds a second output that is 1 where the value is missing (default: if the training split misses any).
    """

    method: Literal["standard", "minmax"] = "standard"
    log1p: bool = False
    clip: float = 8.0
    indicator: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in ("standard", "minmax"):
            raise SpecError(f"method is {self.method!r}; it must be standard or minmax")
        if not self.clip > 0:
            raise SpecError(f"clip is {self.clip}; it must be above 0 (standard deviations)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """Number → the same number as float32; null → NaN. For trees, which need no scale and split on missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vector:
    """A list of `width` numbers → the same numbers; null → zeros (a pretrained vector, say)."""

    width: int

    def __post_init__(self) -> None:
        _at_least("width", self.width, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiHot:
    """A list (or one value) → a 0/1 column per known value, one for any unknown value, and one for null or empty."""

    min_count: int = 1
    max_size: int = 64

    def __post_init__(self) -> None:
        _at_least("min_count", self.min_count, 1)
        _at_least("max_size", self.max_size, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bag:
    """A list → the ids of its values, which the model pools; null elements are dropped, null and empty lists pool to 0.

    `last` keeps only the end of each list (a history's newest). Ids come from an own vocabulary, from `buckets` of a
    hash, or from the column that `share` names.
    """

    pool: Literal["mean", "sum"] = "mean"
    last: int | None = None
    min_count: int = 1
    max_size: int | None = None
    buckets: int | None = None
    share: str | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "sum"):
            raise SpecError(f"pool is {self.pool!r}; it must be mean or sum")
        for name in ("last", "min_count", "max_size", "buckets", "dim"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The model does not read this column."""


Encoding = Vocabulary | Hash | Bucketize | Scale | Raw | Vector | MultiHot | Bag | Drop

# What a configuration may write after `encode:`, the class it becomes, and what it presets.
_ENCODINGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "vocabulary": (Vocabulary, {}),
    "hash": (Hash, {}),
    "bucketize": (Bucketize, {}),
    "scale": (Scale, {}),
    "log1p": (Scale, {"log1p": True}),
    "raw": (Raw, {}),
    "vector": (Vector, {}),
    "multi_hot": (MultiHot, {}),
    "pool": (Bag, {}),
    "sequence": (Bag, {"last": 50}),
    "drop": (Drop, {}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossSpec:
    """`left#right`: a new id per pair of values, through a strong 64-bit mix and then `into`."""

    left: str
    right: str
    into: Vocabulary | Hash = Vocabulary(min_count=2)

    def __post_init__(self) -> None:
        if self.left == self.right:
            raise SpecError(f"cross {self.name!r} joins a column with itself; name two different ones")
        if self.into.share is not None:
            raise SpecError(f"cross {self.name!r} cannot share another column's ids; its keys are pairs")

    @property
    def name(self) -> str:
        return f"{self.left}#{self.right}"


def parse_encoding(name: str, value: Any, *, where: str) -> Encoding:
    """The declaration written for column `name`; `where` (a file's name) starts every error.

    Raises UnknownNameError for an unknown encoding or setting, SpecError for a value that does not fit.
    """
    settings = {"encode": value} if isinstance(value, str) else value
    if not isinstance(settings, Mapping) or "encode" not in settings:
        raise SpecError(f"{where}: column {name!r} is {value!r}; write an encoding, or a mapping with `encode:` in it")
    encode = settings["encode"]
    if encode not in _ENCODINGS:
        raise UnknownNameError("encoding", str(encode), _ENCODINGS, where=f"{where}: column {name!r}")
    kind, preset = _ENCODINGS[encode]
    given = {key: item for key, item in settings.items() if key != "encode"}
    return build(kind, {**preset, **given}, where=f"{where}: column {name!r}")


def parse_cross(value: Any, *, where: str) -> CrossSpec:
    """`a#b`, or a mapping {cross: a#b, encode: hash, buckets: …}."""
    settings = {"cross": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    parts = str(settings.pop("cross", "")).split("#")
    if len(parts) != 2 or not all(part.strip() for part in parts):
        raise SpecError(f"{where}: cross {value!r} is not of the form a#b (two column names)")
    left, right = (part.strip() for part in parts)
    if not settings:
        return CrossSpec(left=left, right=right)
    into = parse_encoding(f"{left}#{right}", {"encode": "vocabulary", **settings}, where=where)
    if not isinstance(into, Vocabulary | Hash):
        raise SpecError(f"{where}: cross {left}#{right} must be encoded as vocabulary or hash")
    return CrossSpec(left=left, right=right, into=into)


def default_encoding(column: InputColumn, family: Family, *, is_key: bool) -> Encoding:
    """What a column gets that its configuration does not mention.

    Join keys, integers named `*_id` and text are ids; other numbers are scaled (raw for trees); lists of text are
    pooled, lists of integers are sequences (multi-hot for trees). Trees drop the join keys: their ids have no order.
    Raises SpecError for a type that no encoder reads.
    """
    dtype = column.dtype
    if is_list(dtype) and pa.types.is_floating(dtype.value_type):
        raise SpecError(f"column {column.name!r} is {dtype}: say {{encode: vector, width: …}} for it, or drop")
    if is_list(dtype) and (is_text(dtype.value_type) or pa.types.is_integer(dtype.value_type)):
        if family == "tree":
            return MultiHot()
        return Bag() if is_text(dtype.value_type) else Bag(last=50)
    is_id = is_key or (pa.types.is_integer(dtype) and column.name.endswith("_id"))
    if is_text(dtype) or (is_id and is_number(dtype)):
        return Drop() if family == "tree" and is_id else Vocabulary()
    if is_number(dtype):
        return Raw() if family == "tree" else Scale()
    raise SpecError(
        f"column {column.name!r} is {dtype}, which no encoder reads; make a number of it in an on-demand view, "
        "or drop it"
    )


def check_encoding(name: str, dtype: pa.DataType, encoding: Encoding, *, where: str) -> None:
    """Raise SpecError if `encoding` cannot read a column of `dtype`."""
    element = dtype.value_type if is_list(dtype) else dtype
    discrete = is_text(element) or pa.types.is_integer(element) or pa.types.is_boolean(element)
    fits = {
        Vocabulary: discrete and not is_list(dtype),
        Hash: discrete and not is_list(dtype),
        Bucketize: is_number(dtype),
        Scale: is_number(dtype),
        Raw: is_number(dtype),
        Vector: is_list(dtype) and is_number(element),
        MultiHot: discrete,
        Bag: is_list(dtype) and discrete,
        Drop: True,
    }
    if not fits[type(encoding)]:
        word = next(word for word, (kind, _) in _ENCODINGS.items() if kind is type(encoding))
        raise SpecError(f"{where}: column {name!r} is {dtype}, which `{word}` cannot encode")


def build(kind: type[Any], settings: Mapping[str, Any], *, where: str) -> Any:
    """An instance of the frozen dataclass `kind` from a mapping, with errors that say what was allowed."""
    known = {field.name: field for field in fields(kind)}
    for key in settings:
        if key not in known:
            raise UnknownNameError("setting", str(key), known, where=where)
    missing = [f.name for f in known.values() if f.name not in settings and f.default is f.default_factory is MISSING]
    if missing:
        raise SpecError(f"{where}: {', '.join(missing)} must be given")
    try:
        return kind(**{key: _typed(key, item, str(known[key].type)) for key, item in settings.items()})
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def _typed(key: str, value: Any, annotation: str) -> Any:
    """`value` if it fits the annotation of a spec's field; lists become tuples and ints floats where asked for."""
    if value is None and "None" in annotation:
        return None
    allowed = annotation.removesuffix(" | None")
    if allowed.startswith("tuple[") and isinstance(value, list | tuple):
        return tuple(_typed(key, item, allowed[6:].split(",")[0].rstrip("]")) for item in value)
    if allowed == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if allowed == "float" and isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
        return float(value)  # YAML reads 1e-4 as text, where 1.0e-4 is a number
    exact: type = {"int": int, "float": float, "bool": bool, "str": str}.get(allowed, str)
    if type(value) is not exact or (isinstance(value, float) and not math.isfinite(value)):
        raise SpecError(f"{key} is {value!r}; it must be of type {annotation.replace('Literal', 'one of ')}")
    return value
