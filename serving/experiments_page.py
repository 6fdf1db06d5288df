"""GET /console/experiments: what runs now, layer by layer, and how it came to be: every version with its changes."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, render_template, request

from experiments.overview import overview
from experiments.store import ConfigStore
from plait import __version__
from plait.errors import StoreError
from serving.admin import describe_version
from serving.console import page, wants_json
from serving.jsonio import json_response
from serving.parts import ClockLike, LiveExperiments

_SHOWN = 50


def install_experiments_page(app: Flask, store: ConfigStore, live: LiveExperiments, clock: ClockLike) -> None:
    """A page that only looks: it works, without the history, while the store does not answer."""

    @app.get("/console/experiments")
    def experiments_page() -> Response:
        try:
            versions, trouble = [describe_version(each) for each in store.history(_SHOWN)], None
        except StoreError as error:
            versions, trouble = [], str(error)
        snapshot = live.snapshot
        content: dict[str, Any] = {
            "version": __version__,
            "serving": {"version": snapshot.version, "source": live.source, "error": live.error},
            "enabled": snapshot.spec.enabled,
            "layers": overview(snapshot.spec, clock.now()),
            "versions": versions,
            "trouble": trouble,
        }
        if wants_json(request):
            return json_response(content)
        return page(render_template("experiments.html", **content))
