"""`plait dataset build`: samples joined, point in time, to a feature service by Feast's get_historical_features.

The folder's name is a hash of all that decides its rows (samples, views and the state of their sources, transforms),
so a dataset that exists is reused and two models of equal features share one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from plait.errors import DataError, SpecError, UnknownNameError
from plait.files import atomic_folder
from plait.offline.dataset import MANIFEST, Dataset, DatasetManifest, FeatureColumn, corrupt_part
from plait.offline.parts import PartWriter, content_hash
from plait.offline.retrieval import REQUEST_TIME, ROW, TIME, chunked, point_in_time, stream_point_in_time, streams
from plait.offline.samples import SampleManifest, read_manifest
from plait.offline.saved import register_dataset
from plait.offline.sources import refuse_drift, source_state
from plait.offline.splits import PARTS
from plait.settings import Home

__all__ = ["REQUEST_TIME", "ModelData", "build_dataset", "dataset_key", "point_in_time", "read_model"]

if TYPE_CHECKING:
    from feast import FeatureStore

    from plait.service import ServiceSpec

CHUNK_ROWS = 1_000_000
SAMPLES_AGAIN = "run `plait samples build` again"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelData:
    """What the hub reads of a model configuration: which service feeds it and which label it learns."""

    name: str
    feature_service: str
    label: str


def read_model(home: Home, name: str) -> ModelData:
    """The model's configuration below trainers/configs/ of the project.

    Raises UnknownNameError (did you mean) for an unknown model, SpecError for a configuration without the keys.
    """
    folder = home.project / "trainers" / "configs"
    files = {path.stem: path for path in folder.glob("*.yaml")}
    if name not in files:
        raise UnknownNameError("model configuration", name, files, where=str(folder))
    try:
        values = yaml.safe_load(files[name].read_text())
    except yaml.YAMLError as error:
        raise SpecError(f"{files[name]} is not YAML: {error}") from error
    missing = [key for key in ("feature_service", "label") if not isinstance((values or {}).get(key), str)]
    if missing:
        raise SpecError(f"{files[name]} lacks {' and '.join(missing)} (each a name)")
    return ModelData(name=values.get("name", name), feature_service=values["feature_service"], label=values["label"])


def build_dataset(
    home: Home,
    service: str,
    *,
    label: str | None = None,
    samples: str = "default",
    store: FeatureStore | None = None,
    engine: str | None = None,
    memory: str | None = None,
    chunk_rows: int = CHUNK_ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """The dataset of `service` over samples/<samples>: built, or opened if it is already there.

    store: by default the project's. engine: "duckdb" or "spark" join by Plait's own expression, with equal rows; None
    asks the project's offline store. memory: what the engine may take ("4GB"). chunk_rows: rows of one join in stores
    that cannot stream, which bounds memory. progress: called with (rows done, rows in all).
    Raises DataError, SpecError, UnknownNameError, StoreError, SettingsError.
    """
    from plait.service import open_store, resolve_service

    folder = home.samples / samples
    manifest = read_manifest(folder)
    if label is not None and label not in manifest.labels:
        raise UnknownNameError(
            "label", label, manifest.labels, where=f"samples {samples!r} (add it with plait samples build --label)"
        )
    store = store or open_store(home)
    spec = resolve_service(store, service)
    _refuse_clashes(spec, manifest)
    key = dataset_key(store, spec, manifest, engine=engine)
    target = home.datasets / f"{samples}-{key[:16]}"
    if (target / MANIFEST).exists():
        try:
            there = Dataset.open(target)
        except DataError:
            pass  # damaged: built again, and swapped in whole
        else:
            register_dataset(store, there)
            return there
    refuse_drift(store, spec)
    with atomic_folder(target) as aside:
        work = aside / ".work"
        if engine is None:
            joined = _from_store(store, spec, manifest, folder, work, chunk_rows)
        else:
            joined = _from_engine(engine, memory, store, spec, manifest, folder, work)
        with closing(joined):
            _write(joined, spec, manifest, folder, aside, key=key, label=label, progress=progress)
        shutil.rmtree(work, ignore_errors=True)
    built = Dataset.open(target)
    register_dataset(store, built)
    return built


def dataset_key(store: FeatureStore, spec: ServiceSpec, samples: SampleManifest, *, engine: str | None = None) -> str:
    """Hash of all that decides a dataset's rows. Two services with the same features have the same key.

    Plait's offline store and its engines give equal rows, so which of them joins is no part of it.
    """
    from plait.stores.offline import created_cutoff

    views = {}
    for view in spec.views:
        stored = store.get_feature_view(view.name)
        views[view.name] = {
            "join_keys": view.join_keys,
            "features": view.features,
            "ttl_s": view.ttl.total_seconds() if view.ttl else None,
            "source": source_state(store, stored.batch_source),
        }
    decides = {
        "samples": samples.data_hash,
        "features": [(feature.name, feature.view, str(feature.dtype)) for feature in spec.features],
        "views": views,
        "transforms": spec.transform_hashes,
        "derived_keys": {key: list(value) for key, value in spec.derived_keys.items()},
        "join": "plait" if engine or streams(store) else type(store.config.offline_store).__name__,
        # Not in the service or its sources, and yet another setting gives other rows.
        "created_cutoff": created_cutoff(store.config),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _refuse_clashes(spec: ServiceSpec, samples: SampleManifest) -> None:
    taken = {ROW, "request_id", TIME, "weight", "split", "label_mature", "origin", *samples.labels}
    for feature in spec.features:
        if feature.name in taken:
            raise SpecError(
                f"feature {feature.name!r} of {spec.name} has the name of a sample column; rename it in feature_repo"
            )


def _write(
    joined: Iterator[tuple[pa.Table, pa.Table]],
    spec: ServiceSpec,
    samples: SampleManifest,
    source: Path,
    aside: Path,
    *,
    key: str,
    label: str | None,
    progress: Callable[[int, int], None],
) -> None:
    first = source / samples.parts[0].path
    with corrupt_part(first, again=SAMPLES_AGAIN):
        sample_schema = pq.read_schema(first).remove_metadata()
    names = [feature.name for feature in spec.features]
    kept = [field for field in sample_schema if field.name not in names]
    schema = pa.schema([*kept, *spec.schema()])
    writers = {part: PartWriter(aside / part, schema, root=aside) for part in PARTS}
    positives = {name: dict.fromkeys(PARTS, 0) for name in samples.labels}
    done, total = 0, sum(samples.rows.values())
    for chunk, features in joined:
        rows = pa.Table.from_arrays(
            [*(chunk.column(field.name) for field in kept), *(features.column(name) for name in names)], schema=schema
        )
        for part in PARTS:
            of_part = rows.filter(pc.equal(rows.column("split"), part))
            if of_part.num_rows:
                writers[part].write(of_part)
            for name, counts in positives.items():
                counts[part] += pc.sum(of_part.column(name)).as_py() or 0
        done += chunk.num_rows
        progress(done, total)
    parts = tuple(part for name in PARTS for part in writers[name].close())
    manifest = DatasetManifest(
        key=key,
        data_hash=content_hash(parts),
        feature_service=spec.name,
        features=tuple(
            FeatureColumn(name=feature.name, view=feature.view, dtype=str(feature.dtype), side=feature.side)
            for feature in spec.features
        ),
        transforms=spec.transform_hashes,
        derived_keys={name: ":".join(value) for name, value in spec.derived_keys.items()},
        label=label or samples.labels[0],
        labels=samples.labels,
        samples=samples.name,
        samples_hash=samples.data_hash,
        split=samples.spec["split"],
        rows={part: writers[part].n_rows for part in PARTS},
        positives=positives,
        schema={field.name: str(field.type) for field in schema},
        parts=parts,
        versions=_versions(),
    )
    (aside / MANIFEST).write_bytes(manifest.to_json())


Joined = Generator[tuple[pa.Table, pa.Table], None, None]  # rows of samples beside their features, in order


def _from_store(
    store: FeatureStore, spec: ServiceSpec, samples: SampleManifest, source: Path, work: Path, chunk_rows: int
) -> Joined:
    """By Feast's get_historical_features: in one streamed query if the store can, else a query a chunk."""
    if streams(store):
        yield from stream_point_in_time(store, spec, lambda: sample_batches(source, samples), work=work)
        return
    for chunk in chunked(sample_batches(source, samples), chunk_rows):
        yield chunk, point_in_time(store, spec, chunk)


def _from_engine(
    engine: str,
    memory: str | None,
    store: FeatureStore,
    spec: ServiceSpec,
    samples: SampleManifest,
    source: Path,
    work: Path,
) -> Joined:
    """By Plait's own expression on DuckDB or Spark, which spill into `work`."""
    from plait.offline.engine import open_engine
    from plait.offline.engine_retrieval import stream_on_engine
    from plait.stores.offline import created_cutoff

    files = [source / part.path for part in samples.parts]
    with open_engine(engine, memory=memory, scratch=work) as running:
        yield from stream_on_engine(
            running, store, spec, files, lambda: sample_batches(source, samples), cutoff=created_cutoff(store.config)
        )


def sample_batches(folder: Path, samples: SampleManifest) -> Iterator[pa.RecordBatch]:
    """The samples in order, a row group at a time at most. Raises DataError for a missing or corrupt part."""
    for part in samples.parts:
        file = folder / part.path
        if not file.exists():
            raise DataError(f"{file} is missing; run `plait samples build` again")
        with corrupt_part(file, again=SAMPLES_AGAIN), pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(batch_size=65_536)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("plait", "feast", "pyarrow", "duckdb")}
