"""What another ranker would have earned, from the log of explored slates (`rank.exploration`).

The log holds, per shown item, the chance of that item at its position given those above it, and the features it was
scored with. A new ranker is asked how likely it would have shown the same items in the same places.

Source for slates: McInerney et al., "Counterfactual Evaluation of Slate Recommendations with Sequential Reward
Interactions", KDD 2020 (the reward at a position is weighted by the chances of the positions down to it).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from experiments.offpolicy import ClippingRow, PolicyValue, clipping_table, importance_weights, policy_value
from experiments.report_events import event_views, micros, quote
from experiments.slates import plackett_luce
from plait.artifacts import Artifact
from plait.audit import typed
from plait.errors import DataError
from plait.settings import Home


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Values of the new policy by each method, beside what the logged one earned on the same rows."""

    logged: float
    n_rows: int
    n_units: int
    values: tuple[PolicyValue, ...]
    clipping: tuple[ClippingRow, ...]
    largest_weight: float
    mean_weight: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExploredLog:
    """Shown items of explored requests, request by request in order of position: arrays of shape (n,)."""

    request: np.ndarray  # 0, 1, …
    user_id: np.ndarray
    item_id: np.ndarray
    position: np.ndarray
    propensity: np.ndarray
    reward: np.ndarray  # 1 where the event followed
    features: pa.Table

    def __len__(self) -> int:
        return len(self.request)


def read_explored(home: Home, artifact: Artifact, *, event: str, since: datetime | None = None) -> ExploredLog:
    """The explored requests of the log, with the columns that `artifact` reads.

    Raises DataError if no request was explored, or the log lacks a feature of the model.
    """
    after = "" if since is None else f"AND timestamp >= make_timestamptz({micros(since)})"
    with event_views(home.events, "impressions", "feedback") as db:
        rows = db.execute(f"""
            WITH hits AS (SELECT DISTINCT request_id, item_id FROM feedback WHERE type = {quote(event)}),
            explored AS (
                SELECT request_id FROM impressions
                WHERE team IS NULL AND features IS NOT NULL AND request_id IS NOT NULL {after}
                GROUP BY 1 HAVING bool_and(propensity IS NOT NULL) AND min(propensity) < 1 - 1e-9)
            SELECT dense_rank() OVER (ORDER BY request_id) - 1 AS request, user_id, i.item_id, position, propensity,
                   (h.item_id IS NOT NULL)::DOUBLE AS reward, features
            FROM impressions i SEMI JOIN explored USING (request_id)
            LEFT JOIN hits h ON i.request_id = h.request_id AND i.item_id = h.item_id
            ORDER BY i.request_id, position""").to_arrow_table()
    if not rows.num_rows:
        raise DataError(
            "no logged request was explored: lists shown as they were ranked say nothing of other orders; "
            "set rank.exploration above 0 in an arm and let it serve"
        )
    return ExploredLog(
        request=rows["request"].to_numpy(),
        user_id=rows["user_id"].to_numpy(),
        item_id=rows["item_id"].to_numpy(),
        position=rows["position"].to_numpy(),
        propensity=rows["propensity"].to_numpy(),
        reward=rows["reward"].to_numpy(),
        features=_features(rows, artifact),
    )


def _features(rows: pa.Table, artifact: Artifact) -> pa.Table:
    logged = [json.loads(text) for text in rows["features"].to_pylist()]
    names = {name for record in logged for name in record}
    keys = {"user_id": rows["user_id"], "item_id": rows["item_id"]}
    lacking = [column.name for column in artifact.encoders.inputs if column.name not in names | keys.keys()]
    if lacking:
        raise DataError(
            f"the log does not hold {', '.join(lacking)}, which this model reads; "
            "serve an explored arm with a model of the same feature service first"
        )
    columns = {
        column.name: typed([record.get(column.name) for record in logged], column.dtype)
        for column in artifact.encoders.inputs
        if column.name not in keys
    }
    return pa.table(keys | columns)


def target_chances(scores: np.ndarray, request: np.ndarray, item_id: np.ndarray, temperature: float) -> np.ndarray:
    """The new ranker's chance of each shown item at its position, given those above it; all of shape (n,).

    It draws as `rank.exploration` does at this temperature; at 0 it shows the best first, equal scores by item id.
    """
    chances = np.empty(len(scores))
    for rows in np.split(np.arange(len(scores)), np.flatnonzero(np.diff(request)) + 1):
        mine = scores[rows].astype(np.float64)
        if temperature > 0:
            chances[rows] = plackett_luce(mine / temperature)
            continue
        rank = np.empty(len(rows), np.int64)
        rank[np.lexsort((item_id[rows], -mine))] = np.arange(len(rows))
        # Among the items left, the shown one is the best: its rank is the least from here on.
        chances[rows] = rank == np.minimum.accumulate(rank[::-1])[::-1]
    return chances


