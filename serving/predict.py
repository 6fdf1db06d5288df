"""POST /v1/predict and POST /v1/events."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flask import Flask, Response, g

from plait.errors import RequestError, StoreError
from serving.jsonio import json_response, read_json
from serving.metrics import Metrics
from serving.parts import ClockLike, Log
from serving.pipeline import Predictor
from serving.queries import PredictQuery, parse_events
from serving.scenes import Scene


def install_predict(
    app: Flask, predictor: Predictor, scenes: Mapping[str, Scene], log: Log, clock: ClockLike, metrics: Metrics
) -> None:
    """The two routes of the loop: what to show, and what came of it."""

    @app.post("/v1/predict")
    def predict() -> Response:
        started = time.perf_counter()
        query = PredictQuery.from_json(read_json(), scenes)
        answer = predictor.predict(query, g.request_id, parse_s=time.perf_counter() - started)
        if answer.model:
            g.model = (answer.model.name, answer.model.version)
        headers = {} if answer.config_version is None else {"X-Config-Version": str(answer.config_version)}
        return json_response(answer.to_json(), headers=headers)

    @app.post("/v1/events")
    def events() -> Response:
        records, n_duplicates = parse_events(read_json(), now=clock.now())
        try:
            log.append("feedback", records)  # returns once they are on disk: only then is 202 true
        except StoreError as error:
            raise RequestError(
                503, "Events not stored", f"{error}; send them again, event_id keeps them single"
            ) from error
        for record in records:
            metrics.events.labels(record["type"]).inc()
        return json_response({"accepted": len(records), "duplicates": n_duplicates}, 202)
