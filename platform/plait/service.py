"""What a model may read: one Feast feature service, resolved once from the registry into plain, frozen specs.

Everything that touches features (training sets, encoders, the server, the audit) takes a ServiceSpec and never walks
Feast's objects itself, so that the canonical feature order, the dtypes and the request/candidate split are decided in
one place.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import pyarrow as pa

from plait.errors import SettingsError, SpecError, UnknownNameError
from plait.settings import Home

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, FeatureView, OnDemandFeatureView

Side = Literal["request", "candidate"]
REQUEST_KEYS = ("user_id",)
CANDIDATE_KEYS = ("item_id",)
DERIVED_KEYS_TAG = "plait.derived_keys"


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """One column a model may read. `side` is "request" if all candidates of a request share its value."""

    name: str
    view: str
    dtype: pa.DataType
    side: Side


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """A stored view and the features of it that must be read: the service's and its transforms' inputs."""

    name: str
    join_keys: tuple[str, ...]
    features: tuple[str, ...]
    ttl: timedelta | None
    side: Side


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformSpec:
    """An on-demand view: a vectorised function in an importable module, pinned by the module's hash."""

    name: str
    function: Callable[[pd.DataFrame], pd.DataFrame]
    reference: str
    sha: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    side: Side


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec:
    """A feature service: features in the service's declared order, and how to obtain them."""

    name: str
    features: tuple[FeatureSpec, ...]
    views: tuple[ViewSpec, ...]
    transforms: tuple[TransformSpec, ...]
    derived_keys: Mapping[str, tuple[str, str]]  # join key -> (view, feature) that holds its value
    request_fields: Mapping[str, pa.DataType]
    request_keys: tuple[str, ...] = REQUEST_KEYS
    candidate_keys: tuple[str, ...] = CANDIDATE_KEYS

    def side(self, side: Side) -> tuple[FeatureSpec, ...]:
        return tuple(feature for feature in self.features if feature.side == side)

    def schema(self, side: Side | None = None) -> pa.Schema:
        """Arrow schema of the features (of one side), in canonical order."""
        return pa.schema([(f.name, f.dtype) for f in self.features if side in (None, f.side)])

    @property
    def transform_hashes(self) -> dict[str, str]:
        return {transform.reference: transform.sha for transform in self.transforms}


