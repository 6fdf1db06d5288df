"""Experiments and models changed over HTTP: who may, on which version, and what comes back."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.live import LiveConfig
from experiments.shape import schema
from experiments.store import ConfigStore, ConflictError
from plait.keys import KeyStore
from plait.settings import Home
from serving.admin import Admin
from serving.keyring import KeyRing
from tests.serving.conftest import make_world

DOCUMENT: dict[str, Any] = {
    "parameters": {"rank.model": {"type": "model", "default": "deepfm"}},
    "layers": {"rank": {"unit": "user", "parameters": ["rank.*"]}},
    "experiments": {
        "trees": {
            "layer": "rank",
            "state": "running",
            "buckets": "all",
            "traffic": 10,
            "arms": {
                "deepfm": {"weight": 50},
                "trees": {"weight": 50, "values": {"rank.model": "lightgbm"}},
            },
        }
    },
}


def with_traffic(traffic: float) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    document["experiments"]["trees"]["traffic"] = traffic
    return document


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.fixture
def served(home: Home, database: str) -> Iterator[Any]:
    """A server over a real store, its own follower of it, and anna's admin key."""
    store = ConfigStore.at(home)
    admin = Admin(store=store, keys=KeyRing(KeyStore(home)))
    with make_world(experiments=LiveConfig(store), admin=admin) as world:
        world.store, world.anna = store, world.key("admin")
        yield world


def put(world: Any, document: Any, tag: str | None, **more: Any) -> Any:
    headers = {**world.anna, **({"If-Match": tag} if tag else {}), **more.pop("headers", {})}
    return world.client.put("/v1/experiments", json=document, headers=headers, **more)


def test_the_whole_life_of_a_configuration(served: Any) -> None:
    empty = served.client.get("/v1/experiments")
    assert empty.headers["ETag"] == '"0"' and empty.get_json()["version"] == 0

    first = put(served, DOCUMENT, '"0"', query_string={"note": "start"})
    assert first.status_code == 200, first.text
    assert {k: first.get_json()[k] for k in ("version", "author", "note", "origin", "unchanged")} == {
        "version": 1, "author": "anna", "note": "start", "origin": "api", "unchanged": False,
    }  # fmt: skip
    live = served.client.get("/v1/experiments")
    assert live.headers["ETag"] == first.headers["ETag"]
    assert live.get_json()["document"] == DOCUMENT
    assert live.get_json()["serving"] == {"version": 1, "source": "store", "error": None}, "its worker follows at once"
    (layer,) = live.get_json()["layers"]
    assert layer["owners"][0]["in_use_percent"] == 10

    second = put(served, with_traffic(25), first.headers["ETag"])
    assert second.get_json()["diff"] == ["~ experiments.trees.traffic: 10 → 25"]
    again = put(served, with_traffic(25), second.headers["ETag"])
    assert again.get_json()["unchanged"] is True and again.get_json()["version"] == 2

    back = served.client.post(
        "/v1/experiments/rollback",
        json={"version": 1, "note": "too much"},
        headers={**served.anna, "If-Match": second.headers["ETag"]},
    )
    assert (back.get_json()["version"], back.get_json()["origin"], back.get_json()["note"]) == (
        3,
        "rollback",
        "too much",
    )
    killed = served.client.post("/v1/experiments/kill", json={"experiment": "trees"}, headers=served.anna)
    assert killed.get_json()["diff"] == ["~ experiments.trees.state: 'running' → 'stopped'"]
    off = served.client.post("/v1/experiments/kill", json={"all": True, "note": "fire"}, headers=served.anna)
    assert off.get_json()["version"] == 5

    listed = served.client.get("/v1/experiments/versions?limit=4").get_json()["versions"]
    assert [(v["version"], v["origin"], v["author"]) for v in listed] == [
        (5, "kill", "anna"), (4, "kill", "anna"), (3, "rollback", "anna"), (2, "api", "anna"),
    ]  # fmt: skip
    one = served.client.get("/v1/experiments/versions/2")
    assert one.get_json()["document"] == with_traffic(25) and one.headers["ETag"] == second.headers["ETag"]
    assert served.store.head().version == 5


def test_an_etag_is_needed_and_an_old_one_is_told_whose_version_is_live(served: Any) -> None:
    missing = put(served, DOCUMENT, None)
    assert missing.status_code == 428 and "If-Match" in missing.get_json()["detail"]
    tag = put(served, DOCUMENT, '"0"').headers["ETag"]
    assert put(served, with_traffic(20), tag).status_code == 200
    for old in (tag, '"0"', f"W/{tag}", "x", '"2-ffffffffffffffff"'):
        refused = put(served, with_traffic(30), old)
        assert refused.status_code == 412, old
        assert "version 2 by anna is live" in refused.get_json()["detail"]
    assert put(served, with_traffic(30), "*").get_json()["version"] == 3
    late = served.client.post("/v1/experiments/rollback", json={"version": 1}, headers={**served.anna, "If-Match": tag})
    assert late.status_code == 412
    assert served.store.head().version == 3


