"""From a document of the right shape to an ExperimentsSpec, piece by piece; what cannot be read becomes a Problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from experiments.conditions import Condition, always, compile_condition, moment
from experiments.hashing import N_BUCKETS
from experiments.metrics import duration
from experiments.problems import Problems
from experiments.source import Path_
from experiments.spec import (
    ROOT,
    Arm,
    Bandit,
    ContextField,
    Domain,
    Experiment,
    ExperimentsSpec,
    Group,
    Holdout,
    Layer,
    Parameter,
    Ranges,
)
from plait.errors import SpecError, did_you_mean


def build_spec(document: Mapping[str, Any], problems: Problems) -> ExperimentsSpec:
    """The spec of `document`. It is whole only if `problems` got no fault; names between parts are not yet checked."""
    return _Builder(document, problems).build()


class _Builder:
    def __init__(self, document: Mapping[str, Any], problems: Problems) -> None:
        self._document, self._problems = document, problems
        self._segments: Mapping[str, Any] = document.get("segments") or {}

    def _section(self, name: str) -> Mapping[str, Any]:
        return self._document.get(name) or {}

    def build(self) -> ExperimentsSpec:
        for name, tree in self._segments.items():
            self._condition(tree, ("segments", name))
        parameters = {name: self._parameter(name, raw) for name, raw in self._section("parameters").items()}
        layers = {name: self._layer(name, raw, parameters) for name, raw in self._section("layers").items()}
        experiments = {name: self._experiment(name, raw) for name, raw in self._section("experiments").items()}
        return ExperimentsSpec(
            enabled=bool(self._document.get("enabled", True)),
            parameters=parameters,
            domains={
                name: Domain(
                    name=name, layer=raw["layer"], ranges=self._ranges(raw["buckets"], ("domains", name, "buckets"))
                )
                for name, raw in self._section("domains").items()
            },
            layers=layers,
            experiments=experiments,
            holdouts={name: self._holdout(name, raw, layers) for name, raw in self._section("holdouts").items()},
            groups={name: Group(name=name, unit=raw["unit"]) for name, raw in self._section("groups").items()},
        )

    def _parameter(self, name: str, raw: Mapping[str, Any]) -> Parameter:
        path: Path_ = ("parameters", name)
        numeric = raw["type"] in ("int", "float")
        for key in ("minimum", "maximum"):
            if key in raw and not numeric:
                self._problems.add((*path, key), f"only numbers have a {key}; this is a {raw['type']}")
        parameter = Parameter(
            name=name,
            type=raw["type"],
            default=frozen(raw["default"]),
            allowed=tuple(frozen(v) for v in raw["allowed"]) if "allowed" in raw else None,
            minimum=raw.get("minimum") if numeric else None,
            maximum=raw.get("maximum") if numeric else None,
            description=raw.get("description", ""),
        )
        if complaint := parameter.complaint(parameter.default):
            self._problems.add((*path, "default"), complaint)
        for i, value in enumerate(parameter.allowed or ()):
            if complaint := replace(parameter, allowed=None).complaint(value):
                self._problems.add((*path, "allowed", i), complaint)
        return parameter

    def _layer(self, name: str, raw: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> Layer:
        owned: list[str] = []
        for i, pattern in enumerate(raw["parameters"]):
            path: Path_ = ("layers", name, "parameters", i)
            if pattern.endswith(".*"):
                found = [parameter for parameter in parameters if parameter.startswith(pattern[:-1])]
            else:
                found = [pattern] if pattern in parameters else []
            if not found:
                self._problems.add(path, f"no parameter {pattern!r}; {did_you_mean(pattern, parameters)}")
            for parameter in found:
                if parameter in owned:
                    self._problems.add(path, f"the layer names {parameter!r} twice")
                else:
                    owned.append(parameter)
        return Layer(
            name=name,
            unit=raw["unit"],
            parameters=tuple(owned),
            domain=raw.get("domain", ROOT),
            launch=raw.get("launch", False),
            salt=raw.get("salt", name),
        )

    def _experiment(self, name: str, raw: Mapping[str, Any]) -> Experiment:
        path: Path_ = ("experiments", name)
        if "traffic" in raw and "ramp" in raw:
            self._problems.add((*path, "traffic"), "give either `traffic` or `ramp`: the ramp says the traffic")
        arms = self._arms(raw["arms"], path)
        return Experiment(
            name=name,
            layer=raw["layer"],
            state=raw["state"],
            ranges=self._ranges(raw["buckets"], (*path, "buckets")),
            arms=arms,
            where=self._condition(raw["where"], (*path, "where")) if "where" in raw else always(),
            salt=raw.get("salt", name),
            traffic=self._parts(raw.get("traffic", 100), (*path, "traffic")),
            start=self._date(raw, "start", path),
            end=self._date(raw, "end", path),
            ramp=self._ramp(raw.get("ramp", []), (*path, "ramp")),
            group=raw.get("group"),
            group_ranges=self._ranges(raw["group_buckets"], (*path, "group_buckets")) if "group_buckets" in raw else (),
            requires=tuple((need["experiment"], frozenset(need.get("arms", ()))) for need in raw.get("requires", [])),
            sticky=raw.get("sticky", False),
            control=raw.get("control", next(iter(raw["arms"]))),
            owner=raw.get("owner", ""),
            description=raw.get("description", ""),
            metrics=tuple(raw.get("metrics", ())),
            primary=raw.get("primary"),
            guardrails=tuple(raw.get("guardrails", ())),
            bandit=self._bandit(raw["bandit"], (*path, "bandit")) if "bandit" in raw else None,
        )

    def _bandit(self, raw: Mapping[str, Any], path: Path_) -> Bandit:
        contextual = raw["method"] != "thompson"
        if contextual and "context" not in raw:
            self._problems.add(
                path, f"method {raw['method']} needs `context`: the attributes it tells requests apart by"
            )
        for key in ("context", "width"):
            if key in raw and not contextual:
                self._problems.add(
                    (*path, key), f"thompson reads no {key}; use method linear or linucb, or leave it out"
                )
        return Bandit(
            method=raw["method"],
            reward=raw.get("reward", "click"),
            floor=self._parts(raw.get("floor", 2), (*path, "floor")),
            by_request=raw.get("by", "request") == "request",
            half_life=self._span(raw["half_life"], (*path, "half_life")) if "half_life" in raw else None,
            wait=self._span(raw["wait"], (*path, "wait"), zero=True) if "wait" in raw else timedelta(minutes=1),
            width=float(raw.get("width", 0.5)),
            context=tuple(
                self._field(name, field, (*path, "context", name)) for name, field in raw.get("context", {}).items()
            ),
        )

    def _field(self, name: str, raw: Mapping[str, Any], path: Path_) -> ContextField:
        if ("scale" in raw) == ("categories" in raw):
            self._problems.add(path, "needs either `scale` (of a number) or `categories` (of a text)")
        elif "center" in raw and "scale" not in raw:
            self._problems.add((*path, "center"), "only a number, with a `scale`, has a center")
        return ContextField(
            name=name,
            center=float(raw.get("center", 0.0)),
            scale=float(raw.get("scale", 1.0)),
            categories=tuple(raw.get("categories", ())),
        )

    def _span(self, text: str, path: Path_, *, zero: bool = False) -> timedelta:
        try:
            span = duration(text, path[-1])  # type: ignore[arg-type]
        except OverflowError:
            span = timedelta.max
        if not (timedelta(0) <= span <= timedelta(days=3650)) or not (span or zero):
            self._problems.add(path, f"{text!r} is no usable span; more than nothing, at most ten years")
            return timedelta(days=1)
        return span

    def _arms(self, raw: Mapping[str, Any], path: Path_) -> tuple[Arm, ...]:
        """The arms. If their weights do not add up, that is a problem, and the first is bent so that checks go on."""
        arms = tuple(self._arm(arm, value, (*path, "arms", arm)) for arm, value in raw.items())
        total = sum(arm.parts for arm in arms)
        if total == N_BUCKETS:
            return arms
        self._problems.add(
            (*path, "arms"), f"the weights add up to {total / 100:g} %, not 100 %; give the rest to the control arm"
        )
        return (replace(arms[0], parts=arms[0].parts + N_BUCKETS - total), *arms[1:])

    def _arm(self, name: str, raw: Mapping[str, Any], path: Path_) -> Arm:
        return Arm(
            name=name,
            parts=self._parts(raw["weight"], (*path, "weight")),
            values={parameter: frozen(value) for parameter, value in (raw.get("values") or {}).items()},
            testers=tuple(raw.get("testers", ())),
        )

    def _holdout(self, name: str, raw: Mapping[str, Any], layers: Mapping[str, Layer]) -> Holdout:
        path: Path_ = ("holdouts", name)
        if ("layer" in raw) == ("unit" in raw):
            self._problems.add(path, "needs either `layer` (buckets of that layer) or `unit` (a global holdout)")
        if "layer" in raw:
            for key in ("layers", "salt"):
                if key in raw:
                    self._problems.add((*path, key), "a holdout of one layer uses that layer's buckets and salt")
            if raw["layer"] not in layers:
                self._problems.add((*path, "layer"), f"no layer {raw['layer']!r}; {did_you_mean(raw['layer'], layers)}")
        for i, layer in enumerate(raw.get("layers", ())):
            if layer not in layers:
                self._problems.add((*path, "layers", i), f"no layer {layer!r}; {did_you_mean(layer, layers)}")
        owner = layers.get(raw.get("layer", ""))
        return Holdout(
            name=name,
            ranges=self._ranges(raw["buckets"], (*path, "buckets")),
            unit=owner.unit if owner else raw.get("unit", "user"),
            salt=owner.salt if owner else raw.get("salt", name),
            layer=raw.get("layer"),
            layers=frozenset(raw["layers"]) if "layers" in raw else None,
        )

    # -- scalars ----------------------------------------------------------------------------------------------------

    def _ranges(self, raw: str | list[str], path: Path_) -> Ranges:
        """ "0-4999" or a list of such as half-open ranges, in the order written (traffic fills them in that order)."""
        if raw == "all":
            return ((0, N_BUCKETS),)
        ranges: list[tuple[int, int]] = []
        for text in [raw] if isinstance(raw, str) else raw:
            first, _, last = text.partition("-")
            low, high = int(first), int(last or first)
            if low > high:
                self._problems.add(path, f"{text!r} runs backwards; the smaller bucket comes first")
                continue
            if any(low < end and start <= high for start, end in ranges):
                self._problems.add(path, f"{text!r} overlaps another of its own ranges")
            ranges.append((low, high + 1))
        return tuple(ranges)

    def _parts(self, percent: float, path: Path_) -> int:
        parts = round(percent * 100)
        if abs(parts - percent * 100) > 1e-6:
            self._problems.add(path, f"{percent} % is too fine; two decimals at most")
        return parts

    def _date(self, raw: Mapping[str, Any], key: str, path: Path_) -> datetime | None:
        if key not in raw:
            return None
        when = moment(raw[key])
        if when is None:
            self._problems.add((*path, key), f"{raw[key]!r} is not a date such as 2026-03-01 or 2026-03-01T08:00:00Z")
        return when

    def _ramp(self, raw: list[Mapping[str, Any]], path: Path_) -> tuple[tuple[datetime, int], ...]:
        steps: list[tuple[datetime, int]] = []
        for i, step in enumerate(raw):
            when = self._date(step, "at", (*path, i))
            parts = self._parts(step["traffic"], (*path, i, "traffic"))
            if when is None:
                continue
            if steps and (when <= steps[-1][0] or parts < steps[-1][1]):
                self._problems.add(
                    (*path, i), "steps go forward in time and never down: lowering traffic would throw units out"
                )
            steps.append((when, parts))
        return tuple(steps)

    def _condition(self, tree: Mapping[str, Any], path: Path_) -> Condition:
        try:
            return compile_condition(tree, self._segments)
        except SpecError as error:
            self._problems.add(path, str(error))
            return always()


def frozen(value: Any) -> Any:
    """A parameter's value that nobody can change in place: lists become tuples."""
    return tuple(value) if isinstance(value, list) else value
