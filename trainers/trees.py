"""Gradient-boosted trees: LightGBM and XGBoost, each written as one ONNX tree ensemble by walking its own model dump.

LightGBM keeps thresholds as doubles; the graph compares float32. Rounding every threshold DOWN to float32 keeps
x <= t true for exactly the same float32 x, where rounding to nearest would move rows that stand on a threshold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import xgboost as xgb
from tqdm import tqdm

from plait.encoders import EncoderSet
from plait.encoders.specs import Side
from trainers.config import LightGBMTraining, XGBoostTraining
from trainers.data import Encoded
from trainers.fitted import Fitted
from trainers.graphs import TreeNodes, tree_columns, tree_matrix, tree_model


def fit_lightgbm(
    spec: LightGBMTraining, encoders: EncoderSet, train: Encoded, valid: Encoded, *, progress: bool = True
) -> Fitted:
    """Train until validation log loss stops falling; the best round's trees are kept."""
    parameters = {
        "objective": "binary",
        "metric": "binary_logloss",
        "learning_rate": spec.learning_rate,
        "num_leaves": spec.leaves,
        "max_depth": spec.max_depth,
        "min_data_in_leaf": spec.min_leaf,
        "bagging_fraction": spec.row_fraction,
        "bagging_freq": 1,
        "feature_fraction": spec.column_fraction,
        "lambda_l1": spec.l1,
        "lambda_l2": spec.l2,
        "seed": spec.seed,
        "num_threads": spec.threads,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    data = lgb.Dataset(tree_matrix(encoders, train.arrays), train.labels, weight=train.weights, free_raw_data=True)
    held_out = data.create_valid(tree_matrix(encoders, valid.arrays), valid.labels, weight=valid.weights)
    history: list[dict[str, Any]] = []
    with tqdm(total=spec.rounds, desc="lightgbm rounds", disable=None if progress else True, leave=False) as bar:

        def record(env: Any) -> None:
            loss = env.evaluation_result_list[0][2]
            history.append({"round": env.iteration, "valid_log_loss": float(loss)})
            bar.update()
            bar.set_postfix(valid_log_loss=f"{loss:.4f}", refresh=False)

        booster = lgb.train(
            parameters,
            data,
            num_boost_round=spec.rounds,
            valid_sets=[held_out],
            callbacks=[record, lgb.early_stopping(spec.patience, verbose=False)],
        )
    best = booster.best_iteration or booster.current_iteration()

    def predict(arrays: dict[str, np.ndarray]) -> npt.NDArray[np.float64]:
        matrix = tree_matrix(encoders, arrays)
        return np.asarray(booster.predict(matrix, num_iteration=best, num_threads=spec.threads), np.float64)

    nodes = lightgbm_nodes(booster, best)
    model = tree_model(encoders, nodes, base=0.0, name="lightgbm")
    return Fitted(
        model=model, predict=predict, history=tuple(history), thresholds=_by_array(encoders, nodes.thresholds())
    )


def fit_xgboost(
    spec: XGBoostTraining, encoders: EncoderSet, train: Encoded, valid: Encoded, *, progress: bool = True
) -> Fitted:
    """Train until validation log loss stops falling; the best round's trees are kept."""
    parameters = {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "learning_rate": spec.learning_rate,
        "max_depth": spec.max_depth,
        "min_child_weight": spec.min_child_weight,
        "subsample": spec.row_fraction,
        "colsample_bytree": spec.column_fraction,
        "alpha": spec.l1,
        "lambda": spec.l2,
        "seed": spec.seed,
        "nthread": spec.threads,
        "verbosity": 0,
    }
    data = xgb.DMatrix(tree_matrix(encoders, train.arrays), train.labels, weight=train.weights, nthread=spec.threads)
    held_out = xgb.DMatrix(
        tree_matrix(encoders, valid.arrays), valid.labels, weight=valid.weights, nthread=spec.threads
    )
    with tqdm(total=spec.rounds, desc="xgboost rounds", disable=None if progress else True, leave=False) as bar:
        recorder = _Recorder(bar)
        booster = xgb.train(
            parameters,
            data,
            num_boost_round=spec.rounds,
            evals=[(held_out, "valid")],
            verbose_eval=False,
            callbacks=[xgb.callback.EarlyStopping(rounds=spec.patience, save_best=True), recorder],
        )

    def predict(arrays: dict[str, np.ndarray]) -> npt.NDArray[np.float64]:
        return np.asarray(booster.inplace_predict(tree_matrix(encoders, arrays)), np.float64)

    nodes, base = xgboost_nodes(booster)
    model = tree_model(encoders, nodes, base=base, name="xgboost")
    return Fitted(
        model=model,
        predict=predict,
        history=tuple(recorder.history),
        thresholds=_by_array(encoders, nodes.thresholds()),
    )


class _Recorder(xgb.callback.TrainingCallback):
    def __init__(self, bar: tqdm) -> None:
        super().__init__()
        self.bar, self.history = bar, []  # type: ignore[var-annotated]

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        loss = float(evals_log["valid"]["logloss"][-1])
        self.history.append({"round": epoch, "valid_log_loss": loss})
        self.bar.update()
        self.bar.set_postfix(valid_log_loss=f"{loss:.4f}", refresh=False)
        return False


def float32_below(value: float) -> float:
    """The largest float32 that is not above `value`.

    >>> float32_below(0.1) <= 0.1 < float32_below(0.1) + 1e-8
    True
    """
    nearest = np.float32(value)
    return float(np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > value else nearest)


def lightgbm_nodes(booster: lgb.Booster, rounds: int) -> TreeNodes:
    """The first `rounds` trees. A split is x <= threshold; what NaN does follows the split's own missing type."""
    nodes = TreeNodes()
    dump = booster.dump_model(num_iteration=rounds)
    for tree, info in enumerate(dump["tree_info"]):
        for index, node, left, right in _walk(info["tree_structure"]):
            if "leaf_value" in node:
                nodes.leaf(tree, index, float(node["leaf_value"]))
                continue
            assert node["decision_type"] == "<=", "no column is declared categorical"
            threshold = float(node["threshold"])
            # LightGBM reads NaN as 0 where the training data missed nothing, else sends it to the default side
            missing_true = node["default_left"] if node["missing_type"] == "NaN" else threshold >= 0.0
            nodes.branch(
                tree,
                index,
                feature=node["split_feature"],
                mode="BRANCH_LEQ",
                threshold=float32_below(threshold),
                true_id=left,
                false_id=right,
                missing_true=missing_true,
            )
    return nodes


def _walk(root: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any], int, int]]:
    """(index, node, index of its left child, of its right child) of every node, the root first."""
    numbered = 1
    waiting = [(0, root)]
    while waiting:
        index, node = waiting.pop()
        if "leaf_value" in node:
            yield index, node, -1, -1
            continue
        left, right, numbered = numbered, numbered + 1, numbered + 2
        waiting += [(right, node["right_child"]), (left, node["left_child"])]
        yield index, node, left, right


