"""The OpenAPI 3.1 document of every route. Tests hold it to the routes there are and to what they really answer."""

from __future__ import annotations

from plait import __version__
from serving.openapi_admin import SECURITY_SCHEMES, admin_paths, admin_schemas, with_keys
from serving.openapi_parts import Schema
from serving.openapi_parts import closed as _closed
from serving.openapi_parts import object_ as _object
from serving.openapi_parts import ok as _ok
from serving.openapi_parts import operation as _operation
from serving.openapi_parts import problems as _problems
from serving.openapi_parts import query as _query
from serving.openapi_parts import ref as _ref
from serving.openapi_parts import responses as _responses
from serving.queries import MAX_EVENTS, MAX_ID_CHARS


def openapi_document() -> Schema:
    """The whole document, as JSON-ready values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Plait serving",
            "version": __version__,
            "description": "Features, models and experiments in one answer; Open Inference Protocol v2 beside.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": with_keys(
            {**_ranking_paths(), **_info_paths(), **admin_paths(), **_protocol_paths(), **_page_paths()}
        ),
        "components": {
            "schemas": {**_schemas(), **admin_schemas()},
            "responses": _responses(),
            "parameters": _parameters(),
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


def _ranking_paths() -> Schema:
    return {
        "/v1/predict": {
            "post": _operation(
                "predict",
                "Rank candidates for a user",
                {"200": _ok("The ranking, best first", "PredictResponse"), **_problems(400, 404, 413, 415, 422, 503)},
                body="PredictRequest",
                example={"scene": "home", "entities": {"user_id": 42}, "candidate_ids": [1, 2, 3], "top_k": 2},
                tags=["ranking"],
            )
        },
        "/v1/events": {
            "post": _operation(
                "postEvents",
                "Report what users did; the same event_id twice counts once",
                {
                    "202": _ok("The events are on disk", "EventsResponse"),
                    **_problems(400, 413, 415, 422, 503),
                },
                body="EventsRequest",
                example={
                    "events": [{"event_id": "e-1", "type": "click", "request_id": "r-1", "user_id": 42, "item_id": 1}]
                },
                tags=["ranking"],
            )
        },
    }


def _info_paths() -> Schema:
    return {
        "/v1/models": {
            "get": _operation(
                "listModels",
                "Models this worker holds, could not load, and the registry knows",
                {"200": _ok("Models", "ModelsResponse")},
                tags=["state"],
            )
        },
        "/v1/assignments": {
            "get": _operation(
                "explainAssignment",
                "The arms and parameter values of a user",
                {"200": _ok("Arms and parameters", "AssignmentResponse"), **_problems(422)},
                parameters=[
                    _query("unit", "The user's id", required=True),
                    _query("session_id", "The session, for layers by session", required=False),
                    _query("device_id", "The device, for layers by device", required=False),
                    _query("request_id", "The request, for layers by request", required=False),
                    _query("scene", "The scene to ask for; default: the first", required=False),
                ],
                tags=["state"],
            )
        },
        "/healthz": {
            "get": _operation("live", "Is the process alive?", {"200": _ok("It is", "Live")}, tags=["health"])
        },
        "/readyz": {
            "get": _operation(
                "ready",
                "Does every loaded model score? (they are run)",
                {"200": _ok("Ready", "Ready"), "503": _ok("Not ready", "Ready")},
                tags=["health"],
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics",
                "Prometheus metrics over all workers",
                {"200": {"description": "Text format", "content": {"text/plain": {"schema": {"type": "string"}}}}},
                tags=["health"],
            )
        },
        "/openapi.json": {
            "get": _operation(
                "openapi",
                "This document",
                {
                    "200": {
                        "description": "OpenAPI 3.1",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    }
                },
                tags=["pages"],
            )
        },
    }


def _protocol_paths() -> Schema:
    paths: Schema = {
        "/v2": {
            "get": _operation(
                "serverMetadata", "Server metadata", {"200": _ok("Metadata", "ServerMetadata")}, tags=["inference"]
            )
        },
        "/v2/health/live": {
            "get": _operation("serverLive", "Server live", {"200": _ok("Live", "Live")}, tags=["inference"])
        },
        "/v2/health/ready": {
            "get": _operation(
                "serverReady",
                "Server ready",
                {"200": _ok("Ready", "Live"), "503": _ok("Not ready", "Live")},
                tags=["inference"],
            )
        },
    }
    name, version = {"$ref": "#/components/parameters/name"}, {"$ref": "#/components/parameters/version"}
    for suffix, prefix, parameters in (
        ("", "model", [name]),
        ("/versions/{version}", "modelVersion", [name, version]),
    ):
        base = f"/v2/models/{{name}}{suffix}"
        paths[base] = {
            "get": _operation(
                f"{prefix}Metadata",
                "Inputs and outputs of a model",
                {"200": _ok("Metadata", "ModelMetadata"), **_problems(404, 503)},
                parameters=parameters,
                tags=["inference"],
            )
        }
        paths[f"{base}/ready"] = {
            "get": _operation(
                f"{prefix}Ready",
                "Does the model score?",
                {"200": _ok("It does", "ModelReady"), **_problems(404, 503)},
                parameters=parameters,
                tags=["inference"],
            )
        }
        paths[f"{base}/infer"] = {
            "post": _operation(
                f"{prefix}Infer",
                "Run the bare graph on tensors",
                {"200": _ok("Output tensors", "InferResponse"), **_problems(400, 404, 413, 415, 503)},
                body="InferRequest",
                parameters=parameters,
                tags=["inference"],
            )
        }
    return paths


def _page_paths() -> Schema:
    html = {"text/html": {"schema": {"type": "string"}}}
    return {
        "/": {
            "get": _operation(
                "landing", "Where things are", {"200": {"description": "A page", "content": html}}, tags=["pages"]
            )
        },
        "/console": {
            "get": _operation(
                "console",
                "Overview and try-it form; JSON with ?format=json or Accept: application/json",
                {
                    "200": {
                        "description": "A page, or its content as JSON",
                        "content": {**html, "application/json": {"schema": {"type": "object"}}},
                    }
                },
                parameters=[
                    _query("format", "json for the page's content", required=False),
                    _query("scene", "Try it: the scene", required=False),
                    _query("user_id", "Try it: the user", required=False),
                    _query("candidate_ids", "Try it: ids with commas or spaces between", required=False),
                    _query("model", "Try it: a model instead of the assigned one", required=False),
                ],
                tags=["pages"],
            )
        },
    }


def _schemas() -> Schema:
    integer, string, number = {"type": "integer"}, {"type": "string"}, {"type": "number"}
    int64 = {"type": "integer", "format": "int64"}
    shape = {"type": "array", "items": {"type": "integer", "minimum": -1}}
    tensor_metadata = _object(name=string, datatype=string, shape=shape)
    arm = _object(layer=string, experiment=string, arm=string)
    tensor = _object(name=string, shape=shape, datatype=string, data={"type": "array"}, parameters={"type": "object"})
    tensor["required"] = ["name", "shape", "datatype", "data"]
    unit = {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_ID_CHARS}
    candidate = _object(item_id=int64)
    candidate["additionalProperties"] = True
    candidate["description"] = "Further fields are the caller's own; the server does not read them."
    predict = _object(
        scene=string,
        entities=_closed(user_id=int64),
        session_id={**unit, "description": "The visit: the unit of experiments by session."},
        device_id={**unit, "description": "The device: the unit of experiments by device."},
        candidates={"type": "array", "minItems": 1, "items": candidate},
        candidate_ids={"type": "array", "minItems": 1, "items": int64},
        context={"type": ["object", "null"], "description": "Request-time features and targeting attributes."},
        top_k={"type": ["integer", "null"], "minimum": 1},
        model={"type": ["string", "null"], "description": "NAME or NAME:VERSION instead of the assigned model."},
    )
    predict.update(
        required=["scene", "entities"],
        additionalProperties=False,
        oneOf=[{"required": ["candidates"]}, {"required": ["candidate_ids"]}],
    )
    event = _object(
        event_id={**string, "minLength": 1, "maxLength": MAX_ID_CHARS},
        type={**string, "pattern": "^[a-z][a-z0-9_]{0,63}$"},
        request_id=unit,
        user_id=int64,
        session_id=unit,
        device_id=unit,
        item_id={"type": ["integer", "null"], "format": "int64"},
        timestamp={
            "type": ["string", "integer", "null"],
            "description": "RFC 3339, or microseconds since 1970; default now.",
        },
        value={"type": ["number", "null"]},
    )
    event.update(required=["event_id", "type", "user_id"], additionalProperties=False)
    ranked = _object(item_id=int64, score={"type": ["number", "null"]}, known={"const": False})
    ranked["required"] = ["item_id", "score"]
    ranked["description"] = "`known: false` marks an id no feature view has; it was scored with defaults."
    loaded = _object(ref=string, name=string, version=string, wanted={"type": "boolean"})
    registered_version = _object(
        version=string,
        aliases={"type": "array", "items": string},
        created={"type": ["string", "null"]},
        metrics={"type": "object"},
    )
    models = _closed(
        models={"type": "array", "items": loaded},
        failed={"type": "array", "items": _closed(ref=string, error=string)},
        registered={
            "type": "array",
            "items": _closed(name=string, versions={"type": "array", "items": registered_version}),
        },
        registry_error={**string, "description": "Why the registry could not be asked."},
    )
    models["required"] = ["models", "failed", "registered"]
    problem = _object(
        type=string, title=string, status=integer, detail=string, instance=string, request_id=string,
        pointer=string, error=string,
        errors={"type": "array", "items": _ref("Fault")},
    )  # fmt: skip
    problem["required"] = ["type", "title", "status", "detail"]
    infer_request = _object(
        id=string, parameters={"type": "object"}, inputs={"type": "array", "minItems": 1, "items": _ref("Tensor")},
        outputs={"type": "array", "items": {"type": "object", "required": ["name"], "properties": {"name": string}}},
    )  # fmt: skip
    infer_request["required"] = ["inputs"]
    infer_response = _object(
        model_name=string, model_version=string, id=string, outputs={"type": "array", "items": _ref("Tensor")}
    )
    infer_response["required"] = ["model_name", "outputs"]
    return {
        "PredictRequest": predict,
        "PredictResponse": _closed(
            request_id=string,
            scene=string,
            model={"anyOf": [_closed(name=string, version=string), {"type": "null"}]},
            experiments={"type": "array", "items": arm},
            ranking={"type": "array", "items": ranked},
            degraded={"type": "array", "items": string},
            timings_ms={"type": "object", "additionalProperties": number},
        ),
        "EventsRequest": _closed(
            events={"type": "array", "minItems": 1, "maxItems": MAX_EVENTS, "items": event},
        ),
        "EventsResponse": _closed(accepted=integer, duplicates=integer),
        "ModelsResponse": models,
        "AssignmentResponse": _closed(
            unit=string,
            units={"type": "object", "additionalProperties": string},
            config_version=integer,
            layers={
                "type": "array",
                "items": _closed(
                    layer=string,
                    unit_kind=string,
                    bucket={"type": ["integer", "null"]},
                    experiment={"type": ["string", "null"]},
                    arm={"type": ["string", "null"]},
                    forced={"type": "boolean"},
                    parameters={"type": "object"},
                    why=string,
                ),
            },
            holdouts={"type": "object", "additionalProperties": {"type": "boolean"}},
            parameters={"type": "object"},
        ),
        "Live": _closed(live={"type": "boolean"}),
        "Ready": _closed(
            ready={"type": "boolean"},
            models={"type": "array", "items": string},
            broken={"type": "object", "additionalProperties": string},
            missing={"type": "array", "items": string},
        ),
        "ServerMetadata": _closed(name=string, version=string, extensions={"type": "array", "items": string}),
        "ModelMetadata": _closed(
            name=string,
            versions={"type": "array", "items": string},
            platform=string,
            inputs={"type": "array", "items": tensor_metadata},
            outputs={"type": "array", "items": tensor_metadata},
        ),
        "ModelReady": _closed(name=string, ready={"type": "boolean"}),
        "Tensor": tensor,
        "InferRequest": infer_request,
        "InferResponse": infer_response,
        "Problem": problem,
    }


def _parameters() -> Schema:
    return {
        name: {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in (("name", "The model's name"), ("version", "A version of it"))
    }
