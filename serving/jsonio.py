"""JSON in and out by orjson."""

from __future__ import annotations

from typing import Any

import orjson
from flask import Response, request

from plait.errors import RequestError

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS


def dumps(value: Any) -> bytes:
    """Bytes of JSON; numpy arrays and datetimes are understood, NaN becomes null."""
    return orjson.dumps(value, option=_OPTIONS, default=str)


def json_response(
    value: Any, status: int = 200, *, content_type: str = "application/json", headers: dict[str, str] | None = None
) -> Response:
    response = Response(dumps(value), status=status, content_type=content_type)
    if headers:
        response.headers.update(headers)
    return response


def read_json() -> Any:
    """The request's body. RequestError 415 for another content type, 400 for broken JSON."""
    mimetype = request.mimetype
    if mimetype != "application/json" and not mimetype.endswith("+json"):
        came = f"came as {mimetype!r}" if mimetype else "carries no Content-Type"
        raise RequestError(
            415, "Unsupported content type", f"the body {came}; send JSON with Content-Type: application/json"
        )
    data = request.get_data(cache=False)
    if not data:
        raise RequestError(400, "Broken JSON", "the body is empty; send a JSON object")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, "Broken JSON", f"the body is not JSON: {error}") from error