def xgboost_nodes(booster: xgb.Booster) -> tuple[TreeNodes, float]:
    """All trees, and the margin they start from. A split is x < threshold; NaN goes to the default side."""
    content = json.loads(booster.save_raw("json"))["learner"]
    nodes = TreeNodes()
    for tree, info in enumerate(content["gradient_booster"]["model"]["trees"]):
        columns = (info[key] for key in ("left_children", "right_children", "split_indices", "split_conditions"))
        for index, (left, right, feature, condition) in enumerate(zip(*columns, strict=True)):
            if left == -1:
                nodes.leaf(tree, index, float(condition))
                continue
            nodes.branch(
                tree,
                index,
                feature=feature,
                mode="BRANCH_LT",
                threshold=float(np.float32(condition)),
                true_id=left,
                false_id=right,
                missing_true=bool(info["default_left"][index]),
            )
    # "[5E-1]" since xgboost 3, "5E-1" before
    probability = float(content["learner_model_param"]["base_score"].strip("[]"))
    return nodes, math.log(probability / (1 - probability))


def _by_array(encoders: EncoderSet, thresholds: dict[int, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """Thresholds by column of the tree matrix → by encoded array and column of it."""
    found: dict[str, dict[int, np.ndarray]] = {}
    start = 0
    for array in tree_columns(encoders):
        side: Side = "request" if array.startswith("request_") else "candidate"
        width = len(encoders.side_fields(side, "id")) if array.endswith("_ids") else encoders.value_width(side)
        found[array] = {c - start: t for c, t in thresholds.items() if start <= c < start + width}
        start += width
    return found
