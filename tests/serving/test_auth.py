"""Who may ask for what: scopes by route, what is refused, and how fast a revoked key is."""

from __future__ import annotations

import base64
import json
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from experiments.store import ConfigStore
from plait.keys import KeyStore
from plait.settings import Home
from serving.admin import Admin
from serving.auth import OPEN, needed_scope
from serving.keyring import KeyRing
from tests.serving.conftest import make_world

PREDICT = {"scene": "home", "entities": {"user_id": 1}, "candidate_ids": [1, 2]}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.fixture
def locked(home: Home):
    """A server that was started with --require-keys."""
    admin = Admin(store=ConfigStore.at(home), keys=KeyRing(KeyStore(home), home.root / "keys.json"), require_keys=True)
    with make_world(admin=admin) as world:
        yield world


def routes(world: Any) -> list[tuple[str, str]]:
    rules = [rule for rule in world.app.url_map.iter_rules() if rule.endpoint != "static"]
    return [(rule.rule, method) for rule in rules for method in sorted(rule.methods - {"HEAD", "OPTIONS"})]


def path_of(rule: str) -> str:
    return re.sub(r"<int:\w+>", "1", rule).replace("<name>", "deepfm").replace("<version>", "1")


def test_every_change_needs_an_admin_key_even_on_an_open_server(world: Any) -> None:
    changes = [(rule, method) for rule, method in routes(world) if needed_scope(rule, method, require_keys=False)]
    assert {rule for rule, _ in changes} == {
        "/v1/experiments", "/v1/experiments/validate", "/v1/experiments/rollback", "/v1/experiments/kill",
        "/v1/models/<name>/promote", "/v1/models/<name>/rollback",
    }  # fmt: skip
    predictor = world.key("predict", "events", name="app")
    for rule, method in changes:
        bare = world.client.open(path_of(rule), method=method, json={})
        assert bare.status_code == 401 and bare.headers["WWW-Authenticate"].startswith("Bearer"), rule
        assert "plait keys create NAME --scope admin" in bare.get_json()["detail"]
        refused = world.client.open(path_of(rule), method=method, json={}, headers=predictor)
        assert refused.status_code == 403 and "key 'app' may predict, events" in refused.get_json()["detail"]
    assert world.registry.moves == [] and world.parts.admin.store.head() is None


def test_a_locked_server_asks_everybody_for_the_scope_of_the_route(locked: Any) -> None:
    tokens = {scope: locked.key(scope, name=scope) for scope in ("predict", "events", "admin")}
    for rule, method in routes(locked):
        statuses = {scope: locked.client.open(path_of(rule), method=method, json={}, headers=headers).status_code
                    for scope, headers in tokens.items()}  # fmt: skip
        bare = locked.client.open(path_of(rule), method=method, json={}).status_code
        if rule in OPEN:
            assert bare == 200 and set(statuses.values()) == {200}, rule
            continue
        allowed = (
            "events" if rule == "/v1/events" else "predict" if rule.startswith(("/v1/predict", "/v2")) else "admin"
        )
        assert bare == 401, rule
        assert {scope for scope, status in statuses.items() if status != 403} == {allowed}, rule


def test_an_open_server_predicts_without_a_key(world: Any) -> None:
    assert world.predict().status_code == 200
    assert world.client.get("/console").status_code == 200


@pytest.mark.parametrize("way", ["bearer", "x-api-key", "basic"])
def test_a_key_comes_in_three_ways(locked: Any, way: str) -> None:
    token = locked.key("admin")["Authorization"].removeprefix("Bearer ")
    basic = base64.b64encode(f"anybody:{token}".encode()).decode()
    headers = {
        "bearer": {"Authorization": f"Bearer {token}"},
        "x-api-key": {"X-API-Key": token},
        "basic": {"Authorization": f"Basic {basic}"},
    }[way]
    assert locked.client.get("/console", headers=headers).status_code == 200
    # a browser repeats a remembered password for another site's form
    changed = locked.client.post("/v1/experiments/validate", json={"layers": {}}, headers=headers)
    assert changed.status_code == (401 if way == "basic" else 200)


@pytest.mark.parametrize("token", ["", "x", "plait_", "plait_000000000000_" + "a" * 43, "é", "a" * 5000])
def test_what_is_no_key_is_401(locked: Any, token: str) -> None:
    answer = locked.client.post("/v1/predict", json=PREDICT, headers={"X-API-Key": token.encode().decode("latin-1")})
    assert answer.status_code == 401 and answer.content_type == "application/problem+json"
    assert locked.log.records["request"] == []


def test_a_key_with_another_keys_id_is_refused(locked: Any) -> None:
    one = locked.key("predict", name="one")["Authorization"]
    two = locked.key("predict", name="two")["Authorization"]
    mixed = "_".join([*one.split("_")[:2], two.split("_", 2)[2]])
    assert locked.client.post("/v1/predict", json=PREDICT, headers={"Authorization": mixed}).status_code == 401
    assert locked.client.post("/v1/predict", json=PREDICT, headers={"Authorization": one}).status_code == 200


def test_unknown_routes_and_methods_are_told_to_everybody(locked: Any) -> None:
    assert locked.client.get("/v1/nope").status_code == 404
    assert locked.client.get("/v1/predict").status_code == 405


def test_a_revoked_key_is_refused_at_the_next_poll_and_an_expired_one_at_once(home: Home) -> None:
    store = KeyStore(home)
    ring = KeyRing(KeyStore(home), poll_s=0.05)
    assert ring.known
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    key, token = store.create("app", ["predict"], author="anna")
    _, short = store.create("short", ["predict"], author="anna", expires=soon)
    ring.start()
    wait_for(lambda: ring.find(token) == key and (ring.find(short) or datetime.now(UTC) >= soon))
    store.revoke("app")
    wait_for(lambda: ring.find(token) is None)
    wait_for(lambda: ring.find(short) is None)
    assert datetime.now(UTC) >= soon
    ring.close()


def wait_for(condition: Any, timeout_s: float = 10.0) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_keys_outlive_their_database_and_a_restart(home: Home) -> None:
    file = home.root / "keys.json"
    _, token = KeyStore(home).create("app", ["predict"], author="anna")
    ring = KeyRing(KeyStore(home), file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and token.split("_", 2)[2] not in file.read_text()
    home.plait_db.unlink()
    home.plait_db.mkdir()
    ring._store._engine.dispose()
    assert ring.poll() is False and "does not answer" in str(ring.error)
    assert ring.find(token).name == "app"
    assert KeyRing(KeyStore(home), file).find(token).name == "app"
    assert KeyRing(KeyStore(home), file).find(token[:-1] + ("a" if token[-1] != "a" else "b")) is None


@pytest.mark.parametrize("text", ["", "{", "3", "[3]", '[{"id": "x"}]'])
def test_without_database_and_with_a_damaged_file_no_key_is_known(home: Home, text: str) -> None:
    home.plait_db.mkdir()
    (home.root / "keys.json").write_text(text)
    ring = KeyRing(KeyStore(home), home.root / "keys.json")
    assert not ring.known
    with make_world(admin=Admin(store=ConfigStore.at(home), keys=ring, require_keys=True)) as world:
        answer = world.client.post("/v1/predict", json=PREDICT, headers={"X-API-Key": "plait_x"})
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert json.loads(answer.text)["title"] == "Keys unknown"