def value_ranker(log: ExploredLog, scores: np.ndarray, *, top: int = 1, temperature: float = 0.0) -> Estimates:
    """The mean reward of the first `top` positions under the new ranker's `scores` (n,) of the shown items.

    top 1 also has a doubly robust estimate, with the new model's own scores as the reward model: it was fitted on
    other rows. Rows of a user are one cluster.
    """
    target = target_chances(scores, log.request, log.item_id, temperature)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(log.request)) + 1])
    so_far = [np.ones(len(log)), np.ones(len(log))]
    for begin, end in zip(starts, [*starts[1:], len(log)], strict=True):
        for product, chances in zip(so_far, (target, log.propensity), strict=True):
            product[begin:end] = np.cumprod(chances[begin:end])
    keep = np.concatenate([np.arange(b, min(b + top, e)) for b, e in zip(starts, [*starts[1:], len(log)], strict=True)])
    predicted = expected = None
    if top == 1:
        predicted = scores[starts].astype(np.float64)
        expected = np.empty(len(starts))
        for i, (begin, end) in enumerate(zip(starts, [*starts[1:], len(log)], strict=True)):
            mine = scores[begin:end].astype(np.float64)
            if temperature > 0:
                weights = np.exp((mine - mine.max()) / temperature)
                expected[i] = (weights / weights.sum()) @ mine
            else:
                expected[i] = mine.max()
    return estimate(
        log.reward[keep], so_far[0][keep], so_far[1][keep], clusters=log.user_id[keep],
        predicted=predicted, expected=expected,
    )  # fmt: skip


def estimate(
    rewards: np.ndarray,
    target: np.ndarray,
    logged: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    expected: np.ndarray | None = None,
) -> Estimates:
    """IPS, self-normalised and, with a reward model, doubly robust estimates; and what clipping does to them."""
    weights = importance_weights(target, logged)
    values = [policy_value(rewards, weights, method=method, clusters=clusters) for method in ("ips", "snips")]
    if predicted is not None and expected is not None:
        values.append(
            policy_value(
                rewards, weights, method="dr", predicted=predicted, expected=expected, clusters=clusters
            )
        )  # fmt: skip
    notes = []
    if not weights.supported:
        notes.append(
            f"the log cannot speak for this policy: weights average {weights.mean:.3g} (1 is right) over "
            f"{weights.effective_sample_size:,.0f} effective rows (30 is the least)"
        )
    return Estimates(
        logged=float(np.mean(rewards)),
        n_rows=len(rewards),
        n_units=len(rewards) if clusters is None else len(np.unique(clusters)),
        values=tuple(values),
        clipping=tuple(clipping_table(rewards, target, logged, clusters=clusters)),
        largest_weight=weights.largest,
        mean_weight=weights.mean,
        notes=tuple(notes),
    )


COLUMNS = ("reward", "propensity", "target", "predicted", "expected", "cluster")


def read_table(path: Path, names: dict[str, str]) -> dict[str, np.ndarray]:
    """The columns of a CSV or parquet file by their role (see COLUMNS). Raises DataError for one that is not there."""
    if not path.is_file():
        raise DataError(f"no file {path}")
    with duckdb.connect() as db:
        try:
            table = db.execute(f"SELECT * FROM {quote(str(path))}").to_arrow_table()
        except duckdb.Error as error:
            raise DataError(f"{path} is neither CSV nor parquet that can be read: {error}") from error
    found = {}
    for role, name in names.items():
        if name not in table.column_names:
            if role in ("reward", "propensity", "target") or name != role:
                raise DataError(f"{path} has no column {name!r} for the {role}; it has {', '.join(table.column_names)}")
            continue
        column = table[name]
        if role != "cluster" and not (
            pa.types.is_integer(column.type)
            or pa.types.is_floating(column.type)
            or pa.types.is_boolean(column.type)
            or pa.types.is_decimal(column.type)
        ):
            raise DataError(f"{path}: column {name!r} is {column.type}; the {role} must be a number")  # fmt: skip
        if column.null_count:
            raise DataError(f"{path}: {column.null_count} rows have no {name!r}; leave them out")
        values = column.to_pandas().to_numpy()
        found[role] = values if role == "cluster" else values.astype(np.float64)
    return found
