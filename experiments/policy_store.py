"""What bandits have learned: every policy as a numbered version, in the database that holds the configuration.

A version is written once and never changed; the newest of an experiment is the live one. A policy equal to the live
one writes nothing, so that learning twice from the same log leaves one version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from experiments.tables import SCHEMA, policy_versions
from plait.database import first_line, in_utc, prepare
from plait.errors import StoreError

KEPT = 1_000
"""Versions kept of each experiment; older ones are deleted as new ones come."""

PolicyKey = tuple[tuple[str, int, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyVersion:
    """One policy as it was learned."""

    experiment: str
    version: int
    created: datetime
    author: str
    document: Mapping[str, Any]


class PolicyStore:
    """Policies in one database; it is reached on first use. Every method raises StoreError if it does not answer."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine, self._made = engine, False

    def keys(self, experiments: Collection[str]) -> PolicyKey:
        """(experiment, version, digest) of the live policies of `experiments`: what a poll compares."""
        p = policy_versions.c
        newest = sa.select(p.experiment, sa.func.max(p.version).label("version")).group_by(p.experiment).subquery()
        query = sa.select(p.experiment, p.version, p.digest).join(
            newest, sa.and_(p.experiment == newest.c.experiment, p.version == newest.c.version)
        )
        rows = self._read(query.where(p.experiment.in_(sorted(experiments))).order_by(p.experiment))
        return tuple((row.experiment, row.version, row.digest) for row in rows)

    def get(self, experiment: str, version: int | None = None) -> PolicyVersion | None:
        """One policy, by default the live one; None if there is none. StoreError if it is damaged."""
        p = policy_versions.c
        query = sa.select(policy_versions).where(p.experiment == experiment)
        if version is not None:
            query = query.where(p.version == version)
        row = self._read(query.order_by(p.version.desc()).limit(1)).first()
        return _version(row) if row else None

    def history(self, experiment: str, limit: int = 100) -> list[PolicyVersion]:
        """The newest policies, newest first."""
        p = policy_versions.c
        query = sa.select(policy_versions).where(p.experiment == experiment).order_by(p.version.desc()).limit(limit)
        return [_version(row) for row in self._read(query)]

    def put(self, experiment: str, document: Mapping[str, Any], *, author: str, at: datetime) -> tuple[int, bool]:
        """Make `document` the live policy; (its version, whether it is new). Two learners at once: one writes.

        StoreError if another policy was written at the same moment.
        """
        text = json.dumps(document, ensure_ascii=False, sort_keys=True, allow_nan=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        live = self.keys([experiment])
        if live and live[0][2] == digest:
            return live[0][1], False
        version = live[0][1] + 1 if live else 1
        p = policy_versions.c
        try:
            with self._connection() as db, db.begin():
                db.execute(
                    policy_versions.insert().values(
                        experiment=experiment, version=version, created=at, author=author[:200], digest=digest,
                        document=text,
                    )
                )  # fmt: skip
                db.execute(
                    policy_versions.delete().where(sa.and_(p.experiment == experiment, p.version <= version - KEPT))
                )
        except sa.exc.IntegrityError as error:
            raise StoreError(f"policy {version} of {experiment} was just written by another learner") from error
        except sa.exc.SQLAlchemyError as error:
            raise _unreachable(error) from error
        return version, True

    def _read(self, query: sa.Select[Any]) -> sa.Result[Any]:
        try:
            with self._connection() as db:
                return db.execute(query).freeze()()
        except sa.exc.SQLAlchemyError as error:
            raise _unreachable(error) from error

    def _connection(self) -> sa.Connection:
        if not self._made:
            prepare(self._engine, SCHEMA)
            self._made = True
        return self._engine.connect()


def _unreachable(error: Exception) -> StoreError:
    return StoreError(f"the store of policies does not answer ({first_line(error)})")


def _version(row: Any) -> PolicyVersion:
    try:
        document = json.loads(row.document)
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__}, not a mapping")
    except ValueError as error:
        raise StoreError(f"policy {row.version} of {row.experiment} cannot be read ({error}); learn again") from error
    return PolicyVersion(
        experiment=row.experiment,
        version=row.version,
        created=in_utc(row.created),
        author=row.author,
        document=document,
    )
