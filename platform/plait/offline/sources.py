"""The files behind a service's views: their state, and whether they still hold what feature_repo declares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from plait.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from feast import FeatureStore

    from plait.service import ServiceSpec


def source_state(store: FeatureStore, source: Any) -> Any:
    """Files of a file source with size and time of change; for other sources their definition."""
    files = source_files(store, source)
    if files is None:
        return source.to_proto().SerializeToString(deterministic=True).hex() if source is not None else None
    state = []
    for file in files:
        if file.exists():
            stat = file.stat()
            state.append([str(file.name), stat.st_size, stat.st_mtime_ns])
    return [str(source.path), state]


def source_files(store: FeatureStore, source: Any) -> list[Path] | None:
    """The files of a file source, in order of their names; None for any other source."""
    path = getattr(source, "path", None)
    if not path:
        return None
    place = Path(path) if Path(path).is_absolute() else Path(str(store.repo_path)) / path
    if "*" in place.name:
        return sorted(place.parent.glob(place.name))
    return sorted(place.rglob("*.parquet")) if place.is_dir() else [place]


def refuse_drift(store: FeatureStore, spec: ServiceSpec) -> None:
    """Raises DataError for a declared feature that no part of its table holds, or that a part holds as another type.

    Numbers may be wider or narrower, and whole numbers may be stored as floats (pandas does, beside nulls). Files that
    cannot be read, and sources that are no local parquet, are left to the store.
    """
    from plait.service import arrow_type

    for view in spec.views:
        stored = store.get_feature_view(view.name)
        source = stored.batch_source
        schemas = dict(_schemas(source_files(store, source) or ()))
        if source is None or not schemas:
            continue
        columns = {new: old for old, new in source.field_mapping.items()}
        declared = {field.name: arrow_type(field.dtype) for field in stored.features}
        for feature in view.features:
            if feature in declared:
                _check(view.name, feature, columns.get(feature, feature), declared[feature], schemas)


def _check(view: str, feature: str, column: str, expected: pa.DataType, schemas: dict[Path, pa.Schema]) -> None:
    again = "run `plait features build` (or write that table again), or correct its declaration in feature_repo"
    n_with = 0
    for file, schema in schemas.items():
        if column not in schema.names:
            n_with += f"/{column}=" in file.as_posix()  # a partition's folder holds it
            continue
        n_with += 1
        found = schema.field(column).type
        if not _fits(found, expected):
            raise DataError(f"feature {feature!r} of {view}: {file} holds {found}, expected {expected}; {again}")
    if not n_with:
        folder = next(iter(schemas))
        known = set().union(*(schema.names for schema in schemas.values()))
        raise DataError(
            f"feature {feature!r} of {view}: no column {column!r} in {folder} (expected {expected}); "
            f"{did_you_mean(column, known)} Else {again}"
        )


def _schemas(files: Iterable[Path]) -> Iterable[tuple[Path, pa.Schema]]:
    for file in files:
        try:
            yield file, pq.read_schema(file)
        except (OSError, pa.ArrowException):
            continue  # the store says which file is corrupt, and how


def _fits(found: pa.DataType, expected: pa.DataType) -> bool:
    kinds = (_kind(found), _kind(expected))
    if "other" in kinds or kinds[0] in ("null", kinds[1]):
        return True
    return kinds in (("whole", "number"), ("number", "whole"), ("decimal", "number"), ("date", "time"))


def _kind(dtype: pa.DataType) -> str:
    if pa.types.is_dictionary(dtype):
        return _kind(dtype.value_type)
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        return f"list of {_kind(dtype.value_type)}"
    for kind, fits in _KINDS.items():
        if any(fit(dtype) for fit in fits):
            return kind
    return "other"


_KINDS = {
    "null": (pa.types.is_null,),
    "whole": (pa.types.is_integer,),
    "number": (pa.types.is_floating,),
    "decimal": (pa.types.is_decimal,),
    "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    "truth": (pa.types.is_boolean,),
    "time": (pa.types.is_timestamp,),
    "date": (pa.types.is_date,),
    "bytes": (pa.types.is_binary, pa.types.is_large_binary),
}
