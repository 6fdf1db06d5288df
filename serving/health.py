"""GET /healthz, /readyz and /metrics."""

from __future__ import annotations

import threading
import time
from typing import Any

from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.jsonio import json_response
from serving.metrics import Metrics
from serving.pool import ModelPool


class Readiness:
    """Runs every loaded model on a row of defaults, at most once in `every_s`: probes are no load."""

    def __init__(self, pool: ModelPool, *, every_s: float = 1.0) -> None:
        self._pool, self._every_s = pool, every_s
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._last: tuple[bool, dict[str, Any]] = (False, {})

    def check(self) -> tuple[bool, dict[str, Any]]:
        """(ready, why). Ready: at least one model is loaded and every loaded one scores."""
        with self._lock:
            if time.monotonic() - self._at >= self._every_s:
                self._last = self._run()
                self._at = time.monotonic()
            return self._last

    def _run(self) -> tuple[bool, dict[str, Any]]:
        models = self._pool.models
        broken = {}
        for ref, model in models.items():
            try:
                model.warm_up()
            except Exception as error:
                broken[ref] = repr(error)
        ready = bool(models) and not broken
        return ready, {"ready": ready, "models": sorted(models), "broken": broken, "missing": self._pool.missing()}


def install_health(app: Flask, pool: ModelPool, metrics: Metrics) -> None:
    """Probes for an orchestrator, numbers for Prometheus."""
    readiness = Readiness(pool)
    app.extensions["plait_readiness"] = readiness

    @app.get("/healthz")
    def healthz() -> Response:
        return json_response({"live": True})

    @app.get("/readyz")
    def readyz() -> Response:
        ready, why = readiness.check()
        return json_response(why, 200 if ready else 503)

    @app.get("/metrics")
    def exposition() -> Response:
        return Response(metrics.exposition(), content_type=CONTENT_TYPE_LATEST)
