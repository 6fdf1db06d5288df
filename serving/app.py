"""The Flask application, made from its parts: nothing is loaded at import, nothing is global."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, g, request

import plait
from serving.admin import Admin, install_admin
from serving.auth import install_auth
from serving.console import install_console
from serving.experiments_page import install_experiments_page
from serving.health import install_health
from serving.info import install_info
from serving.jsonio import dumps
from serving.metrics import Metrics
from serving.oip import install_oip
from serving.openapi import openapi_document
from serving.parts import ClockLike, LiveExperiments, Log, Registry
from serving.pipeline import Predictor
from serving.pool import ModelPool
from serving.predict import install_predict
from serving.problems import install_problem_handlers
from serving.scenes import Scene
from serving.tracing import request_id_from, trace_from

access = logging.getLogger("serving.access")
MAX_BODY_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that an application is made from, and what to close when it goes."""

    scenes: Mapping[str, Scene]
    pool: ModelPool
    registry: Registry
    experiments: LiveExperiments
    log: Log
    clock: ClockLike
    metrics: Metrics
    predictor: Predictor
    admin: Admin
    info: Mapping[str, Any] = field(default_factory=dict)  # shown on the console: project, home, clock
    on_close: tuple[Callable[[], None], ...] = ()

    def close(self) -> None:
        """Stop threads and write what waits, in the order given."""
        for close in self.on_close:
            close()


def create_app(parts: Parts, *, access_log: bool = False, max_body_bytes: int = MAX_BODY_BYTES) -> Flask:
    """The server's application. `access_log` writes one JSON line per request to the logger serving.access."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
    app.url_map.strict_slashes = False
    _install_request_frame(app, parts, access_log=access_log)
    install_auth(app, parts.admin.keys, require_keys=parts.admin.require_keys)
    install_problem_handlers(app)
    install_predict(app, parts.predictor, parts.scenes, parts.log, parts.clock, parts.metrics)
    install_oip(app, parts.pool, parts.registry)
    install_health(app, parts.pool, parts.metrics)
    install_info(app, parts.pool, parts.registry, parts.experiments, parts.scenes, parts.clock)
    install_admin(app, parts.admin, parts.registry, parts.experiments, parts.clock)
    install_experiments_page(app, parts.admin.store, parts.experiments, parts.clock)
    install_console(app, parts.predictor, parts.pool, parts.experiments, parts.scenes, parts.metrics, parts.info)

    document = dumps(openapi_document())

    @app.get("/openapi.json")
    def openapi() -> Response:
        return Response(document, content_type="application/json")

    return app


def _install_request_frame(app: Flask, parts: Parts, *, access_log: bool) -> None:
    """Around every request: its id and trace, in and out, its time and status counted."""
    metrics = parts.metrics
    counters: dict[tuple[str, str, str, int], Any] = {}  # labels() costs more than a dictionary
    histograms: dict[str, Any] = {}

    @app.before_request
    def begin() -> None:
        g.started = time.perf_counter()
        g.request_id = request_id_from(request.headers.get("X-Request-Id"))
        g.trace = trace_from(request.headers.get("Traceparent"))
        metrics.inflight.inc()

    @app.after_request
    def finish(response: Response) -> Response:
        seconds = time.perf_counter() - g.started
        route = request.url_rule.rule if request.url_rule else "none"
        model, version = g.get("model", ("", ""))
        key = (route, model, version, response.status_code)
        if key not in counters:
            counters[key] = metrics.requests.labels(route, model, version, str(response.status_code))
        counters[key].inc()
        if route not in histograms:
            histograms[route] = metrics.request_seconds.labels(route)
        histograms[route].observe(seconds)
        if 400 <= response.status_code < 500:
            metrics.rejected.labels(str(response.status_code)).inc()
        response.headers["X-Request-Id"] = g.request_id
        response.headers["Traceparent"] = g.trace.traceparent
        if access_log:
            line = {
                "at": time.time(),
                "method": request.method,
                "path": request.path,
                "status": response.status_code,
                "ms": round(seconds * 1e3, 2),
                "request_id": g.request_id,
                "trace_id": g.trace.trace_id,
                "pid": os.getpid(),
            }
            access.info("%s", dumps(line).decode())
        return response

    @app.teardown_request
    def end(_: BaseException | None) -> None:
        metrics.inflight.dec()


SERVER_NAME = "plait"
SERVER_VERSION = plait.__version__
