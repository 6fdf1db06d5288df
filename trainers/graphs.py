"""ONNX graphs of artifacts: the inputs every model has, the expansion of the request side, and tree ensembles.

Shapes: B request rows (1 or N), N candidates, F id columns, w value columns, L longest list of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from plait.artifacts import OUTPUT
from plait.encoders import EncoderSet
from plait.encoders.specs import Side
from plait.errors import SpecError

OPSET = 18
OPSET_ML = 3
IR_VERSION = 10


class GraphBuilder:
    """Collects nodes and initializers; `add` returns the name of what the node computes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._n = 0

    def fresh(self, stem: str) -> str:
        self._n += 1
        return f"{stem}_{self._n}"

    def constant(self, array: np.ndarray, stem: str = "const") -> str:
        name = self.fresh(stem)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, op: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        name = output or self.fresh(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [name], domain=domain, **attributes))
        return name


def graph_inputs(encoders: EncoderSet) -> list[onnx.ValueInfoProto]:
    """One graph input per encoded array; request rows are B, candidates N, list lengths are named by their list."""
    inputs = []
    for name in encoders.input_names():
        side: Side = "request" if name.startswith("request_") else "candidate"
        rows = "B" if side == "request" else "N"
        if name == f"{side}_ids":
            inputs.append(_input(name, TensorProto.INT64, [rows, len(encoders.side_fields(side, "id"))]))
        elif name == f"{side}_values":
            inputs.append(_input(name, TensorProto.FLOAT, [rows, encoders.value_width(side)]))
        else:
            inputs.append(_input(name, TensorProto.INT64, [rows, f"L_{name}"]))
    return inputs


def candidate_count(builder: GraphBuilder, encoders: EncoderSet) -> str:
    """The name of a 1-element tensor holding N. Raises SpecError if the model reads nothing of the candidates."""
    names = [name for name in encoders.input_names() if name.startswith("candidate_")]
    if not names:
        raise SpecError("the model reads no candidate column; all candidates of a request would score the same")
    shape = builder.add("Shape", names[0])
    return builder.add("Slice", shape, builder.constant(np.array([0])), builder.constant(np.array([1])))


def expand_rows(builder: GraphBuilder, name: str, count: str, rank: int) -> str:
    """`name` with its first dimension, 1 or N, made N."""
    target = builder.add("Concat", count, builder.constant(np.ones(rank - 1, np.int64)), axis=0) if rank > 1 else count
    return builder.add("Expand", name, target)


def finish(builder: GraphBuilder, inputs: Sequence[onnx.ValueInfoProto], logits: str, *, name: str) -> onnx.ModelProto:
    """The model that ends in `score` (N,) = sigmoid of `logits`, (N,) or (N, 1)."""
    flat = builder.add("Reshape", logits, builder.constant(np.array([-1])))
    builder.add("Sigmoid", flat, output=OUTPUT)
    graph = helper.make_graph(
        builder.nodes, name, list(inputs), [_input(OUTPUT, TensorProto.FLOAT, ["N"])], builder.initializers
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", OPSET_ML)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="plait")
    onnx.checker.check_model(model)
    return model


@dataclass(slots=True)
class TreeNodes:
    """Nodes of all trees of an ensemble, column by column, as ONNX's TreeEnsembleRegressor wants them.

    A branch goes to `true_id` if x `mode` threshold, or if x is NaN and `missing_true`. Leaves add `weight`.
    """

    tree: list[int] = field(default_factory=list)
    node: list[int] = field(default_factory=list)
    feature: list[int] = field(default_factory=list)
    mode: list[str] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    true_id: list[int] = field(default_factory=list)
    false_id: list[int] = field(default_factory=list)
    missing_true: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def branch(
        self,
        tree: int,
        node: int,
        *,
        feature: int,
        mode: str,
        threshold: float,
        true_id: int,
        false_id: int,
        missing_true: bool,
    ) -> None:
        self._append(tree, node, feature, mode, threshold, true_id, false_id, int(missing_true), 0.0)

    def leaf(self, tree: int, node: int, weight: float) -> None:
        self._append(tree, node, 0, "LEAF", 0.0, 0, 0, 0, weight)

    def _append(self, *row: object) -> None:
        for column, value in zip(self.__slots__, row, strict=True):
            getattr(self, column).append(value)

    def thresholds(self) -> dict[int, np.ndarray]:
        """The distinct thresholds of each feature that is split on."""
        found: dict[int, set[float]] = {}
        for feature, mode, threshold in zip(self.feature, self.mode, self.threshold, strict=True):
            if mode != "LEAF":
                found.setdefault(feature, set()).add(threshold)
        return {feature: np.array(sorted(values), np.float32) for feature, values in found.items()}


def tree_model(encoders: EncoderSet, nodes: TreeNodes, *, base: float, name: str) -> onnx.ModelProto:
    """Expand and concatenate both sides (order of `tree_matrix`), then the trees' sum + `base`, then the sigmoid."""
    builder = GraphBuilder()
    count = candidate_count(builder, encoders)
    columns = []
    for array in tree_columns(encoders):
        is_ids = array.endswith("_ids")
        floats = builder.add("Cast", array, to=TensorProto.FLOAT) if is_ids else array
        columns.append(expand_rows(builder, floats, count, 2) if array.startswith("request_") else floats)
    matrix = builder.add("Concat", *columns, axis=1) if len(columns) > 1 else columns[0]
    leaves = [i for i, mode in enumerate(nodes.mode) if mode == "LEAF"]
    logits = builder.add(
        "TreeEnsembleRegressor",
        matrix,
        domain="ai.onnx.ml",
        aggregate_function="SUM",
        post_transform="NONE",
        n_targets=1,
        base_values=[float(base)],
        nodes_treeids=nodes.tree,
        nodes_nodeids=nodes.node,
        nodes_featureids=nodes.feature,
        nodes_modes=nodes.mode,
        nodes_values=nodes.threshold,
        nodes_truenodeids=nodes.true_id,
        nodes_falsenodeids=nodes.false_id,
        nodes_missing_value_tracks_true=nodes.missing_true,
        target_treeids=[nodes.tree[i] for i in leaves],
        target_nodeids=[nodes.node[i] for i in leaves],
        target_ids=[0] * len(leaves),
        target_weights=[nodes.weight[i] for i in leaves],
    )
    return finish(builder, graph_inputs(encoders), logits, name=name)


def tree_columns(encoders: EncoderSet) -> list[str]:
    """The encoded arrays that make a tree's matrix, in column order. Raises SpecError if a list is not multi-hot."""
    names = [name for name in encoders.input_names() if name.endswith(("_ids", "_values")) and "_bag_" not in name]
    if bags := [f.name for f in encoders.fields if f.kind == "bag"]:
        raise SpecError(f"column {bags[0]!r} is pooled, which trees cannot read; encode it as multi_hot or drop it")
    return names


def tree_matrix(encoders: EncoderSet, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(n, w) float32: the encoded arrays of n rows side by side, as the graph lays them out."""
    return np.concatenate([arrays[name].astype(np.float32) for name in tree_columns(encoders)], axis=1)


def tree_column_names(encoders: EncoderSet) -> list[str]:
    """A readable name per column of `tree_matrix`."""
    values = iter(encoders.value_names())
    names: list[str] = []
    for array in tree_columns(encoders):
        side: Side = "request" if array.startswith("request_") else "candidate"
        if array.endswith("_ids"):
            names += [f.name for f in encoders.side_fields(side, "id")]
        else:
            names += [next(values) for _ in range(encoders.value_width(side))]
    return names


def _input(name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))
