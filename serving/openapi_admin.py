"""The part of the OpenAPI document about administration, and which routes want an API key."""

from __future__ import annotations

from typing import Any

from serving.auth import needed_scope
from serving.openapi_parts import Schema, closed, object_, ok, operation, problems, query, ref

SECURITY_SCHEMES: Schema = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of `plait keys create`."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "browser": {"type": "http", "scheme": "basic", "description": "Pages, to look only: the key as the password."},
}
_EXAMPLE = {
    "parameters": {"rank.model": {"type": "string", "default": "deepfm"}},
    "layers": {"rank": {"unit": "user", "parameters": ["rank.*"]}},
    "experiments": {},
}


def with_keys(paths: Schema) -> Schema:
    """The paths, each operation with the keys it takes and the answers it gives without one."""
    for path, operations in paths.items():
        for method, each in operations.items():
            strict = needed_scope(path, method.upper(), require_keys=True)
            if strict is None:
                continue
            always = needed_scope(path, method.upper(), require_keys=False) is not None
            schemes = ["bearer", "header", *(["browser"] if method == "get" else [])]
            each["security"] = [*([] if always else [{}]), *({scheme: []} for scheme in schemes)]
            each["responses"].update(problems(401, 403))
            when = "" if always else " if the server runs with --require-keys"
            each["description"] = f"Needs an API key with scope {strict}{when}."
    return paths


def admin_paths() -> Schema:
    """Everything under /v1/experiments, and what changes models."""
    if_match: Schema = {
        "name": "If-Match",
        "in": "header",
        "description": "The ETag of the version that yours is based on; * is whatever is live",
        "schema": {"type": "string"},
    }
    version = {
        "name": "version", "in": "path", "required": True, "description": "A version", "schema": {"type": "integer"},
    }  # fmt: skip
    name = {"$ref": "#/components/parameters/name"}
    return {
        "/v1/experiments": {
            "get": operation(
                "getExperiments",
                "The live configuration, what this worker serves of it, and its layers; YAML with Accept",
                {"200": _both("The configuration; its ETag names the version", "ExperimentsResponse"), **problems(503)},
                tags=["experiments"],
            ),
            "put": _document(
                operation(
                    "putExperiments",
                    "Make a whole configuration live, or none of it",
                    {"200": ok("The live version", "ChangeResponse"), **problems(400, 412, 413, 415, 422, 428, 503)},
                    body="ExperimentsDocument",
                    parameters=[{**if_match, "required": True}, query("note", "Why, for the history", required=False)],
                    tags=["experiments"],
                )
            ),
        },
        "/v1/experiments/validate": {
            "post": _document(
                operation(
                    "validateExperiments",
                    "Check a configuration and tell what it would change",
                    {"200": ok("It is valid", "ValidateResponse"), **problems(400, 413, 415, 422, 503)},
                    body="ExperimentsDocument",
                    example=_EXAMPLE,
                    tags=["experiments"],
                )
            )
        },
        "/v1/experiments/versions": {
            "get": operation(
                "listExperimentVersions",
                "Versions, newest first: who, when, how, why and what changed",
                {"200": ok("Versions", "VersionsResponse"), **problems(422, 503)},
                parameters=[query("limit", "How many; default 100, at most 1000", required=False)],
                tags=["experiments"],
            )
        },
        "/v1/experiments/versions/{version}": {
            "get": operation(
                "getExperimentVersion",
                "One version with its document",
                {"200": ok("The version", "VersionResponse"), **problems(404, 503)},
                parameters=[version],
                tags=["experiments"],
            )
        },
        "/v1/experiments/rollback": {
            "post": operation(
                "rollbackExperiments",
                "Make an old version's configuration live again, as a new version",
                {"200": ok("The live version", "ChangeResponse"), **problems(400, 404, 412, 413, 415, 422, 503)},
                body="RollbackRequest",
                parameters=[if_match],
                tags=["experiments"],
            )
        },
        "/v1/experiments/kill": {
            "post": operation(
                "killExperiments",
                "Stop one experiment and what requires it, or everything",
                {"200": ok("The live version", "ChangeResponse"), **problems(400, 404, 413, 415, 422, 503)},
                body="KillRequest",
                tags=["experiments"],
            )
        },
        "/v1/experiments/schema": {
            "get": operation(
                "getExperimentsSchema",
                "The JSON Schema of a configuration",
                {
                    "200": {
                        "description": "JSON Schema, draft 2020-12",
                        "content": {"application/schema+json": {"schema": {"type": "object"}}},
                    }
                },
                tags=["experiments"],
            )
        },
        "/v1/models/{name}/promote": {
            "post": operation(
                "promoteModel",
                "Point an alias at a version; every worker follows within seconds",
                {"200": ok("The version", "AliasResponse"), **problems(400, 404, 413, 415, 422, 503)},
                body="PromoteRequest",
                parameters=[name],
                tags=["models"],
            )
        },
        "/v1/models/{name}/rollback": {
            "post": operation(
                "rollbackModel",
                "Point an alias at what it named before",
                {"200": ok("The version", "AliasResponse"), **problems(400, 404, 413, 415, 422, 503)},
                body="AliasRequest",
                parameters=[name],
                tags=["models"],
            )
        },
        "/console/experiments": {
            "get": operation(
                "experimentsPage",
                "Experiments by layer, and the history with its changes; JSON as /console",
                {
                    "200": {
                        "description": "A page, or its content as JSON",
                        "content": {
                            "text/html": {"schema": {"type": "string"}},
                            "application/json": {"schema": {"type": "object"}},
                        },
                    }
                },
                parameters=[query("format", "json for the page's content", required=False)],
                tags=["pages"],
            )
        },
    }


