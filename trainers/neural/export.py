"""A two-sided torch model as one ONNX graph: the request's part runs on its own rows (1 or N), is expanded, then meets
the candidates' part.

The parts are exported apart, each with one free batch dimension, and joined here: a single export would either fix the
request's rows at 1 or tie them to N. Initializers that both parts hold (the embedding table) are kept once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from plait.encoders import EncoderSet
from trainers.graphs import GraphBuilder, candidate_count, expand_rows, finish, graph_inputs
from trainers.neural.deepfm import DeepFM, SideSums


class _RequestPart(nn.Module):
    def __init__(self, model: DeepFM, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *arrays: Tensor) -> SideSums:
        return self.model.side("request", dict(zip(self.inputs, arrays, strict=True)))


class _CandidatePart(nn.Module):
    def __init__(self, model: DeepFM, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        arrays, request = tensors[: len(self.inputs)], tensors[len(self.inputs) :]
        sums = self.model.side("candidate", dict(zip(self.inputs, arrays, strict=True)))
        return self.model.combine([request, sums] if request else [sums])  # type: ignore[list-item]


def export_deepfm(model: DeepFM, encoders: EncoderSet, sample: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The whole graph, ending in `score`. sample: encoded arrays of a few rows, to trace with.

    Raises SpecError if the model reads nothing of the candidates.
    """
    model = model.eval()
    builder = GraphBuilder()
    count = candidate_count(builder, encoders)
    # tracing takes a size of 1 for a constant, so every dimension of the samples is made at least 2
    tensors = {name: torch.from_numpy(_at_least_two(name, array)) for name, array in sample.items()}
    request_inputs = tuple(name for name in encoders.input_names() if name.startswith("request_"))
    candidate_inputs = tuple(name for name in encoders.input_names() if name.startswith("candidate_"))
    crossing: list[str] = []
    request_sums: tuple[Tensor, ...] = ()
    if request_inputs:
        part = _RequestPart(model, request_inputs)
        given = tuple(tensors[name] for name in request_inputs)
        with torch.no_grad():
            request_sums = part(*given)
        outputs = _append(builder, "request", _export(part, request_inputs, given), request_inputs)
        crossing = [expand_rows(builder, name, count, 2) for name in outputs]
    given = (*(tensors[name] for name in candidate_inputs), *request_sums)
    proto = _export(_CandidatePart(model, candidate_inputs), (*candidate_inputs, *_sum_names(request_sums)), given)
    (logits,) = _append(builder, "candidate", proto, (*candidate_inputs, *crossing))
    return finish(builder, graph_inputs(encoders), logits, name="deepfm")


def _export(part: nn.Module, names: tuple[str, ...], given: tuple[Tensor, ...]) -> onnx.ModelProto:
    rows = torch.export.Dim("rows", min=1)
    shapes: list[dict[int, Any]] = []
    for name, tensor in zip(names, given, strict=True):
        ragged = "_bag_" in name and tensor.dim() == 2
        shapes.append({0: rows, 1: torch.export.Dim(f"length_{len(shapes)}", min=1)} if ragged else {0: rows})
    with _quiet():
        program = torch.onnx.export(
            part,
            given,
            dynamo=True,
            input_names=list(names),
            dynamic_shapes=(tuple(shapes),),
            opset_version=18,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _append(builder: GraphBuilder, prefix: str, part: onnx.ModelProto, arguments: Iterable[str]) -> list[str]:
    """Copy a part's nodes into the graph, fed by the values `arguments`; returns the names of its outputs there."""
    shared = {tensor.name: tensor for tensor in builder.initializers}
    names = {value.name: argument for value, argument in zip(part.graph.input, arguments, strict=True)}
    for tensor in part.graph.initializer:
        twin = shared.get(tensor.name)
        if twin is not None and twin.raw_data == tensor.raw_data and twin.dims == tensor.dims:
            names[tensor.name] = tensor.name
            continue
        names[tensor.name] = tensor.name if twin is None else f"{prefix}.{tensor.name}"
        copied = onnx.TensorProto()
        copied.CopyFrom(tensor)
        copied.name = names[tensor.name]
        builder.initializers.append(copied)
    for node in part.graph.node:
        assert not any(attribute.HasField("g") for attribute in node.attribute), "no control flow is exported"
        for output in node.output:
            names.setdefault(output, f"{prefix}.{output}" if output else "")
        copied_node = helper.make_node(
            node.op_type,
            [names.get(name, name) for name in node.input],
            [names[name] for name in node.output],
            domain=node.domain,
        )
        copied_node.attribute.extend(node.attribute)
        builder.nodes.append(copied_node)
    return [names[value.name] for value in part.graph.output]


def _at_least_two(name: str, array: np.ndarray) -> np.ndarray:
    """`array` with its free dimensions (rows, and the length of a list) repeated if they are 1."""
    rows, columns = (2 if size == 1 else 1 for size in array.shape)
    return np.ascontiguousarray(np.tile(array, (rows, columns if "_bag_" in name else 1)))


def _sum_names(sums: tuple[Tensor, ...]) -> tuple[str, ...]:
    return tuple(f"request_sum_{i}" for i in range(len(sums)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals; its errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
