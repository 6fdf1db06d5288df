"""Reading the features of one request: a user, candidates and a moment in, typed columns of a feature service out.

The same values a training set holds: views are read as of `now` with their ttl, keys that are themselves features
(a movie's genre) are read first, and on-demand transforms run by the very function that training calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from plait.errors import SettingsError, SpecError, StoreError
from plait.service import FeatureSpec, ServiceSpec, Side, TransformSpec, reading_stages
from plait.stores.keys import StoredView
from plait.stores.online_base import PackedOnlineStore, ViewColumns, ViewRead
from plait.transforms import output_column

if TYPE_CHECKING:
    from feast import FeatureStore

REQUEST_TIMESTAMP = "request_timestamp"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRows:
    """Features of one request, in the service's canonical order and dtypes.

    request: 1 row of what all candidates share. candidates: one row per candidate, in order.
    unknown: bool (n,), candidates of which no candidate view keyed by the candidate alone holds a row.
    request_unknown: the same of the request's own key.
    """

    request: pa.Table
    candidates: pa.Table
    unknown: np.ndarray
    request_unknown: bool


class OnlineReader:
    """Reads one feature service's features. Safe in many threads and, made before a fork, in its children."""

    def __init__(self, store: FeatureStore, service: ServiceSpec) -> None:
        online = store._get_provider().online_store
        if not isinstance(online, PackedOnlineStore):
            raise SettingsError(
                f"the online store is {type(online).__name__}; serving reads packed rows: set online_store.type to "
                "plait.stores.sqlite.PackedSQLiteOnlineStore or plait.stores.redis.PackedRedisOnlineStore"
            )
        self.service = service
        self._online = online
        self._config = store.config
        self._views = {
            view.name: StoredView.of(store.config, store.get_feature_view(view.name)) for view in service.views
        }
        self._stages = reading_stages(service)
        self._sides = {view.name: view.side for view in service.views}

    def read(
        self, request: Mapping[str, Any], candidates: pa.Table, *, context: Mapping[str, Any], now: datetime
    ) -> OnlineRows:
        """Features of `request` (its entity keys) and `candidates` (one row each, their keys as columns).

        context: the request's own fields that on-demand transforms take. now: aware. One round trip to the store per
        stage: two where join keys are derived from features, else one. Raises StoreError, SpecError.
        """
        n_rows = candidates.num_rows
        keys: dict[Side, dict[str, pa.Array]] = {
            "request": {name: pa.array([value]) for name, value in request.items()},
            "candidate": {name: candidates[name] for name in candidates.column_names},
        }
        self._require_keys(keys)
        features: dict[Side, dict[str, pa.Array]] = {"request": {}, "candidate": {}}
        found: dict[str, np.ndarray] = {}
        for stage in self._stages:
            for name, columns in zip(stage, self._read_stage(stage, keys, n_rows, now), strict=True):
                features[self._sides[name]].update(columns.columns)
                found[name] = columns.found
            for key, (view, feature) in self.service.derived_keys.items():
                if view in stage:
                    side = self._sides[view]
                    keys[side][key] = features[side][feature]
        fields = self._request_fields(context, now)
        for transform in self.service.transforms:
            self._apply(transform, features, fields, n_rows)
        return OnlineRows(
            request=self._table("request", features["request"], 1),
            candidates=self._table("candidate", features["candidate"], n_rows),
            unknown=self._unknown(found, self.service.candidate_keys, n_rows),
            request_unknown=bool(self._unknown(found, self.service.request_keys, 1)[0]),
        )

    def _require_keys(self, keys: Mapping[Side, Mapping[str, pa.Array]]) -> None:
        needed: dict[Side, tuple[str, ...]] = {
            "request": self.service.request_keys,
            "candidate": self.service.candidate_keys,
        }
        for side, names in needed.items():
            lacking = [name for name in names if name not in keys[side]]
            if lacking:
                came = ", ".join(sorted(keys[side])) or "none"
                raise SpecError(f"{self.service.name}: the {side} lacks {', '.join(lacking)}; keys that came: {came}")

    def _read_stage(
        self, stage: Sequence[str], keys: Mapping[Side, Mapping[str, pa.Array]], n_rows: int, now: datetime
    ) -> list[ViewColumns]:
        reads = []
        specs = {view.name: view for view in self.service.views}
        for name in stage:
            spec, view = specs[name], self._views[name]
            columns = {}
            for key in spec.join_keys:
                if key in keys[spec.side]:
                    columns[key] = keys[spec.side][key]
                else:  # a request's key in a candidate's view: every candidate's is the same
                    columns[key] = pa.repeat(keys["request"][key][0], n_rows)
            reads.append(ViewRead(view=view, features=view.features(spec.features), keys=columns))
        return self._online.read_views(self._config, reads, now=now)

    def _request_fields(self, context: Mapping[str, Any], now: datetime) -> dict[str, pa.Array]:
        fields = {}
        for name, dtype in self.service.request_fields.items():
            value = int(now.timestamp() // 1) if name == REQUEST_TIMESTAMP else context.get(name)
            try:
                fields[name] = pa.array([value], dtype)
            except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
                raise SpecError(f"{self.service.name}: context field {name!r} is {dtype}: {error}") from error
        return fields

    def _apply(
        self,
        transform: TransformSpec,
        features: dict[Side, dict[str, pa.Array]],
        fields: Mapping[str, pa.Array],
        n_rows: int,
    ) -> None:
        """Run one on-demand transform on its side's frame and put its outputs beside the stored features."""
        size = 1 if transform.side == "request" else n_rows
        columns = {}
        for name in transform.inputs:
            here = features[transform.side].get(name)
            if here is None:
                shared = fields.get(name, features["request"].get(name))
                if shared is None:
                    raise SpecError(f"transform {transform.reference} takes {name!r}, which nothing provides")
                here = shared if size == 1 else pa.repeat(shared[0], size)
            columns[name] = here
        outputs = transform.function(pa.table(columns).to_pandas())
        dtypes = {feature.name: feature.dtype for feature in self.service.features if feature.view == transform.name}
        for name, dtype in dtypes.items():
            features[transform.side][name] = output_column(outputs, name, dtype, size, transform.reference)

    def _table(self, side: Side, columns: Mapping[str, pa.Array], n_rows: int) -> pa.Table:
        specs = self.service.side(side)
        if not specs:  # a table without columns still has rows, which Arrow can say only by way of another column
            return pa.table({"rows": pa.nulls(n_rows)}).select([])
        return pa.table({spec.name: _typed(columns[spec.name], spec) for spec in specs})

    def _unknown(self, found: Mapping[str, np.ndarray], own_keys: tuple[str, ...], n_rows: int) -> np.ndarray:
        known = [found[view.name] for view in self.service.views if view.join_keys == own_keys]
        return ~np.logical_or.reduce(known) if known else np.zeros(n_rows, dtype=bool)


def _typed(column: pa.Array, spec: FeatureSpec) -> pa.Array:
    if column.type == spec.dtype:
        return column
    try:
        return column.cast(spec.dtype)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StoreError(f"feature {spec.name!r} is read as {column.type}, the service says {spec.dtype}") from error