def admin_schemas() -> Schema:
    """Bodies and answers of administration."""
    integer, string = {"type": "integer"}, {"type": "string"}
    strings = {"type": "array", "items": string}
    about: Schema = {
        "version": integer,
        "created": {"type": "string", "format": "date-time"},
        "author": string,
        "origin": {"enum": ["apply", "api", "rollback", "kill"]},
        "note": string,
        "diff": strings,
    }
    document: Schema = {"type": "object", "description": "See /v1/experiments/schema."}
    live = closed(**about, document=document, serving={"type": "object"}, layers={"type": "array"})
    live["required"] = ["version", "document", "serving", "layers"]  # nothing is told of a version 0
    change = closed(**about, warnings=strings, unchanged={"type": "boolean"})
    change["required"] = list(about)
    fault = object_(pointer=string, detail=string, line=integer)
    fault["required"] = ["pointer", "detail"]
    fault["description"] = "`line` is that of the body, where it is known."
    rollback = _some(["version"], version=integer, note=string)
    kill = _some([], experiment=string, all={"type": "boolean"}, note=string)
    kill["oneOf"] = [{"required": ["experiment"]}, {"required": ["all"], "properties": {"all": {"const": True}}}]
    return {
        "Fault": fault,
        "ExperimentsDocument": document,
        "ExperimentsResponse": live,
        "ValidateResponse": closed(valid={"const": True}, warnings=strings, diff=strings),
        "ChangeResponse": change,
        "VersionsResponse": closed(versions={"type": "array", "items": closed(**about)}),
        "VersionResponse": closed(**about, document=document),
        "RollbackRequest": rollback,
        "KillRequest": kill,
        "PromoteRequest": _some(["version"], version=string, alias=string),
        "AliasRequest": _some([], alias=string),
        "AliasResponse": closed(name=string, version=string, aliases=strings),
    }


def _some(required: list[str], **properties: Schema) -> Schema:
    return {**closed(**properties), "required": required}


def _document(described: Schema) -> Schema:
    """A configuration may come as YAML, too."""
    described["requestBody"]["content"]["application/yaml"] = {"schema": {"type": "string"}}
    return described


def _both(description: str, schema: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {"ETag": {"schema": {"type": "string"}}},
        "content": {
            "application/json": {"schema": ref(schema)},
            "application/yaml": {"schema": {"type": "string"}},
        },
    }
