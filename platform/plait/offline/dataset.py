"""A training set on disk: train, valid and test parquet parts beside a manifest, opened and read here.

Nothing in this module needs Feast: a trainer, a benchmark or a notebook opens a dataset from its folder alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from plait.errors import DataError, UnknownNameError
from plait.offline.parts import Part, file_sha256
from plait.offline.splits import PARTS

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureColumn:
    """A feature of the service as it stands in the dataset; `dtype` is Arrow's name of the type."""

    name: str
    view: str
    dtype: str
    side: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetManifest:
    """What a dataset holds and how it came to be; `data_hash` is over the parts' contents."""

    key: str
    data_hash: str
    feature_service: str
    features: tuple[FeatureColumn, ...]
    transforms: Mapping[str, str]  # import reference -> hash of its module
    derived_keys: Mapping[str, str]  # join key -> "view:feature"
    label: str
    labels: tuple[str, ...]
    samples: str
    samples_hash: str
    split: Mapping[str, Any]
    rows: Mapping[str, int]
    positives: Mapping[str, Mapping[str, int]]  # label -> split -> rows with 1
    schema: Mapping[str, str]  # column -> Arrow's name of its type
    parts: tuple[Part, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> DatasetManifest:
        values = json.loads(text)
        values["features"] = tuple(FeatureColumn(**feature) for feature in values["features"])
        values["parts"] = tuple(Part(**part) for part in values["parts"])
        values["labels"] = tuple(values["labels"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Split:
    """One of train, valid, test: parquet files in order, with the manifest's row count."""

    name: str
    files: tuple[Path, ...]
    n_rows: int
    schema: pa.Schema

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, in order of sample_id, with all or the named columns. Raises UnknownNameError, DataError."""
        names = self.check_columns(columns)
        tables = []
        for file in self.files:
            with corrupt_part(file):
                tables.append(pq.read_table(file, columns=names, use_threads=True, partitioning=None))
        wanted = pa.schema([self.schema.field(name) for name in names])
        return pa.concat_tables(tables).select(names) if tables else wanted.empty_table()

    def batches(self, columns: Sequence[str] | None = None, *, rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """The same rows in batches, one row group in memory at a time."""
        names = self.check_columns(columns)
        for file in self.files:
            with corrupt_part(file), pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=rows, columns=names):
                    yield batch.select(names)

    def scan(self) -> pads.Dataset:
        """As a pyarrow dataset, for filters and projections."""
        return pads.dataset(list(self.files), schema=self.schema, format="parquet")

    def check_columns(self, columns: Sequence[str] | None) -> list[str]:
        """`columns` as a list, all of them if None. Raises UnknownNameError with the nearest name."""
        if columns is None:
            return list(self.schema.names)
        for name in columns:
            if name not in self.schema.names:
                raise UnknownNameError("column", name, self.schema.names, where="dataset")
        return list(columns)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset folder, opened."""

    folder: Path
    manifest: DatasetManifest
    schema: pa.Schema

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Dataset:
        """Open a folder; verify=True also compares every part's SHA-256 with the manifest's.

        Raises DataError if the folder holds no dataset, or a part is missing, of another size, or corrupt.
        """
        path = folder / MANIFEST
        try:
            manifest = DatasetManifest.from_json(path.read_text())
        except FileNotFoundError as error:
            raise DataError(f"no dataset in {folder}; run `plait dataset build MODEL` first") from error
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not a dataset manifest ({error}); build the dataset again") from error
        schema = None
        for part in manifest.parts:
            file = folder / part.path
            if not file.exists() or file.stat().st_size != part.size_bytes:
                came = f"{file.stat().st_size} bytes" if file.exists() else "no file"
                raise DataError(
                    f"{file}: {came} where {part.size_bytes} bytes were written; delete {folder} and build it again"
                )
            if verify and file_sha256(file) != part.sha256:
                raise DataError(f"{file} is not what was written (SHA-256 differs); delete {folder} and build it again")
            if schema is None:
                with corrupt_part(file):
                    schema = pq.read_schema(file)
        if schema is None:
            raise DataError(f"{folder} lists no part; delete it and build it again")
        return cls(folder, manifest, schema.remove_metadata())

    def split(self, name: str) -> Split:
        """train, valid or test. Raises UnknownNameError."""
        if name not in PARTS:
            raise UnknownNameError("split", name, PARTS, where=str(self.folder))
        parts = [part for part in self.manifest.parts if Path(part.path).parts[0] == name]
        files = tuple(self.folder / part.path for part in parts)
        return Split(name, files, sum(part.rows for part in parts), self.schema)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the service's features, in its canonical order."""
        return tuple(feature.name for feature in self.manifest.features)


class corrupt_part:
    """Turns pyarrow's errors while reading `file` into a DataError that names it, and what to do: `again`."""

    def __init__(self, file: Path, *, again: str = "delete its dataset folder and build it again") -> None:
        self.file, self.again = file, again

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | pa.ArrowException):
            reason = " ".join(str(error).split())
            raise DataError(f"{self.file} cannot be read ({reason}); {self.again}") from error


def find_datasets(root: Path) -> list[Dataset]:
    """Every whole dataset below `root`, newest first; folders that cannot be opened are left out."""
    found = []
    for path in root.glob(f"*/{MANIFEST}"):
        if path.parent.name.startswith("."):
            continue
        try:
            found.append(Dataset.open(path.parent))
        except DataError:
            continue
    return sorted(found, key=lambda dataset: dataset.manifest.created, reverse=True)
