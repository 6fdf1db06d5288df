"""A configuration checked as a whole: `check` tells every problem, `load` gives the spec or raises them.

Shape first (experiments.shape), then each piece (experiments.build), then what pieces say about one another (here).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from experiments.build import build_spec
from experiments.hashing import N_BUCKETS
from experiments.prerequisites import check_prerequisites
from experiments.problems import ConfigError, Problem, Problems
from experiments.shape import check_shape
from experiments.source import Path_, Source
from experiments.spec import ROOT, Experiment, ExperimentsSpec, Ranges
from plait.errors import did_you_mean


def check(source: Source, *, models: Collection[str] | None = None) -> tuple[ExperimentsSpec | None, list[Problem]]:
    """The spec (None if there is a fault) and every problem found.

    models: what a parameter of type model may name ("deepfm", "deepfm:3", "deepfm@champion"); None leaves it unchecked.
    """
    problems = Problems(source)
    check_shape(source.document, problems)
    if problems.faults:
        return None, problems.found
    spec = build_spec(source.document, problems)
    for rule in (
        _check_domains,
        _check_ownership,
        _check_experiments,
        _check_bandits,
        _check_buckets,
        _check_groups,
        _check_testers,
        _check_salts,
    ):
        rule(spec, problems)
    if not problems.faults:
        check_prerequisites(spec, problems)
    if models is not None:
        _check_models(spec, problems, models)
    return (None if problems.faults else spec), problems.found


def load(source: Source, *, models: Collection[str] | None = None) -> ExperimentsSpec:
    """The spec of `source`; ConfigError with all faults if it has any."""
    spec, problems = check(source, models=models)
    if spec is None:
        raise ConfigError([problem for problem in problems if not problem.warning])
    return spec


def _check_domains(spec: ExperimentsSpec, problems: Problems) -> None:
    for domain in spec.domains.values():
        if domain.name == ROOT:
            problems.add(("domains", ROOT), f"{ROOT!r} is the domain of everybody; choose another name")
        if domain.layer not in spec.layers:
            problems.add(
                ("domains", domain.name, "layer"),
                f"no layer {domain.layer!r}; {did_you_mean(domain.layer, spec.layers)}",
            )
        elif spec.layers[domain.layer].launch:
            problems.add(("domains", domain.name, "layer"), "a launch layer holds no domains")
    for layer in spec.layers.values():
        if layer.domain != ROOT and layer.domain not in spec.domains:
            known = [ROOT, *spec.domains]
            problems.add(
                ("layers", layer.name, "domain"), f"no domain {layer.domain!r}; {did_you_mean(layer.domain, known)}"
            )
        if layer.launch and layer.domain != ROOT:
            problems.add(("layers", layer.name, "domain"), "a launch layer runs over all traffic: leave `domain` out")
    for layer in spec.layers.values():
        seen: list[str] = []
        name = layer.name
        while name in spec.layers and spec.layers[name].domain in spec.domains:
            if name in seen:
                problems.add(("layers", layer.name, "domain"), f"nested in itself: {' → '.join([*seen, name])}")
                break
            seen.append(name)
            name = spec.domains[spec.layers[name].domain].layer


def _check_ownership(spec: ExperimentsSpec, problems: Problems) -> None:
    """Within a domain a parameter has one layer, and one launch layer at most; nested layers divide their parent's."""
    owners: dict[tuple[str, bool, str], str] = {}
    for layer in spec.layers.values():
        parent = spec.domains[layer.domain].layer if layer.domain in spec.domains else ""
        for parameter in layer.parameters:
            path: Path_ = ("layers", layer.name, "parameters")
            first = owners.setdefault((layer.domain, layer.launch, parameter), layer.name)
            if first != layer.name:
                kind = "launch layers" if layer.launch else "layers"
                problems.add(
                    path,
                    f"parameter {parameter!r} is in two {kind} of domain {layer.domain!r}: {first!r}, {layer.name!r}",
                )
            if parent in spec.layers and parameter not in spec.layers[parent].parameters:
                problems.add(
                    path, f"parameter {parameter!r} is not one of layer {parent!r}, which this layer is nested in"
                )


