"""One immutable version of the configuration, ready to assign."""

from __future__ import annotations

import copy
import json
import logging
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from experiments.assignment import Assignment, AssignmentError, StickyArms, assign
from experiments.batch import BatchAssignment, assign_many
from experiments.explain import Explanation, explain
from experiments.plan import Plan, build_plan, edges
from experiments.policy import Policy, compile_policy
from experiments.source import Source, read_folder
from experiments.spec import ExperimentsSpec
from experiments.validate import load, model_references
from plait.errors import SpecError

logger = logging.getLogger("experiments")
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_NOTHING: Mapping[str, Any] = {}


class Snapshot:
    """Assigns units under one configuration. Pure: the same units, attributes and moment give the same answer, in
    any order of calls and in any process (only experiments declared sticky also ask `sticky`)."""

    def __init__(
        self,
        spec: ExperimentsSpec,
        *,
        version: int = 0,
        document: Mapping[str, Any] | None = None,
        sticky: StickyArms | None = None,
    ) -> None:
        self.spec, self.version, self.document = spec, version, dict(document or {})
        self._sticky = sticky
        self.policies: Mapping[str, Policy] = _NOTHING
        self._edges = edges(spec)
        self._plans: list[Plan | None] = [None] * (len(self._edges) + 1)
        self._plan = self._plan_at(datetime.now(UTC))

    @classmethod
    def of(
        cls,
        document: Mapping[str, Any],
        *,
        version: int = 0,
        models: Collection[str] | None = None,
        sticky: StickyArms | None = None,
    ) -> Snapshot:
        """The snapshot of a document (what YAML or JSON holds). ConfigError with every fault if it is wrong."""
        spec = load(Source(dict(document)), models=models)
        return cls(spec, version=version, document=document, sticky=sticky)

    @classmethod
    def from_folder(cls, folder: Path, *, models: Collection[str] | None = None) -> Snapshot:
        """The snapshot of the YAML files of a folder, as version 0. ConfigError names files and lines."""
        source = read_folder(folder)
        return cls(load(source, models=models), document=source.document)

    @classmethod
    def empty(cls) -> Snapshot:
        """No parameter, no experiment: what serves when there is no configuration at all."""
        return cls(ExperimentsSpec())

    @property
    def bandits(self) -> frozenset[str]:
        """Experiments whose arms a bandit draws."""
        return frozenset(e.name for e in self.spec.experiments.values() if e.bandit and e.state != "stopped")

    def with_policies(self, stored: Mapping[str, tuple[int, Mapping[str, Any]]]) -> Snapshot:
        """The same configuration with the bandits' learned policies: experiment → (version, document).

        A policy that does not fit the configuration (any more) is left out, and said so: its weights serve.
        """
        policies: dict[str, Policy] = {}
        for name in sorted(self.bandits & stored.keys()):
            version, document = stored[name]
            try:
                policies[name] = compile_policy(self.spec.experiments[name], version, document)
            except SpecError as error:
                logger.warning("experiments: the weights of %s serve: %s", name, error)
        other = copy.copy(self)  # compiled plans are shared: they hold no policy
        other.policies = policies
        return other

    def assign(
        self,
        units: Mapping[str, str],
        attributes: Mapping[str, Any] | None = None,
        at: datetime | None = None,
        *,
        force: Mapping[str, str] | None = None,
    ) -> Assignment:
        """Parameter values for these units ({"user": "42", "request": "r1"}) at the moment `at` (default: now).

        Never raises: whatever cannot be decided is left at its default, and `errors` says why. A kind of unit that is
        not given leaves the layers that divide by it at their defaults. force: {experiment: arm} for this call, marked.
        """
        try:
            plan = self._plan
            if at is None:
                at = datetime.now(UTC)
            elif at.tzinfo is None:
                at = at.replace(tzinfo=UTC)
            if not plan.since <= at < plan.until:
                plan = self._plan = self._plan_at(at)
            return assign(
                plan,
                self.version,
                units,
                attributes or _NOTHING,
                force=force or _NOTHING,
                sticky=self._sticky,
                policies=self.policies,
            )
        except Exception as error:
            logger.exception("assignment failed; the defaults serve")
            reason = AssignmentError("internal", f"{type(error).__name__}: {error}")
            defaults = self._plan.defaults
            return Assignment(self.version, dict(defaults), (), (reason,), defaults)

    def assign_many(
        self,
        units: Mapping[str, Sequence[Any]],
        attributes: pa.Table | Mapping[str, Sequence[Any]] | None = None,
        at: datetime | None = None,
    ) -> BatchAssignment:
        """The same as `assign` for many rows at once: `units` and `attributes` are columns of equal length."""
        moment = _aware(at)
        return assign_many(
            self._plan_at(moment), self.version, units, attributes, sticky=self._sticky, policies=self.policies
        )

    def explain(
        self,
        units: Mapping[str, str] | str,
        attributes: Mapping[str, Any] | None = None,
        at: datetime | None = None,
    ) -> Explanation:
        """For every layer: bucket, experiment, arm, parameters, and why. A plain id stands for every kind of unit."""
        if isinstance(units, str):
            units = dict.fromkeys(self._plan.kinds or ("user",), units)
        return explain(
            self.spec,
            self.version,
            units,
            attributes or {},
            _aware(at),
            sticky=self._sticky,
            policies=self.policies,
        )

    def model_references(self) -> frozenset[str]:
        """Every model that a default or an unstopped experiment names: what a server should have loaded."""
        return frozenset(reference for _, reference in model_references(self.spec))

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {name: parameter.default for name, parameter in self.spec.parameters.items()}

    def to_json(self) -> str:
        """The document, as it is kept in the store and on disk."""
        return json.dumps(self.document, ensure_ascii=False, sort_keys=False)

    def _plan_at(self, at: datetime) -> Plan:
        i = bisect_right(self._edges, at)
        plan = self._plans[i]
        if plan is None:  # two threads may both build it; they build the same
            since = self._edges[i - 1] if i else _FIRST
            until = self._edges[i] if i < len(self._edges) else _LAST
            plan = self._plans[i] = build_plan(self.spec, since, until)
        return plan


def _aware(at: datetime | None) -> datetime:
    if at is None:
        return datetime.now(UTC)
    return at if at.tzinfo else at.replace(tzinfo=UTC)
