"""Who may ask for what: API keys with scopes.

Whatever changes experiments or models needs a key with scope admin, always. With `--require-keys` predictions need
predict, feedback needs events, and what shows the server's state needs admin; probes, /metrics, the API's description
and the landing page stay open. A route that is not named here is taken for administration.
"""

from __future__ import annotations

from flask import Flask, g, request

from plait.errors import RequestError
from serving.keyring import KeyRing

OPEN = frozenset(
    {"/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready"}
)
_SCOPES = {"/v1/predict": "predict", "/v1/recommend": "predict", "/v1/events": "events"}


def needed_scope(rule: str, method: str, *, require_keys: bool) -> str | None:
    """The scope that a request to this route needs; None: nobody is asked."""
    if rule in OPEN:
        return None
    if rule in _SCOPES or rule.startswith("/v2/"):
        return _SCOPES.get(rule, "predict") if require_keys else None
    reads = method in ("GET", "HEAD", "OPTIONS")
    return "admin" if require_keys or not reads else None


def install_auth(app: Flask, keys: KeyRing, *, require_keys: bool) -> None:
    """Before every request: 401 without a valid key, 403 without the scope. The key is left in `g.api_key`."""

    @app.before_request
    def authorize() -> None:
        if request.url_rule is None:  # no such route or method: the answer is 404 or 405 for everybody
            return
        scope = needed_scope(request.url_rule.rule, request.method, require_keys=require_keys)
        if scope is None:
            return
        token = _token()
        if not token:
            raise RequestError(
                401,
                "API key needed",
                f"{request.method} {request.path} needs an API key with scope {scope}: send `Authorization: Bearer "
                f"KEY` or `X-API-Key: KEY`; `plait keys create NAME --scope {scope}` makes one",
            )
        if not keys.known:
            raise RequestError(503, "Keys unknown", "the API keys cannot be read now; try again in a moment")
        key = keys.find(token)
        if key is None:
            raise RequestError(
                401, "Invalid API key", "no such key, or it was revoked or has expired; ask for a new one"
            )
        if scope not in key.scopes:
            raise RequestError(
                403,
                "Scope missing",
                f"key {key.name!r} may {', '.join(key.scopes)}; {request.method} {request.path} needs scope {scope}",
            )
        g.api_key = key


def author() -> str:
    """Who signs a change: the name of the request's key."""
    return str(g.api_key.name)


def _token() -> str:
    """The key of the request. A browser may send it as the password of its log-in, but only to look: it would send a
    remembered one along with another site's form, too."""
    given = request.authorization
    if given is not None and given.type == "bearer" and given.token:
        return given.token
    if given is not None and given.type == "basic" and request.method in ("GET", "HEAD"):
        return given.password or ""
    return request.headers.get("X-API-Key", "")
