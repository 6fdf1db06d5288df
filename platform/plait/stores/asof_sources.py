"""Feast data sources as DuckDB relations: a parquet file, a folder of parts, and whatever else Feast can read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
from feast.data_format import DeltaFormat, ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource

from plait.errors import StoreError, did_you_mean
from plait.stores.asof_engine import broken_parts, literal, one_line, quote


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """A table as one connection sees it. `order` are SQL expressions, last written last: they decide full ties."""

    name: str
    sql: str
    columns: Mapping[str, str]  # name → DuckDB type
    order: tuple[str, ...]
    n_rows: int | None = None
    files: tuple[str, ...] = ()  # the local parquet files behind it
    renamed: Mapping[str, str] = field(default_factory=dict)  # Feast's name → the column's own, by field_mapping

    @property
    def row(self) -> str:
        """SQL for the number of a row (BIGINT), rising in the order of `order`; a part holds fewer than 2^40 rows."""
        return "((file_index::BIGINT << 40) + file_row_number::BIGINT)" if self.files else "__row"

    def column(self, name: str, *, what: str) -> str:
        """The quoted column behind Feast's `name`; StoreError names the nearest one if there is none."""
        own = self.renamed.get(name, name)
        if own not in self.columns:
            raise StoreError(f"{self.name}: no column {own!r} for {what}; {did_you_mean(own, self.columns)}")
        return quote(own)

    def type_of(self, name: str) -> str:
        """The DuckDB type of Feast's `name`, which must exist."""
        return self.columns[self.renamed.get(name, name)]


def resolve_path(uri: str | Path, repo_path: Path | None) -> str:
    """A URI as it is; a path made absolute against the repo, never against the working directory."""
    text = str(uri)
    if is_remote(text):
        return text
    if text.startswith("file://"):
        text = urlparse(text).path
    path = Path(text).expanduser()
    return str(path if path.is_absolute() or repo_path is None else repo_path / path)


def is_remote(uri: str) -> bool:
    parsed = urlparse(uri)
    return bool(parsed.scheme and parsed.netloc) and parsed.scheme != "file"


def parquet_files(path: str, *, name: str) -> list[str]:
    """The parquet files at `path`: itself, or all below it in name order, but none that is hidden or half-written.

    A name that begins with "." or "_" (of a file or of a folder below `path`) is not data, unless it is a partition
    (`_key=value`). Raises StoreError.
    """
    root = Path(path)
    if root.is_file():
        return [path]
    if not root.exists():
        raise StoreError(
            f"{name}: nothing at {path}; write the table first (for Plait's own: `plait features build`), "
            "or correct the source's path"
        )
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        files += [str(Path(folder) / name) for name in names if name.endswith(".parquet") and not _is_hidden(name)]
    if not files:
        raise StoreError(f"{name}: no *.parquet file in the folder {path}; write the table first")
    return sorted(files)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def source_relation(db: duckdb.DuckDBPyConnection, source: DataSource, repo_path: Path | None) -> Relation:
    """`source` readable in `db`, with its field mapping applied. Raises StoreError on what is missing or corrupt."""
    mapping: Mapping[str, str] = getattr(source, "field_mapping", None) or {}
    is_parquet = isinstance(source, FileSource) and (
        source.file_format is None or isinstance(source.file_format, ParquetFormat)
    )
    if isinstance(source, FileSource) and is_parquet and not is_remote(source.path):
        relation = parquet_relation(db, resolve_path(source.path, repo_path), name=f"source {source.name!r}")
    else:
        relation = arrow_relation(db, _arrow_of(source, repo_path), name=f"source {source.name!r}")
    renamed = {new: old for old, new in mapping.items() if old in relation.columns}
    return replace(relation, renamed=renamed)


def parquet_relation(db: duckdb.DuckDBPyConnection, path: str, *, name: str) -> Relation:
    """The file or folder at `path` (absolute). Columns that some parts lack are null there."""
    files = parquet_files(path, name=name)
    listed = ", ".join(literal(file) for file in files)
    options = "" if len(files) == 1 else ", union_by_name = true"
    sql = f"read_parquet([{listed}]{options})"
    try:
        columns = _describe(db, sql)
        counted = db.execute(f"SELECT sum(num_rows) FROM parquet_file_metadata([{listed}])").fetchone()
    except duckdb.Error as error:
        raise unreadable(files, name=name, error=error) from error
    n_rows = int(counted[0]) if counted and counted[0] is not None else None
    order = ("file_index", "file_row_number")
    return Relation(name=name, sql=sql, columns=columns, order=order, n_rows=n_rows, files=tuple(files))


def arrow_relation(db: duckdb.DuckDBPyConnection, data: pa.Table | ds.Dataset, *, name: str) -> Relation:
    """An Arrow table or dataset, registered in `db` under a name of its own."""
    registered = f"__arrow_{id(data)}"
    db.register(registered, data)
    sql = f"(SELECT *, row_number() OVER () AS __row FROM {registered})"
    columns = _describe(db, registered)
    n_rows = data.num_rows if isinstance(data, pa.Table) else None
    return Relation(name=name, sql=sql, columns=columns, order=("__row",), n_rows=n_rows)


def unreadable(files: list[str], *, name: str, error: Exception) -> StoreError:
    """The error for a table DuckDB could not read: names the parts that are broken."""
    if broken := broken_parts(files):
        return StoreError(f"{name}: corrupt parquet: {broken}. Remove or rewrite it, then run again")
    return StoreError(f"{name}: its parquet files do not form one table: {one_line(error)}")


def _describe(db: duckdb.DuckDBPyConnection, sql: str) -> dict[str, str]:
    return {row[0]: row[1] for row in db.execute(f"DESCRIBE SELECT * FROM {sql}").fetchall()}


def _arrow_of(source: DataSource, repo_path: Path | None) -> pa.Table | ds.Dataset:
    """Remote parquet and Delta as datasets (DuckDB then scans them lazily), the rest through Feast's own readers."""
    if isinstance(source, FileSource):
        path = resolve_path(source.path, repo_path)
        if isinstance(source.file_format, DeltaFormat):
            return _delta_dataset(path, source)
        filesystem, inside = FileSource.create_filesystem_and_path(
            path, source.s3_endpoint_override or "", source.resolve_credentials()
        )
        try:
            return ds.dataset(inside, format="parquet", partitioning="hive", filesystem=filesystem)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"source {source.name!r}: cannot read {path}: {error}") from error
    from feast.infra.offline_stores.duckdb import _read_data_source  # brings ibis: 16 MB

    expression: Any = _read_data_source(source, str(repo_path or "."))
    operation = expression.op()
    if not hasattr(operation, "data"):
        raise StoreError(
            f"source {source.name!r} ({type(source).__name__}) is not readable by the DuckDB offline store; "
            "use a FileSource (parquet, Delta), or an Iceberg, Lance or MLflow source"
        )
    return operation.data.to_pyarrow(expression.schema())


def _delta_dataset(path: str, source: FileSource) -> ds.Dataset:
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise StoreError(
            f"source {source.name!r} is a Delta table: install plait[lakes] (package deltalake) to read it"
        ) from error
    options = {key: str(value) for key, value in (source.resolve_credentials() or {}).items()}
    if source.s3_endpoint_override:
        options["AWS_ENDPOINT_URL"] = source.s3_endpoint_override
    try:
        return DeltaTable(path, storage_options=options or None).to_pyarrow_dataset()
    except (DeltaError, OSError) as error:
        raise StoreError(f"source {source.name!r}: cannot read the Delta table {path}: {error}") from error
