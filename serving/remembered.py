"""The model registry as a server asks it: what each name meant last is kept on disk, for when the database is gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import StoreError
from plait.files import write_atomically
from plait.models import ModelRegistry, ModelVersion
from plait.settings import Home

logger = logging.getLogger("serving")


@dataclass(frozen=True, kw_only=True, slots=True)
class RememberedVersion:
    """What is left of a version while the registry does not answer."""

    name: str
    version: str
    path: Path


class RememberedRegistry:
    """A ModelRegistry whose `resolve` outlives its database; everything else raises StoreError then."""

    def __init__(self, registry: ModelRegistry, file: Path) -> None:
        self._registry, self._file = registry, file
        self._known = read_remembered(file)

    def resolve(self, ref: str) -> ModelVersion | RememberedVersion:
        """The version that `ref` means, or meant when the registry last answered. RegistryError, StoreError."""
        try:
            found = self._registry.resolve(ref)
        except StoreError:
            if ref not in self._known:
                raise
            name, version = self._known[ref]
            path = self._registry.home.models / name / version
            return RememberedVersion(name=name, version=version, path=path)
        if self._known.get(ref) != (found.name, found.version):
            # other workers write here too
            self._known = {**read_remembered(self._file), **self._known, ref: (found.name, found.version)}
            try:
                write_atomically(self._file, json.dumps(self._known, indent=1).encode())
            except OSError as error:
                logger.warning("what models' names mean could not be kept on disk: %s", error)
        return found

    def names(self) -> list[str]:
        return self._registry.names()

    def versions(self, name: str) -> Sequence[ModelVersion]:
        return self._registry.versions(name)

    def references(self) -> set[str]:
        return self._registry.references()

    def promote(self, name: str, version: str, alias: str, *, author: str | None = None) -> ModelVersion:
        return self._registry.promote(name, version, alias, author=author)

    def rollback(self, name: str, alias: str) -> ModelVersion:
        return self._registry.rollback(name, alias)

    def close(self) -> None:
        self._registry.close()


def remembered_file(home: Home) -> Path:
    """Where a server keeps what models' names meant last."""
    return home.root / "models-last-good.json"


def read_remembered(file: Path) -> dict[str, tuple[str, str]]:
    """{reference: (name, version)} as it was kept; empty if nothing was, or nothing of use."""
    if not file.exists():
        return {}
    try:
        saved: Any = json.loads(file.read_bytes())
        return {str(ref): (str(name), str(version)) for ref, (name, version) in saved.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.error("%s cannot be used: %r", file, error)
        return {}
