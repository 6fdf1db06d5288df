"""Model configurations: YAML → ModelSpec, once, at the edge.

A file holds name, feature_service, label and algorithm, and optionally columns, crosses and training. Whatever it
leaves out has a default from the feature service's schema (columns) or from the algorithm (training).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from plait.encoders import Encoding, InputColumn, default_encoding, parse_cross, parse_encoding
from plait.encoders.specs import CrossSpec, Family, build
from plait.errors import SpecError, UnknownNameError

CONFIGS = Path(__file__).parent / "configs"
_KEYS = ("name", "feature_service", "label", "algorithm", "columns", "crosses", "training")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepFMTraining:
    """`dim` floats per id, an MLP of `hidden` layers, row-wise Adagrad on the tables and Adam on the rest.

    l2 pulls the embedding rows of each batch towards 0. Training stops when validation log loss has not improved for
    `patience` epochs; the best epoch is kept. `threads`: 0 leaves torch's own choice.
    """

    epochs: int = 20
    batch_size: int = 1024
    dim: int = 16
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.2
    learning_rate: float = 0.001
    table_learning_rate: float = 0.02
    l2: float = 0.0
    patience: int = 2
    seed: int = 17
    threads: int = 0

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "dim", "learning_rate", "table_learning_rate", "patience")
        _fraction(self, "dropout")
        if self.l2 < 0 or self.threads < 0 or any(width < 1 for width in self.hidden):
            raise SpecError("l2 and threads must not be negative, and hidden layers need at least one unit")


@dataclass(frozen=True, kw_only=True, slots=True)
class LightGBMTraining:
    """Boosting rounds until validation log loss has not improved for `patience` rounds."""

    rounds: int = 1000
    learning_rate: float = 0.05
    leaves: int = 31
    max_depth: int = -1
    min_leaf: int = 100
    row_fraction: float = 0.8
    column_fraction: float = 0.8
    l1: float = 0.0
    l2: float = 5.0
    patience: int = 50
    seed: int = 17
    threads: int = 2

    def __post_init__(self) -> None:
        _positive(self, "rounds", "learning_rate", "patience", "threads", "min_leaf", "row_fraction", "column_fraction")
        if self.leaves < 2:
            raise SpecError(f"leaves is {self.leaves}; a tree needs at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class XGBoostTraining:
    """Boosting rounds until validation log loss has not improved for `patience` rounds."""

    rounds: int = 1000
    learning_rate: float = 0.05
    max_depth: int = 6
    min_child_weight: float = 20.0
    row_fraction: float = 0.8
    column_fraction: float = 0.8
    l1: float = 0.0
    l2: float = 5.0
    patience: int = 50
    seed: int = 17
    threads: int = 2

    def __post_init__(self) -> None:
        _positive(
            self, "rounds", "learning_rate", "max_depth", "patience", "threads", "row_fraction", "column_fraction"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticTraining:
    """L2-regularised logistic regression. Strengths `c` are walked from strong to weak until validation log loss rises
    for `patience` steps in a row; each starts from the last."""

    c: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    max_iterations: int = 300
    tolerance: float = 1e-4
    patience: int = 2
    seed: int = 17

    def __post_init__(self) -> None:
        _positive(self, "max_iterations", "tolerance", "patience")
        if not self.c or any(value <= 0 for value in self.c):
            raise SpecError(f"c is {list(self.c)}; it needs at least one strength, all above 0")


Training = DeepFMTraining | LightGBMTraining | XGBoostTraining | LogisticTraining

ALGORITHMS: dict[str, tuple[type[Any], Family]] = {
    "deepfm": (DeepFMTraining, "neural"),
    "lightgbm": (LightGBMTraining, "tree"),
    "xgboost": (XGBoostTraining, "tree"),
    "logistic": (LogisticTraining, "linear"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One model to train. `source` is the file it came from, for messages."""

    name: str
    feature_service: str
    label: str
    algorithm: str
    training: Training
    columns: Mapping[str, Any] = field(default_factory=dict)
    crosses: Sequence[Any] = ()
    source: str = "model"

    @property
    def family(self) -> Family:
        return ALGORITHMS[self.algorithm][1]

    def to_dict(self) -> dict[str, Any]:
        """As YAML or JSON would hold it, with every training setting; `parse_spec` reads it back."""
        return {
            "name": self.name,
            "feature_service": self.feature_service,
            "label": self.label,
            "algorithm": self.algorithm,
            "columns": dict(self.columns),
            "crosses": list(self.crosses),
            "training": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.training).items()},
        }

    def with_training(self, **settings: Any) -> ModelSpec:
        return replace(self, training=replace(self.training, **settings))

    def encodings(
        self, inputs: Iterable[InputColumn], keys: Iterable[str]
    ) -> tuple[dict[str, Encoding], list[CrossSpec]]:
        """The encoding of every input, declared or by default, and the crosses.

        Raises UnknownNameError, with the file's name and the nearest name, for a column outside the service.
        """
        known = {item.name: item for item in inputs}
        key_names = set(keys)
        for name in self.columns:
            if name not in known:
                raise UnknownNameError(f"feature of service {self.feature_service!r}", name, known, where=self.source)
        encodings = {
            name: parse_encoding(name, self.columns[name], where=self.source)
            if name in self.columns
            else default_encoding(item, self.family, is_key=name in key_names)
            for name, item in known.items()
        }
        crosses = [parse_cross(value, where=self.source) for value in self.crosses]
        for cross in crosses:
            for name in (cross.left, cross.right):
                if name not in known:
                    kind = f"feature of service {self.feature_service!r}"
                    raise UnknownNameError(kind, name, known, where=f"{self.source}: cross {cross.name}")
        return encodings, crosses


