"""A published model measured on a split: beside its baselines, by segment, with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from plait.artifacts import Artifact
from plait.errors import DataError
from plait.offline.dataset import Dataset
from trainers.baselines import fit_baselines
from trainers.data import ranking_groups, read_split
from trainers.metrics import Interval, auc_interval, evaluate

_SCORE_ROWS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Measures by name; `segments` maps a segment to its rows and measures; `group` is what NDCG ranks within."""

    split: str
    rows: int
    group: str
    metrics: Mapping[str, float]
    auc: Interval
    baselines: Mapping[str, Mapping[str, float]]
    segments: Mapping[str, tuple[int, Mapping[str, float]]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; measures that do not exist are null."""
        return _json(asdict(self))


def evaluate_artifact(artifact: Artifact, data: Dataset, *, split: str = "test", replicates: int = 200) -> Evaluation:
    """Score a split with the artifact itself, as served. Raises DataError if the training set lacks its columns."""
    label = artifact.manifest.label
    rows = read_split(data, split, label)
    missing = [item.name for item in artifact.encoders.inputs if item.name not in rows.column_names]
    if missing:
        raise DataError(f"{data.folder} lacks {', '.join(missing)}, which {artifact.manifest.name} reads")
    train = read_split(data, "train", label)
    labels, users = rows.column(label).to_numpy(), rows.column("user_id").to_numpy()
    groups, group = ranking_groups(rows)
    scores = score_in_pieces(artifact, rows)
    baselines = fit_baselines(train, label)
    return Evaluation(
        split=split,
        rows=len(rows),
        group=group,
        metrics=evaluate(labels, scores, groups),
        auc=auc_interval(labels, scores, users, replicates=replicates),
        baselines={name: evaluate(labels, baseline.predict(rows), groups) for name, baseline in baselines.items()},
        segments={
            name: (int(chosen.sum()), evaluate(labels[chosen], scores[chosen], groups[chosen]))
            for name, chosen in segments_of(rows, train).items()
            if chosen.any()
        },
    )


def segments_of(rows: pa.Table, train: pa.Table) -> dict[str, npt.NDArray[np.bool_]]:
    """Which rows belong to users and movies that the training split has seen (warm) or not (cold)."""
    found: dict[str, npt.NDArray[np.bool_]] = {}
    for what, key in (("users", "user_id"), ("items", "item_id")):
        warm = np.isin(rows.column(key).to_numpy(), train.column(key).to_numpy())
        found |= {f"warm {what}": warm, f"cold {what}": ~warm}
    return found


def score_in_pieces(artifact: Artifact, rows: pa.Table) -> npt.NDArray[np.float64]:
    """(n,) probabilities, a bounded number of rows at a time."""
    pieces = [artifact.score_rows(rows.slice(start, _SCORE_ROWS)) for start in range(0, len(rows), _SCORE_ROWS)]
    return np.concatenate(pieces).astype(np.float64)


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
