"""A server made of fakes: ten-line parts that behave as the real ones promise to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from flask import Flask
from flask.testing import FlaskClient

from experiments.explain import Explanation, explain
from experiments.snapshot import Snapshot
from experiments.store import ConfigStore
from plait.errors import RegistryError, StoreError, did_you_mean
from plait.keys import KeyStore
from plait.settings import Home
from serving.admin import Admin
from serving.app import Parts, create_app
from serving.keyring import KeyRing
from serving.metrics import Metrics
from serving.parts import ServingModel
from serving.pipeline import MODEL, Predictor
from serving.pool import ModelPool
from serving.rows import FeatureRows
from serving.scenes import Scene

NOW = datetime(1998, 4, 10, 12, 0, tzinfo=UTC)
FEATURES = (
    SimpleNamespace(name="user_age", dtype=pa.int64(), side="request"),
    SimpleNamespace(name="user_last_movies", dtype=pa.list_(pa.int64()), side="request"),
    SimpleNamespace(name="movie_mean", dtype=pa.float64(), side="candidate"),
)


SPEC = Snapshot.of(
    {
        "parameters": {"rank.model": {"type": "string", "default": "deepfm"}},
        "layers": {"rank": {"unit": "user", "parameters": ["rank.model"]}},
        "experiments": {
            "ranker": {
                "layer": "rank",
                "state": "running",
                "buckets": "0-9999",
                "arms": {
                    "deepfm": {"weight": 50, "values": {"rank.model": "deepfm"}},
                    "lightgbm": {"weight": 50, "values": {"rank.model": "lightgbm"}},
                },
            }
        },
    }
).spec


class FakeClock:
    def now(self) -> datetime:
        return NOW


class FakeReader:
    """Users 1..99 and items 1..999 exist; movie_mean is item_id % 10; user 7 has seen items 1, 2 and 3."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.before = lambda: None

    def read(
        self, request: Mapping[str, Any], candidates: pa.Table, *, context: Mapping[str, Any], now: datetime
    ) -> FeatureRows:
        self.before()
        if self.error:
            raise self.error
        user, items = request["user_id"], candidates["item_id"].to_numpy()
        known = (items >= 1) & (items <= 999)
        age, seen = (user % 100, [1, 2, 3] if user == 7 else []) if 1 <= user <= 99 else (None, None)
        return FeatureRows(
            pa.table(
                {"user_age": pa.array([age], pa.int64()), "user_last_movies": pa.array([seen], pa.list_(pa.int64()))}
            ),
            pa.table(
                {
                    "movie_mean": pa.array(
                        [float(i % 10) if k else None for i, k in zip(items, known, strict=True)], pa.float64()
                    )
                }
            ),
            ~known,
            age is None,
        )


class FakeScorer:
    """Scores movie_mean / 10 + shift, 0.05 + shift without one; the graph doubles x."""

    inputs = (SimpleNamespace(name="x", datatype="FP32", shape=(-1, 2)),)
    outputs = (SimpleNamespace(name="score", datatype="FP32", shape=(-1,)),)

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift
        self.error: Exception | None = None

    def score(self, request: pa.Table, candidates: pa.Table) -> np.ndarray:
        if self.error:
            raise self.error
        assert request.num_rows == 1 and "user_id" in request.column_names and "item_id" in candidates.column_names
        means = candidates["movie_mean"].to_pylist()
        return np.array([0.05 if m is None else m / 10 for m in means], np.float32) + np.float32(self.shift)

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"score": (inputs["x"] * 2).sum(axis=1)}


@dataclass(frozen=True)
class FakeVersion:
    name: str
    version: str
    path: Path = Path("/nowhere")
    aliases: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class FakeRegistry:
    """deepfm and lightgbm have champions; `champions` may be changed under a running pool."""

    def __init__(self) -> None:
        self.champions = {"deepfm": "1", "lightgbm": "1"}
        self.known = {"deepfm": ["1", "2"], "lightgbm": ["1"], "logistic": ["1"]}
        self.champions["logistic"] = "1"
        self.moves: list[tuple[str, str, str, str | None]] = []

    def resolve(self, ref: str) -> FakeVersion:
        name, _, version = ref.partition(":")
        if name not in self.known or (version and version not in self.known[name]):
            raise RegistryError(f"no model {ref!r} in the registry; {did_you_mean(name, self.known)}")
        return FakeVersion(name, version or self.champions[name])

    def names(self) -> list[str]:
        return sorted(self.known)

    def versions(self, name: str) -> list[FakeVersion]:
        if name not in self.known:
            raise RegistryError(f"no model {name!r}")
        return [FakeVersion(name, v, aliases=("champion",) * (v == self.champions[name])) for v in self.known[name]]

    def references(self) -> set[str]:
        return {f"{name}{end}" for name in self.known for end in ("", *(f":{v}" for v in self.known[name]))}

    def promote(self, name: str, version: str, alias: str, *, author: str | None = None) -> FakeVersion:
        found = self.resolve(f"{name}:{version}")
        self.moves.append((name, alias, version, author))
        self.champions[name] = version
        return FakeVersion(name, found.version, aliases=(alias,))

    def rollback(self, name: str, alias: str) -> FakeVersion:
        before = [move for move in self.moves if move[0] == name]
        if not before:
            raise RegistryError(f"{name}@{alias} has no earlier version to go back to")
        self.champions[name] = "1"
        return FakeVersion(name, "1", aliases=(alias,))


@dataclass(frozen=True)
class FakeArm:
    layer: str
    experiment: str
    arm: str
    parameter: str
    unit: str
    unit_kind: str = "user"
    forced: bool = False
    counterfactual: bool = False
    propensity: float | None = None
    context: str | None = None
    chosen_by: str = "hash"


