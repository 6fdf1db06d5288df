"""Where configurations are kept: every version, with author, time, note and diff, in one table.

A version is written once and never changed; the newest is the live one. Writing names the version it was based on, so
of two writers one wins and the other is told (optimistic locking, by the primary key). Rolling back writes an old
document as a new version: versions only count up, whatever the clock does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from experiments.diff import diff_documents
from experiments.live import LiveConfig
from experiments.snapshot import Snapshot
from experiments.source import Source
from experiments.sticky import StickyStore
from experiments.tables import SCHEMA, config_versions
from experiments.validate import load
from plait.database import database_url, in_utc, open_database, prepare, unreachable
from plait.errors import SpecError, StoreError, UnknownNameError
from plait.settings import Home

__all__ = ["ConfigStore", "ConfigVersion", "ConflictError", "LiveConfig"]

logger = logging.getLogger("experiments")
_KILL_TRIES = 10


class ConflictError(StoreError):
    """Somebody else wrote a version in between: read it, and decide again."""


class NoVersionError(StoreError):
    """A version was asked for that was never written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigVersion:
    """One version as it was written. origin: apply, api, rollback or kill. `diff` is against the version before."""

    version: int
    created: datetime
    author: str
    origin: str
    note: str
    digest: str
    document: Mapping[str, Any]
    diff: tuple[str, ...]


