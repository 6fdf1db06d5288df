"""The database of the model registry, the experiments' configuration and the API keys.

SQLite in the home's plait.db, or whatever PLAIT_DATABASE_URL names (PostgreSQL, for more than one machine): the same
tables. Each part's tables carry the version of their layout; an older one is brought up to date in one transaction
when it is first met, a newer one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from plait.errors import SettingsError, StoreError
from plait.settings import Home

VARIABLE = "PLAIT_DATABASE_URL"
_PATIENCE_S = 30  # how long a writer waits for another one of the same SQLite file
_CONNECT_S = 5  # how long a database server may take to answer
# A server that vanished from the network is noticed in seconds, and no statement waits for a lock for ever.
_POSTGRES = {
    "connect_timeout": _CONNECT_S,
    "application_name": "plait",
    "keepalives_idle": _CONNECT_S,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 1000 * _CONNECT_S,
    "options": "-c statement_timeout=60s -c lock_timeout=30s",
}
_ADVISORY_LOCK = 0x706C616974  # "plait": held while tables are made, so that of many processes one makes them

_stamps = sa.Table(
    "plait_schema",
    sa.MetaData(),
    sa.Column("part", sa.String(40), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The tables of one part. upgrades[n]: the statements that lead from layout n to n + 1, plain enough for both."""

    part: str
    version: int
    metadata: sa.MetaData
    upgrades: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def database_url(home: Home) -> str:
    """PLAIT_DATABASE_URL, else the SQLite file of the home."""
    return os.environ.get(VARIABLE) or f"sqlite:///{home.plait_db}"


def database_name(home: Home) -> str:
    """The database as messages may call it: without its password."""
    return sa.make_url(database_url(home)).render_as_string(hide_password=True).removeprefix("sqlite:///")


def has_database(home: Home) -> bool:
    """Whether there is anything to ask yet: a home that nothing was written to has no SQLite file."""
    return bool(os.environ.get(VARIABLE)) or home.plait_db.exists()


def open_database(home: Home | None, url: str | None = None) -> sa.Engine:
    """An engine for `url` (default: database_url), connected on first use. SettingsError for a URL that cannot be."""
    given = url or (database_url(home) if home else "")
    try:
        parsed = sa.make_url(given.replace("postgres://", "postgresql://", 1))
    except sa.exc.ArgumentError as error:
        raise SettingsError(
            f"{VARIABLE} is no database URL; write it like postgresql://user:password@host:5432/plait"
        ) from error
    backend = parsed.get_backend_name()
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")  # SQLAlchemy's default driver is the one before it
    if backend == "sqlite":
        if home and parsed.database == str(home.plait_db):
            with suppress(OSError):  # the first connection says what is wrong with the folder
                home.root.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": _PATIENCE_S}}
    else:
        options = {"pool_pre_ping": True, "pool_timeout": _CONNECT_S}
        if backend == "postgresql":
            own = {key: value for key, value in _POSTGRES.items() if key not in parsed.query}
            options["connect_args"] = own  # what the URL says goes first
    try:
        return sa.create_engine(parsed, **options)
    except ModuleNotFoundError as error:
        package = "'plait[postgres]'" if backend == "postgresql" else error.name
        raise SettingsError(
            f"{VARIABLE} names a {backend} database, but Python has no {error.name}; pip install {package}"
        ) from error
    except sa.exc.SQLAlchemyError as error:
        raise SettingsError(f"{VARIABLE} names no database that SQLAlchemy knows: {first_line(error)}") from error


def prepare(engine: sa.Engine, schema: Schema) -> None:
    """Make or upgrade the part's tables. StoreError if a later Plait made them; SQLAlchemyError without database."""
    if _is_current(engine, schema):
        return
    with engine.connect() as db:
        if db.dialect.name == "sqlite":
            db.exec_driver_sql("BEGIN IMMEDIATE")  # one process makes the tables, the others wait
        elif db.dialect.name == "postgresql":
            db.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        _stamps.create(db, checkfirst=True)
        present = set(sa.inspect(db).get_table_names())
        found = db.execute(sa.select(_stamps.c.version).where(_stamps.c.part == schema.part)).scalar()
        had_tables = bool(present & schema.metadata.tables.keys())
        version = found or (1 if had_tables else schema.version)  # tables without a stamp are the first layout
        _refuse_later(schema, version)
        while version < schema.version:
            for statement in schema.upgrades[version]:
                db.exec_driver_sql(statement)
            version += 1
        schema.metadata.create_all(db)
        if found is None:
            db.execute(_stamps.insert().values(part=schema.part, version=version))
        else:
            db.execute(_stamps.update().where(_stamps.c.part == schema.part).values(version=version))
        db.commit()


def _is_current(engine: sa.Engine, schema: Schema) -> bool:
    with engine.connect() as db:
        present = set(sa.inspect(db).get_table_names())
        if not present >= {_stamps.name, *schema.metadata.tables}:
            return False
        version = db.execute(sa.select(_stamps.c.version).where(_stamps.c.part == schema.part)).scalar()
    _refuse_later(schema, version or 0)
    return version == schema.version


def _refuse_later(schema: Schema, version: int) -> None:
    if version > schema.version:
        raise StoreError(
            f"the database's tables of {schema.part} have layout {version}, made by a later Plait; this one knows "
            f"layout {schema.version}: upgrade it (pip install --upgrade plait)"
        )


def unreachable(what: str, error: Exception) -> StoreError:
    """What a database error means to whoever asked `what`."""
    return StoreError(f"{what} does not answer ({first_line(error)}); nothing was changed")


def first_line(error: Exception) -> str:
    """The first line of an error's text: drivers go on for many."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def in_utc(moment: datetime) -> datetime:
    """A stored moment, aware: SQLite forgets the zone (everything is written in UTC), PostgreSQL gives its own."""
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