def test_of_two_writers_at_once_one_wins_and_the_other_gets_412(served: Any) -> None:
    tag = put(served, DOCUMENT, '"0"').headers["ETag"]
    barrier, answers = threading.Barrier(6), []

    def write(i: int) -> None:
        client = served.app.test_client()
        barrier.wait(timeout=20)
        headers = {**served.anna, "If-Match": tag}
        answers.append(client.put("/v1/experiments", json=with_traffic(20 + i), headers=headers).status_code)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(answers) == [200] + [412] * 5
    assert served.store.head().version == 2


def test_a_kill_goes_over_a_version_written_at_the_same_moment(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(served, DOCUMENT, '"0"')
    real, hits = served.store.apply, []

    def late(*arguments: Any, **named: Any) -> Any:
        if not hits:
            hits.append(1)
            real(with_traffic(20), author="bert")
            raise ConflictError("version 2 by bert is live")
        return real(*arguments, **named)

    monkeypatch.setattr(served.store, "apply", late)
    killed = served.client.post("/v1/experiments/kill", json={"experiment": "trees"}, headers=served.anna).get_json()
    assert killed["version"] == 3
    assert served.store.head().document["experiments"]["trees"] == {
        **with_traffic(20)["experiments"]["trees"], "state": "stopped",
    }  # fmt: skip


def test_every_fault_is_told_with_pointer_line_and_suggestion(served: Any) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["experiments"]["trees"]["arms"]["trees"] = {"weight": 40, "values": {"rank.modell": "lightgbm"}}
    document["experiments"]["trees"]["layer"] = "rnak"
    for answer in (
        put(served, None, '"0"', data=json.dumps(document, indent=2), content_type="application/json"),
        served.client.post("/v1/experiments/validate", json=document, headers=served.anna),
    ):
        assert answer.status_code == 422 and answer.content_type == "application/problem+json"
        faults = {fault["pointer"]: fault for fault in answer.get_json()["errors"]}
        assert "did you mean 'rank'?" in faults["/experiments/trees/layer"]["detail"]
        assert "add up to 90 %" in faults["/experiments/trees/arms"]["detail"]
        modell = faults["/experiments/trees/arms/trees/values/rank.modell"]
        assert "did you mean 'rank.model'?" in modell["detail"]
    text = yaml.safe_dump(document, sort_keys=False)
    answer = served.client.post(
        "/v1/experiments/validate", data=text, content_type="application/yaml", headers=served.anna
    )
    lines = {fault["pointer"]: fault["line"] for fault in answer.get_json()["errors"]}
    number = 1 + next(i for i, line in enumerate(text.splitlines()) if "rank.modell" in line)
    assert lines["/experiments/trees/arms/trees/values/rank.modell"] == number
    assert served.store.head() is None


def test_unknown_sections_and_keys_are_all_told(served: Any) -> None:
    answer = served.client.post(
        "/v1/experiments/validate",
        data='{"experimnts": {},\n"layer": {},\n'
        '"layers": {"a": {"unit": "user", "parameters": ["p"], "slt": 1, "x~/": 2}}}',
        content_type="application/json",
        headers=served.anna,
    )
    faults = {fault["pointer"]: (fault["line"], fault["detail"]) for fault in answer.get_json()["errors"]}
    assert faults["/experimnts"] == (1, "no such section; did you mean 'experiments'?")
    assert faults["/layer"] == (2, "no such section; did you mean 'layers'?")
    assert faults["/layers/a/slt"] == (3, "no such key; did you mean 'salt'?")
    assert faults["/layers/a/x~0~1"][0] == 3


def test_an_arm_that_names_an_unregistered_model_is_refused(served: Any) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["experiments"]["trees"]["arms"]["trees"]["values"]["rank.model"] = "lightgmb"
    (fault,) = put(served, document, '"0"').get_json()["errors"]
    assert fault["detail"] == "no model 'lightgmb' in the registry; did you mean 'lightgbm'?"


@pytest.mark.parametrize(
    ("data", "content_type", "status", "words"),
    [
        (b"{", "application/json", 400, "body:1: not JSON"),
        (b"[]", "application/json", 400, "the top must be sections"),
        (b'{"layers": {}, "layers": {}}', "application/json", 400, "the key 'layers' is given twice"),
        (b'{"layers": NaN}', "application/json", 400, "NaN is not JSON"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b'{"segments": {"s": {"attribute": "\\ud800", "exists": true}}}', "application/json", 422, "half a character"),
        (b"layers: [", "application/yaml", 400, "body:1: not YAML"),
        (b"\xff", "application/yaml", 400, "not UTF-8"),
        (b"layers: {}", "text/plain", 415, "send application/json or application/yaml"),
        (b"layers: !!python/object:os.system {}", "application/yaml", 400, "not allowed"),
    ],
)  # fmt: skip
def test_a_broken_document_is_one_clear_answer(
    served: Any, data: bytes, content_type: str, status: int, words: str
) -> None:
    answer = put(served, None, '"0"', data=data, content_type=content_type)
    assert answer.status_code == status and words in answer.get_json()["detail"], answer.text
    assert served.store.head() is None


def test_yaml_in_and_yaml_out(served: Any) -> None:
    text = yaml.safe_dump(DOCUMENT)
    assert put(served, None, '"0"', data=text, content_type="application/yaml").status_code == 200
    answer = served.client.get("/v1/experiments", headers={"Accept": "application/yaml"})
    assert answer.content_type.startswith("application/yaml") and yaml.safe_load(answer.text) == DOCUMENT


def test_validating_writes_nothing_and_tells_the_difference(served: Any) -> None:
    put(served, DOCUMENT, '"0"')
    answer = served.client.post("/v1/experiments/validate", json=with_traffic(50), headers=served.anna).get_json()
    assert answer == {"valid": True, "warnings": [], "diff": ["~ experiments.trees.traffic: 10 → 50"]}
    assert served.store.head().version == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("rollback", {"version": 9}, 404, "there are 1 to 1"),
        ("rollback", {"version": "1"}, 422, "version must be a whole number, not '1'"),
        ("rollback", {"version": True}, 422, "version must be a whole number"),
        ("rollback", {}, 422, "version is missing"),
        ("rollback", {"version": 1, "noet": ""}, 422, "no field 'noet'; did you mean 'note'?"),
        ("rollback", [], 422, "expected a JSON object"),
        ("rollback", {"version": 1, "note": "x" * 2001}, 422, "at most 2000 characters"),
        ("kill", {"experiment": "tree"}, 404, "did you mean 'trees'?"),
        ("kill", {"experiment": "trees", "all": True}, 422, '{"all": true}'),
        ("kill", {"all": False}, 422, '{"all": true}'),
    ],
)
def test_a_wrong_request_says_what_is_right(served: Any, path: str, body: Any, status: int, words: str) -> None:
    put(served, DOCUMENT, '"0"')
    answer = served.client.post(f"/v1/experiments/{path}", json=body, headers=served.anna)
    assert answer.status_code == status and words in answer.get_json()["detail"], answer.text
    assert served.store.head().version == 1


