"""Logistic regression (scikit-learn) on sparse one-hot ids and dense values, as an ONNX graph of look-ups.

Shapes: n rows, T rows of all id tables in one, w value columns of a side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from onnx import ModelProto
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from plait.encoders import SIDES, EncoderSet
from plait.encoders.specs import Side
from trainers.config import LogisticTraining
from trainers.data import Encoded
from trainers.fitted import Fitted
from trainers.graphs import GraphBuilder, candidate_count, expand_rows, finish, graph_inputs
from trainers.metrics import log_loss


def fit_logistic(
    spec: LogisticTraining, encoders: EncoderSet, train: Encoded, valid: Encoded, *, progress: bool = True
) -> Fitted:
    """Walk the regularisation path, each step warm, until validation log loss rises; the best step is kept."""
    offsets = table_offsets(encoders)
    x_train, x_valid = (design_matrix(encoders, offsets, part.arrays) for part in (train, valid))
    model = LogisticRegression(
        C=spec.c[0], max_iter=spec.max_iterations, tol=spec.tolerance, warm_start=True, random_state=spec.seed
    )
    history: list[dict[str, Any]] = []
    best_loss, best_weights, best_bias, worse = np.inf, np.empty(0), 0.0, 0
    with tqdm(spec.c, desc="logistic path", disable=None if progress else True, leave=False) as path:
        for c in path:
            _fit_step(model, c, x_train, train)
            loss = log_loss(valid.labels, model.predict_proba(x_valid)[:, 1])
            history.append({"strength": c, "valid_log_loss": loss, "iterations": int(model.n_iter_[0])})
            path.set_postfix(c=c, valid_log_loss=f"{loss:.4f}")
            if loss < best_loss:
                best_loss, worse = loss, 0
                best_weights, best_bias = model.coef_[0].copy(), float(model.intercept_[0])
            else:
                worse += 1
                if worse >= spec.patience:
                    break

    def predict(arrays: dict[str, np.ndarray]) -> npt.NDArray[np.float64]:
        logits = design_matrix(encoders, offsets, arrays) @ best_weights + best_bias
        return np.asarray(1 / (1 + np.exp(-logits)), np.float64)

    return Fitted(
        model=logistic_model(encoders, offsets, best_weights, best_bias), predict=predict, history=tuple(history)
    )


def _fit_step(model: LogisticRegression, c: float, x: sp.csr_matrix, train: Encoded) -> None:
    """One fit; stopping at `max_iterations` is a choice here (the path goes on from there), so its warning is not."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    model.set_params(C=c)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, train.labels, sample_weight=train.weights)


def table_offsets(encoders: EncoderSet) -> dict[str, int]:
    """Where each id table starts when all are stacked; shared tables are stacked once. "" holds the total."""
    offsets, total = {}, 0
    for name, size in encoders.table_sizes().items():
        offsets[name] = total
        total += size
    offsets[""] = total
    return offsets


def design_matrix(encoders: EncoderSet, offsets: dict[str, int], arrays: dict[str, np.ndarray]) -> sp.csr_matrix:
    """(n, T + w_request + w_candidate): 1 at each id, 1 / length (or 1) at each of a list's ids, then the values.

    Every array must have the same number of rows.
    """
    n = len(next(iter(arrays.values())))
    parts: list[sp.csr_matrix] = []
    indices, weights = [], []
    for side in SIDES:
        for field in encoders.side_fields(side, "id"):
            indices.append(arrays[f"{side}_ids"][:, field.position, None] + offsets[field.table])
            weights.append(np.ones((n, 1)))
        for field in encoders.side_fields(side, "bag"):
            ids = arrays[f"{side}_bag_{field.name}"]
            present = (ids > 0).astype(np.float64)
            length = np.maximum(present.sum(axis=1, keepdims=True), 1) if field.pool == "mean" else 1.0
            indices.append(ids + offsets[field.table])
            weights.append(present / length)
    if indices:
        columns = np.concatenate(indices, axis=1)
        data = np.concatenate(weights, axis=1)
        starts = np.arange(n + 1) * columns.shape[1]
        onehot = sp.csr_matrix((data.ravel(), columns.ravel(), starts), shape=(n, offsets[""]))
        onehot.sum_duplicates()
        onehot.eliminate_zeros()
        parts.append(onehot)
    parts += [sp.csr_matrix(arrays[f"{s}_values"].astype(np.float64)) for s in SIDES if f"{s}_values" in arrays]
    return sp.hstack(parts, format="csr")


def logistic_model(
    encoders: EncoderSet, offsets: dict[str, int], weights: npt.NDArray[np.float64], bias: float
) -> ModelProto:
    """The graph of `design_matrix @ weights + bias`; each side is summed by itself, then the request's is expanded."""
    builder = GraphBuilder()
    count = candidate_count(builder, encoders)
    total = offsets[""]
    table = builder.constant(weights[:total].astype(np.float32)[:, None], "table")
    logits = builder.constant(np.array([[bias]], np.float32), "bias")
    start = total
    for side in SIDES:
        width = encoders.value_width(side)
        terms = _side_terms(builder, encoders, offsets, table, side, weights[start : start + width])
        start += width
        for term in terms:
            term = expand_rows(builder, term, count, 2) if side == "request" else term
            logits = builder.add("Add", logits, term)
    return finish(builder, graph_inputs(encoders), logits, name="logistic")


def _side_terms(
    builder: GraphBuilder,
    encoders: EncoderSet,
    offsets: dict[str, int],
    table: str,
    side: Side,
    value_weights: npt.NDArray[np.float64],
) -> list[str]:
    """Names of (rows, 1) terms whose sum is this side's part of the logit."""
    terms = []
    if ids := encoders.side_fields(side, "id"):
        shift = builder.constant(np.array([[offsets[f.table] for f in ids]], np.int64), "offsets")
        gathered = builder.add("Gather", table, builder.add("Add", f"{side}_ids", shift), axis=0)
        terms.append(builder.add("ReduceSum", gathered, builder.constant(np.array([1])), keepdims=0))
    for field in encoders.side_fields(side, "bag"):
        terms.append(_bag_term(builder, table, f"{side}_bag_{field.name}", offsets[field.table], field.pool))
    if len(value_weights):
        column = builder.constant(value_weights.astype(np.float32)[:, None], "weights")
        terms.append(builder.add("MatMul", f"{side}_values", column))
    return terms


def _bag_term(builder: GraphBuilder, table: str, ids: str, offset: int, pool: str) -> str:
    one = builder.constant(np.array([1]))
    present = builder.add("Cast", builder.add("Cast", ids, to=9), to=1)  # int64 → bool → float: 1 where id > 0
    gathered = builder.add("Gather", table, builder.add("Add", ids, builder.constant(np.array(offset))), axis=0)
    flat = builder.add("Squeeze", gathered, builder.constant(np.array([2])))
    total = builder.add("ReduceSum", builder.add("Mul", flat, present), one, keepdims=1)
    if pool == "sum":
        return total
    length = builder.add("ReduceSum", present, one, keepdims=1)
    return builder.add("Div", total, builder.add("Max", length, builder.constant(np.array(1.0, np.float32))))
