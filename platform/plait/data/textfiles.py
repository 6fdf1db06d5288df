"""CSV and JSON lines, also compressed: batches in types that do not hang on where the reader's blocks end."""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.json as pjson

from plait.errors import DataError

_BLOCK_BYTES = 8 << 20
_CSV_BLOCK_BYTES = 1 << 20


def csv_batches(file: Path, texts: Collection[str]) -> Iterator[pa.RecordBatch]:
    names = dict.fromkeys(_opened_csv(file).schema.names)
    further = [name for name in names if name not in texts]
    types = _types_of_all_blocks(file, further) if further else {}
    yield from _opened_csv(file, column_types={**types, **dict.fromkeys(texts, pa.string())})


def _opened_csv(file: Path, **convert: Any) -> pcsv.CSVStreamingReader:
    return pcsv.open_csv(
        file,
        read_options=pcsv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        parse_options=pcsv.ParseOptions(delimiter="\t" if ".tsv" in file.suffixes else ","),
        convert_options=pcsv.ConvertOptions(**convert),
    )


def _types_of_all_blocks(file: Path, names: Sequence[str]) -> dict[str, pa.DataType]:
    """What each column can be in every block of a CSV file: Arrow would take its type from the first one.

    Nothing for a file of one block, which needs no look ahead.
    """
    types: dict[str, pa.DataType] = {}
    blocks = _opened_csv(file, include_columns=list(names), column_types=dict.fromkeys(names, pa.string()))
    count = 0
    for block in blocks:
        count += 1
        for name in names:
            if types.get(name) != pa.string():
                types[name] = _common(types.get(name, pa.null()), _type_of_texts(block.column(name)))
    return types if count > 1 else {}


def _type_of_texts(texts: pa.Array) -> pa.DataType:
    """The type that Arrow would give to a CSV file's column of these texts."""
    written = pa.BufferOutputStream()
    pcsv.write_csv(pa.table({"x": texts.unique()}), written)
    try:
        return pcsv.read_csv(pa.BufferReader(written.getvalue())).schema.field("x").type
    except pa.ArrowInvalid:
        return pa.string()


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of both, or text."""
    try:
        schemas = [pa.schema([("x", each)]) for each in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowTypeError:
        return pa.string()


def json_batches(file: Path, texts: Collection[str]) -> Iterator[pa.RecordBatch]:
    """A block of lines at a time, each with types of its own: a field may be absent or null for as long as it likes."""
    options = pjson.ParseOptions(explicit_schema=pa.schema([(name, pa.string()) for name in _not_only_times(file)]))
    before = 0
    with _opened(file) as lines:
        while block := lines.readlines(_BLOCK_BYTES):
            if not all(map(bytes.isspace, block)):
                try:
                    yield from pjson.read_json(pa.BufferReader(b"".join(block)), parse_options=options).to_batches()
                except pa.ArrowInvalid as error:
                    raise DataError(f"{file}, {_bad_line(block, before) or error}") from error
            before += len(block)


def _opened(file: Path) -> BufferedReader | gzip.GzipFile:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def _not_only_times(file: Path) -> set[str]:
    """Fields whose texts are times in some blocks, which Arrow makes times of, and other words in others."""
    kinds: dict[str, set[bool]] = {}
    with _opened(file) as lines:
        block = lines.readlines(_BLOCK_BYTES)
        while following := lines.readlines(_BLOCK_BYTES):  # a file of one block needs no look ahead
            for each in (block, following) if not kinds else (following,):
                with suppress(pa.ArrowInvalid):  # told, with its line, when its turn comes
                    for field in pjson.read_json(pa.BufferReader(b"".join(each))).schema:
                        if pa.types.is_timestamp(field.type) or pa.types.is_string(field.type):
                            kinds.setdefault(field.name, set()).add(pa.types.is_timestamp(field.type))
            block = following
    return {name for name, kind in kinds.items() if len(kind) == 2}


def _bad_line(block: Sequence[bytes], before: int) -> str | None:
    """The first line that is no JSON object, or whose fields are of another kind than in the lines before it."""
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(block, before + 1):
        if line.isspace():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            return f"line {number} is not JSON ({error}): {line.decode(errors='replace').strip()[:80]!r}"
        if not isinstance(values, dict):
            return f"line {number} is not a JSON object: {line.decode(errors='replace').strip()[:80]!r}"
        for name, value in values.items():
            kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
            if value is not None and kinds.setdefault(name, (kind, number))[0] != kind:
                return f"line {number}: {name!r} is a {kind}, and a {kinds[name][0]} in line {kinds[name][1]}"
    return None
