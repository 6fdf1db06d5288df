"""The aggregates a project declares, found the way Feast finds them, so that both see the same repository."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plait.aggregates.declare import spec_of
from plait.aggregates.spec import AggregateSpec
from plait.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    from feast import FeatureView

    from plait.settings import Home


def declared_views(home: Home) -> dict[str, FeatureView]:
    """Every stored feature view declared in the project, by name (honours .feastignore).

    Raises SpecError if a file of the repository cannot be imported.
    """
    if str(home.project) not in sys.path:
        sys.path.append(str(home.project))
    from feast.repo_operations import parse_repo

    before = Path.cwd()
    os.chdir(home.project)  # Feast names modules relative to the working directory
    try:
        contents = parse_repo(home.project)
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(f"Feast cannot read the declarations in {home.project}: {error}") from error
    finally:
        os.chdir(before)
    return {view.name: view for view in sorted(contents.feature_views, key=lambda view: view.name)}


def declared_aggregates(home: Home, only: Sequence[str] = ()) -> list[AggregateSpec]:
    """The project's aggregates, or those named. Raises UnknownNameError (did you mean) for a name that is none."""
    specs = {name: spec for name, view in declared_views(home).items() if (spec := spec_of(view)) is not None}
    for name in only:
        if name not in specs:
            raise UnknownNameError("aggregate view", name, specs, where=str(home.project / "feature_repo"))
    return [specs[name] for name in only] if only else list(specs.values())


def registered_aggregates(home: Home, only: Sequence[str] = ()) -> list[AggregateSpec]:
    """The same as the registry holds them (after `feast apply`)."""
    from plait.service import open_store

    specs = {view.name: spec for view in open_store(home).list_feature_views() if (spec := spec_of(view)) is not None}
    if not specs:
        raise SpecError("the registry holds no aggregate view; run `feast apply` first")
    for name in only:
        if name not in specs:
            raise UnknownNameError("aggregate view", name, specs, where="the registry")
    return [specs[name] for name in only] if only else list(specs.values())
