"""All encoders of one model: fitted once on the training split, saved as data, and used by training and serving alike.

The output is a dict of named arrays, which are the inputs of the model's ONNX graph (side is "request" or "candidate";
B rows of that side, F id columns, w value outputs, L longest list):

    {side}_ids       (B, F) int64    one column per vocabulary, hash, bucketize or cross
    {side}_values    (B, w) float32  scaled and raw numbers, vectors and multi-hot columns side by side
    {side}_bag_NAME  (B, L) int64    one array per pooled list, padded by 0

An array without columns is left out. The request side may have one row for all candidates: the graph expands it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from plait.encoders.arrays import column, columns, cross_keys, dtype_of, dtype_text, is_list, keys_of
from plait.encoders.columns import (
    BucketTable,
    HashTable,
    IdTable,
    MultiHotValues,
    NumberBlock,
    RawValues,
    ScaleValues,
    ValueEncoder,
    VectorValues,
    VocabularyTable,
    padded_ids,
    table_from,
    table_state,
    value_state,
    values_from,
)
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
    Side,
    Vector,
    Vocabulary,
    check_encoding,
)
from plait.errors import ArtifactError, DataError, SpecError, UnknownNameError

SIDES: tuple[Side, Side] = ("request", "candidate")
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """Where one column (or cross) lies in the encoded arrays.

    kind "id": column `position` of {side}_ids. "value": columns `position` to `position + width` of {side}_values.
    "bag": the array {side}_bag_{name}. `table` names the id table of ids and bags; fields that share one share ids.
    """

    name: str
    side: Side
    kind: Literal["id", "value", "bag"]
    position: int = 0
    width: int = 1
    table: str = ""
    pool: str = ""
    last: int | None = None
    dim: int | None = None
    cross: tuple[str, str] | None = None


class EncoderSet:
    """Fitted encoders of one model. Make it with `fit` or `load`; it never changes afterwards."""

    def __init__(
        self,
        inputs: Sequence[Column],
        fields: Sequence[Field],
        tables: Mapping[str, IdTable],
        values: Mapping[str, ValueEncoder],
    ) -> None:
        self.inputs = tuple(inputs)
        self.fields = tuple(fields)
        self.tables = dict(tables)
        self.values = dict(values)
        self._wanted = {side: [(i.name, i.dtype) for i in self.inputs if i.side == side] for side in SIDES}
        self._plans = {side: _SidePlan.of(side, self.fields, self.values) for side in SIDES}
        self._crossed = sorted({name for field in self.fields for name in field.cross or ()})
        self._wide = {n: e for n, e in self.values.items() if isinstance(e, VectorValues | MultiHotValues)}

    @classmethod
    def fit(
        cls,
        rows: pa.Table,
        inputs: Iterable[InputColumn],
        encodings: Mapping[str, Encoding],
        crosses: Sequence[CrossSpec] = (),
        *,
        where: str = "model",
    ) -> EncoderSet:
        """Fit on `rows`, which must be the training split and nothing else.

        inputs: the columns the model may read, in their canonical order; each needs an encoding. Raises SpecError or
        UnknownNameError (starting with `where`) if the declarations do not fit the columns, DataError if the rows
        do not.
        """
        known = {item.name: item for item in inputs}
        if len(rows) == 0:
            raise DataError("the training split has no rows; nothing can be fitted on it")
        for name in (*encodings, *(name for cross in crosses for name in (cross.left, cross.right))):
            if name not in known:
                raise UnknownNameError("column", name, known, where=where)
        fitting = _Fitting(rows, known, encodings, where)
        for name in known:
            fitting.add(name)
        for cross in crosses:
            fitting.add_cross(cross)
        read = {f.name for f in fitting.fields if f.cross is None} | {n for c in crosses for n in (c.left, c.right)}
        used = [Column(name=n, dtype=c.dtype, side=c.side) for n, c in known.items() if n in read]
        if not fitting.fields:
            raise SpecError(f"{where}: every column is dropped; a model must read at least one")
        return cls(used, fitting.fields, fitting.tables, fitting.values)

    def encode(self, request: pa.Table, candidates: pa.Table) -> dict[str, np.ndarray]:
        """The graph's inputs for one request (`request` of 1 row) or for N independent rows (`request` of N rows).

        Columns beyond `self.inputs` are ignored. Raises DataError if one is missing, of another type, or if the
        row counts do not go together.
        """
        if len(request) not in (1, len(candidates)):
            raise DataError(f"{len(request)} request rows for {len(candidates)} candidates; give 1, or one for each")
        tables = {"request": request, "candidate": candidates}
        arrays: dict[str, pa.Array] = {}
        for side, wanted in self._wanted.items():
            arrays |= zip((name for name, _ in wanted), columns(tables[side], wanted), strict=True)
        keys = {name: keys_of(arrays[name]) for name in self._crossed}
        out: dict[str, np.ndarray] = {}
        for side, plan in self._plans.items():
            self._encode_side(plan, arrays, keys, len(tables[side]), out)
        return out

    def encode_rows(self, rows: pa.Table) -> dict[str, np.ndarray]:
        """The graph's inputs for rows that hold the columns of both sides (a training set's)."""
        return self.encode(rows, rows)

    def _encode_side(
        self,
        plan: _SidePlan,
        arrays: Mapping[str, pa.Array],
        keys: Mapping[str, np.ndarray],
        n: int,
        out: dict[str, np.ndarray],
    ) -> None:
        if plan.ids:
            ids = np.empty((n, len(plan.ids)), np.int64)
            for field in plan.ids:
                table = self.tables[field.table]
                if field.cross is None:
                    ids[:, field.position] = table.ids(arrays[field.name])
                else:
                    pair = cross_keys(keys[field.cross[0]], keys[field.cross[1]])
                    ids[:, field.position] = table.ids_of_int64(pair)  # type: ignore[union-attr]
            out[f"{plan.side}_ids"] = ids
        if plan.values:
            values = np.empty((n, plan.value_width), np.float32)
            plan.numbers.write(arrays, values)
            for field in plan.wide:
                end = field.position + field.width
                values[:, field.position : end] = self._wide[field.name].values(arrays[field.name])
            out[f"{plan.side}_values"] = values
        for field in plan.bags:
            out[f"{plan.side}_bag_{field.name}"] = padded_ids(
                arrays[field.name], self.tables[field.table], last=field.last
            )

    def side_fields(self, side: Side, kind: str) -> tuple[Field, ...]:
        """The fields of one side and kind, by position."""
        return tuple(field for field in self.fields if field.side == side and field.kind == kind)

    def value_width(self, side: Side) -> int:
        return self._plans[side].value_width

    def table_sizes(self) -> dict[str, int]:
        """Rows of each id table, the rows of null and unknown included."""
        return {name: table.size for name, table in self.tables.items()}

    def input_names(self) -> tuple[str, ...]:
        """Names of the encoded arrays, in the order of the graph's inputs."""
        names: list[str] = []
        for side, plan in self._plans.items():
            names += [f"{side}_ids"] if plan.ids else []
            names += [f"{side}_values"] if plan.values else []
            names += [f"{side}_bag_{field.name}" for field in plan.bags]
        return tuple(names)

    def value_names(self) -> list[str]:
        """A readable name per column of request_values then candidate_values."""
        names = []
        for side in SIDES:
            for field in self.side_fields(side, "value"):
                encoder = self.values[field.name]
                if isinstance(encoder, MultiHotValues):
                    known = [str(value) for value in encoder.table.values.to_pylist()]
                    names += [f"{field.name}={value}" for value in ("<none>", "<unknown>", *known)]
                else:
                    names += [field.name if i == 0 else f"{field.name}[{i}]" for i in range(field.width)]
        return names

    def save(self, folder: Path) -> None:
        """Write `encoders.json` and one arrow file per vocabulary into `folder` (made if missing)."""
        folder.mkdir(parents=True, exist_ok=True)
        vocabularies: dict[str, pa.Array] = {
            f"ids:{name}": table.values for name, table in self.tables.items() if isinstance(table, VocabularyTable)
        } | {f"values:{n}": e.table.values for n, e in self.values.items() if isinstance(e, MultiHotValues)}
        files = {key: f"vocabulary-{i}.arrow" for i, key in enumerate(vocabularies)}
        for key, values in vocabularies.items():
            table = pa.table({"value": values})
            with pa.ipc.new_file(str(folder / files[key]), table.schema) as writer:
                writer.write_table(table)
        state = {
            "format": _FORMAT,
            "inputs": [{"name": i.name, "dtype": dtype_text(i.dtype), "side": i.side} for i in self.inputs],
            "fields": [asdict(field) for field in self.fields],
            "tables": {name: table_state(table) for name, table in self.tables.items()},
            "values": {name: value_state(encoder) for name, encoder in self.values.items()},
            "vocabularies": files,
        }
        (folder / "encoders.json").write_text(json.dumps(state, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> EncoderSet:
        """What `save` wrote. Raises ArtifactError if a file is missing or unreadable."""
        try:
            state = json.loads((folder / "encoders.json").read_text())
            if state["format"] != _FORMAT:
                raise ArtifactError(f"{folder} has encoders of format {state['format']}; this Plait reads {_FORMAT}")
            vocabularies = {key: _read_values(folder / name) for key, name in state["vocabularies"].items()}
            inputs = [Column(name=i["name"], dtype=dtype_of(i["dtype"]), side=i["side"]) for i in state["inputs"]]
            fields = [Field(**{**f, "cross": tuple(f["cross"]) if f["cross"] else None}) for f in state["fields"]]
            tables = {n: table_from(s, vocabularies.get(f"ids:{n}")) for n, s in state["tables"].items()}
            values = {n: values_from(s, vocabularies.get(f"values:{n}")) for n, s in state["values"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the encoders in {folder} cannot be read: {error!r}") from error
        return cls(inputs, fields, tables, values)


@dataclass(frozen=True, slots=True)
class _SidePlan:
    side: Side
    ids: tuple[Field, ...]
    values: tuple[Field, ...]
    bags: tuple[Field, ...]
    value_width: int
    numbers: NumberBlock  # of the values: those that are one number
    wide: tuple[Field, ...]  # the others: vectors and multi-hot columns

    @classmethod
    def of(cls, side: Side, fields: Sequence[Field], encoders: Mapping[str, ValueEncoder]) -> _SidePlan:
        ids, values, bags = (
            tuple(f for f in fields if f.side == side and f.kind == kind) for kind in ("id", "value", "bag")
        )
        numbers = [
            (field.name, field.position, encoder)
            for field in values
            if isinstance(encoder := encoders[field.name], ScaleValues | RawValues)
        ]
        wide = tuple(f for f in values if isinstance(encoders[f.name], VectorValues | MultiHotValues))
        return cls(side, ids, values, bags, sum(f.width for f in values), NumberBlock(numbers), wide)


class _Fitting:
    """The state of one `EncoderSet.fit`: columns are added in order and take the next free position of their array."""

    def __init__(
        self, rows: pa.Table, inputs: Mapping[str, InputColumn], encodings: Mapping[str, Encoding], where: str
    ) -> None:
        self.rows, self.inputs, self.encodings, self.where = rows, inputs, encodings, where
        self.fields: list[Field] = []
        self.tables: dict[str, IdTable] = {}
        self.values: dict[str, ValueEncoder] = {}
        self._next = {(side, kind): 0 for side in SIDES for kind in ("id", "value", "bag")}

    def add(self, name: str) -> None:
        item = self.inputs[name]
        if name not in self.encodings:
            raise SpecError(f"{self.where}: column {name!r} has no encoding")
        encoding = self.encodings[name]
        check_encoding(name, item.dtype, encoding, where=self.where)
        if isinstance(encoding, Drop):
            return
        if isinstance(encoding, Vocabulary | Hash | Bucketize):
            self._place(name, item.side, "id", table=self._table(name), dim=encoding.dim)
        elif isinstance(encoding, Bag):
            table = self._table(name)
            self._place(name, item.side, "bag", table=table, pool=encoding.pool, last=encoding.last, dim=encoding.dim)
        else:
            encoder = self.values[name] = _fit_values(column(self.rows, name, item.dtype), encoding)
            self._place(name, item.side, "value", width=encoder.width)

    def add_cross(self, cross: CrossSpec) -> None:
        for name in (cross.left, cross.right):
            dtype = self.inputs[name].dtype
            if is_list(dtype) or pa.types.is_floating(dtype):
                raise SpecError(f"{self.where}: cross {cross.name} needs ids on both sides, but {name!r} is {dtype}")
        if any(field.name == cross.name for field in self.fields):
            raise SpecError(f"{self.where}: cross {cross.name} is declared twice")
        both = {self.inputs[cross.left].side, self.inputs[cross.right].side}
        left, right = (column(self.rows, n, self.inputs[n].dtype) for n in (cross.left, cross.right))
        if isinstance(cross.into, Hash):
            self.tables[cross.name] = HashTable(cross.into.buckets, cross.into.seed)
        else:
            keys = pa.array(cross_keys(keys_of(left), keys_of(right)))
            self.tables[cross.name] = VocabularyTable.fit(
                keys, min_count=cross.into.min_count, max_size=cross.into.max_size
            )
        side: Side = "request" if both == {"request"} else "candidate"
        pair = (cross.left, cross.right)
        self._place(cross.name, side, "id", table=cross.name, dim=cross.into.dim, cross=pair)

    def _place(self, name: str, side: Side, kind: Literal["id", "value", "bag"], **settings: Any) -> None:
        field = Field(name=name, side=side, kind=kind, position=self._next[side, kind], **settings)
        self._next[side, kind] += field.width
        self.fields.append(field)

    def _table(self, name: str) -> str:
        """The name of the id table of column `name`, fitted when first asked for."""
        encoding = self.encodings[name]
        owner = getattr(encoding, "share", None) or name
        if owner != name:
            self._check_share(name, owner)
        if owner not in self.tables:
            item = self.inputs[owner]
            self.tables[owner] = _fit_table(column(self.rows, owner, item.dtype), self.encodings[owner])
        return owner

    def _check_share(self, name: str, owner: str) -> None:
        where = f"{self.where}: column {name!r}"
        if owner not in self.inputs:
            raise UnknownNameError("column", owner, self.inputs, where=f"{where} shares with")
        encoding = self.encodings.get(owner)
        if not isinstance(encoding, Vocabulary | Hash | Bag) or encoding.share is not None:
            raise SpecError(f"{where} shares ids with {owner!r}, which has none of its own")
        ours, theirs = (_element(self.inputs[n].dtype) for n in (name, owner))
        if ours != theirs:
            raise SpecError(f"{where} holds {ours} and cannot share the ids of {owner!r}, which holds {theirs}")


def _fit_table(array: pa.Array, encoding: Encoding) -> IdTable:
    if isinstance(encoding, Hash):
        return HashTable(encoding.buckets, encoding.seed)
    if isinstance(encoding, Bucketize):
        return BucketTable.fit(array, encoding)
    if isinstance(encoding, Bag) and encoding.buckets is not None:
        return HashTable(encoding.buckets)
    assert isinstance(encoding, Vocabulary | Bag)
    flat = array.flatten() if is_list(array.type) else array
    return VocabularyTable.fit(flat, min_count=encoding.min_count, max_size=encoding.max_size)


def _fit_values(array: pa.Array, encoding: Encoding) -> ValueEncoder:
    if isinstance(encoding, Scale):
        return ScaleValues.fit(array, encoding)
    if isinstance(encoding, Raw):
        return RawValues()
    if isinstance(encoding, Vector):
        return VectorValues.fit(encoding)
    assert isinstance(encoding, MultiHot)
    return MultiHotValues.fit(array, encoding)


def _element(dtype: pa.DataType) -> pa.DataType:
    return dtype.value_type if is_list(dtype) else dtype


def _read_values(path: Path) -> pa.Array:
    with pa.ipc.open_file(str(path)) as reader:
        return reader.read_all().column("value").combine_chunks()
