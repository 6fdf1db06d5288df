"""/openapi.json is valid OpenAPI 3.1, has every route and no other, and tells the truth about real answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from serving.openapi import openapi_document

# The OpenAPI Initiative's own schema of 3.1 documents (Apache-2.0).
META = json.loads((Path(__file__).parent / "data" / "openapi-3.1.schema.json").read_text())
DOCUMENT = json.loads(json.dumps(openapi_document()))

PREDICT = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1, 5000]}
EVENT = {"event_id": "e", "type": "click", "user_id": 1}
TENSOR = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
V = "/v2/models/{name}/versions/{version}"
CALLS = [
    ("post", "/v1/predict", "/v1/predict", PREDICT, 200),
    ("post", "/v1/predict", "/v1/predict", {**PREDICT, "candidate_ids": []}, 422),
    ("post", "/v1/predict", "/v1/predict", {**PREDICT, "scene": "x"}, 404),
    ("post", "/v1/events", "/v1/events", {"events": [EVENT]}, 202),
    ("post", "/v1/events", "/v1/events", {"events": [{}]}, 422),
    ("get", "/v1/models", "/v1/models", None, 200),
    ("get", "/v1/assignments?unit=1", "/v1/assignments", None, 200),
    ("get", "/v1/assignments", "/v1/assignments", None, 422),
    ("get", "/healthz", "/healthz", None, 200),
    ("get", "/readyz", "/readyz", None, 200),
    ("get", "/v2", "/v2", None, 200),
    ("get", "/v2/health/live", "/v2/health/live", None, 200),
    ("get", "/v2/health/ready", "/v2/health/ready", None, 200),
    ("get", "/v2/models/deepfm", "/v2/models/{name}", None, 200),
    ("get", "/v2/models/nope", "/v2/models/{name}", None, 404),
    ("get", "/v2/models/deepfm/versions/1", "/v2/models/{name}/versions/{version}", None, 200),
    ("get", "/v2/models/deepfm/ready", "/v2/models/{name}/ready", None, 200),
    ("get", "/v2/models/deepfm/versions/1/ready", "/v2/models/{name}/versions/{version}/ready", None, 200),
    ("post", "/v2/models/deepfm/infer", "/v2/models/{name}/infer", {"inputs": [TENSOR]}, 200),
    ("post", "/v2/models/deepfm/infer", "/v2/models/{name}/infer", {"inputs": []}, 400),
    ("post", "/v2/models/deepfm/versions/2/infer", V + "/infer", {"inputs": [TENSOR]}, 200),
    ("get", "/openapi.json", "/openapi.json", None, 200),
    ("get", "/console?format=json", "/console", None, 200),
    ("get", "/console/experiments?format=json", "/console/experiments", None, 200),
    ("get", "/v1/experiments", "/v1/experiments", None, 200),
    ("put", "/v1/experiments", "/v1/experiments", {"layers": {}}, 428),
    ("post", "/v1/experiments/validate", "/v1/experiments/validate", {"layers": {}}, 200),
    ("post", "/v1/experiments/validate", "/v1/experiments/validate", {"layers": {"x": {}}}, 422),
    ("get", "/v1/experiments/versions", "/v1/experiments/versions", None, 200),
    ("get", "/v1/experiments/versions?limit=0", "/v1/experiments/versions", None, 422),
    ("get", "/v1/experiments/versions/1", "/v1/experiments/versions/{version}", None, 404),
    ("post", "/v1/experiments/rollback", "/v1/experiments/rollback", {"version": 1}, 404),
    ("post", "/v1/experiments/kill", "/v1/experiments/kill", {"all": True}, 503),
    ("post", "/v1/experiments/kill", "/v1/experiments/kill", {}, 422),
    ("get", "/v1/experiments/schema", "/v1/experiments/schema", None, 200),
    ("post", "/v1/models/deepfm/promote", "/v1/models/{name}/promote", {"version": "2"}, 200),
    ("post", "/v1/models/deepfm/promote", "/v1/models/{name}/promote", {"version": "9"}, 404),
    ("post", "/v1/models/deepfm/rollback", "/v1/models/{name}/rollback", {}, 404),
]  # fmt: skip


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Resolves #/components references against the document."""
    resource = Resource.from_contents(DOCUMENT, default_specification=DRAFT202012)
    registry = Registry().with_resource("doc:", resource)
    text = json.dumps(schema).replace('"#/components', '"doc:#/components')
    return Draft202012Validator(json.loads(text), registry=registry)


def test_the_document_is_valid_openapi(world: Any) -> None:
    served = world.client.get("/openapi.json").get_json()
    assert served == DOCUMENT
    Draft202012Validator(META).validate(served)
    for schema in served["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere() -> None:
    references = re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(DOCUMENT))
    assert len(references) > 30
    for reference in references:
        node: Any = DOCUMENT
        for part in reference.split("/"):
            node = node[part]


def test_every_route_is_described_and_nothing_else(world: Any) -> None:
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in world.app.url_map.iter_rules()
        if rule.endpoint != "static"
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert routes == described
    ids = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("method", "url", "path", "body", "status"), CALLS, ids=[f"{c[1]} {c[4]}" for c in CALLS])
def test_real_answers_are_as_described(world: Any, method: str, url: str, path: str, body: Any, status: int) -> None:
    response = world.client.open(url, method=method, json=body, headers=world.key("admin"))
    assert response.status_code == status
    operation = DOCUMENT["paths"][path][method]
    described = operation["responses"][str(status)]
    if "$ref" in described:
        described = DOCUMENT["components"]["responses"][described["$ref"].rsplit("/", 1)[1]]
    schema = described["content"][response.content_type]["schema"]
    validator(schema).validate(response.get_json())
    if body is not None and status < 300:
        validator(operation["requestBody"]["content"]["application/json"]["schema"]).validate(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {**PREDICT, "scene": 3},
        {**PREDICT, "x": 1},
        {**PREDICT, "candidate_ids": []},
        {**PREDICT, "candidates": []},
        {**PREDICT, "session_id": ""},
        {**PREDICT, "session_id": 3},
        {**PREDICT, "device_id": "d" * 201},
    ],
)
def test_what_the_schema_refuses_the_server_refuses(world: Any, body: dict[str, Any]) -> None:
    schema = DOCUMENT["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert not validator(schema).is_valid(body)
    assert world.client.post("/v1/predict", json=body).status_code == 422


def test_the_examples_are_valid_and_served(world: Any) -> None:
    headers = world.key("admin")
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "example" in content:
                validator(content["schema"]).validate(content["example"])
                assert world.client.post(path, json=content["example"], headers=headers).status_code < 300
