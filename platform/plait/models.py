"""The model registry: versions of artifacts, the aliases that name them, and what each alias pointed at before.

A version is a folder models/NAME/VERSION (an artifact) and a row; the row is written after the folder is in place, so
whoever sees a version can load it. Aliases move in one transaction; `rollback` moves one back along its history.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from plait.clock import Clock
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


class ModelRegistry:
    """The registry of one home. `url`: an SQLAlchemy URL; default SQLite in the home's plait.db."""

    def __init__(self, home: Home, url: str | None = None) -> None:
        home.create()
        self.home = home
        self._clock = Clock.of(home)
        self._engine = sa.create_engine(url or f"sqlite:///{home.plait_db}", connect_args=_patience(url))
        _metadata.create_all(self._engine)

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
        with self._engine.begin() as db:
            db.execute(
                _versions.insert().values(name=name, version=version, created=self._clock.now(), manifest=manifest)
            )
        if alias:
            self.promote(name, str(version), alias)
        return self.get(name, str(version))

    def _claim(self, folder: Path) -> int:
        """The next free version, claimed by making its (empty) folder, which two processes cannot both do."""
        while True:
            taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
            version = max(taken, default=0) + 1
            try:
                (folder / str(version)).mkdir()
            except FileExistsError:
                continue
            return version

    def names(self) -> list[str]:
        with self._engine.connect() as db:
            return sorted(db.execute(sa.select(_versions.c.name).distinct()).scalars())

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of `name`, oldest first. RegistryError, with a suggestion, if there is none."""
        with self._engine.connect() as db:
            rows = db.execute(sa.select(_versions).where(_versions.c.name == name).order_by(_versions.c.version)).all()
            aliases = self._aliases(db, name)
        if not rows:
            raise RegistryError(f"no model {name!r} in the registry; {did_you_mean(name, self.names())}")
        return [
            ModelVersion(
                name=name,
                version=str(row.version),
                path=self.home.models / name / str(row.version),
                created=row.created.replace(tzinfo=UTC),
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

    def promote(self, name: str, version: str, alias: str = CHAMPION) -> ModelVersion:
        """Point `alias` at a version; servers that follow the alias pick it up within seconds."""
        model = self.get(name, version)
        if not _NAME.fullmatch(alias):
            raise SpecError(f"{alias!r} cannot be an alias; use letters, digits, '.', '_' and '-'")
        if alias in model.aliases:
            return model
        with self._engine.begin() as db:
            db.execute(
                _alias_moves.insert().values(
                    name=name, alias=alias, version=int(version), moved=self._clock.now(), undone=False
                )
            )
        return self.get(name, version)

    def rollback(self, name: str, alias: str = CHAMPION) -> ModelVersion:
        """Point `alias` at what it named before. RegistryError if it never named anything else."""
        self.versions(name)  # an unknown name gets its own message
        with self._engine.begin() as db:
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

    def _aliases(self, db: sa.Connection, name: str) -> dict[str, int]:
        moves = db.execute(
            sa.select(_alias_moves.c.alias, _alias_moves.c.version)
            .where(_alias_moves.c.name == name, ~_alias_moves.c.undone)
            .order_by(_alias_moves.c.id)
        )
        return {move.alias: move.version for move in moves}


def _patience(url: str | None) -> dict[str, Any]:
    """SQLite waits for another writer instead of failing at once."""
    return {"timeout": 30} if url is None or url.startswith("sqlite") else {}
