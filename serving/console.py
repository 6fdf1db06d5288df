"""The landing page and the console's overview: server-rendered, nothing from outside; JSON at the same path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from flask import Flask, Request, Response, g, render_template, request

from plait import __version__
from plait.errors import PlaitError
from serving.info import describe_experiments
from serving.jsonio import json_response
from serving.metrics import Metrics, quantile
from serving.parts import Experiments
from serving.pipeline import Predictor
from serving.pool import ModelPool
from serving.queries import PredictQuery
from serving.scenes import Scene

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"


def install_console(
    app: Flask,
    predictor: Predictor,
    pool: ModelPool,
    experiments: Experiments,
    scenes: Mapping[str, Scene],
    metrics: Metrics,
    info: Mapping[str, Any],
) -> None:
    """GET / and GET /console."""

    @app.get("/")
    def landing() -> Response:
        return page(render_template("index.html", version=__version__, info=info))

    @app.get("/console")
    def console() -> Response:
        content: dict[str, Any] = {
            "version": __version__,
            "worker": os.getpid(),
            "info": dict(info),
            "traffic": traffic(metrics),
            "models": pool.status(),
            "experiments": experiment_shares(experiments, metrics),
            "scenes": [
                {"name": s.name, "description": s.description, "default_model": s.default_model}
                for s in scenes.values()
            ],
            "recent": list(predictor.recent),
            "tried": _try_it(predictor, scenes) if "user_id" in request.args else None,
        }
        if wants_json(request):
            return json_response(content)
        return page(render_template("console.html", **content, form=request.args))


def traffic(metrics: Metrics) -> dict[str, Any]:
    """Requests, errors, and the time of each stage, over all workers since the server started."""
    n_requests = n_errors = n_predictions = 0.0
    degraded: dict[str, int] = {}
    buckets: dict[str, list[tuple[float, float]]] = {}
    for metric in metrics.collect():
        for sample in metric.samples:
            if sample.name == "plait_requests_total":
                n_requests += sample.value
                n_errors += sample.value if sample.labels["status"].startswith("5") else 0
                n_predictions += sample.value if sample.labels["route"] == "/v1/predict" else 0
            elif sample.name == "plait_degraded_total":
                degraded[sample.labels["reason"]] = int(sample.value)
            elif sample.name == "plait_stage_seconds_bucket":
                buckets.setdefault(sample.labels["stage"], []).append((float(sample.labels["le"]), sample.value))
    stages = []
    for stage in ("parse", "assign", "features", "score", "log", "total"):
        cumulative = sorted(buckets.get(stage, []))
        p50, p99 = quantile(cumulative, 0.5), quantile(cumulative, 0.99)
        if p50 is not None and p99 is not None:
            stages.append({"stage": stage, "p50_ms": round(p50 * 1e3, 3), "p99_ms": round(p99 * 1e3, 3)})
    return {
        "requests": int(n_requests),
        "predictions": int(n_predictions),
        "server_errors": int(n_errors),
        "degraded": degraded,
        "stages": stages,
    }


def experiment_shares(experiments: Experiments, metrics: Metrics) -> dict[str, Any]:
    """The configuration's experiments, each arm with its weight and the answers that were made with it."""
    answers: dict[tuple[str, str], int] = {}
    for metric in metrics.collect():
        for sample in metric.samples:
            if sample.name == "plait_assignments_total":
                key = (sample.labels["experiment"], sample.labels["arm"])
                answers[key] = answers.get(key, 0) + int(sample.value)
    snapshot = experiments.snapshot
    described = describe_experiments(snapshot.spec)
    for experiment in described:
        counts = [answers.get((experiment["experiment"], arm["arm"]), 0) for arm in experiment["arms"]]
        for arm, count in zip(experiment["arms"], counts, strict=True):
            arm["answers"], arm["share"] = count, count / max(1, sum(counts))
    return {
        "config_version": snapshot.version,
        "error": getattr(experiments, "error", None),  # why a newer configuration could not be taken up
        "experiments": described,
    }


def _try_it(predictor: Predictor, scenes: Mapping[str, Scene]) -> dict[str, Any]:
    """The form's answer, or its error. It leaves no impression: a look is not traffic."""
    args = request.args
    body: dict[str, Any] = {
        "scene": args.get("scene", ""),
        "entities": {"user_id": _number(args.get("user_id", ""))},
        "candidate_ids": [_number(part) for part in re.split(r"[\s,]+", args.get("candidate_ids", "")) if part],
    }
    if args.get("model"):
        body["model"] = args["model"]
    try:
        answer = predictor.predict(PredictQuery.from_json(body, scenes), g.request_id, log=False)
    except PlaitError as error:
        return {"error": str(error)}
    return {"answer": answer.to_json()}


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def wants_json(asked: Request) -> bool:
    """Whether a page is asked for as JSON, by ?format=json or by the Accept header."""
    best = asked.accept_mimetypes.best_match(["text/html", "application/json"])
    return asked.args.get("format") == "json" or best == "application/json"


def page(html: str) -> Response:
    return Response(
        html,
        content_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"},
    )
