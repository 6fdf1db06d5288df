"""Metrics as declared in YAML: what is measured of a unit, in which window, and what it decides.

A metric of every type but quantile and ranking is built of additive columns (per unit, a count of events or a sum of
their values), so that unit-level sufficient statistics follow from one pass over each event table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from plait.errors import SpecError, UnknownNameError

Type = Literal["proportion", "count", "mean", "ratio", "quantile", "retention", "ranking"]
Role = Literal["primary", "secondary", "guardrail"]
Goal = Literal["increase", "decrease"]
Decision = Literal["sequential", "group_sequential", "fixed"]
IMPRESSION = "impression"
MEASURES = ("ndcg", "mrr", "precision", "recall", "hit_rate")
# Columns that a filter may test, per event table.
FILTERABLE = {
    "feedback": ("value", "item_id", "request_id"),
    IMPRESSION: ("scene", "position", "score", "item_id", "model", "model_version"),
}
OPERATORS = {"eq": "=", "ne": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "in": "IN"}
DEFAULT_METRICS = Path(__file__).with_name("metrics.yaml")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One test on a column of an event."""

    column: str
    operator: str
    value: Any

    def sql(self) -> str:
        """The test as SQL; values are quoted here, columns and operators come from fixed lists."""
        if self.operator == "in":
            return f"{self.column} IN ({', '.join(_literal(v) for v in self.value)})"
        return f"{self.column} {OPERATORS[self.operator]} {_literal(self.value)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """An additive column of a unit: events of one type (None: any feedback), counted or their values summed."""

    event: str | None
    aggregate: Literal["count", "sum"] = "count"
    where: tuple[Condition, ...] = ()
    start: timedelta = timedelta(0)  # window, from the unit's first exposure on
    end: timedelta | None = None

    @property
    def source(self) -> str:
        return IMPRESSION if self.event == IMPRESSION else "feedback"


@dataclass(frozen=True, kw_only=True, slots=True)
class Covariate:
    """What CUPED adjusts by: the metric itself over `days` before exposure, or a feature as of the exposure."""

    days: float = 28.0
    feature_service: str | None = None
    feature: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """A measure of each request's ranked list, averaged over requests and clustered by unit."""

    measure: str
    k: int
    gains: tuple[tuple[str, float], ...]  # (feedback type, gain of an item with it)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One declared metric. `numerator` and `denominator` are the additive columns; means divide by units."""

    name: str
    type: Type
    role: Role = "secondary"
    goal: Goal = "increase"
    description: str = ""
    numerator: Column | None = None
    denominator: Column | None = None
    quantile: float | None = None
    level: Literal["unit", "event"] = "unit"
    ranking: Ranking | None = None
    winsorize: tuple[float, float] | None = None  # lower and upper quantile of the units' values
    covariate: Covariate | None = None
    margin: float | None = None  # guardrail: tolerated harm, relative to control
    min_effect: float = 0.02  # relative effect worth finding
    complete: bool = False  # only units whose window has ended

    @property
    def window(self) -> timedelta | None:
        """How long after exposure the metric goes on looking; None is open-ended."""
        return self.numerator.end if self.numerator else None

    @property
    def is_share(self) -> bool:
        return self.type in ("proportion", "retention")

    @property
    def additive(self) -> bool:
        """Whether the metric is a mean or ratio of additive columns (so that it has a daily series and CUPED)."""
        return self.type not in ("quantile", "ranking")


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """How verdicts are reached; declared before the data is looked at.

    decision: "sequential" decides by confidence sequences (look whenever you like), "group_sequential" by `looks`
    planned looks at `planned_units`, "fixed" by one look at the end.
    """

    alpha: float = 0.05
    power: float = 0.8
    decision: Decision = "sequential"
    looks: int = 5
    spending: Literal["obrien_fleming", "pocock"] = "obrien_fleming"
    planned_units: int | None = None
    tuning_units: float = 10_000.0
    srm_threshold: float = 0.001
    segments: tuple[str, ...] = ()
    bootstrap: int = 1_000

    def __post_init__(self) -> None:
        for name, low, high in (("alpha", 0, 1), ("power", 0, 1), ("srm_threshold", 0, 1)):
            if not low < getattr(self, name) < high:
                raise SpecError(f"analysis.{name} is {getattr(self, name)}; it lies between {low} and {high}")
        if self.looks < 1 or self.tuning_units < 1 or self.bootstrap < 0:
            raise SpecError("analysis: looks and tuning_units are at least 1, bootstrap at least 0")
        if self.decision == "group_sequential" and not self.planned_units:
            raise SpecError("analysis.decision group_sequential needs planned_units, the units at the last look")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSet:
    """All metrics of an analysis, in declared order, and the analysis."""

    metrics: tuple[Metric, ...]
    analysis: Analysis = field(default_factory=Analysis)

    def __post_init__(self) -> None:
        if not self.metrics:
            raise SpecError("no metric is declared; give at least one under `metrics:`")
        names = [metric.name for metric in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SpecError(f"metric {twice[0]!r} is declared twice; names are unique")

    def get(self, name: str) -> Metric:
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise UnknownNameError("metric", name, [metric.name for metric in self.metrics])

    @property
    def primaries(self) -> tuple[Metric, ...]:
        """The primary metrics; the first metric where none is declared so."""
        return tuple(metric for metric in self.metrics if metric.role == "primary") or self.metrics[:1]


def load_metrics(path: Path | None = None) -> MetricSet:
    """Read a metrics file (default: the one beside this module). Raises SpecError naming file, metric and field."""
    path = path or DEFAULT_METRICS
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise SpecError(f"no metrics file {path}; give one with --metrics") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    return parse_metrics(raw, where=str(path))


def parse_metrics(raw: Any, *, where: str = "metrics") -> MetricSet:
    """A MetricSet from what YAML or JSON gave."""
    top = _mapping(raw, where, ("metrics", "analysis"))
    declared = top.get("metrics")
    if not isinstance(declared, list):
        raise SpecError(f"{where}: `metrics` is a list of metrics, not {type(declared).__name__}")
    metrics = tuple(_metric(item, f"{where}: metric {i + 1}") for i, item in enumerate(declared))
    return MetricSet(metrics=metrics, analysis=_analysis(top.get("analysis") or {}, f"{where}: analysis"))


def duration(text: Any, where: str) -> timedelta:
    """A time span such as 30m, 12h, 7d or 2w.

    >>> duration("1.5h", "window")
    datetime.timedelta(seconds=5400)
    """
    match = _DURATION.fullmatch(str(text).strip())
    if not match:
        raise SpecError(f"{where} is {text!r}; write a span such as 30m, 12h, 7d or 2w")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


_COMMON = ("name", "type", "role", "goal", "description", "margin", "min_effect", "complete", "cuped", "window")
_EVENT = ("event", "where")
_FIELDS: dict[str, tuple[str, ...]] = {
    "proportion": _EVENT,
    "count": (*_EVENT, "winsorize"),
    "mean": (*_EVENT, "winsorize"),
    "ratio": ("numerator", "denominator"),
    "quantile": (*_EVENT, "quantile", "level", "aggregate"),
    "retention": (*_EVENT, "from", "to"),
    "ranking": ("measure", "k", "gains"),
}


def _metric(raw: Any, where: str) -> Metric:
    if not isinstance(raw, Mapping) or "name" not in raw:
        raise SpecError(f"{where} is {raw!r}; a metric is a mapping with at least name and type")
    name = str(raw["name"])
    where = f"{where} ({name})"
    if not _NAME.fullmatch(name):
        raise SpecError(f"{where}: a name is a letter, then letters, digits and _, at most 64")
    kind = _choice(raw.get("type"), tuple(_FIELDS), "metric type", where)
    _mapping(raw, where, (*_COMMON, *_FIELDS[kind]))
    window = duration(raw["window"], f"{where}: window") if raw.get("window") is not None else None
    metric_type = cast(Type, kind)
    parts: dict[str, Any] = {}
    if kind in ("proportion", "count"):
        parts["numerator"] = _column(raw, where, end=window)
    elif kind == "mean":
        parts["numerator"] = _column({"aggregate": "sum", **raw}, where, end=window)
    elif kind == "ratio":
        for side in ("numerator", "denominator"):
            child = _mapping(raw.get(side), f"{where}: {side}", ("event", "where", "aggregate"))
            parts[side] = _column(child, f"{where}: {side}", end=window)
    elif kind == "quantile":
        parts["quantile"] = _number(raw.get("quantile"), f"{where}: quantile", 0, 1)
        parts["level"] = _choice(raw.get("level", "unit"), ("unit", "event"), "level", where)
        parts["numerator"] = _column({"aggregate": "sum", **raw}, where, end=window)
    elif kind == "retention":
        start, end = (duration(raw.get(key), f"{where}: {key}") for key in ("from", "to"))
        if end <= start:
            raise SpecError(f"{where}: `to` ({raw['to']}) lies after `from` ({raw['from']})")
        parts["numerator"] = _column(raw, where, start=start, end=end, default_event=None)
    else:
        parts["ranking"] = _ranking(raw, where)
        parts["numerator"] = Column(event=IMPRESSION, end=window)
    role = cast(Role, _choice(raw.get("role", "secondary"), ("primary", "secondary", "guardrail"), "role", where))
    margin = raw.get("margin", 0.05 if role == "guardrail" else None)
    return Metric(
        name=name,
        type=metric_type,
        role=role,
        goal=cast(Goal, _choice(raw.get("goal", "increase"), ("increase", "decrease"), "goal", where)),
        description=str(raw.get("description", "")),
        winsorize=_winsorize(raw.get("winsorize"), where),
        covariate=_covariate(raw.get("cuped", True), where) if kind not in ("quantile", "ranking") else None,
        margin=None if margin is None else _number(margin, f"{where}: margin", 0, 10),
        min_effect=_number(raw.get("min_effect", 0.02), f"{where}: min_effect", 0, 100),
        complete=bool(raw.get("complete", kind == "retention")),
        **parts,
    )


def _column(
    raw: Mapping[str, Any],
    where: str,
    *,
    start: timedelta = timedelta(0),
    end: timedelta | None,
    default_event: str | None = "click",
) -> Column:
    event = raw.get("event", default_event)
    column = Column(event=None if event in (None, "any") else str(event), start=start, end=end)
    aggregate = _choice(raw.get("aggregate", "count"), ("count", "sum"), "aggregate", where)
    if aggregate == "sum" and column.source == IMPRESSION:
        raise SpecError(f"{where}: impressions have no value to sum; count them")
    conditions = []
    for name, test in (raw.get("where") or {}).items():
        if name not in FILTERABLE[column.source]:
            raise UnknownNameError(f"{column.source} column", str(name), FILTERABLE[column.source], where=where)
        tests = test if isinstance(test, Mapping) else {"in" if isinstance(test, list) else "eq": test}
        for operator, value in tests.items():
            if operator not in OPERATORS:
                raise UnknownNameError("operator", str(operator), OPERATORS, where=f"{where}: where.{name}")
            if operator == "in" and (not isinstance(value, list) or not value):
                raise SpecError(f"{where}: where.{name}.in takes a list of at least one value, not {value!r}")
            for one in value if operator == "in" else [value]:
                if not isinstance(one, str | int | float | bool):
                    raise SpecError(f"{where}: where.{name} compares with {one!r}; give a number or a string")
            conditions.append(
                Condition(column=name, operator=operator, value=tuple(value) if operator == "in" else value)
            )
    return Column(
        event=column.event,
        aggregate=cast(Literal["count", "sum"], aggregate),
        where=tuple(conditions),
        start=start,
        end=end,
    )


def _ranking(raw: Mapping[str, Any], where: str) -> Ranking:
    gains = raw.get("gains", {"click": 1.0})
    if not isinstance(gains, Mapping) or not gains:
        raise SpecError(f"{where}: gains maps feedback types to numbers, such as {{click: 1, purchase: 3}}")
    return Ranking(
        measure=_choice(raw.get("measure", "ndcg"), MEASURES, "measure", where),
        k=int(_number(raw.get("k", 10), f"{where}: k", 0, 1_000_000)) or 1,
        gains=tuple((str(event), _number(gain, f"{where}: gains.{event}", 0, 1e6)) for event, gain in gains.items()),
    )


def _winsorize(raw: Any, where: str) -> tuple[float, float] | None:
    if raw is None:
        return None
    low, high = raw if isinstance(raw, list) and len(raw) == 2 else (0.0, raw)
    low, high = _number(low, f"{where}: winsorize", 0, 1), _number(high, f"{where}: winsorize", 0, 1)
    if low >= high:
        raise SpecError(f"{where}: winsorize is {raw!r}; give an upper quantile such as 0.999, or [lower, upper]")
    return low, high


def _covariate(raw: Any, where: str) -> Covariate | None:
    if raw is True or raw == "auto":
        return Covariate()
    if raw is False or raw is None or raw == "none":
        return None
    fields = _mapping(raw, f"{where}: cuped", ("days", "feature_service", "feature"))
    if ("feature" in fields) != ("feature_service" in fields):
        raise SpecError(f"{where}: cuped names both feature_service and feature, or neither")
    return Covariate(
        days=_number(fields.get("days", 28), f"{where}: cuped.days", 0, 3650),
        feature_service=fields.get("feature_service"),
        feature=fields.get("feature"),
    )


def _analysis(raw: Any, where: str) -> Analysis:
    known = tuple(Analysis.__dataclass_fields__)
    fields = dict(_mapping(raw, where, known))
    if "decision" in fields:
        _choice(fields["decision"], ("sequential", "group_sequential", "fixed"), "decision", where)
    if "spending" in fields:
        _choice(fields["spending"], ("obrien_fleming", "pocock"), "spending", where)
    if "segments" in fields:
        if not isinstance(fields["segments"], list):
            raise SpecError(f"{where}: segments is a list of user attributes")
        fields["segments"] = tuple(str(name) for name in fields["segments"])
    for name in ("alpha", "power", "srm_threshold", "tuning_units", "looks", "bootstrap", "planned_units"):
        if fields.get(name) is not None:
            number = _number(fields[name], f"{where}: {name}", 0, math.inf)
            fields[name] = int(number) if name in ("looks", "bootstrap", "planned_units") else number
    return Analysis(**fields)


def _mapping(raw: Any, where: str, known: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise SpecError(f"{where} is {raw!r}; it is a mapping with {', '.join(known)}")
    for key in raw:
        if key not in known:
            raise UnknownNameError("field", str(key), known, where=where)
    return raw


def _choice(value: Any, known: Iterable[str], kind: str, where: str) -> str:
    if value not in known:
        raise UnknownNameError(kind, str(value), known, where=where)
    return str(value)


def _number(value: Any, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SpecError(f"{where} is {value!r}; give a number between {low:g} and {high:g}")
    return float(value)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"