class FakeAssignment:
    def __init__(self, values: Mapping[str, Any], arms: Sequence[FakeArm]) -> None:
        self.values, self.arms, self.errors, self._used = values, arms, [], set[str]()
        self.missing = ()

    def __getitem__(self, parameter: str) -> Any:
        self._used.add(parameter)
        return self.values[parameter]

    def alternatives(self, parameter: str) -> dict[str, Any]:
        return {}

    def mark_counterfactual(self, parameter: str) -> None:
        raise AssertionError("nothing here has alternatives")

    def exposures(self) -> list[FakeArm]:
        return [arm for arm in self.arms if arm.parameter in self._used]


class FakeSnapshot:
    """Even users are in the arm lightgbm; `values` may be changed."""

    version = 3
    spec = SPEC
    document: Mapping[str, Any] = MappingProxyType({})

    def explain(self, units: Mapping[str, str], attributes: Mapping[str, Any], at: datetime) -> Explanation:
        return explain(SPEC, self.version, units, attributes, at)

    def model_references(self) -> list[str]:
        return ["deepfm", "lightgbm"]

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"recall.exclude_seen": False, "recall.max_candidates": 500}
        self.error: Exception | None = None

    def assign(self, units: Mapping[str, str], attributes: Mapping[str, Any], at: datetime) -> FakeAssignment:
        if self.error:
            raise self.error
        unit = units["user"]
        model = "lightgbm" if unit.isdigit() and int(unit) % 2 == 0 else "deepfm"
        arms = [
            FakeArm("recall", "exclude_seen", str(self.values["recall.exclude_seen"]), "recall.exclude_seen", unit),
            FakeArm("rank", "ranker", model, MODEL, unit),
        ]
        return FakeAssignment({MODEL: model, **self.values}, arms)


class FakeLog:
    """Keeps everything in lists; `fail` refuses, as a full queue or a full disk would."""

    def __init__(self) -> None:
        self.records: dict[str, list[dict[str, Any]]] = {"request": [], "feedback": [], "exposure": []}
        self.fail = False
        self.queue_length = 0

    def append(self, kind: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self.fail:
            raise StoreError("the disk is full")
        self.records[kind].extend(map(dict, records))

    def enqueue(self, kind: str, records: Sequence[Mapping[str, Any]]) -> bool:
        if not self.fail:
            self.records[kind].extend(map(dict, records))
        return not self.fail


@dataclass
class World:
    """A server and all of its fakes."""

    registry: FakeRegistry
    reader: FakeReader
    scorers: dict[str, FakeScorer]
    snapshot: Any
    log: Any
    metrics: Metrics
    pool: ModelPool
    parts: Parts
    app: Flask
    client: FlaskClient

    def predict(self, **changes: Any) -> Any:
        body = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1, 2, 3], **changes}
        return self.client.post("/v1/predict", json={k: v for k, v in body.items() if v is not ...})

    def key(self, *scopes: str, name: str = "anna") -> dict[str, str]:
        """The headers that carry a new API key of this name."""
        keys = self.parts.admin.keys
        _, token = keys._store.create(name, scopes or ("admin",), author="root")
        keys.poll()
        return {"Authorization": f"Bearer {token}"}

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def world() -> Iterator[World]:
    with make_world() as made:
        yield made


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    """One server for many generated requests."""
    with make_world() as made:
        yield made


@contextmanager
def make_world(
    metrics_folder: Path | None = None,
    *,
    snapshot: Any = None,
    log: Any = None,
    experiments: Any = None,
    admin: Admin | None = None,
) -> Iterator[World]:
    """snapshot or experiments (a live configuration), log, admin: real ones instead of fakes."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(project=Path(folder), root=Path(folder) / ".plait")
        given = admin or Admin(store=ConfigStore.at(home), keys=KeyRing(KeyStore(home)))
        with _make_world(given, metrics_folder, snapshot=snapshot, log=log, experiments=experiments) as world:
            yield world


@contextmanager
def _make_world(
    admin: Admin, metrics_folder: Path | None, *, snapshot: Any, log: Any, experiments: Any
) -> Iterator[World]:
    registry, reader, metrics = FakeRegistry(), FakeReader(), Metrics(metrics_folder)
    snapshot, log = snapshot or FakeSnapshot(), log or FakeLog()
    experiments = experiments or SimpleNamespace(snapshot=snapshot, source="store", error=None, poll=lambda: True)
    scorers: dict[str, FakeScorer] = {}

    def load(version: FakeVersion) -> ServingModel:
        ref = f"{version.name}:{version.version}"
        scorer = scorers.setdefault(ref, FakeScorer())
        return ServingModel(
            name=version.name,
            version=version.version,
            scorer=scorer,
            reader=reader,
            features=FEATURES,
            context_fields={"temperature": pa.float64()},
            details={"feature_service": f"click_{version.name}", "algorithm": "fake", "metrics": {"auc": 0.75}},
        )

    pool = ModelPool(registry, load, lambda: ["deepfm", "lightgbm"], metrics)
    pool.refresh()
    clock = FakeClock()
    predictor = Predictor(pool, experiments, log, clock, metrics)
    scene = Scene(
        name="home",
        default_model="deepfm",
        history_feature="user_last_movies",
        max_candidates=1000,
        features_timeout_ms=200,
    )
    parts = Parts(
        scenes={"home": scene},
        pool=pool,
        registry=registry,
        experiments=experiments,
        log=log,
        clock=clock,
        metrics=metrics,
        predictor=predictor,
        admin=admin,
        info={"project": "fake"},
        on_close=(pool.close, predictor.close, admin.keys.close, admin.store.close),
    )
    app = create_app(parts)
    app.testing = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    yield World(registry, reader, scorers, snapshot, log, metrics, pool, parts, app, app.test_client())
    parts.close()
