"""Pieces of the OpenAPI document that its parts share."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_STATUS = {
    400: "The body is broken JSON or YAML, or no valid inference request",
    401: "An API key is needed, and none or no usable one came",
    403: "The API key lacks the scope",
    404: "No such scene, model, experiment or version",
    412: "Another version is live than the one that If-Match names",
    413: "Too many candidates or events, or too large a body",
    415: "The body is not declared as JSON",
    428: "If-Match is missing",
    422: "The body is JSON but not a valid request; `pointer` says where",
    503: "Not available now; try again after Retry-After seconds",
}


def responses() -> Schema:
    problem = {"application/problem+json": {"schema": ref("Problem")}}
    return {f"Problem{status}": {"description": text, "content": problem} for status, text in _STATUS.items()}


def operation(
    operation_id: str,
    summary: str,
    responses: Schema,
    *,
    tags: list[str],
    body: str = "",
    example: Any = None,
    parameters: list[Schema] | None = None,
) -> Schema:
    operation: Schema = {"operationId": operation_id, "summary": summary, "tags": tags, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body:
        content: Schema = {"schema": ref(body)}
        if example is not None:
            content["example"] = example
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return operation


def ok(description: str, schema: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": ref(schema)}}}


def problems(*statuses: int) -> Schema:
    return {str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in statuses}


def query(name: str, description: str, *, required: bool) -> Schema:
    return {"name": name, "in": "query", "required": required, "description": description, "schema": {"type": "string"}}


def ref(schema: str) -> Schema:
    return {"$ref": f"#/components/schemas/{schema}"}


def object_(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def closed(**properties: Schema) -> Schema:
    return {**object_(**properties), "additionalProperties": False}
