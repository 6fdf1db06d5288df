"""GET /v1/models and GET /v1/assignments: what serves, and who is in which arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, request

from plait.errors import RequestError
from serving.jsonio import json_response
from serving.parts import ClockLike, Experiments, Registry
from serving.pool import ModelPool
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
        return json_response({**pool.status(), "registered": registered_models(registry)})

    @app.get("/v1/assignments")
    def assignments() -> Response:
        unit = request.args.get("unit", "")
        if not unit or len(unit) > 200:
            raise RequestError(422, "Invalid request", "ask with ?unit=ID, a user id of 1 to 200 characters")
        scene = request.args.get("scene") or next(iter(scenes))
        return json_response(describe_assignment(experiments, unit, scene, clock))


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


def describe_assignment(experiments: Experiments, unit: str, scene: str, clock: ClockLike) -> dict[str, Any]:
    """What a user would be served: every arm and every parameter's value. Nothing is recorded as an exposure."""
    snapshot = experiments.snapshot
    assignment = snapshot.assign({"user": unit, "request": "none"}, {"scene": scene}, clock.now())
    return {
        "unit": unit,
        "config_version": snapshot.version,
        "arms": [
            {"layer": a.layer, "experiment": a.experiment, "arm": a.arm, "unit_kind": a.unit_kind, "forced": a.forced}
            for a in assignment.arms
        ],
        "parameters": dict(assignment.values),
        "errors": [str(error) for error in assignment.errors],
    }
