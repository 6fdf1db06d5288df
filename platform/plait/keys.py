"""API keys: who may ask the server for what. The database holds a hash of each, never the key.

A key is `plait_ID_SECRET`. The ID finds its row; the SECRET has 256 random bits, so that one SHA-256 is as good a hash
as a slow one: there is nothing to guess. Keys are shown once, may expire, and are revoked by name or id.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from plait.database import Schema, in_utc, open_database, prepare, unreachable
from plait.errors import RegistryError, SpecError, UnknownNameError, did_you_mean
from plait.settings import Home

SCOPES = ("predict", "events", "admin")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@+-]{0,99}")
_TOKEN = re.compile(r"plait_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")

_metadata = sa.MetaData()
_keys = sa.Table(
    "api_keys",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(100), nullable=False),
    sa.Column("author", sa.String(200), nullable=False),
    sa.Column("created", sa.DateTime(timezone=True), nullable=False),
    sa.Column("expires", sa.DateTime(timezone=True)),
    sa.Column("revoked", sa.DateTime(timezone=True)),
)
# a name says who did something, so at any time one key has it
_unrevoked = _keys.c.revoked.is_(None)
sa.Index("api_keys_name", _keys.c.name, unique=True, sqlite_where=_unrevoked, postgresql_where=_unrevoked)
SCHEMA = Schema(part="keys", version=1, metadata=_metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """One key as it is kept. `hash`: SHA-256 of the whole key, hexadecimal; `author`: who made it."""

    id: str
    name: str
    hash: str
    scopes: tuple[str, ...]
    author: str
    created: datetime
    expires: datetime | None
    revoked: datetime | None

    def usable(self, now: datetime) -> bool:
        """Neither revoked nor expired at `now` (aware)."""
        return self.revoked is None and (self.expires is None or now < self.expires)


def read_token(token: str) -> tuple[str, str] | None:
    """(id, hash) of a key as a client sends it; None if it does not look like one."""
    found = _TOKEN.fullmatch(token)
    return (found[1], hashlib.sha256(token.encode()).hexdigest()) if found else None


class KeyStore:
    """The keys of one home's database. Times are the wall's: a replayed clock must not revive an expired key.

    Every method raises StoreError if the database does not answer.
    """

    def __init__(self, home: Home, url: str | None = None) -> None:
        self._engine = open_database(home, url)
        self._ready = False

    def create(
        self, name: str, scopes: Collection[str], *, author: str, expires: datetime | None = None
    ) -> tuple[ApiKey, str]:
        """A new key, and its token, which is kept nowhere. SpecError for a bad name, scope, or a time that is past."""
        if not _NAME.fullmatch(name):
            raise SpecError(f"{name!r} cannot name a key; use letters, digits, spaces and . _ @ + -, at most 100")
        if not scopes:
            raise SpecError(f"key {name!r} needs a scope; there are {', '.join(SCOPES)}")
        for scope in scopes:
            if scope not in SCOPES:
                raise UnknownNameError("scope", scope, SCOPES)
        now = datetime.now(UTC)
        if expires is not None and expires <= now:
            raise SpecError(f"key {name!r} would have expired already, at {expires:%Y-%m-%d %H:%M}Z")
        key_id = secrets.token_hex(6)
        token = f"plait_{key_id}_{secrets.token_urlsafe(32)}"
        key = ApiKey(
            id=key_id,
            name=name,
            hash=hashlib.sha256(token.encode()).hexdigest(),
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            author=author,
            created=now,
            expires=expires,
            revoked=None,
        )
        row = {field: getattr(key, field) for field in ApiKey.__slots__} | {"scopes": " ".join(key.scopes)}
        try:
            with self._begin() as db:
                db.execute(_keys.insert().values(row))
        except sa.exc.IntegrityError as error:
            raise SpecError(
                f"there is a key {name!r} already; `plait keys revoke` it, or choose another name"
            ) from error
        return key, token

    def all(self) -> list[ApiKey]:
        """Every key, revoked ones too, oldest first."""
        with self._begin() as db:
            rows = db.execute(sa.select(_keys).order_by(_keys.c.created, _keys.c.id)).all()
        return [_key(row) for row in rows]

    def usable(self) -> list[ApiKey]:
        """The keys that are neither revoked nor expired."""
        with self._begin() as db:
            rows = db.execute(sa.select(_keys).where(_unrevoked)).all()
        now = datetime.now(UTC)
        return [key for key in map(_key, rows) if key.usable(now)]

    def revoke(self, name_or_id: str) -> ApiKey:
        """End a key. RegistryError, with a suggestion, if no unrevoked key goes by it."""
        with self._begin() as db:
            named = sa.and_(_unrevoked, sa.or_(_keys.c.name == name_or_id, _keys.c.id == name_or_id))
            rows = db.execute(sa.select(_keys).where(named)).all()
            # a key may be called what is another one's id: the name means the key
            row = next((row for row in rows if row.name == name_or_id), rows[0] if rows else None)
            if row is None:
                known = db.execute(sa.select(_keys.c.name).where(_unrevoked)).scalars()
                raise RegistryError(f"no key {name_or_id!r} to revoke; {did_you_mean(name_or_id, known)}")
            now = datetime.now(UTC)
            db.execute(_keys.update().where(_keys.c.id == row.id).values(revoked=now))
        return _key(row, revoked=now)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        try:
            if not self._ready:
                prepare(self._engine, SCHEMA)
                self._ready = True
            with self._engine.begin() as db:
                yield db
        except sa.exc.IntegrityError:
            raise
        except sa.exc.SQLAlchemyError as error:
            raise unreachable("the database of API keys", error) from error


def _key(row: sa.Row[tuple[object, ...]], *, revoked: datetime | None = None) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        hash=row.hash,
        scopes=tuple(row.scopes.split()),
        author=row.author,
        created=in_utc(row.created),
        expires=in_utc(row.expires) if row.expires else None,
        revoked=revoked or (in_utc(row.revoked) if row.revoked else None),
    )