def _check_experiments(spec: ExperimentsSpec, problems: Problems) -> None:
    for experiment in spec.experiments.values():
        path: Path_ = ("experiments", experiment.name)
        layer = spec.layers.get(experiment.layer)
        if layer is None:
            problems.add(
                (*path, "layer"), f"no layer {experiment.layer!r}; {did_you_mean(experiment.layer, spec.layers)}"
            )
        if experiment.start and experiment.end and experiment.start >= experiment.end:
            problems.add((*path, "end"), "ends before it starts")
        arms = [arm.name for arm in experiment.arms]
        if experiment.control not in arms:
            problems.add((*path, "control"), f"no arm {experiment.control!r}; {did_you_mean(experiment.control, arms)}")
        if experiment.sticky and layer and layer.unit == "request":
            problems.add((*path, "sticky"), "a request is seen once: there is nothing to stick to; use another unit")
        if not experiment.parameters:
            problems.add((*path, "arms"), "no arm sets a parameter, so nobody could tell the arms apart")
        for arm in experiment.arms:
            for name, value in arm.values.items():
                where = (*path, "arms", arm.name, "values", name)
                if name not in spec.parameters:
                    problems.add(where, f"no parameter {name!r}; {did_you_mean(name, spec.parameters)}")
                elif layer is not None and name not in layer.parameters:
                    problems.add(
                        where,
                        f"layer {layer.name!r} does not own this parameter; it owns {', '.join(layer.parameters)}",
                    )
                elif complaint := spec.parameters[name].complaint(value):
                    problems.add(where, complaint)


def _check_bandits(spec: ExperimentsSpec, problems: Problems) -> None:
    for experiment in spec.experiments.values():
        bandit, path = experiment.bandit, ("experiments", experiment.name)
        if bandit is None:
            continue
        layer = spec.layers.get(experiment.layer)
        if len(experiment.arms) < 2:
            problems.add((*path, "arms"), "a bandit chooses between two or more arms")
        if experiment.sticky:
            problems.add((*path, "sticky"), "a bandit moves units to better arms, and sticky keeps them: choose one")
        if layer is not None and layer.launch:
            problems.add((*path, "bandit"), "a launch layer moves defaults; put the bandit into an ordinary layer")
        for key in ("primary", "metrics", "guardrails"):
            if getattr(experiment, key):
                problems.add(
                    (*path, key), "a bandit is reported on by its reward alone; this is not judged", warning=True
                )
        if bandit.floor * len(experiment.arms) > N_BUCKETS:
            problems.add(
                (*path, "bandit", "floor"), f"{len(experiment.arms)} arms cannot all keep {bandit.floor / 100:g} %"
            )
            continue
        for arm in experiment.arms:
            if arm.parts < bandit.floor:
                problems.add(
                    (*path, "arms", arm.name, "weight"),
                    f"{arm.parts / 100:g} % is below the bandit's floor of {bandit.floor / 100:g} % for every arm",
                )


def _check_buckets(spec: ExperimentsSpec, problems: Problems) -> None:
    """No bucket of a layer belongs to two things at the same time. A stopped experiment has given its buckets back."""
    claims: dict[str, list[tuple[Path_, Ranges, Experiment | None]]] = {}
    for domain in spec.domains.values():
        claims.setdefault(domain.layer, []).append((("domains", domain.name), domain.ranges, None))
    for holdout in spec.holdouts.values():
        if holdout.layer:
            claims.setdefault(holdout.layer, []).append((("holdouts", holdout.name), holdout.ranges, None))
    for experiment in spec.experiments.values():
        if experiment.state != "stopped":
            path: Path_ = ("experiments", experiment.name)
            claims.setdefault(experiment.layer, []).append((path, experiment.ranges, experiment))
    for layer, claimed in claims.items():
        for i, (claim, ranges, claimant) in enumerate(claimed):
            for other_path, other_ranges, other in claimed[:i]:
                overlap = _overlap(ranges, other_ranges)
                if overlap and not _apart(claimant, other):
                    buckets = f"buckets {overlap[0]}-{overlap[1] - 1} of layer {layer!r}"
                    owner = ".".join(map(str, other_path))
                    problems.add((*claim, "buckets"), f"{buckets} already belong to {owner}")


