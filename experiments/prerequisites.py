"""Prerequisites between experiments: known, alive, without a cycle."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from experiments.problems import Problems
from experiments.source import Path_
from experiments.spec import ROOT, Experiment, ExperimentsSpec
from plait.errors import did_you_mean


def check_prerequisites(spec: ExperimentsSpec, problems: Problems) -> None:
    """A prerequisite must name an experiment and arms that a unit can be in together with this experiment."""
    for experiment in spec.experiments.values():
        for i, (name, arms) in enumerate(experiment.requires):
            path: Path_ = ("experiments", experiment.name, "requires", i)
            needed = spec.experiments.get(name)
            if needed is None:
                problems.add(path, f"no experiment {name!r}; {did_you_mean(name, spec.experiments)}")
                continue
            known = [arm.name for arm in needed.arms]
            for arm in sorted(arms - set(known)):
                problems.add((*path, "arms"), f"experiment {name!r} has no arm {arm!r}; {did_you_mean(arm, known)}")
            if experiment.state != "stopped" and (reason := _death(spec, experiment, needed, arms)):
                problems.add(path, f"dead prerequisite: {reason}; nobody could ever be in {experiment.name!r}")
    try:
        evaluation_order(spec)
    except CycleError as error:
        names = [str(name) for name in error.args[1]]
        problems.add(("experiments", names[0], "requires"), f"prerequisites in a cycle: {' → '.join(reversed(names))}")
    if not problems.faults:
        _check_chains(spec, problems)


def _check_chains(spec: ExperimentsSpec, problems: Problems) -> None:
    """All that an experiment requires, directly or not, must be possible together."""
    for experiment in spec.experiments.values():
        needed, waiting = [experiment], [name for name, _ in experiment.requires]
        while waiting:
            other = spec.experiments[waiting.pop()]
            if other in needed:
                continue
            clash = next((each for each in needed if _exclusive(spec, each, other)), None)
            if clash is not None and experiment.state != "stopped":
                problems.add(
                    ("experiments", experiment.name, "requires"),
                    f"dead prerequisite: no unit can be in both {clash.name!r} and {other.name!r}",
                )
                break
            needed.append(other)
            waiting += [name for name, _ in other.requires]


def evaluation_order(spec: ExperimentsSpec) -> dict[str, int]:
    """Position of each experiment in an order in which prerequisites come first. CycleError if there is none."""
    graph = {e.name: {name for name, _ in e.requires} for e in spec.experiments.values()}
    return {name: i for i, name in enumerate(TopologicalSorter(graph).static_order())}


def _death(spec: ExperimentsSpec, experiment: Experiment, needed: Experiment, arms: frozenset[str]) -> str | None:
    if needed.state == "stopped":
        return f"{needed.name!r} is stopped"
    if experiment.state == "running" and needed.state == "draft":
        return f"{needed.name!r} is still a draft"
    if needed.end and experiment.start and needed.end <= experiment.start:
        return f"{needed.name!r} ends before {experiment.name!r} starts"
    if experiment.end and needed.start and experiment.end <= needed.start:
        return f"{needed.name!r} starts after {experiment.name!r} ends"
    if arms and not any(arm.parts for arm in needed.arms if arm.name in arms):
        return f"the arms {', '.join(sorted(arms))} of {needed.name!r} have no weight"
    if experiment.group is not None and experiment.group == needed.group:
        return f"both are in group {experiment.group!r}, which takes a unit into one of them only"
    if _exclusive(spec, experiment, needed):
        return f"{needed.name!r} is in other buckets of the same layer"
    return None


def _exclusive(spec: ExperimentsSpec, a: Experiment, b: Experiment) -> bool:
    """Whether some layer sends the two into different buckets."""
    choices_of_b = dict(_choices(spec, b))
    return any(layer in choices_of_b and choices_of_b[layer] != choice for layer, choice in _choices(spec, a))


def _choices(spec: ExperimentsSpec, experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(layer, what owns the bucket there) from the experiment up to the default domain."""
    layer, choice = experiment.layer, f"experiment {experiment.name}"
    yield layer, choice
    while (domain := spec.layers[layer].domain) != ROOT:
        layer, choice = spec.domains[domain].layer, f"domain {domain}"
        yield layer, choice
