"""Changing experiments and models over HTTP: the same store, checks and versions as the `plait` command.

Every change is signed with the name of the API key it came with. This worker follows its own change at once, the others
at their next poll.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from flask import Flask, Response, request

from experiments.diff import diff_documents
from experiments.overview import overview
from experiments.problems import ConfigError, Problem
from experiments.shape import schema
from experiments.source import Source, parse_text, read_json_text
from experiments.store import ConfigStore, ConfigVersion, ConflictError, NoVersionError
from experiments.validate import check
from plait.errors import RegistryError, RequestError, SpecError, UnknownNameError, did_you_mean
from serving.auth import author
from serving.jsonio import json_response, read_json
from serving.keyring import KeyRing
from serving.parts import ClockLike, LiveExperiments, Registry

_YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
_NONE = '"0"'  # the tag of a store that holds no version yet


@dataclass(frozen=True, kw_only=True)
class Admin:
    """What administration needs beside the server's other parts."""

    store: ConfigStore
    keys: KeyRing
    require_keys: bool = False


def install_admin(app: Flask, admin: Admin, registry: Registry, live: LiveExperiments, clock: ClockLike) -> None:
    """The routes under /v1/experiments, and those of /v1/models that change something."""
    store = admin.store

    @app.get("/v1/experiments")
    def live_configuration() -> Response:
        with _answers():
            head = store.head()
        document = dict(head.document if head else live.snapshot.document)
        headers = {"ETag": etag(head)}
        if request.accept_mimetypes.best_match(["application/json", *_YAML]) in _YAML:
            text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
            return Response(text, content_type="application/yaml", headers=headers)
        body = {
            **(describe_version(head) if head else {"version": 0}),
            "document": document,
            "serving": {"version": live.snapshot.version, "source": live.source, "error": live.error},
            "layers": overview(live.snapshot.spec, clock.now()),
        }
        return json_response(body, headers=headers)

    @app.put("/v1/experiments")
    def replace_configuration() -> Response:
        with _answers():
            expected = _base(store, needed=True)
            source = read_document()
            models = _models(registry)
            warnings = check_document(source, models)
            made = store.apply(
                source, author=author(), expected=expected, models=models, note=_note(request.args.get("note", ""))
            )
        live.poll()
        return _made(made, warnings=warnings, unchanged=made.version == expected)

    @app.post("/v1/experiments/validate")
    def validate_configuration() -> Response:
        with _answers():
            source = read_document()
            warnings = check_document(source, _models(registry))
            head = store.head()
        changes = diff_documents(head.document if head else {}, source.document)
        return json_response({"valid": True, "warnings": warnings, "diff": changes})

    @app.get("/v1/experiments/versions")
    def configuration_versions() -> Response:
        text = request.args.get("limit", "100")
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1000):
            raise RequestError(422, "Invalid request", f"limit must be a whole number from 1 to 1000, not {text!r}")
        with _answers():
            return json_response({"versions": [describe_version(each) for each in store.history(int(text))]})

    @app.get("/v1/experiments/versions/<int:version>")
    def configuration_version(version: int) -> Response:
        with _answers():
            found = store.get(version)
        return json_response({**describe_version(found), "document": found.document}, headers={"ETag": etag(found)})

    @app.post("/v1/experiments/rollback")
    def rollback_configuration() -> Response:
        body = _fields(read_json(), needed={"version": int}, optional={"note": str})
        with _answers():
            base = _base(store, needed=False)
            made = store.rollback(
                body["version"],
                author=author(),
                expected=base,
                models=_models(registry),
                note=_note(body.get("note", "")),
            )
        live.poll()
        return _made(made)

    @app.post("/v1/experiments/kill")
    def kill_experiment() -> Response:
        body = _fields(read_json(), needed={}, optional={"experiment": str, "all": bool, "note": str})
        if ("experiment" in body) == bool(body.get("all")):
            raise RequestError(422, "Invalid request", 'give {"experiment": NAME}, or {"all": true} for everything')
        with _answers():
            made = store.kill(body.get("experiment"), author=author(), note=_note(body.get("note", "")))
        live.poll()
        return _made(made)

    @app.get("/v1/experiments/schema")
    def configuration_schema() -> Response:
        return json_response(schema(), content_type="application/schema+json")

    @app.post("/v1/models/<name>/promote")
    def promote_model(name: str) -> Response:
        body = _fields(read_json(), needed={"version": str}, optional={"alias": str})
        with _answers():
            return json_response(
                describe_model(registry.promote(name, body["version"], body.get("alias", "champion"), author=author()))
            )

    @app.post("/v1/models/<name>/rollback")
    def rollback_model(name: str) -> Response:
        body = _fields(read_json(), needed={}, optional={"alias": str})
        with _answers():
            return json_response(describe_model(registry.rollback(name, body.get("alias", "champion"))))


def describe_version(version: ConfigVersion) -> dict[str, Any]:
    """A version without its document."""
    return {
        "version": version.version,
        "created": version.created,
        "author": version.author,
        "origin": version.origin,
        "note": version.note,
        "diff": list(version.diff),
    }


