"""Scenes: the places that ask for a ranking, declared in scenes.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from plait.errors import SpecError, UnknownNameError

DEFAULT_FILE = Path(__file__).with_name("scenes.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One scene. `history_feature` may be empty: then recall.exclude_seen has no effect here."""

    name: str
    default_model: str
    description: str = ""
    max_candidates: int = 1000
    top_k: int = 100
    history_feature: str = ""
    features_timeout_ms: int = 500

    def __post_init__(self) -> None:
        for key in ("name", "default_model", "description", "history_feature"):
            if not isinstance(getattr(self, key), str):
                raise SpecError(f"scene {self.name}: {key} must be a string, not {getattr(self, key)!r}")
        for key in ("max_candidates", "top_k", "features_timeout_ms"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(f"scene {self.name}: {key} must be a whole number from 1 on, not {value!r}")
        if not self.default_model:
            raise SpecError(f"scene {self.name}: default_model is empty; name a registered model, e.g. deepfm")


def parse_scenes(document: Any, *, where: str = "scenes.yaml") -> Mapping[str, Scene]:
    """The scenes of a parsed document {scenes: {NAME: {…}}}. Raises SpecError."""
    body = document.get("scenes") if isinstance(document, dict) else None
    if not isinstance(body, dict) or not body:
        raise SpecError(f"{where}: expected `scenes:` with at least one scene below it")
    allowed = {field.name for field in fields(Scene)} - {"name"}
    scenes = {}
    for name, settings in body.items():
        if not isinstance(settings, dict):
            raise SpecError(f"{where}: scene {name!r} must be a mapping of settings, not {settings!r}")
        for key in settings:
            if key not in allowed:
                raise UnknownNameError("setting", str(key), allowed, where=f"{where}: scene {name}")
        if "default_model" not in settings:
            raise SpecError(f"{where}: scene {name} names no default_model")
        scenes[str(name)] = Scene(name=str(name), **settings)
    return scenes


def load_scenes(path: Path = DEFAULT_FILE) -> Mapping[str, Scene]:
    """The scenes declared in a YAML file. Raises SpecError with the file's name."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the scenes file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    return parse_scenes(document, where=path.name)