def test_models_are_promoted_and_rolled_back_in_the_keys_name(world: Any) -> None:
    headers = world.key("admin", name="deploy bot")
    answer = world.client.post("/v1/models/deepfm/promote", json={"version": "2"}, headers=headers)
    assert answer.get_json() == {"name": "deepfm", "version": "2", "aliases": ["champion"]}
    assert world.registry.moves == [("deepfm", "champion", "2", "deploy bot")]
    world.pool.refresh()
    assert world.predict().get_json()["model"] == {"name": "deepfm", "version": "2"}
    assert world.client.post("/v1/models/deepfm/rollback", json={}, headers=headers).get_json()["version"] == "1"
    missing = world.client.post("/v1/models/depfm/promote", json={"version": "2"}, headers=headers)
    assert missing.status_code == 404 and "did you mean 'deepfm'?" in missing.get_json()["detail"]


def test_the_schema_is_the_published_one(world: Any) -> None:
    answer = world.client.get("/v1/experiments/schema")
    assert answer.content_type == "application/schema+json" and answer.get_json() == schema()


def test_a_store_that_is_gone_is_503_and_the_page_still_looks(home: Home) -> None:
    home.plait_db.mkdir()
    keys = KeyRing(KeyStore(home, f"sqlite:///{home.root}/keys.db"))
    with make_world(admin=Admin(store=ConfigStore.at(home), keys=keys)) as world:
        headers = world.key("admin")
        for method, path, body in (
            ("get", "/v1/experiments", None),
            ("get", "/v1/experiments/versions", None),
            ("put", "/v1/experiments", DOCUMENT),
            ("post", "/v1/experiments/kill", {"all": True}),
        ):
            answer = world.client.open(path, method=method, json=body, headers={**headers, "If-Match": '"0"'})
            assert answer.status_code == 503 and "does not answer" in answer.get_json()["detail"]
            assert answer.headers["Retry-After"]
        page = world.client.get("/console/experiments")
        assert page.status_code == 200 and "ranker" in page.text and "does not answer" in page.text
        assert world.predict().status_code == 200


def test_the_page_shows_layers_versions_and_changes(served: Any) -> None:
    assert "No version was applied yet" in served.client.get("/console/experiments").text
    put(served, DOCUMENT, '"0"', query_string={"note": "<b>start</b>"})
    put(served, with_traffic(25), "*")
    page = served.client.get("/console/experiments").text
    for words in ("version 2 serves", "trees 50 %", "~ experiments.trees.traffic: 10 → 25", "anna", "&lt;b&gt;start"):
        assert words in page
    content = served.client.get("/console/experiments?format=json").get_json()
    assert [v["version"] for v in content["versions"]] == [2, 1] and content["serving"]["version"] == 2
