"""One database for three parts: which one, made once by many at a time, upgraded in place, refused when it is newer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from plait.database import Schema, database_url, has_database, open_database, prepare
from plait.errors import SettingsError, StoreError
from plait.models import ModelRegistry
from plait.settings import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait")


def schema(version: int, *columns: str, upgrades: dict[int, tuple[str, ...]] | None = None) -> Schema:
    metadata = sa.MetaData()
    sa.Table(
        "things", metadata, sa.Column("id", sa.Integer, primary_key=True), *(sa.Column(c, sa.Text) for c in columns)
    )
    return Schema(part="things", version=version, metadata=metadata, upgrades=upgrades or {})


FIRST = schema(1, "name")
SECOND = schema(2, "name", "owner", upgrades={1: ("ALTER TABLE things ADD COLUMN owner TEXT",)})


def test_the_variable_names_the_database_else_it_is_the_homes_file(home, monkeypatch):
    monkeypatch.delenv("PLAIT_DATABASE_URL", raising=False)
    assert database_url(home) == f"sqlite:///{home.plait_db}"
    assert not has_database(home)
    monkeypatch.setenv("PLAIT_DATABASE_URL", "sqlite:////elsewhere/plait.db")
    assert database_url(home) == "sqlite:////elsewhere/plait.db"
    assert has_database(home)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("plait.db", "is no database URL; write it like postgresql://"),
        ("postgres+nodriver://h/d", "names no database that SQLAlchemy knows"),
        ("oracle+cx_oracle://h/d", "Python has no cx_Oracle; pip install"),
    ],
)
def test_a_url_that_cannot_be_is_one_clear_line_without_the_password(home, url, message):
    with pytest.raises(SettingsError, match=message) as caught:
        open_database(home, url)
    assert "\n" not in str(caught.value)


def test_a_password_is_in_no_message(home, find_port):
    pytest.importorskip("psycopg")
    registry = ModelRegistry(home, f"postgres://plait:s3cret@127.0.0.1:{find_port()}/plait")
    with pytest.raises(StoreError, match="the model registry does not answer") as caught:
        registry.names()
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.postgres
def test_no_statement_waits_for_ever_unless_the_url_says_so(home, postgres):
    url = postgres.new_database()
    for given, expected in ((url, "1min"), (f"{url}?options=-c%20statement_timeout%3D7s", "7s")):
        engine = open_database(home, given)
        with engine.connect() as db:
            assert db.exec_driver_sql("SHOW statement_timeout").scalar() == expected
        engine.dispose()


def test_many_processes_at_once_make_the_tables_once(home, database):
    barrier, errors = threading.Barrier(8), []

    def start() -> None:
        engine = open_database(home)
        barrier.wait(timeout=20)
        try:
            prepare(engine, FIRST)
        except Exception as error:
            errors.append(error)
        engine.dispose()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []


@pytest.mark.parametrize("stamped", [True, False])
def test_an_older_layout_is_upgraded_in_place_and_keeps_its_rows(home, database, stamped):
    engine = open_database(home)
    if stamped:
        prepare(engine, FIRST)
    else:  # as before layouts were stamped
        FIRST.metadata.create_all(engine)
    with engine.begin() as db:
        db.exec_driver_sql("INSERT INTO things (id, name) VALUES (1, 'one')")
    prepare(engine, SECOND)
    prepare(engine, SECOND)
    with engine.connect() as db:
        assert db.execute(sa.select(SECOND.metadata.tables["things"])).all() == [(1, "one", None)]
    engine.dispose()


def test_an_upgrade_that_fails_leaves_the_old_layout(home, database):
    engine = open_database(home)
    prepare(engine, FIRST)
    broken = schema(3, "name", upgrades={1: ("ALTER TABLE things ADD COLUMN owner TEXT",), 2: ("ALTER TABLE nothing",)})
    with pytest.raises(sa.exc.SQLAlchemyError):
        prepare(engine, broken)
    assert [column["name"] for column in sa.inspect(engine).get_columns("things")] == ["id", "name"]
    prepare(engine, FIRST)
    engine.dispose()


def test_tables_of_a_later_plait_are_refused_and_left_alone(home, database):
    engine = open_database(home)
    prepare(engine, SECOND)
    with pytest.raises(StoreError, match="layout 2, made by a later Plait; this one knows layout 1: upgrade it"):
        prepare(engine, FIRST)
    prepare(engine, SECOND)
    engine.dispose()


def test_a_table_added_to_a_part_is_made_in_a_database_that_has_the_others(home, database):
    engine = open_database(home)
    prepare(engine, FIRST)
    sa.Table("more", (wider := schema(1, "name")).metadata, sa.Column("id", sa.Integer, primary_key=True))
    prepare(engine, wider)
    assert "more" in sa.inspect(engine).get_table_names()
    engine.dispose()


def test_a_registry_of_the_first_layout_learns_who_promotes(home, database):
    engine = open_database(home)
    with engine.begin() as db:
        ModelRegistry(home)  # reaches nothing yet
        db.exec_driver_sql(
            "CREATE TABLE model_alias_moves (id INTEGER PRIMARY KEY, name VARCHAR(100) NOT NULL, alias VARCHAR(100) "
            "NOT NULL, version INTEGER NOT NULL, moved TIMESTAMP NOT NULL, undone BOOLEAN NOT NULL)"
        )
        moved = "INSERT INTO model_alias_moves VALUES (1, 'm', 'champion', 1, '2026-03-01 00:00:00', false)"
        db.exec_driver_sql(moved)
    registry = ModelRegistry(home)
    assert [(move.version, move.author, move.undone) for move in registry.moves("m")] == [("1", None, False)]
    registry.close()
    engine.dispose()