def describe_model(version: Any) -> dict[str, Any]:
    return {"name": version.name, "version": version.version, "aliases": list(version.aliases)}


def etag(version: ConfigVersion | None) -> str:
    """The entity tag of a version: of its number and content, so that a restored backup has others."""
    return f'"{version.version}-{version.digest[:16]}"' if version else _NONE


def read_document() -> Source:
    """The body as a configuration, JSON or YAML. RequestError 415 or 400."""
    mimetype = request.mimetype
    is_json = mimetype == "application/json" or mimetype.endswith("+json")
    if not is_json and mimetype not in _YAML:
        came = f"came as {mimetype!r}" if mimetype else "carries no Content-Type"
        raise RequestError(415, "Unsupported content type", f"the body {came}; send application/json or {_YAML[0]}")
    try:
        text = request.get_data(cache=False).decode("utf-8")
        return read_json_text(text, file="body") if is_json else parse_text(text, file="body")
    except UnicodeDecodeError as error:
        raise RequestError(400, "Broken document", f"the body is not UTF-8 (byte {error.start})") from error
    except SpecError as error:
        raise RequestError(400, "Broken document", str(error)) from error


def check_document(source: Source, models: Collection[str] | None) -> list[str]:
    """The warnings; ConfigError with every fault."""
    _, problems = check(source, models=models)
    if faults := [problem for problem in problems if not problem.warning]:
        raise ConfigError(faults)
    return [str(problem) for problem in problems]


def _made(made: ConfigVersion, **more: Any) -> Response:
    return json_response({**describe_version(made), **more}, headers={"ETag": etag(made)})


def _models(registry: Registry) -> set[str] | None:
    """What a parameter of type model may name; None (unchecked) while nothing is registered, as in the command."""
    return registry.references() or None


def _base(store: ConfigStore, *, needed: bool) -> int | None:
    """The version that If-Match names: 428 if it must be there and is not, 412 if another version is live."""
    if not request.headers.get("If-Match"):
        if not needed:
            return None
        raise RequestError(
            428,
            "Precondition required",
            "send If-Match with the ETag of the version that yours is based on (GET tells)",
        )
    head = store.latest()
    version = head.version if head else 0
    if request.if_match.star_tag or etag(head).strip('"') in request.if_match.as_set():
        return version
    who = f"version {version} by {head.author}" if head else "no version"
    raise RequestError(
        412, "Precondition failed", f"{who} is live, not what If-Match names; look at it, and decide again"
    )


def _note(note: str) -> str:
    if len(note) > 2000 or "\x00" in note:
        raise RequestError(422, "Invalid request", "a note may have at most 2000 characters, and no null character")
    return note


def _fields(body: Any, *, needed: Mapping[str, type], optional: Mapping[str, type]) -> dict[str, Any]:
    """A flat JSON object with these fields and no others, of these types."""
    if not isinstance(body, dict):
        raise RequestError(422, "Invalid request", f"expected a JSON object, not a {type(body).__name__}", pointer="")
    allowed = {**needed, **optional}
    words: dict[type, str] = {int: "a whole number", str: "a text", bool: "true or false"}
    for name, value in body.items():
        if name not in allowed:
            detail = f"no field {name!r}; {did_you_mean(name, allowed)}"
            raise RequestError(422, "Invalid request", detail, pointer=f"/{name}")
        if type(value) is not allowed[name]:
            detail = f"{name} must be {words[allowed[name]]}, not {value!r}"
            raise RequestError(422, "Invalid request", detail, pointer=f"/{name}")
    for name in needed:
        if name not in body:
            raise RequestError(422, "Invalid request", f"{name} is missing: {words[needed[name]]}", pointer=f"/{name}")
    return body


@contextmanager
def _answers() -> Iterator[None]:
    """Errors of the store and the registry as answers; a database that is gone is answered 503 elsewhere."""
    try:
        yield
    except ConfigError as error:
        n = len(error.problems)
        detail = f"the configuration has {n} fault{'s' if n != 1 else ''}; nothing was changed"
        faults = [_fault(problem) for problem in error.problems]
        raise RequestError(422, "Invalid configuration", detail, errors=faults) from error
    except ConflictError as error:
        raise RequestError(412, "Precondition failed", str(error)) from error
    except NoVersionError as error:
        raise RequestError(404, "Unknown version", str(error)) from error
    except UnknownNameError as error:
        raise RequestError(404, f"Unknown {error.kind}", str(error)) from error
    except RegistryError as error:
        raise RequestError(404, "Unknown model", str(error)) from error
    except SpecError as error:
        raise RequestError(422, "Invalid request", str(error)) from error


def _fault(problem: Problem) -> dict[str, Any]:
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in problem.path]
    fault: dict[str, Any] = {"pointer": "".join(f"/{part}" for part in parts), "detail": problem.message}
    return {**fault, "line": problem.place.line} if problem.place else fault
