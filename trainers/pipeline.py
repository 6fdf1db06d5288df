"""From a training set and a configuration to a verified artifact: the same steps for every family of models."""

from __future__ import annotations

import importlib.metadata
import platform as host
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from plait.artifacts import GOLDEN_TOLERANCE, ArtifactManifest, write_artifact
from plait.encoders import Column, EncoderSet
from plait.errors import ArtifactError, DataError
from plait.offline.dataset import Dataset
from plait.service import ServiceSpec
from trainers.baselines import fit_baselines
from trainers.config import ModelSpec, parse_spec
from trainers.data import Encoded, ranking_groups, read_split
from trainers.fitted import Fitted
from trainers.golden import golden_rows, standing_on_thresholds
from trainers.metrics import evaluate

_LIBRARIES = ("plait", "numpy", "pyarrow", "onnx", "onnxruntime")
_FAMILY_LIBRARIES = {
    "deepfm": ("torch", "onnxscript"),
    "lightgbm": ("lightgbm",),
    "xgboost": ("xgboost-cpu",),
    "logistic": ("scikit-learn", "scipy"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A trained model before it is published: everything that its artifact will say."""

    spec: ModelSpec
    encoders: EncoderSet
    fitted: Fitted
    manifest: ArtifactManifest
    golden: pa.Table

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest.metrics

    def write(self, folder: Path) -> ArtifactManifest:
        """Write the artifact; raises ArtifactError if it would not reproduce the golden rows."""
        return write_artifact(
            folder, model=self.fitted.model, encoders=self.encoders, manifest=self.manifest, golden=self.golden
        )


def model_inputs(service: ServiceSpec, schema: pa.Schema) -> tuple[list[Column], list[str]]:
    """What a model of `service` may read, in canonical order (join keys, then features), and which are keys.

    Raises DataError if the training set lacks one of them or holds it as another type.
    """
    keys = [*((name, "request") for name in service.request_keys), *((n, "candidate") for n in service.candidate_keys)]
    lost = [name for name in (*(k for k, _ in keys), *(f.name for f in service.features)) if name not in schema.names]
    if lost:
        raise DataError(
            f"the training set lacks {', '.join(lost)} of service {service.name!r}; build it again "
            "(`plait dataset build`)"
        )
    columns = [Column(name=name, dtype=schema.field(name).type, side=side) for name, side in keys]  # type: ignore[arg-type]
    taken = {column.name for column in columns}
    columns += [Column(name=f.name, dtype=f.dtype, side=f.side) for f in service.features if f.name not in taken]
    return columns, [name for name, _ in keys]


def train_model(
    spec: ModelSpec, service: ServiceSpec, data: Dataset, *, now: datetime, progress: bool = True
) -> TrainedModel:
    """Fit encoders and model on the training split, stop by the validation split, measure on the test split.

    now: the moment the manifest says it was created. Raises SpecError, DataError or ArtifactError (a graph that
    disagrees with its trainer is never returned).
    """
    inputs, keys = model_inputs(service, data.schema)
    encodings, crosses = spec.encodings(inputs, keys)
    train = read_split(data, "train", spec.label)
    encoders = EncoderSet.fit(train, inputs, encodings, crosses, where=spec.source)
    valid, test = (read_split(data, name, spec.label) for name in ("valid", "test"))
    encoded = {name: Encoded.of(rows, encoders, spec.label) for name, rows in (("train", train), ("valid", valid))}
    _check_classes(encoded, spec.label)
    fitted = trainer_of(spec.algorithm)(spec.training, encoders, encoded["train"], encoded["valid"], progress=progress)
    conversion = check_conversion(fitted, encoders, encoded["valid"].arrays)

    labels = test.column(spec.label).to_numpy()
    groups, group_name = ranking_groups(test)
    scores = fitted.predict(encoders.encode_rows(test))
    baselines = {
        name: evaluate(labels, baseline.predict(test), groups)
        for name, baseline in fit_baselines(train, spec.label).items()
    }
    manifest = ArtifactManifest(
        name=spec.name,
        algorithm=spec.algorithm,
        feature_service=spec.feature_service,
        features=tuple(
            {"name": c.name, "dtype": str(c.dtype), "side": c.side, "key": c.name in keys} for c in encoders.inputs
        ),
        label=spec.label,
        transforms=dict(service.transform_hashes),
        metrics=evaluate(labels, scores, groups) | {"ndcg_group": group_name, "conversion_difference": conversion},
        baselines=baselines,
        history=_history(fitted.history),
        data_hash=data.manifest.data_hash,
        dataset=data.folder.name,
        config=spec.to_dict(),
        seed=spec.training.seed,
        versions=library_versions(spec.algorithm),
        created=now.isoformat(),
    )
    golden = golden_rows(test, encoders, fitted)
    return TrainedModel(spec=spec, encoders=encoders, fitted=fitted, manifest=_without_nan(manifest), golden=golden)


def retrain(
    manifest: ArtifactManifest, service: ServiceSpec, data: Dataset, *, now: datetime, progress: bool = False
) -> TrainedModel:
    """Train again what a manifest says. Raises DataError if the training set is not the one it was trained on."""
    if manifest.data_hash != data.manifest.data_hash:
        raise DataError(
            f"{manifest.name} was trained on data {manifest.data_hash}, "
            f"but {data.folder} holds {data.manifest.data_hash}"
        )
    spec = parse_spec(manifest.config, source=f"manifest of {manifest.name}")
    return train_model(spec, service, data, now=now, progress=progress)


def trainer_of(algorithm: str) -> Callable[..., Fitted]:
    """The fit function of an algorithm; only its own libraries are imported."""
    if algorithm == "deepfm":
        from trainers.neural.training import fit_deepfm

        return fit_deepfm
    if algorithm == "logistic":
        from trainers.classical import fit_logistic

        return fit_logistic
    from trainers import trees

    return trees.fit_lightgbm if algorithm == "lightgbm" else trees.fit_xgboost


def check_conversion(
    fitted: Fitted, encoders: EncoderSet, arrays: Mapping[str, np.ndarray], *, rows: int = 2000, seed: int = 17
) -> float:
    """Largest difference between the graph and the trainer over some rows, and over the same rows moved onto the
    model's own thresholds and emptied to NaN. Raises ArtifactError if it is above the golden tolerance."""
    n = len(next(iter(arrays.values())))
    picked = np.random.default_rng(seed).permutation(n)[:rows]
    some = {name: array[picked] for name, array in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        session = _session(fitted, Path(folder))
        worst = 0.0
        for moved in (some, standing_on_thresholds(some, fitted.thresholds, seed=seed)):
            difference = np.abs(session.run(["score"], dict(moved))[0] - fitted.predict(moved)).max()
            worst = max(worst, float(difference)) if difference == difference else float("nan")
    if not worst <= GOLDEN_TOLERANCE:
        raise ArtifactError(
            f"the exported graph differs from its trainer by {worst:.2g} (allowed: {GOLDEN_TOLERANCE:g}); "
            "the model is not published"
        )
    return worst


def library_versions(algorithm: str) -> dict[str, str]:
    """Versions of Python and of every library that had a say in the artifact."""
    found = {"python": host.python_version()}
    for name in (*_LIBRARIES, *_FAMILY_LIBRARIES[algorithm]):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _session(fitted: Fitted, folder: Path) -> ort.InferenceSession:
    import onnx

    onnx.save_model(fitted.model, str(folder / "m.onnx"), save_as_external_data=fitted.model.ByteSize() > 1 << 30)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / "m.onnx"), options, providers=["CPUExecutionProvider"])


def _check_classes(encoded: Mapping[str, Encoded], label: str) -> None:
    for split, rows in encoded.items():
        if rows.labels.min() == rows.labels.max():
            raise DataError(f"every {label!r} of the {split} split is {rows.labels[0]:.0f}; a model needs both 0 and 1")


def _history(history: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple({key: value if isinstance(value, int) else float(value) for key, value in h.items()} for h in history)


def _without_nan(manifest: ArtifactManifest) -> ArtifactManifest:
    """JSON has no NaN: a measure that does not exist (NDCG without a positive, say) is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return replace(manifest, metrics=clean(manifest.metrics), baselines=clean(manifest.baselines))