def open_store(home: Home) -> FeatureStore:
    """Feast's store of this project, with paths made absolute so that the working directory does not matter.

    Raises SettingsError if feature_store.yaml cannot be read or names what is not installed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Feast imports feature_repo's transforms by reference, so the project must be importable wherever we are called.
    if str(home.project) not in sys.path:
        sys.path.append(str(home.project))
    _silence_feast()
    from feast import FeatureStore
    from feast.repo_config import load_repo_config

    path = home.project / "feature_store.yaml"
    try:
        config = load_repo_config(home.project, path)
        config.registry.path = _absolute_sqlite(config.registry.path, home)
        if hasattr(config.online_store, "path"):
            config.online_store.path = str(_in_home(config.online_store.path, home))
        home.root.mkdir(parents=True, exist_ok=True)
        return FeatureStore(config=config)
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(f"Feast cannot open {path}: {error}") from error


def resolve_service(store: FeatureStore, name: str) -> ServiceSpec:
    """The spec of feature service `name` as the registry holds it.

    Raises UnknownNameError if there is none (run `feast apply`), SpecError if it cannot be served.
    """
    services = {service.name: service for service in store.list_feature_services()}
    if not services:
        raise SpecError("the registry holds no feature service; run `feast apply` first")
    if name not in services:
        raise UnknownNameError("feature service", name, services)
    service = services[name]
    stored = {view.name: view for view in store.list_feature_views()}
    on_demand = {view.name: view for view in store.list_on_demand_feature_views()}
    derived = _derived_keys(service, stored)

    read: dict[str, list[str]] = {}  # view -> features to read, service's own first
    for projection in service.feature_view_projections:
        if projection.join_key_map:
            raise SpecError(f"{name}: view {projection.name} renames join keys, which serving does not support")
        if projection.name in stored:
            _extend(read, projection.name, (field.name for field in projection.features))
    for view, feature in derived.values():
        _extend(read, view, [feature])

    transforms: dict[str, TransformSpec] = {}
    request_fields: dict[str, pa.DataType] = {}
    for projection in service.feature_view_projections:
        if projection.name in on_demand:
            transform = on_demand[projection.name]
            for source in transform.source_feature_view_projections.values():
                _extend(read, source.name, (field.name for field in source.features))
            for request in transform.source_request_sources.values():
                request_fields.update({field.name: arrow_type(field.dtype) for field in request.schema})
    views = {view: _view_spec(stored[view], features) for view, features in read.items()}
    for projection in service.feature_view_projections:
        if projection.name in on_demand:
            transforms[projection.name] = _transform_spec(on_demand[projection.name], views)

    features = []
    for projection in service.feature_view_projections:
        side = (transforms.get(projection.name) or views[projection.name]).side
        for field in projection.features:
            features.append(
                FeatureSpec(name=field.name, view=projection.name, dtype=arrow_type(field.dtype), side=side),
            )
    _refuse_duplicates(name, features)
    return ServiceSpec(
        name=name,
        features=tuple(features),
        views=tuple(views.values()),
        transforms=tuple(transforms.values()),
        derived_keys=MappingProxyType(derived),
        request_fields=MappingProxyType(request_fields),
    )


def reading_stages(service: ServiceSpec) -> list[list[str]]:
    """The service's views in rounds: each round's join keys are known from the request or from rounds before.

    Raises SpecError if nothing provides a join key.
    """
    known = {*service.request_keys, *service.candidate_keys}
    waiting = {view.name: view for view in service.views}
    stages = []
    while waiting:
        ready = [name for name, view in waiting.items() if known.issuperset(view.join_keys)]
        if not ready:
            lacking = {key for view in waiting.values() for key in view.join_keys} - known
            raise SpecError(
                f"{service.name}: nothing provides join key {', '.join(sorted(lacking))} of "
                f"{', '.join(sorted(waiting))}; derive it from a feature by the service's tag plait.derived_keys"
            )
        for name in ready:
            del waiting[name]
        known.update(key for key, (view, _) in service.derived_keys.items() if view in ready)
        stages.append(ready)
    return stages


def _derived_keys(service: FeatureService, stored: Mapping[str, FeatureView]) -> dict[str, tuple[str, str]]:
    derived = {}
    for part in filter(None, (service.tags or {}).get(DERIVED_KEYS_TAG, "").split(",")):
        key, _, reference = part.strip().partition("=")
        view, _, feature = reference.partition(":")
        where = f"{service.name}: tag {DERIVED_KEYS_TAG}"
        if view not in stored:
            raise UnknownNameError("feature view", view, stored, where=where)
        known = [field.name for field in stored[view].features]
        if feature not in known:
            raise UnknownNameError("feature", feature, known, where=where)
        derived[key] = (view, feature)
    return derived


def _view_spec(view: FeatureView, features: Iterable[str]) -> ViewSpec:
    keys = tuple(column.name for column in view.entity_columns)
    ttl = view.ttl if view.ttl and view.ttl > timedelta(0) else None
    side: Side = "request" if set(keys) <= set(REQUEST_KEYS) else "candidate"
    return ViewSpec(name=view.name, join_keys=keys, features=tuple(features), ttl=ttl, side=side)


def _transform_spec(view: OnDemandFeatureView, views: Mapping[str, ViewSpec]) -> TransformSpec:
    from plait.transforms import load_transform, transform_reference

    reference, sha = transform_reference(view)
    sources = [source.name for source in view.source_feature_view_projections.values()]
    inputs = [field.name for source in view.source_feature_view_projections.values() for field in source.features]
    inputs += [field.name for request in view.source_request_sources.values() for field in request.schema]
    side: Side = "request" if all(views[source].side == "request" for source in sources) else "candidate"
    return TransformSpec(
        name=view.name,
        function=load_transform(reference, sha),
        reference=reference,
        sha=sha,
        inputs=tuple(inputs),
        outputs=tuple(field.name for field in view.features),
        side=side,
    )


def _refuse_duplicates(service: str, features: Iterable[FeatureSpec]) -> None:
    seen: dict[str, str] = {}
    for feature in features:
        if feature.name in seen:
            raise SpecError(
                f"{service}: feature {feature.name!r} comes from both {seen[feature.name]} and {feature.view}; "
                "feature names are unique across a service: rename one in feature_repo"
            )
        seen[feature.name] = feature.view


def _extend(read: dict[str, list[str]], view: str, features: Iterable[str]) -> None:
    wanted = read.setdefault(view, [])
    wanted.extend(feature for feature in features if feature not in wanted)


def arrow_type(dtype: Any) -> pa.DataType:
    from feast.type_map import feast_value_type_to_pa

    arrow = feast_value_type_to_pa(dtype.to_value_type())
    # Feast's timestamps carry no zone here; ours are microseconds UTC everywhere.
    return pa.timestamp("us", tz="UTC") if pa.types.is_timestamp(arrow) else arrow


def _in_home(path: str, home: Home) -> Path:
    """A path of feature_store.yaml: `.plait/…` lies in the home, any other relative path in the project."""
    plain = Path(path)
    if plain.is_absolute():
        return plain
    return home.root / Path(*plain.parts[1:]) if plain.parts[0] == ".plait" else home.project / plain


def _absolute_sqlite(url: str, home: Home) -> str:
    prefix = "sqlite:///"
    return f"{prefix}{_in_home(url.removeprefix(prefix), home)}" if url.startswith(prefix) else url


def _silence_feast() -> None:
    """Feast warns on every import and call that this or that is experimental; once known, it only hides other words."""
    warnings.filterwarnings("ignore", message=".*experimental.*", category=RuntimeWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"feast\.|google\.|pydantic\.|ibis\.")
