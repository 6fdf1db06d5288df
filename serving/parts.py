"""What the server needs from the rest of Plait, cut to what it calls. Tests pass ten-line fakes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa


class Rows(Protocol):
    """Features of one request: `request` has 1 row, `candidates` and `unknown` have N."""

    @property
    def request(self) -> pa.Table: ...
    @property
    def candidates(self) -> pa.Table: ...
    @property
    def unknown(self) -> np.ndarray: ...
    @property
    def request_unknown(self) -> bool: ...


class Reader(Protocol):
    """Reads one model's features; raises whatever its store raises."""

    def read(
        self, request: Mapping[str, Any], candidates: pa.Table, *, context: Mapping[str, Any], now: datetime
    ) -> Rows: ...


class Scorer(Protocol):
    """An artifact. `score` is float32 (N,), a probability of the label; `infer` is the bare graph."""

    def score(self, request: pa.Table, candidates: pa.Table) -> np.ndarray: ...
    def infer(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]: ...
    @property
    def inputs(self) -> Sequence[Any]: ...
    @property
    def outputs(self) -> Sequence[Any]: ...


class FeatureLike(Protocol):
    """One feature as a model reads it; side is "request" or "candidate"."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> pa.DataType: ...
    @property
    def side(self) -> str: ...


class VersionLike(Protocol):
    """What the model registry says of one version."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def path(self) -> Path: ...


class Registry(Protocol):
    """The model registry. `resolve` takes NAME, NAME:VERSION or NAME@ALIAS and raises RegistryError."""

    def resolve(self, ref: str) -> VersionLike: ...
    def names(self) -> Sequence[str]: ...
    def versions(self, name: str) -> Sequence[VersionLike]: ...
    def references(self) -> set[str]: ...
    def promote(self, name: str, version: str, alias: str, *, author: str | None = None) -> Any: ...
    def rollback(self, name: str, alias: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class ServingModel:
    """One loaded model with the reader of its feature service. Immutable: a new version is a new object."""

    name: str
    version: str
    scorer: Scorer
    reader: Reader
    features: Sequence[FeatureLike]
    context_fields: Mapping[str, pa.DataType] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        return f"{self.name}:{self.version}"

    def defaults(self, n_candidates: int) -> tuple[pa.Table, pa.Table]:
        """(request features, candidate features) with every value missing: what an encoder maps to its defaults."""
        return (
            _nulls([f for f in self.features if f.side == "request"], 1),
            _nulls([f for f in self.features if f.side == "candidate"], n_candidates),
        )

    def score(self, user_id: int, item_ids: np.ndarray, request: pa.Table, candidates: pa.Table) -> np.ndarray:
        """Scores (N,) of `item_ids` (N,): the features of both sides, with the join keys that a model may read too."""
        return self.scorer.score(
            _with(request, "user_id", pa.array([user_id], pa.int64())), _with(candidates, "item_id", pa.array(item_ids))
        )

    def warm_up(self) -> None:
        """Run the model on rows without values; raises if it cannot score or a score is no probability."""
        scores = self.score(0, np.array([0, 1]), *self.defaults(2))
        if scores.shape != (2,) or not bool(np.all((scores >= 0) & (scores <= 1))):
            raise ValueError(f"{self.ref} scored {scores!r} in its warm-up; two probabilities were expected")


Loader = Callable[[VersionLike], ServingModel]


class Log(Protocol):
    """The event log. `append` returns when the records are durable; `enqueue` may drop, and says so by False."""

    def append(self, kind: str, records: Sequence[Mapping[str, Any]]) -> None: ...
    def enqueue(self, kind: str, records: Sequence[Mapping[str, Any]]) -> bool: ...
    @property
    def queue_length(self) -> int: ...


class Arm(Protocol):
    """One arm that a unit is in."""

    @property
    def layer(self) -> str: ...
    @property
    def experiment(self) -> str: ...
    @property
    def arm(self) -> str: ...
    @property
    def forced(self) -> bool: ...
    @property
    def unit_kind(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def counterfactual(self) -> bool: ...
    @property
    def propensity(self) -> float | None: ...
    @property
    def context(self) -> str | None: ...
    @property
    def chosen_by(self) -> str: ...


class AssignmentFault(Protocol):
    """Why something was left at its default; `code` is one of a few."""

    @property
    def code(self) -> str: ...


class AssignmentLike(Protocol):
    """Parameter values for one request; reading one records its use. missing: kinds of unit that no id came for."""

    def __getitem__(self, parameter: str) -> Any: ...
    @property
    def values(self) -> Mapping[str, Any]: ...
    @property
    def arms(self) -> Sequence[Arm]: ...
    @property
    def errors(self) -> Sequence[AssignmentFault]: ...
    @property
    def missing(self) -> Sequence[str]: ...
    def alternatives(self, parameter: str) -> Mapping[str, Any]: ...
    def mark_counterfactual(self, parameter: str) -> None: ...
    def exposures(self) -> Sequence[Any]: ...


class SnapshotLike(Protocol):
    """One immutable version of the experiments' configuration."""

    @property
    def version(self) -> int: ...
    @property
    def spec(self) -> Any: ...
    @property
    def document(self) -> Mapping[str, Any]: ...
    def assign(self, units: Mapping[str, str], attributes: Mapping[str, Any], at: datetime) -> AssignmentLike: ...
    def explain(self, units: Mapping[str, str], attributes: Mapping[str, Any], at: datetime) -> Any: ...
    def model_references(self) -> Collection[str]: ...


class Experiments(Protocol):
    """The live configuration: `snapshot` is swapped whole."""

    @property
    def snapshot(self) -> SnapshotLike: ...


class LiveExperiments(Experiments, Protocol):
    """A live configuration that follows a store: where `snapshot` came from, what is wrong with a newer one."""

    @property
    def source(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    def poll(self) -> bool: ...


class ClockLike(Protocol):
    def now(self) -> datetime: ...


def _nulls(features: Sequence[FeatureLike], n_rows: int) -> pa.Table:
    return pa.table({f.name: pa.nulls(n_rows, f.dtype) for f in features})


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    if name in table.column_names:
        return table
    if not table.num_columns:  # such a table forgets how many rows it has
        return pa.table({name: column})
    return table.append_column(name, column)
