"""The model registry: versions of artifacts, the aliases that name them, and what each alias pointed at before.

A version is a folder models/NAME/VERSION (an artifact) and a row; the row is written after the folder is in place, so
whoever sees a version can load it. Aliases move in one transaction; `rollback` moves one back along its history.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from plait.clock import Clock
from plait.database import Schema, in_utc, open_database, prepare, unreachable
from plait.errors import RegistryError, SpecError, did_you_mean
from plait.files import fsync_folder
from plait.settings import Home

CHAMPION = "champion"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

_metadata = sa.MetaData()
_versions = sa.Table(
    "model_versions",
    _metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("created", sa.DateTime(timezone=True), nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
)
_alias_moves = sa.Table(
    "model_alias_moves",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(100), nullable=False, index=True),
    sa.Column("alias", sa.String(100), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("moved", sa.DateTime(timezone=True), nullable=False),
    sa.Column("undone", sa.Boolean, nullable=False, default=False),
    sa.Column("author", sa.String(200)),
)
SCHEMA = Schema(
    part="models",
    version=2,
    metadata=_metadata,
    upgrades={1: ("ALTER TABLE model_alias_moves ADD COLUMN author VARCHAR(200)",)},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """One registered artifact. `version` counts up from "1" within a name."""

    name: str
    version: str
    path: Path
    created: datetime
    manifest: Mapping[str, Any]
    aliases: tuple[str, ...]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest.get("metrics", {})

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AliasMove:
    """One move of an alias. author: who promoted, or None where nobody said; undone: a rollback took it back."""

    alias: str
    version: str
    moved: datetime
    author: str | None
    undone: bool


class ModelRegistry:
    """The registry of one home, reached on first use; its artifacts lie in the home.

    url: an SQLAlchemy URL; default PLAIT_DATABASE_URL, else SQLite in the home's plait.db. Every method raises
    StoreError if the database does not answer.
    """

    def __init__(self, home: Home, url: str | None = None) -> None:
        home.create()
        self.home = home
        self._clock = Clock.of(home)
        self._engine = open_database(home, url)
        self._ready = False

    def register(self, name: str, staged: Path, *, alias: str | None = CHAMPION) -> ModelVersion:
        """Take the artifact folder `staged` over as the next version of `name`; it moves, nothing is copied.

        The artifact is loaded and must reproduce its golden rows first. `alias` then points at it; None leaves
        aliases alone. Raises SpecError for a name that cannot be a folder, ArtifactError for a bad artifact.
        """
        from plait.artifacts import load_artifact

        if not _NAME.fullmatch(name):
            raise SpecError(f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-'")
        load_artifact(staged, verify=True)
        manifest = (staged / "manifest.json").read_text()
        folder = self.home.models / name
        folder.mkdir(parents=True, exist_ok=True)
        version = self._claim(folder)
        target = folder / str(version)
        staged.rename(target)
        fsync_folder(folder)
        with self._begin() as db:
            db.execute(
                _versions.insert().values(name=name, version=version, created=self._clock.now(), manifest=manifest)
            )
        if alias:
            self.promote(name, str(version), alias)
        return self.get(name, str(version))

    def _claim(self, folder: Path) -> int:
        """The next free version, claimed by making its (empty) folder, which two processes cannot both do."""
        while True:
            with self._begin() as db:  # a restored database may know more than the folder
                known = sa.select(sa.func.max(_versions.c.version)).where(_versions.c.name == folder.name)
                taken = [db.execute(known).scalar() or 0]
            taken += [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
            version = max(taken) + 1
            try:
                (folder / str(version)).mkdir()
            except FileExistsError:
                continue
            return version

    def names(self) -> list[str]:
        with self._begin() as db:
            return sorted(db.execute(sa.select(_versions.c.name).distinct()).scalars())

    def references(self) -> set[str]:
        """Everything that names a registered model: NAME, NAME:VERSION and NAME@ALIAS."""
        found: set[str] = set()
        for name in self.names():
            for model in self.versions(name):
                found |= {name, f"{name}:{model.version}", *(f"{name}@{alias}" for alias in model.aliases)}
        return found

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of `name`, oldest first. RegistryError, with a suggestion, if there is none."""
        with self._begin() as db:
            rows = db.execute(sa.select(_versions).where(_versions.c.name == name).order_by(_versions.c.version)).all()
            aliases = self._aliases(db, name)
        if not rows:
            raise RegistryError(f"no model {name!r} in the registry; {did_you_mean(name, self.names())}")
        return [
            ModelVersion(
                name=name,
                version=str(row.version),
                path=self.home.models / name / str(row.version),
                created=in_utc(row.created),
                manifest=json.loads(row.manifest),
                aliases=tuple(sorted(alias for alias, version in aliases.items() if version == row.version)),
            )
            for row in rows
        ]

    def get(self, name: str, version: str) -> ModelVersion:
        found = {model.version: model for model in self.versions(name)}
        if version not in found:
            raise RegistryError(f"no version {version!r} of model {name!r}; there are {', '.join(found)}")
        return found[version]

    def resolve(self, reference: str) -> ModelVersion:
        """The version that `NAME`, `NAME:VERSION` or `NAME@ALIAS` means now; a bare name means its champion."""
        name, colon, version = reference.partition(":")
        if colon:
            return self.get(name, version)
        name, _, alias = reference.partition("@")
        alias = alias or CHAMPION
        models = self.versions(name)
        for model in models:
            if alias in model.aliases:
                return model
        known = sorted({known for model in models for known in model.aliases})
        raise RegistryError(f"no alias {alias!r} of model {name!r}; {did_you_mean(alias, known)}")

    def moves(self, name: str) -> list[AliasMove]:
        """How the aliases of `name` moved, newest first."""
        with self._begin() as db:
            rows = db.execute(
                sa.select(_alias_moves).where(_alias_moves.c.name == name).order_by(_alias_moves.c.id.desc())
            ).all()
        return [
            AliasMove(
                alias=row.alias,
                version=str(row.version),
                moved=in_utc(row.moved),
                author=row.author,
                undone=row.undone,
            )
            for row in rows
        ]

    def promote(self, name: str, version: str, alias: str = CHAMPION, *, author: str | None = None) -> ModelVersion:
        """Point `alias` at a version; servers that follow the alias pick it up within seconds."""
        model = self.get(name, version)
        if not _NAME.fullmatch(alias):
            raise SpecError(f"{alias!r} cannot be an alias; use letters, digits, '.', '_' and '-'")
        if alias in model.aliases:
            return model
        with self._begin() as db:
            db.execute(
                _alias_moves.insert().values(
                    name=name, alias=alias, version=int(version), moved=self._clock.now(), undone=False, author=author
                )
            )
        return self.get(name, version)

    def rollback(self, name: str, alias: str = CHAMPION) -> ModelVersion:
        """Point `alias` at what it named before. RegistryError if it never named anything else."""
        self.versions(name)  # an unknown name gets its own message
        with self._begin() as db:
            live = db.execute(
                sa.select(_alias_moves.c.id, _alias_moves.c.version)
                .where(_alias_moves.c.name == name, _alias_moves.c.alias == alias, ~_alias_moves.c.undone)
                .order_by(_alias_moves.c.id.desc())
                .limit(2)
            ).all()
            if len(live) < 2:
                raise RegistryError(f"{name}@{alias} has no earlier version to go back to")
            db.execute(_alias_moves.update().where(_alias_moves.c.id == live[0].id).values(undone=True))
        return self.get(name, str(live[1].version))

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        """A transaction on tables that are there."""
        try:
            if not self._ready:
                prepare(self._engine, SCHEMA)
                self._ready = True
            with self._engine.begin() as db:
                yield db
        except sa.exc.SQLAlchemyError as error:
            raise unreachable("the model registry", error) from error

    def _aliases(self, db: sa.Connection, name: str) -> dict[str, int]:
        moves = db.execute(
            sa.select(_alias_moves.c.alias, _alias_moves.c.version)
            .where(_alias_moves.c.name == name, ~_alias_moves.c.undone)
            .order_by(_alias_moves.c.id)
        )
        return {move.alias: move.version for move in moves}
