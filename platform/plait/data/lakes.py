"""Delta and Iceberg tables: local, in an object store, or, for Iceberg, by the name that a catalog has for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa
import pyarrow.dataset as pads

from plait.errors import DataError, SettingsError, SpecError

LAKES = ("delta", "iceberg")
CATALOG = "iceberg"  # iceberg://CATALOG/NAMESPACE.TABLE
OBJECT_STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
ALLOWED = (
    "a path or file://, a Delta or Iceberg table at "
    f"{', '.join(f'{scheme}://' for scheme in OBJECT_STORES)}, iceberg://CATALOG/NAMESPACE.TABLE, or a database's "
    "SQLAlchemy URL, such as postgresql+psycopg://user@host/db, with its dialect's package installed"
)
_TELLING = ("type", "region", "warehouse", "endpoint", "endpoint_url")  # ends of options whose values are no secrets


def scheme_of(source: str) -> str:
    """What stands before ://, and nothing for a path.

    >>> scheme_of("s3://bucket/table"), scheme_of("events/clicks.csv")
    ('s3', '')
    """
    scheme, separator, _ = source.partition("://")
    return scheme.lower() if separator else ""


def local_path(source: str, known: str) -> Path | None:
    """Where a source of the format `known` lies on this machine; None for tables that do not.

    Raises DataError for an address from which this format is not read.
    """
    scheme = scheme_of(source)
    if not scheme:
        return Path(source)
    if scheme == "file":
        return Path(url2pathname(urlsplit(source).path))
    if known in LAKES and scheme in OBJECT_STORES:
        return None
    if scheme == CATALOG and known == "iceberg":
        return None
    raise DataError(f"no {known} is read from {scheme}://; a source is {ALLOWED}; copy files of other formats here")


def delta_batches(source: str, options: Mapping[str, str], rows: int) -> Iterator[pa.RecordBatch]:
    """options: deltalake's storage_options."""
    try:
        from deltalake import DeltaTable
    except ImportError as error:
        raise SettingsError(
            "reading Delta tables needs deltalake; install it with `pip install plait[lakes]`"
        ) from error
    # Only files of the table's present version: those it has removed still lie in the folder.
    dataset: pads.Dataset = DeltaTable(source, storage_options=dict(options) or None).to_pyarrow_dataset()
    yield from dataset.to_batches(batch_size=rows)


def iceberg_batches(source: str, options: Mapping[str, str], rows: int) -> Iterator[pa.RecordBatch]:
    """options: properties of pyiceberg's catalog, or of its FileIO. rows: of no meaning to pyiceberg."""
    try:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.table import StaticTable
    except ImportError as error:
        raise SettingsError(
            "reading Iceberg tables needs pyiceberg; install it with `pip install plait[lakes]`"
        ) from error
    if scheme_of(source) != CATALOG:
        metadata = _newest_metadata(source)
        try:
            table: Any = StaticTable.from_metadata(metadata, dict(options))
        except FileNotFoundError as error:
            raise DataError(
                f"{without_secrets(metadata, options)} has no Iceberg metadata that can be found: give the address of "
                "the newest metadata/*.metadata.json, or the table's name in a catalog, "
                f"{CATALOG}://CATALOG/NAMESPACE.TABLE"
            ) from error
        yield from table.scan().to_arrow_batch_reader()
        return
    name, _, identifier = source.partition("://")[2].partition("/")
    if not name or "." not in identifier:
        raise SpecError(f"{source}: write iceberg://CATALOG/NAMESPACE.TABLE")
    catalog: Any = load_catalog(name, **options)
    with closing(catalog) if hasattr(catalog, "close") else nullcontext():
        yield from catalog.load_table(identifier).scan().to_arrow_batch_reader()


def _newest_metadata(source: str) -> str:
    """The metadata file of a table that lies here; elsewhere pyiceberg finds it, if the table has a version hint."""
    path = local_path(source, "iceberg")
    if path is None:
        return source
    if path.is_dir():
        versions = sorted((path / "metadata").glob("*.metadata.json"))
        if not versions:
            raise DataError(f"{path} has no metadata/*.metadata.json; it is no Iceberg table")
        path = max(versions, key=lambda file: json.loads(file.read_text()).get("last-updated-ms", 0))
    return str(path)


def without_secrets(text: str, options: Mapping[str, str]) -> str:
    """`text` without the values of options, and without passwords and signatures of URLs.

    >>> without_secrets("no s3://id:pass@b/t for hunter2 in eu", {"secret_key": "hunter2", "s3.region": "eu"})
    'no s3://***@b/t for *** in eu'
    """
    for key, value in sorted(options.items(), key=lambda option: -len(option[1])):
        if value and not key.lower().endswith(_TELLING):
            text = text.replace(value, "***")
    text = re.sub(r"://[^/\s:@]*:\S*@", "://***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:sig|token|key|secret|password)[^=&\s]*=)[^&\s]+", r"\1***", text)
