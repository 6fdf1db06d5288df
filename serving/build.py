"""The real parts, made from a project's home in the worker process that will use them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from experiments.live import LiveConfig
from experiments.store import ConfigStore
from plait.artifacts import load_artifact
from plait.clock import Clock
from plait.errors import ArtifactError, PlaitError
from plait.eventlog import EventLog, log_folder
from plait.keys import KeyStore
from plait.models import ModelRegistry
from plait.online import OnlineReader
from plait.service import ServiceSpec, open_store, resolve_service
from plait.settings import Home
from serving.admin import Admin
from serving.app import Parts
from serving.keyring import KeyRing
from serving.metrics import Metrics
from serving.parts import Loader, ServingModel, SnapshotLike, VersionLike
from serving.pipeline import Predictor
from serving.pool import ModelPool
from serving.remembered import RememberedRegistry, remembered_file
from serving.scenes import DEFAULT_FILE, Scene, load_scenes

logger = logging.getLogger("serving")

if TYPE_CHECKING:
    from feast import FeatureStore

    from plait.artifacts import ArtifactManifest


def build_parts(
    home: Home,
    *,
    label: str = "serve",
    n_reads: int = 8,
    metrics_folder: Path | None = None,
    require_keys: bool = False,
) -> Parts:
    """Everything a server needs, started: models loaded, configuration read, log open. Close it before exit.

    Raises PlaitError with what to do if the feature store, the registry or the configuration is not there.
    """
    scenes = load_scenes(scenes_file(home))
    clock = Clock.of(home)
    metrics = Metrics(metrics_folder)
    store = open_store(home)
    registry = RememberedRegistry(ModelRegistry(home), remembered_file(home))
    keys = KeyRing(KeyStore(home), home.root / "api-keys.json").start()
    config = ConfigStore.at(home)
    live = LiveConfig(
        config,
        on_change=lambda _: metrics.config_reloads.labels("adopted").inc(),
        on_policies=lambda result: metrics.policy_reloads.labels(result).inc(),
    )
    live.start()
    pool = ModelPool(registry, model_loader(store, clock), lambda: wanted_models(scenes, live.snapshot), metrics)
    pool.start()
    log = EventLog(log_folder(home), label)
    predictor = Predictor(pool, live, log, clock, metrics, n_reads=n_reads)
    log.on_lost = predictor.log_lost
    return Parts(
        scenes=scenes,
        pool=pool,
        registry=registry,
        experiments=live,
        log=log,
        clock=clock,
        metrics=metrics,
        predictor=predictor,
        admin=Admin(store=config, keys=keys, require_keys=require_keys),
        info={"project": home.project.name, "clock": "replays the data's time" if clock.replaying else "wall"},
        on_close=(pool.close, live.close, keys.close, predictor.close, log.close),
    )


def scenes_file(home: Home) -> Path:
    """The project's own serving/scenes.yaml, else the one Plait ships."""
    own = home.project / "serving" / "scenes.yaml"
    return own if own.exists() else DEFAULT_FILE


def model_loader(store: FeatureStore, clock: Clock) -> Loader:
    """Loads one version: checksums, golden rows, and the same features and transforms as the registry serves."""

    def load(version: VersionLike) -> ServingModel:
        artifact = load_artifact(version.path, threads=1, verify=True)
        manifest = artifact.manifest
        service = resolve_service(store, manifest.feature_service)
        check_same_features(f"{version.name}:{version.version}", manifest, service)
        reader = OnlineReader(store, service)
        first_read(reader, clock)
        return ServingModel(
            name=version.name,
            version=str(version.version),
            scorer=artifact,
            reader=reader,
            features=service.features,
            context_fields=service.request_fields,
            details={
                "algorithm": manifest.algorithm,
                "feature_service": manifest.feature_service,
                "n_features": len(manifest.features),
                "metrics": dict(manifest.metrics),
                "created": manifest.created,
            },
        )

    return load


def first_read(reader: OnlineReader, clock: Clock) -> None:
    """Read once, so that no request pays for connections and imports. A store that is away does not keep a model out:
    requests meet that too, and degrade."""
    try:
        reader.read({"user_id": 0}, pa.table({"item_id": pa.array([0], pa.int64())}), context={}, now=clock.now())
    except PlaitError as error:
        logger.warning("the online store cannot be read now: %s", error)


def check_same_features(ref: str, manifest: ArtifactManifest, service: ServiceSpec) -> None:
    """ArtifactError unless the service still gives what the model was trained on, by the same transforms."""
    served = {feature.name: feature for feature in service.features}
    for feature in manifest.features:
        name = feature["name"]
        if feature.get("key"):
            continue
        if name not in served:
            raise ArtifactError(
                f"{ref} reads {name!r}, which feature service {service.name} no longer has; "
                "put it back and `feast apply`, or train the model again"
            )
        have, want = served[name], (str(feature["dtype"]), feature["side"])
        if (str(have.dtype), have.side) != want:
            raise ArtifactError(
                f"{ref} was trained on {name!r} as {want[0]} ({want[1]} side), but {service.name} now gives "
                f"{have.dtype} ({have.side} side); train the model again"
            )
    for reference, sha in manifest.transforms.items():
        now = service.transform_hashes.get(reference)
        if now != sha:
            raise ArtifactError(
                f"{ref} was trained with {reference} as of {sha[:12]}, but the feature registry has "
                f"{now[:12] if now else 'none'}: train again with the new code, or go back to the old and `feast apply`"
            )


def wanted_models(scenes: Mapping[str, Scene], snapshot: SnapshotLike) -> Iterable[str]:
    """Every model that some scene or some arm may ask for."""
    return [*(scene.default_model for scene in scenes.values()), *sorted(snapshot.model_references())]