class ConfigStore:
    """Versions of the experiments' configuration in one database; it is reached on first use, not when made."""

    def __init__(self, url: str, *, home: Home | None = None, now: Callable[[], datetime] | None = None) -> None:
        self.home, self._now = home, now or (lambda: datetime.now(UTC))
        self.engine = open_database(home, url)
        self._ready = False

    @classmethod
    def at(cls, home: Home, url: str | None = None) -> ConfigStore:
        """The store of a home: in its plait.db, in PLAIT_DATABASE_URL, or in the database `url`."""
        return cls(url or database_url(home), home=home)

    def head(self) -> ConfigVersion | None:
        """The live version; None if there is none yet. StoreError if the database does not answer."""
        newest = sa.select(config_versions).order_by(config_versions.c.version.desc()).limit(1)
        row = self._read(newest).first()
        return _version(row) if row else None

    def head_key(self) -> tuple[int, str] | None:
        """(version, digest) of the live version: what a poll compares."""
        columns = sa.select(config_versions.c.version, config_versions.c.digest)
        row = self._read(columns.order_by(config_versions.c.version.desc()).limit(1)).first()
        return (row.version, row.digest) if row else None

    def get(self, version: int) -> ConfigVersion:
        """One version. NoVersionError if it does not exist."""
        row = self._read(sa.select(config_versions).where(config_versions.c.version == version)).first()
        if row is None:
            head = self.head_key()
            known = f"there are 1 to {head[0]}" if head else "there is none yet"
            raise NoVersionError(f"no version {version} of the experiments' configuration; {known}")
        return _version(row)

    def history(self, limit: int = 100, *, before: int | None = None) -> list[ConfigVersion]:
        """The newest versions (older than `before`), newest first; one whose document cannot be read any more has an
        empty one."""
        query = sa.select(config_versions).order_by(config_versions.c.version.desc()).limit(limit)
        rows = self._read(query if before is None else query.where(config_versions.c.version < before))
        return [_version(row, damaged_ok=True) for row in rows]

    def latest(self) -> ConfigVersion | None:
        """The live version even if it is damaged: a good one must always be able to follow it."""
        return next(iter(self.history(limit=1)), None)

    def apply(
        self,
        document: Mapping[str, Any] | Source,
        *,
        author: str,
        expected: int | None = None,
        models: Collection[str] | None = None,
        note: str = "",
        origin: str = "api",
    ) -> ConfigVersion:
        """Make `document` the live configuration, as a whole or not at all.

        expected: the version it was based on (0: none yet); None takes the present one. Raises ConfigError with every
        fault, ConflictError if the live version is another (or becomes one meanwhile), StoreError without database.
        A document equal to the live one writes nothing and returns the live version.
        """
        source = document if isinstance(document, Source) else Source(dict(document))
        load(source, models=models)
        if not author.strip():
            raise SpecError("a change needs an author; give your name or e-mail address")
        head = self.latest()
        present = head.version if head else 0
        if expected is not None and expected != present:
            raise ConflictError(f"based on version {expected}, but {_who(head)} is live; look at it and apply again")
        text = json.dumps(source.document, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SpecError("the configuration holds half a character (a lone surrogate); write it as UTF-8") from error
        digest = hashlib.sha256(json.dumps(source.document, sort_keys=True).encode()).hexdigest()
        if head is not None and head.digest == digest:
            return head
        row = {
            "version": present + 1,
            # a clock that jumped back must not make history run backwards
            "created": max(self._now(), head.created) if head else self._now(),
            "author": author.strip()[:200],
            "origin": origin,
            "note": note,
            "digest": digest,
            "document": text,
            "diff": "\n".join(diff_documents(head.document if head else {}, source.document)),
        }
        try:
            with self._connection() as db, db.begin():
                db.execute(config_versions.insert().values(**row))
        except sa.exc.IntegrityError as error:
            raise ConflictError(
                f"{_who(self.latest())} was written at the same moment; look at it and apply again"
            ) from error
        except sa.exc.SQLAlchemyError as error:
            raise _unreachable(error) from error
        return self.get(present + 1)

    def rollback(
        self,
        version: int,
        *,
        author: str,
        expected: int | None = None,
        models: Collection[str] | None = None,
        note: str = "",
    ) -> ConfigVersion:
        """Make an old version's document live again, as a new version. It is checked like any other; expected: the
        version that was live when this was decided (default: the present one)."""
        old, head = self.get(version), self.head_key()
        present = head[0] if head else 0
        return self.apply(
            old.document,
            author=author,
            expected=present if expected is None else expected,
            models=models,
            note=note or f"back to version {version}",
            origin="rollback",
        )

    def kill(self, experiment: str | None, *, author: str, note: str = "") -> ConfigVersion:
        """Stop one experiment, or with None everything, at once. A kill must always work: models are not checked, and
        if somebody writes a version at the same moment, that one is killed too."""
        for _ in range(_KILL_TRIES - 1):
            try:
                return self._kill(experiment, author=author, note=note)
            except ConflictError:
                logger.info("experiments: killing again, over a version that was just written")
        return self._kill(experiment, author=author, note=note)

    def _kill(self, experiment: str | None, *, author: str, note: str) -> ConfigVersion:
        head = self.head()
        if head is None:
            raise StoreError("no configuration was applied yet; run `plait experiments apply` first")
        document = json.loads(json.dumps(head.document))
        if experiment is None:
            document["enabled"] = False
        else:
            known = document.get("experiments") or {}
            if experiment not in known:
                raise UnknownNameError("experiment", experiment, known)
            known[experiment]["state"] = "stopped"
            _drop_dependents(known, experiment)
        return self.apply(document, author=author, expected=head.version, note=note or "killed", origin="kill")

    def snapshot(self) -> Snapshot | None:
        """The live version, compiled and bound to this store's sticky arms; None if there is none yet."""
        head = self.head()
        return Snapshot.of(head.document, version=head.version, sticky=self.sticky()) if head else None

    def sticky(self) -> StickyStore:
        """The store of sticky arms in the same database."""
        return StickyStore(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    # -- database ---------------------------------------------------------------------------------------------------

    def _read(self, query: sa.Select[Any]) -> sa.Result[Any]:
        try:
            with self._connection() as db:
                return db.execute(query).freeze()()
        except sa.exc.SQLAlchemyError as error:
            raise _unreachable(error) from error

    def _connection(self) -> sa.Connection:
        if not self._ready:
            prepare(self.engine, SCHEMA)
            self._ready = True
        return self.engine.connect()


def _drop_dependents(experiments: dict[str, Any], stopped: str) -> None:
    """Stop, too, what requires a stopped experiment: nobody could be in it any more."""
    for name, raw in experiments.items():
        if raw["state"] != "stopped" and any(need["experiment"] == stopped for need in raw.get("requires", ())):
            raw["state"] = "stopped"
            _drop_dependents(experiments, name)


def _who(version: ConfigVersion | None) -> str:
    return f"version {version.version} by {version.author}" if version else "no version"


def _unreachable(error: Exception) -> StoreError:
    return unreachable("the experiment store", error)


def _version(row: Any, *, damaged_ok: bool = False) -> ConfigVersion:
    try:
        document = json.loads(row.document)
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__}, not a mapping")
    except ValueError as error:
        if not damaged_ok:
            raise StoreError(
                f"version {row.version} of the experiments' configuration cannot be read ({error}); "
                "apply a good one, or `plait experiments rollback VERSION`"
            ) from error
        document = {}
    return ConfigVersion(
        version=row.version,
        created=in_utc(row.created),
        author=row.author,
        origin=row.origin,
        note=row.note,
        digest=row.digest,
        document=document,
        diff=tuple(row.diff.splitlines()),
    )
