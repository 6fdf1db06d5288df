"""API keys: shown once, kept as a hash, unique by name, gone when revoked or expired."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from plait.cli import LazyGroup
from plait.commands.keys import keys as keys_command
from plait.database import open_database
from plait.errors import RegistryError, SpecError, StoreError
from plait.keys import KeyStore, read_token
from plait.settings import Home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    monkeypatch.delenv("PLAIT_DATABASE_URL", raising=False)
    monkeypatch.setenv("PLAIT_AUTHOR", "anna")
    return Home(project=tmp_path, root=tmp_path / ".plait")


@pytest.fixture
def store(home: Home, database: str) -> Any:
    store = KeyStore(home)
    yield store
    store.close()


def plait(*arguments: str, ok: bool = True) -> Result:
    """`plait keys …`, whether or not this installation knows the entry point yet."""
    group = LazyGroup("plait", commands={"keys": keys_command})
    group.get_command = lambda ctx, name: keys_command  # type: ignore[method-assign]
    result = CliRunner().invoke(group, ["keys", *arguments])
    assert (result.exit_code == 0) == ok, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_a_key_is_kept_as_a_hash_only(home, store, database):
    key, token = store.create("ci", ["admin", "predict"], author="anna")
    assert (key.name, key.scopes, key.author, key.expires) == ("ci", ("predict", "admin"), "anna", None)
    assert read_token(token) == (key.id, key.hash)
    assert store.all() == store.usable() == [key]
    engine = open_database(home)
    with engine.connect() as db:
        stored = repr(db.exec_driver_sql("SELECT * FROM api_keys").all())
    engine.dispose()
    secret = token.split("_", 2)[2]
    assert key.hash in stored and secret not in stored


def test_no_two_keys_are_alike(store):
    made = [store.create(f"k{i}", ["events"], author="anna") for i in range(20)]
    assert len({token for _, token in made}) == len({key.id for key, _ in made}) == 20


@pytest.mark.parametrize("text", ["", "x", "plait_", "plait_0123456789ab_short", "PLAIT_0123456789ab_" + "a" * 43])
def test_what_is_no_key_is_recognised(text):
    assert read_token(text) is None


def test_a_name_is_free_again_only_after_its_key_is_revoked(store):
    store.create("ci", ["admin"], author="anna")
    with pytest.raises(SpecError, match="there is a key 'ci' already; `plait keys revoke` it"):
        store.create("ci", ["predict"], author="anna")
    store.revoke("ci")
    again, _ = store.create("ci", ["predict"], author="anna")
    assert store.usable() == [again] and len(store.all()) == 2


def test_a_key_is_revoked_by_name_or_by_id(store):
    first, _ = store.create("one", ["admin"], author="anna")
    second, _ = store.create("two", ["admin"], author="anna")
    assert store.revoke("one").id == first.id
    assert store.revoke(second.id).revoked is not None
    assert store.usable() == []
    with pytest.raises(RegistryError, match="no key 'one' to revoke; none is known"):
        store.revoke("one")


def test_an_expired_key_is_of_no_use(store):
    soon = datetime.now(UTC) + timedelta(hours=1)
    key, _ = store.create("short", ["predict"], author="anna", expires=soon)
    assert key.usable(soon - timedelta(seconds=1)) and not key.usable(soon)
    (kept,) = store.all()
    assert kept.expires == soon and kept.expires.utcoffset() == timedelta(0)
    with pytest.raises(SpecError, match="would have expired already"):
        store.create("late", ["predict"], author="anna", expires=datetime.now(UTC))


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x00", "é" * 3, "x" * 101, "-rf"])
def test_a_name_that_cannot_sign_is_refused(store, name):
    with pytest.raises(SpecError, match="cannot name a key"):
        store.create(name, ["admin"], author="anna")


def test_a_database_that_is_gone_is_a_clear_answer(home):
    home.plait_db.mkdir(parents=True)
    store = KeyStore(home)
    for call in (store.all, store.usable, lambda: store.revoke("x"), lambda: store.create("x", ["admin"], author="a")):
        with pytest.raises(StoreError, match="the database of API keys does not answer"):
            call()


def test_the_command_shows_a_key_once(home):
    made = plait("create", "deploy bot", "--scope", "admin", "--scope", "predict", "--expires", "90d")
    token = made.stdout.strip()
    assert read_token(token) and "it is shown this once" in made.stderr
    listed = plait("list").output
    assert "deploy bot" in listed and "predict,admin" in listed and "by anna" in listed and "expires 20" in listed
    assert token.split("_", 2)[2] not in listed
    (record,) = json.loads(plait("list", "--json").output)
    assert record["name"] == "deploy bot" and "hash" not in record


def test_the_command_revokes_and_lists_what_was(home):
    plait("create", "a", "--scope", "events")
    assert "is revoked; running servers refuse it within two seconds" in plait("revoke", "a").output
    assert "there is no usable key" in plait("list").stderr
    assert "revoked 20" in plait("list", "--all").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "a", "--scope", "amdin"], "no scope 'amdin'; did you mean 'admin'?"),
        (["create", "a"], "Missing option '--scope'"),
        (["create", "a", "--scope", "admin", "--expires", "soon"], "neither a time span such as 90d nor a date"),
        (["create", "a", "--scope", "admin", "--expires", "2020-01-01"], "would have expired already"),
        (["revoke", "a"], "no key 'a' to revoke"),
    ],
)
def test_a_wrong_command_is_one_clear_line(home, arguments, message):
    result = plait(*arguments, ok=False)
    assert result.exit_code == 2 and message in result.stderr
    assert KeyStore(home).all() == []


def test_only_unrevoked_names_are_unique_in_the_table_itself(home, store):
    """Two creators at once meet in the index, not in a check before it."""
    key, _ = store.create("ci", ["admin"], author="anna")
    engine = open_database(home)
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as db:
        db.exec_driver_sql("INSERT INTO api_keys SELECT 'ffffffffffff', name, hash, scopes, author, created, expires, "
                           "revoked FROM api_keys")  # fmt: skip
    engine.dispose()
    assert store.all() == [key]
