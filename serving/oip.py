"""Open Inference Protocol v2 over the same loaded models: bare graphs, tensors in, tensors out.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md. Errors carry its {"error": "…"}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flask import Flask, Response, g

from plait import __version__
from plait.errors import PlaitError, RegistryError, RequestError
from serving.jsonio import json_response, read_json
from serving.parts import Registry, ServingModel
from serving.pool import ModelPool

PLATFORM = "onnx_onnxv1"
NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip
DATATYPES = {np.dtype(dtype): name for name, dtype in NUMPY.items()}


def install_oip(app: Flask, pool: ModelPool, registry: Registry) -> None:
    """The protocol's routes."""

    @app.get("/v2")
    def server_metadata() -> Response:
        return json_response({"name": "plait", "version": __version__, "extensions": []})

    @app.get("/v2/health/live")
    def live() -> Response:
        return json_response({"live": True})

    @app.get("/v2/health/ready")
    def ready() -> Response:
        is_ready, _ = app.extensions["plait_readiness"].check()
        return json_response({"live": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models/<name>")
    @app.get("/v2/models/<name>/versions/<version>")
    def metadata(name: str, version: str | None = None) -> Response:
        model = _model(pool, name, version)
        return json_response(
            {
                "name": model.name,
                "versions": [v.version for v in registry.versions(name)],
                "platform": PLATFORM,
                "inputs": [_tensor_metadata(t) for t in model.scorer.inputs],
                "outputs": [_tensor_metadata(t) for t in model.scorer.outputs],
            }
        )

    @app.get("/v2/models/<name>/ready")
    @app.get("/v2/models/<name>/versions/<version>/ready")
    def model_ready(name: str, version: str | None = None) -> Response:
        model = _model(pool, name, version)
        try:
            model.warm_up()
        except Exception as error:
            raise RequestError(503, "Model not ready", f"{model.ref} does not score: {error!r}") from error
        return json_response({"name": model.name, "ready": True})

    @app.post("/v2/models/<name>/infer")
    @app.post("/v2/models/<name>/versions/<version>/infer")
    def infer(name: str, version: str | None = None) -> Response:
        model = _model(pool, name, version)
        g.model = (model.name, model.version)
        return json_response(answer_inference(model, read_json()))


def answer_inference(model: ServingModel, body: Any) -> dict[str, Any]:
    """The response body to an inference request. RequestError 400 for anything the model cannot take."""
    if not isinstance(body, dict):
        raise _wrong("the body must be a JSON object with inputs")
    identity = body.get("id")
    if identity is not None and not isinstance(identity, str):
        raise _wrong(f"id must be a string, not {identity!r}")
    inputs = _inputs(body.get("inputs"), model.scorer.inputs)
    wanted = _wanted_outputs(body.get("outputs"), [t.name for t in model.scorer.outputs])
    try:
        outputs = model.scorer.infer(inputs)
    except Exception as error:  # onnxruntime raises many kinds for shapes that do not fit each other
        raise _wrong(f"{model.ref} could not run on these tensors: {error}") from error
    answer: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if identity is not None:
        answer["id"] = identity
    answer["outputs"] = [encode_tensor(name, np.asarray(outputs[name])) for name in wanted]
    return answer


def decode_tensor(tensor: Any) -> np.ndarray:
    """An input tensor {"name","shape","datatype","data"} as an array; data may be nested or flat. RequestError 400."""
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise _wrong("each input must be an object with name, shape, datatype and data")
    name, shape, datatype = tensor["name"], tensor.get("shape"), tensor.get("datatype")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _wrong(f"input {name}: shape must be a list of sizes such as [2, 3], not {shape!r}")
    if datatype not in NUMPY:
        raise _wrong(f"input {name}: datatype {datatype!r} is none of {', '.join(NUMPY)}")
    if not isinstance(tensor.get("data"), list):
        raise _wrong(f"input {name}: data must be a list, nested or flat in row-major order")
    flat = _flatten(tensor["data"])
    if len(flat) != math.prod(shape):
        raise _wrong(f"input {name}: shape {shape} holds {math.prod(shape)} values, but data has {len(flat)}")
    _check_values(name, datatype, flat)
    try:
        return np.array(flat, NUMPY[datatype]).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise _wrong(f"input {name}: data does not fit {datatype}: {error}") from error


def encode_tensor(name: str, values: np.ndarray) -> dict[str, Any]:
    """An output tensor, data flat in row-major order."""
    if values.dtype.kind in "OSU":
        return {
            "name": name,
            "shape": list(values.shape),
            "datatype": "BYTES",
            "data": [str(v) for v in values.ravel()],
        }
    # orjson has no 16-bit float
    flat = values.astype(np.float32).ravel() if values.dtype == np.float16 else np.ascontiguousarray(values).ravel()
    return {"name": name, "shape": list(values.shape), "datatype": DATATYPES[values.dtype], "data": flat}


def _model(pool: ModelPool, name: str, version: str | None) -> ServingModel:
    ref = name if version is None else f"{name}:{version}"
    try:
        return pool.get(ref)
    except RegistryError as error:
        raise RequestError(404, "Unknown model", str(error)) from error
    except PlaitError as error:
        raise RequestError(503, "Model not available", str(error)) from error


def _inputs(given: Any, expected: Sequence[Any]) -> dict[str, np.ndarray]:
    if not isinstance(given, list) or not given:
        raise _wrong("inputs must be a list with one tensor per model input")
    arrays: dict[str, np.ndarray] = {}
    kinds = {t.name: t for t in expected}
    for tensor in given:
        array = decode_tensor(tensor)
        name = tensor["name"]
        if name not in kinds:
            raise _wrong(f"the model has no input {name!r}; its inputs: {', '.join(kinds)}")
        if name in arrays:
            raise _wrong(f"input {name} came twice")
        _check_against(kinds[name], array, tensor["datatype"])
        arrays[name] = array
    if missing := [name for name in kinds if name not in arrays]:
        raise _wrong(f"inputs are missing: {', '.join(missing)}")
    return arrays


def _check_against(kind: Any, array: np.ndarray, datatype: str) -> None:
    if datatype != kind.datatype:
        raise _wrong(f"input {kind.name} has datatype {kind.datatype}, but {datatype} came")
    fits = len(array.shape) == len(kind.shape) and all(
        want in (-1, have) for want, have in zip(kind.shape, array.shape, strict=True)
    )
    if not fits:
        raise _wrong(f"input {kind.name} has shape {list(kind.shape)} (-1 is free), but {list(array.shape)} came")


def _check_values(name: str, datatype: str, flat: Sequence[Any]) -> None:
    """numpy would turn true into 1, 1.5 into 1 and 7 into "7"; the caller should hear of it instead."""
    if datatype == "BOOL":
        ok = all(type(v) is bool for v in flat)
    elif datatype == "BYTES":
        ok = all(type(v) is str for v in flat)
    elif datatype.startswith("FP"):
        ok = all(type(v) in (int, float) for v in flat)
    else:
        ok = all(type(v) is int for v in flat)
    if not ok:
        raise _wrong(f"input {name}: data holds values that are not {datatype}")


def _wanted_outputs(given: Any, names: Sequence[str]) -> Sequence[str]:
    if given is None:
        return names
    if not isinstance(given, list) or not all(isinstance(o, Mapping) and o.get("name") in names for o in given):
        raise _wrong(f'outputs must be a list of {{"name": …}} from: {", ".join(names)}')
    return [output["name"] for output in given] or names


def _tensor_metadata(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _flatten(data: list[Any]) -> list[Any]:
    while data and any(isinstance(value, list) for value in data):
        if not all(isinstance(value, list) for value in data):
            raise _wrong("data nests unevenly: lists and values stand side by side")
        data = [value for row in data for value in row]
    return data


def _wrong(detail: str) -> RequestError:
    return RequestError(400, "Invalid inference request", detail)
