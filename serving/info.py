"""GET /v1/models and GET /v1/assignments: what serves, and who is in which arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, request

from plait.errors import RequestError, StoreError
from serving.jsonio import json_response
from serving.parts import ClockLike, Experiments, Registry
from serving.pool import ModelPool
from serving.queries import MAX_ID_CHARS
from serving.scenes import Scene


def install_info(
    app: Flask,
    pool: ModelPool,
    registry: Registry,
    experiments: Experiments,
    scenes: Mapping[str, Scene],
    clock: ClockLike,
) -> None:
    """Read-only views of the worker's state."""

    @app.get("/v1/models")
    def models() -> Response:
        try:
            registered: dict[str, Any] = {"registered": registered_models(registry)}
        except StoreError as error:  # what this worker holds can be told all the same
            registered = {"registered": [], "registry_error": str(error)}
        return json_response({**pool.status(), **registered})

    @app.get("/v1/assignments")
    def assignments() -> Response:
        given = {"user": "unit", "session": "session_id", "device": "device_id", "request": "request_id"}
        units = {kind: request.args[name] for kind, name in given.items() if name in request.args}
        for kind, unit in {"user": "", **units}.items():
            if not 0 < len(unit) <= MAX_ID_CHARS:
                detail = f"ask with ?{given[kind]}=ID, a {kind} id of 1 to {MAX_ID_CHARS} characters"
                raise RequestError(422, "Invalid request", detail)
        scene = request.args.get("scene") or next(iter(scenes))
        return json_response(describe_assignment(experiments, units, scene, clock))


def registered_models(registry: Registry) -> list[dict[str, Any]]:
    """Every name with its versions, newest first."""
    found: list[dict[str, Any]] = []
    for name in registry.names():
        versions: list[dict[str, Any]] = [
            {
                "version": version.version,
                "aliases": list(getattr(version, "aliases", ())),
                "created": getattr(version, "created", None),
                "metrics": dict(getattr(version, "metrics", {}) or {}),
            }
            for version in registry.versions(name)
        ]
        found.append({"name": name, "versions": sorted(versions, key=lambda v: int(v["version"]), reverse=True)})
    return found


def describe_assignment(
    experiments: Experiments, units: Mapping[str, str], scene: str, clock: ClockLike
) -> dict[str, Any]:
    """What these units would be served, layer by layer with the reason. Nothing is recorded as an exposure."""
    explanation = experiments.snapshot.explain(units, {"scene": scene}, clock.now())
    return {
        "unit": units["user"],
        "units": dict(units),
        "config_version": explanation.version,
        "layers": [
            {
                "layer": layer.layer,
                "unit_kind": layer.unit_kind,
                "bucket": layer.bucket,
                "experiment": layer.experiment,
                "arm": layer.arm,
                "forced": layer.forced,
                "parameters": dict(layer.parameters),
                "why": layer.why,
            }
            for layer in explanation.layers
        ],
        "holdouts": dict(explanation.holdouts),
        "parameters": dict(explanation.values),
    }


def describe_experiments(spec: Any) -> list[dict[str, Any]]:
    """Every experiment of a configuration: its state, its share of the layer, and its arms' weights, 0 to 1."""
    return [
        {
            "layer": experiment.layer,
            "experiment": experiment.name,
            "state": experiment.state,
            "traffic": sum(end - first for first, end in experiment.ranges) * experiment.traffic / 1e8,
            "arms": [
                {"arm": arm.name, "weight": arm.parts / 1e4, "parameters": dict(arm.values)} for arm in experiment.arms
            ],
        }
        for experiment in spec.experiments.values()
    ]
