"""Open Inference Protocol v2: paths, bodies and errors as its specification has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait import __version__
from serving.oip import NUMPY, decode_tensor, encode_tensor

X = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2], [3.5, 4]]}


def infer(world: Any, **changes: Any) -> Any:
    body = {k: v for k, v in {"inputs": [X], **changes}.items() if v is not ...}
    return world.client.post("/v2/models/deepfm/infer", json=body)


def test_server_metadata_and_health(world: Any) -> None:
    assert world.client.get("/v2").get_json() == {"name": "plait", "version": __version__, "extensions": []}
    assert world.client.get("/v2/").status_code == 200
    assert world.client.get("/v2/health/live").status_code == 200
    assert world.client.get("/v2/health/ready").status_code == 200


def test_model_metadata_lists_versions_platform_and_tensors(world: Any) -> None:
    expected = {
        "name": "deepfm",
        "versions": ["1", "2"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "score", "datatype": "FP32", "shape": [-1]}],
    }
    assert world.client.get("/v2/models/deepfm").get_json() == expected
    assert world.client.get("/v2/models/deepfm/versions/2").get_json() == expected


def test_readiness_of_a_model_runs_it(world: Any) -> None:
    ready = world.client.get("/v2/models/deepfm/versions/1/ready")
    assert ready.status_code == 200 and ready.get_json() == {"name": "deepfm", "ready": True}
    world.scorers["deepfm:1"].error = RuntimeError("broken graph")
    broken = world.client.get("/v2/models/deepfm/ready")
    assert broken.status_code == 503 and "broken graph" in broken.get_json()["error"]
    assert world.client.get("/v2/health/ready").status_code == 503


def test_inference_answers_with_id_version_and_row_major_data(world: Any) -> None:
    response = infer(world, id="q7", parameters={"a": 1}, outputs=[{"name": "score"}])
    assert response.status_code == 200
    assert response.get_json() == {
        "model_name": "deepfm",
        "model_version": "1",
        "id": "q7",
        "outputs": [{"name": "score", "shape": [2], "datatype": "FP32", "data": [6.0, 15.0]}],
    }


def test_flat_and_nested_data_are_the_same_tensor(world: Any) -> None:
    flat = infer(world, inputs=[{**X, "data": [1, 2, 3.5, 4]}]).get_json()
    assert flat == infer(world).get_json()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (..., "inputs must be a list"),
        ([], "inputs must be a list"),
        ([3], "must be an object"),
        ([{**X, "name": "y"}], "no input 'y'"),
        ([X, X], "came twice"),
        ([{**X, "shape": [4]}], "has shape [-1, 2]"),
        ([{**X, "shape": [2, 3]}], "holds 6 values, but data has 4"),
        ([{**X, "shape": [-2, 2]}], "list of sizes"),
        ([{**X, "shape": "2"}], "list of sizes"),
        ([{**X, "datatype": "FLOAT"}], "is none of"),
        ([{**X, "datatype": "INT64", "data": [1, 2, 3, 4]}], "has datatype FP32, but INT64 came"),
        ([{**X, "data": [[1, 2], 3, 4]}], "unevenly"),
        ([{**X, "data": ["1", 2, 3, 4]}], "not FP32"),
        ([{**X, "data": [True, 2, 3, 4]}], "not FP32"),
        ([{**X, "data": "1234"}], "data must be a list"),
    ],
)
def test_tensors_the_model_cannot_take_are_a_400_with_the_protocol_s_error(world: Any, inputs: Any, words: str) -> None:
    response = infer(world, inputs=inputs)
    assert response.status_code == 400
    assert words in response.get_json()["error"]


def test_unknown_models_versions_and_outputs_are_errors(world: Any) -> None:
    for path in ("/v2/models/depfm", "/v2/models/deepfm/versions/9", "/v2/models/nope/ready"):
        response = world.client.get(path)
        assert response.status_code == 404 and response.get_json()["error"]
    response = infer(world, outputs=[{"name": "scores"}])
    assert response.status_code == 400 and "score" in response.get_json()["error"]


TENSORS = st.sampled_from([n for n in NUMPY if n != "BYTES"]).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(st.integers(0, 3), min_size=1, max_size=3),
        st.integers(0, 2**32 - 1),
    )
)


@given(TENSORS)
def test_a_tensor_survives_encoding_and_decoding(case: tuple[str, list[int], int]) -> None:
    datatype, shape, seed = case
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2 if datatype == "BOOL" else 100, shape).astype(NUMPY[datatype])
    encoded = encode_tensor("t", values)
    decoded = decode_tensor({**encoded, "datatype": datatype, "data": encoded["data"].tolist()})
    assert encoded["shape"] == shape and (encoded["datatype"] == datatype)
    assert decoded.dtype == values.dtype and np.array_equal(decoded, values)
