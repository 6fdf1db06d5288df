"""YAML files as one document, remembering the file and line of every key, for errors that point.

Read by the YAML 1.2 core rules: `no` is a text (Norway), dates and 10:30 are texts, a key given twice is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plait.errors import SpecError, did_you_mean

SECTIONS = ("enabled", "parameters", "domains", "layers", "segments", "groups", "holdouts", "experiments")
_METRICS_FILE = "metrics.yaml"  # in the same folder, read by the report; no part of what is served
_MAX_BYTES, _MAX_NODES, _MAX_DEPTH = 2_000_000, 200_000, 40

_MAX_JSON_LINES = 200_000  # characters: above, reading JSON a second time for its lines would take seconds

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "bool", "int", "float", "null")}

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Source:
    """A document of plain dicts, lists and scalars, and where each of its paths was written (empty for JSON)."""

    document: dict[str, Any]
    places: Mapping[Path_, Place] = field(default_factory=dict)

    def place(self, path: Path_) -> Place | None:
        """Where `path`, or the nearest part of it that was written, stands."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the implicit types of YAML 1.2's core schema only."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name and type)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_folder(folder: Path) -> Source:
    """All *.yaml of `folder` but metrics.yaml, in name order, merged. SpecError names the file and line of a fault."""
    files = sorted(path for path in folder.glob("*.yaml") if path.name != _METRICS_FILE and path.is_file())
    if not files:
        raise SpecError(f"no *.yaml in {folder}; write one (docs/experiments.md begins with an example)")
    return merge([read_file(path) for path in files])


def read_file(path: Path) -> Source:
    """One YAML file. A file without a last line break is taken for half-written and refused."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path.name} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if not text.strip():
        raise SpecError(f"{path.name} is empty: half-written? Delete it, or give it a section such as `experiments:`")
    if not text.endswith("\n"):
        raise SpecError(f"{path.name} ends in the middle of a line: half-written? End it with a line break")
    return read_text(text, file=path.name)


def read_text(text: str, *, file: str = "<text>") -> Source:
    """YAML text as a Source; only the known sections are allowed at the top."""
    source = parse_text(text, file=file)
    for name in source.document:
        if name not in SECTIONS:
            raise SpecError(f"{source.place((name,))}: no section {name!r}; {did_you_mean(str(name), SECTIONS)}")
    return source


def read_json_text(text: str, *, file: str = "<json>") -> Source:
    """JSON text as a Source. A key given twice is an error. Lines are known where YAML reads the same text."""
    try:
        document = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)
    except RecursionError as error:
        raise SpecError(f"{file} is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise SpecError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise SpecError(f"{file}: {error}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{file}: the top must be sections ({', '.join(SECTIONS)}), not a {type(document).__name__}")
    places: Mapping[Path_, Place] = {}
    if len(text) <= _MAX_JSON_LINES:
        with suppress(SpecError):
            places = parse_text(text.replace("\t", " "), file=file).places
    return Source(document, places)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return out


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse_text(text: str, *, file: str = "<text>") -> Source:
    """YAML text (JSON is nearly always YAML) as a Source, whatever its sections are called."""
    if len(text) > _MAX_BYTES:
        raise SpecError(f"{file} has {len(text):,} characters; at most {_MAX_BYTES:,} are allowed")
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        reader = _Reader(file, loader)
        document = reader.value(node, ()) if node else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or str(error)
        raise SpecError(f"{where}: not YAML: {problem}") from error
    except RecursionError as error:
        raise SpecError(f"{file} is nested too deeply") from error
    finally:
        loader.dispose()
    if not isinstance(document, dict):
        raise SpecError(f"{file}: the top must be sections ({', '.join(SECTIONS)}), not a {type(document).__name__}")
    return Source(document, reader.places)


def merge(sources: list[Source]) -> Source:
    """One document of several files; a thing declared in two of them is an error that names both places."""
    document: dict[str, Any] = {}
    places: dict[Path_, Place] = {}
    for source in sources:
        for section, content in source.document.items():
            if content is None:
                continue
            if not isinstance(content, dict):
                _refuse_twice(document, places, source, (section,), present=section in document)
                document[section] = content
                continue
            into = document.setdefault(section, {})
            for name, value in content.items():
                _refuse_twice(document, places, source, (section, name), present=name in into)
                into[name] = value
        places = {**source.places, **places}
    return Source(document, places)


def _refuse_twice(
    document: Mapping[str, Any], places: Mapping[Path_, Place], source: Source, path: Path_, *, present: bool
) -> None:
    if present:
        raise SpecError(f"{source.place(path)}: {'.'.join(map(str, path))} is already declared at {places.get(path)}")


class _Reader:
    """YAML nodes to plain values, noting lines, refusing duplicate keys and runaway aliases."""

    def __init__(self, file: str, loader: _CoreLoader) -> None:
        self._file, self._loader, self._n_nodes = file, loader, 0
        self.places: dict[Path_, Place] = {}

    def value(self, node: yaml.Node, path: Path_) -> Any:
        place = Place(self._file, node.start_mark.line + 1)
        self.places.setdefault(path, place)
        self._n_nodes += 1
        if self._n_nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise SpecError(f"{place}: too many values or too deep (aliases that contain themselves?)")
        if node.tag not in _PLAIN_TAGS:
            raise SpecError(f"{place}: the tag {node.tag} is not allowed; write plain YAML")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = Place(self._file, key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise SpecError(f"{place}: a key must be a plain text")
            key = str(key_node.value)
            if key in out:
                raise SpecError(f"{place}: the key {key!r} is given twice; first at {self.places[(*path, key)]}")
            self.places[(*path, key)] = place
            out[key] = self.value(value_node, (*path, key))
        return out
