"""What is wrong with a configuration: every problem at once, each with its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.source import Path_, Place, Source
from plait.errors import SpecError


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault (or warning) at `path` of the document, written at `place` if it came from a file."""

    path: Path_
    message: str
    place: Place | None = None
    warning: bool = False

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        name = ".".join(str(part) for part in self.path)
        return f"{where}{name}{': ' if name else ''}{self.message}"


class ConfigError(SpecError):
    """A configuration that cannot be used; `problems` are all of its faults."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        n = len(self.problems)
        head = f"the experiments' configuration has {n} fault{'s' if n != 1 else ''}; nothing was changed"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))


class Problems:
    """Collects problems while a document is read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.found: list[Problem] = []

    def add(self, path: Path_, message: str, *, warning: bool = False) -> None:
        self.found.append(Problem(path, message, self._source.place(path), warning))

    @property
    def faults(self) -> list[Problem]:
        return [problem for problem in self.found if not problem.warning]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.found if problem.warning]
