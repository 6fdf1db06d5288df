"""Every error Plait raises on purpose.

PlaitError
├── SettingsError            the project, its home or its environment is not as it should be
├── SpecError                a declaration (YAML, flags, JSON, feature_repo) cannot exist
│   └── UnknownNameError     a name that is not among the known ones; suggests the nearest
├── DataError                input data is missing, corrupt or of the wrong shape
├── StoreError               an offline or online store could not do what was asked
├── ArtifactError            an artifact is incomplete, corrupt, or does not reproduce its golden rows
├── RegistryError            the model registry was asked for what it does not hold
└── RequestError             an HTTP request is wrong; carries the status to answer with

A command prints the message and exits with 2; the server answers with a problem document. The message says what
came, what was allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlaitError(Exception):
    """Root of all of them: its text is fit for a user's eyes."""


class SettingsError(PlaitError):
    """The project, its home or its environment is not as it should be."""


class SpecError(PlaitError, ValueError):
    """A declaration cannot exist in the state it was given in."""


class UnknownNameError(SpecError, LookupError):
    """`name` is not one of the `known` things of this `kind`; the message suggests the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, where: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"{where}{': ' if where else ''}no {kind} {name!r}; {did_you_mean(name, self.known)}")


class DataError(PlaitError):
    """Input data is missing, corrupt or of the wrong shape."""


class StoreError(PlaitError):
    """An offline or online store could not do what was asked; nothing half-done is left."""


class ArtifactError(PlaitError):
    """An artifact is incomplete, corrupt, or does not reproduce its golden rows."""


class RegistryError(PlaitError, LookupError):
    """The model registry does not hold what was asked for."""


class RequestError(PlaitError):
    """An HTTP request is wrong: `status` answers it, `extra` joins the problem document."""

    def __init__(self, status: int, title: str, detail: str, **extra: object) -> None:
        self.status, self.title, self.detail, self.extra = status, title, detail, extra
        super().__init__(detail)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them.

    >>> did_you_mean("genre", ["genres", "title"])
    "did you mean 'genres'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is known"