def configured_names(folders: Iterable[Path] = (CONFIGS,)) -> list[str]:
    """Names of the models that have a configuration."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def load_spec(model: str, overrides: Iterable[str] = (), folders: Sequence[Path] = (CONFIGS,)) -> ModelSpec:
    """The configuration of `model`: a name below `folders` (the first that has it), or the path of a YAML file.

    overrides: `key.path=value` texts. Raises UnknownNameError for an unknown model, SpecError for a wrong file.
    """
    path = Path(model)
    if path.suffix not in (".yaml", ".yml"):
        found = [folder / f"{model}.yaml" for folder in folders if (folder / f"{model}.yaml").is_file()]
        if not found:
            raise UnknownNameError("model configuration", model, configured_names(folders))
        path = found[0]
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} holds no mapping; it needs at least name, feature_service, label and algorithm")
    for override in overrides:
        _override(content, override)
    return parse_spec(content, source=path.name)


def parse_spec(content: Mapping[str, Any], *, source: str) -> ModelSpec:
    """A ModelSpec from a mapping. Raises SpecError or UnknownNameError, starting with `source`."""
    for key in content:
        if key not in _KEYS:
            raise UnknownNameError("setting", str(key), _KEYS, where=source)
    for key in _KEYS[:4]:
        if not isinstance(content.get(key), str) or not content[key]:
            raise SpecError(f"{source}: {key} is {content.get(key)!r}; it must be given, as text")
    algorithm = content["algorithm"]
    if algorithm not in ALGORITHMS:
        raise UnknownNameError("algorithm", algorithm, ALGORITHMS, where=source)
    columns, crosses, training = (
        content.get("columns") or {},
        content.get("crosses") or [],
        content.get("training") or {},
    )
    for key, value, kind in (
        ("columns", columns, Mapping),
        ("crosses", crosses, list),
        ("training", training, Mapping),
    ):
        if not isinstance(value, kind):
            raise SpecError(f"{source}: {key} is {value!r}; it must be a {'list' if kind is list else 'mapping'}")
    for name, value in columns.items():
        parse_encoding(name, value, where=source)
    for value in crosses:
        parse_cross(value, where=source)
    return ModelSpec(
        **{key: content[key] for key in _KEYS[:4]},
        training=build(ALGORITHMS[algorithm][0], training, where=f"{source}: training"),
        columns=dict(columns),
        crosses=tuple(crosses),
        source=source,
    )


def _override(content: dict[str, Any], text: str) -> None:
    """Set `a.b.c=value` (value read as YAML) in nested mappings, in place."""
    path, equals, value = text.partition("=")
    *parents, last = path.strip().split(".")
    if not equals or not all((*parents, last)):
        raise SpecError(f"--set {text!r} is not of the form key=value, such as training.epochs=3")
    target = content
    for parent in parents:
        below = target.get(parent)
        if isinstance(below, str):  # columns.age: bucketize → columns.age.buckets=5
            below = {"encode": below}
        target[parent] = below = dict(below) if isinstance(below, Mapping) else {}
        target = below
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {text!r}: the value is no YAML: {error}") from error


def _positive(spec: Any, *names: str) -> None:
    for name in names:
        if not getattr(spec, name) > 0:
            raise SpecError(f"{name} is {getattr(spec, name)}; it must be above 0")


def _fraction(spec: Any, name: str) -> None:
    if not 0 <= getattr(spec, name) < 1:
        raise SpecError(f"{name} is {getattr(spec, name)}; it must be in [0, 1)")