def _overlap(a: Ranges, b: Ranges) -> tuple[int, int] | None:
    common = [(max(x, u), min(y, v)) for x, y in a for u, v in b if x < v and u < y]
    return min(common) if common else None


def _apart(a: Experiment | None, b: Experiment | None) -> bool:
    """Whether one has ended by the time the other starts."""
    if a is None or b is None:
        return False
    return any(x.end is not None and y.start is not None and x.end <= y.start for x, y in ((a, b), (b, a)))


def _check_groups(spec: ExperimentsSpec, problems: Problems) -> None:
    members: dict[str, list[Experiment]] = {}
    for experiment in spec.experiments.values():
        path: Path_ = ("experiments", experiment.name)
        if (experiment.group is None) != (not experiment.group_ranges):
            given = "group" if experiment.group else "group_buckets"
            problems.add((*path, given), "`group` and `group_buckets` go together: which share of the group is its own")
        if experiment.group is not None and experiment.group not in spec.groups:
            problems.add(
                (*path, "group"), f"no group {experiment.group!r}; {did_you_mean(experiment.group, spec.groups)}"
            )
        if experiment.group is None or experiment.state == "stopped":
            continue
        for other in members.get(experiment.group, []):
            if _overlap(experiment.group_ranges, other.group_ranges) and not _apart(experiment, other):
                problems.add((*path, "group_buckets"), f"overlap those of {other.name!r} in group {experiment.group!r}")
        members.setdefault(experiment.group, []).append(experiment)


def _check_testers(spec: ExperimentsSpec, problems: Problems) -> None:
    seen: dict[tuple[str, str], str] = {}
    for experiment in spec.experiments.values():
        if experiment.state == "stopped":
            continue
        for arm in experiment.arms:
            for tester in arm.testers:
                name = f"{experiment.name}.{arm.name}"
                first = seen.setdefault((experiment.layer, tester), name)
                if first != name:
                    path: Path_ = ("experiments", experiment.name, "arms", arm.name, "testers")
                    problems.add(path, f"{tester!r} is already a tester of {first} in the same layer")


def _check_salts(spec: ExperimentsSpec, problems: Problems) -> None:
    """Two layers (or experiments) with one salt would be copies of each other."""
    for section, things in (("layers", spec.layers.values()), ("experiments", _unstopped(spec))):
        seen: dict[str, str] = {}
        for thing in things:
            first = seen.setdefault(thing.salt, thing.name)  # type: ignore[attr-defined]
            if first != thing.name:  # type: ignore[attr-defined]
                problems.add(
                    (section, thing.name, "salt"), f"{first!r} has the same salt: both would split units alike"
                )  # type: ignore[attr-defined]


def _unstopped(spec: ExperimentsSpec) -> Iterator[Experiment]:
    return (experiment for experiment in spec.experiments.values() if experiment.state != "stopped")


def _check_models(spec: ExperimentsSpec, problems: Problems, models: Iterable[str]) -> None:
    known = set(models)
    for path, reference in model_references(spec):
        if reference not in known:
            problems.add(path, f"no model {reference!r} in the registry; {did_you_mean(reference, known)}")


def model_references(spec: ExperimentsSpec) -> Iterator[tuple[Path_, str]]:
    """Every model that a default or an arm of an unstopped experiment names, and where; empty text names none."""
    models = {name for name, parameter in spec.parameters.items() if parameter.type == "model"}
    for name in models:
        if spec.parameters[name].default:
            yield ("parameters", name, "default"), spec.parameters[name].default
    for experiment in _unstopped(spec):
        for arm in experiment.arms:
            for name in sorted(name for name in models & arm.values.keys() if arm.values[name]):
                yield ("experiments", experiment.name, "arms", arm.name, "values", name), arm.values[name]
