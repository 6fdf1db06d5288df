"""Every error of the server as an RFC 9457 problem document, with the request id in it."""

from __future__ import annotations

import logging
import re
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge

from plait.errors import RequestError, StoreError, UnknownNameError, did_you_mean
from serving.jsonio import json_response

logger = logging.getLogger("serving")
# Basic is for browsers, which then ask for the key as a password.
_HEADERS = {
    401: {"WWW-Authenticate": 'Bearer realm="plait", Basic realm="plait: any user, an API key as the password"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


def problem(status: int, title: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any) -> Response:
    """A problem document. `extra` joins it (a `pointer` into the body, a list of `errors`, …)."""
    body = {
        "type": f"urn:plait:problem:{_slug(title)}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": request.path,
        "request_id": g.get("request_id", ""),
        **extra,
    }
    return json_response(body, status, content_type="application/problem+json", headers=headers)


def install_problem_handlers(app: Flask) -> None:
    """Turn every exception into a problem document; under /v2 the Open Inference Protocol's {"error"} is added."""

    @app.errorhandler(RequestError)
    def wrong_request(error: RequestError) -> Response:
        headers = _HEADERS.get(error.status)
        return _answer(error.status, error.title, error.detail, headers=headers, **error.extra)

    @app.errorhandler(StoreError)
    def store_away(error: StoreError) -> Response:
        return _answer(503, "Store unavailable", str(error), headers=_HEADERS[503])

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(error: RequestEntityTooLarge) -> Response:
        limit = app.config["MAX_CONTENT_LENGTH"]
        return _answer(413, "Body too large", f"the body may have at most {limit} bytes; send fewer items at a time")

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        detail, headers = error.description or "", {}
        if status == 404:
            paths = sorted({rule.rule for rule in app.url_map.iter_rules()})
            detail = f"no route {request.path}; {did_you_mean(request.path, paths)}"
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            headers["Allow"] = ", ".join(sorted(error.valid_methods))
            detail = f"{request.path} does not take {request.method}; allowed: {headers['Allow']}"
        return _answer(status, error.name, detail, headers=headers)

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        logger.error("request %s failed", g.get("request_id", "-"), exc_info=error)
        return _answer(500, "Internal error", "an unexpected error; the server's log has it under this request_id")


def unknown_name(kind: str, error: UnknownNameError) -> RequestError:
    """404 for a name in the request that nothing goes by."""
    return RequestError(404, f"Unknown {kind}", str(error))


def _answer(status: int, title: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any) -> Response:
    if request.path.startswith("/v2"):
        extra["error"] = detail
    return problem(status, title, detail, headers=headers, **extra)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
