"""One request's assignment: decided from a plan, read by parameter name, and remembering which were read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from mmh3 import mmh3_32_uintdigest as murmur3

from experiments.hashing import MAX_UNIT_CHARS, N_BUCKETS, refusal
from experiments.plan import Owner, Plan, PlannedArm, PlannedBandit, PlannedLayer
from experiments.policy import Draw, Policy
from plait.errors import UnknownNameError

_NO_ATTRIBUTES: Mapping[str, Any] = MappingProxyType({})
HASH_UNIT = 2.0**-32


class StickyArms(Protocol):
    """First arms of units, kept: `get` gives the stored arm or None, `keep` remembers one. Both may fail."""

    def get(self, experiment: str, unit_kind: str, unit: str) -> str | None: ...

    def keep(self, experiment: str, unit_kind: str, unit: str, arm: str) -> None: ...


class AssignmentError(NamedTuple):
    """Why something was left at its default. `code` is one of a few, fit for a metric's label."""

    code: str
    detail: str


class ArmRef(NamedTuple):
    """A unit's arm in one experiment. forced: a tester's, left out of analysis. counterfactual: arms differ here.

    Of a bandit's arm: the propensity it was drawn with, the context (JSON) that decided it, and what chose (see Draw).
    """

    layer: str
    experiment: str
    arm: str
    forced: bool
    unit_kind: str
    unit: str
    counterfactual: bool = False
    propensity: float | None = None
    context: str | None = None
    chosen_by: str = "hash"


Choice = tuple[Owner, PlannedArm, str, bool]  # owner, arm, unit, forced


class Assignment:
    """Parameter values for one request. `assignment[name]` reads one and records its use; `values` reads unrecorded.

    missing: kinds of unit that some layer divides by and that were not given: those layers rest at their defaults.
    """

    __slots__ = (
        "_choices",
        "_counterfactual",
        "_defaults",
        "_draws",
        "_used",
        "_values",
        "errors",
        "missing",
        "version",
    )

    def __init__(
        self,
        version: int,
        values: dict[str, Any],
        choices: Sequence[Choice],
        errors: tuple[AssignmentError, ...],
        defaults: Mapping[str, Any],
        missing: tuple[str, ...] = (),
        draws: Mapping[Owner, Draw] = _NO_ATTRIBUTES,  # type: ignore[assignment]
    ) -> None:
        self.version, self._values, self._choices, self._draws = version, values, choices, draws
        self.errors, self._defaults, self.missing = errors, defaults, missing
        self._used: set[str] = set()
        self._counterfactual: set[str] = set()

    def __getitem__(self, parameter: str) -> Any:
        """The value, recorded as used. UnknownNameError (a LookupError) if the configuration has no such parameter."""
        try:
            value = self._values[parameter]
        except KeyError:
            raise UnknownNameError("parameter", parameter, self._values) from None
        self._used.add(parameter)
        return value

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._values

    def get(self, parameter: str, default: Any = None) -> Any:
        """The value, recorded as used; `default` if the configuration has no such parameter."""
        return self[parameter] if parameter in self._values else default

    @property
    def values(self) -> Mapping[str, Any]:
        """All parameters; reading here is no exposure."""
        return MappingProxyType(self._values)

    @property
    def arms(self) -> tuple[ArmRef, ...]:
        """Every experiment and holdout the units are in, used or not."""
        return tuple(_ref(choice, self._draws) for choice in self._choices)

    def alternatives(self, parameter: str) -> dict[str, Any]:
        """What `parameter` is in each arm of the experiment that decides it here, by arm name; empty if none does.

        For triggered analysis: compute the answer under the alternatives; `mark_counterfactual` if one differs.
        """
        for owner, _, _, _ in reversed(self._choices):
            if parameter in owner.parameters and not owner.is_holdout:
                below = self._value_below(parameter, owner)
                return {arm.name: arm.values.get(parameter, below) for arm in owner.arms}
        return {}

    def mark_counterfactual(self, parameter: str) -> None:
        """Say that another arm would have changed this answer through `parameter`: its exposures carry the mark.

        Call it in every arm alike, treatment included, else the marked groups cannot be compared.
        """
        self._counterfactual.add(parameter)

    def exposures(self) -> tuple[ArmRef, ...]:
        """The arms whose parameters were read: what this answer was made with."""
        used = self._touched(self._used | self._counterfactual)
        marked = self._touched(self._counterfactual) if self._counterfactual else set()
        return tuple(
            _ref(choice, self._draws, counterfactual=i in marked) for i, choice in enumerate(self._choices) if i in used
        )

    def _touched(self, parameters: set[str]) -> set[int]:
        """Positions of the choices that had a say in `parameters`: down to the one whose value is served."""
        touched, open_ = set(), set(parameters)
        for i in range(len(self._choices) - 1, -1, -1):
            owner, arm, _, _ = self._choices[i]
            if not open_.isdisjoint(owner.parameters):
                touched.add(i)
                open_ -= arm.values.keys()
        return touched

    def _value_below(self, parameter: str, top: Owner) -> Any:
        """What the parameter is without `top`'s say: the launch or outer layer's value."""
        for owner, arm, _, _ in reversed(self._choices):
            if owner.rank < top.rank and parameter in arm.values:
                return arm.values[parameter]
        return self._defaults[parameter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


def _ref(choice: Choice, draws: Mapping[Owner, Draw], *, counterfactual: bool = False) -> ArmRef:
    owner, arm, unit, forced = choice
    ref = ArmRef(owner.layer, owner.name, arm.name, forced, owner.unit_kind, unit, counterfactual)
    if owner.bandit is None or forced:
        return ref
    draw = draws[owner]
    return ref._replace(propensity=draw.propensity, context=draw.context, chosen_by=draw.chosen_by)


def assign(
    plan: Plan,
    version: int,
    units: Mapping[str, str],
    attributes: Mapping[str, Any],
    *,
    force: Mapping[str, str] = _NO_ATTRIBUTES,
    sticky: StickyArms | None = None,
    policies: Mapping[str, Policy] = _NO_ATTRIBUTES,
) -> Assignment:
    """Decide every layer of `plan` for these units. Bad units are left at defaults and named in `errors`.

    policies: of bandits, by experiment; one that is not there serves its weights.
    """
    keys, errors = _encode(plan.kinds, units)
    forced = _forced(plan, units, force, errors) if plan.testers or force else {}
    held, choices_above = _held_layers(plan, keys, units) if plan.holdouts else ((), ())
    choices: list[Choice] = []
    deferred: list[tuple[Owner, bytes]] = []
    domains: set[str] = set()
    draws: dict[Owner, Draw] = {}
    for layer in plan.layers:
        if forced and layer.name in forced:
            choices.append(forced[layer.name])
            continue
        key = keys.get(layer.unit_kind)
        if key is None or layer.name in held or (layer.domain is not None and layer.domain not in domains):
            continue
        owner = layer.owners[layer.table[murmur3(layer.prefix + key) % N_BUCKETS]]
        if owner is None:
            pass
        elif isinstance(owner, str):
            domains.add(owner)
        elif owner.plain:  # the usual case, without a call: half of the time of an assignment
            if owner.test is None or owner.test(attributes):
                arm = owner.arms[owner.arm_table[murmur3(owner.arm_prefix + key) % N_BUCKETS]]
                choices.append((owner, arm, units[owner.unit_kind], False))
        elif owner.requires:
            deferred.append((owner, key))
        elif owner.is_holdout:
            choices.append((owner, owner.arms[0], units[owner.unit_kind], False))
        else:
            decided = _decide(owner, key, keys, units, attributes, sticky, policies, draws, errors)
            if decided is not None:
                choices.append((owner, decided, units[owner.unit_kind], False))
        if layer.open_holdouts:
            choices.extend(_open_holdouts(layer, owner, units))
    if deferred:
        _decide_deferred(deferred, choices, keys, units, attributes, sticky, policies, draws, errors)
    choices.extend(choices_above)
    values = dict(plan.defaults)
    for _, chosen, _, _ in choices:
        values.update(chosen.values)
    missing = tuple(kind for kind in plan.kinds if kind not in units) if len(keys) < len(plan.kinds) else ()
    return Assignment(version, values, choices, tuple(errors), plan.defaults, missing, draws)


def _encode(kinds: Sequence[str], units: Mapping[str, Any]) -> tuple[dict[str, bytes], list[AssignmentError]]:
    """The hashed form of each unit that some layer wants. A kind that is absent is no error: its layers just rest."""
    keys: dict[str, bytes] = {}
    errors: list[AssignmentError] = []
    for kind in kinds:
        unit = units.get(kind)
        if isinstance(unit, str) and 0 < len(unit) <= MAX_UNIT_CHARS:
            data = unit.encode("utf-8", "surrogatepass")
            keys[kind] = b"%d:%b" % (len(data), data)
        elif kind in units:
            code = refusal(unit) or "unit_not_string"
            errors.append(AssignmentError(code, f"the {kind} id {_brief(unit)} cannot be assigned; defaults serve"))
    return keys, errors


def _brief(value: object) -> str:
    return f"of type {type(value).__name__}" if not isinstance(value, str) else f"of {len(value)} characters"


def _decide(
    owner: Owner,
    key: bytes,
    keys: Mapping[str, bytes],
    units: Mapping[str, str],
    attributes: Mapping[str, Any],
    sticky: StickyArms | None,
    policies: Mapping[str, Policy],
    draws: dict[Owner, Draw],
    errors: list[AssignmentError],
) -> PlannedArm | None:
    """The arm of a unit whose bucket is the owner's, or None: a unit that fails a test is offered to nobody else."""
    if owner.test is not None and not owner.test(attributes):
        return None
    if owner.group is not None:
        kind, prefix, marks = owner.group
        group_key = keys.get(kind)
        if group_key is None or not marks[murmur3(prefix + group_key) % N_BUCKETS]:
            return None
    if owner.bandit is not None:
        draw = draws[owner] = _draw(owner, owner.bandit, key, keys, attributes, policies, errors)
        return owner.arms[draw.arm]
    if owner.sticky and sticky is not None:
        return _stuck(owner, key, units[owner.unit_kind], sticky, errors)
    if not owner.enrolling:
        return None
    return owner.arms[owner.arm_table[murmur3(owner.arm_prefix + key) % N_BUCKETS]]


def _draw(
    owner: Owner,
    bandit: PlannedBandit,
    key: bytes,
    keys: Mapping[str, bytes],
    attributes: Mapping[str, Any],
    policies: Mapping[str, Policy],
    errors: list[AssignmentError],
) -> Draw:
    """What the bandit's policy draws; by the unit where no request id was given, by the weights where it fails."""
    u = murmur3(owner.arm_prefix + keys.get(bandit.drawn_by, key)) * HASH_UNIT
    policy = policies.get(owner.name)
    if policy is None:
        return bandit.initial.choose(u, attributes)
    try:
        return policy.choose(u, attributes)
    except Exception as error:  # whatever is wrong with a policy, the request goes on
        errors.append(AssignmentError("bandit_failed", f"{owner.name}: {error!r}"))
        return bandit.initial.choose(u, attributes)


def _stuck(owner: Owner, key: bytes, unit: str, sticky: StickyArms, errors: list[AssignmentError]) -> PlannedArm | None:
    """The stored arm; else, where the experiment still enrols, the hashed one, which is then stored."""
    hashed = owner.arms[owner.arm_table[murmur3(owner.arm_prefix + key) % N_BUCKETS]] if owner.enrolling else None
    try:
        stored = sticky.get(owner.name, owner.unit_kind, unit)
        if stored is not None:
            for arm in owner.arms:
                if arm.name == stored:
                    return arm
        if hashed is not None:
            sticky.keep(owner.name, owner.unit_kind, unit, hashed.name)
    except Exception as error:  # whatever the store does, the request goes on
        errors.append(AssignmentError("sticky_unavailable", f"{owner.name}: {error}"))
    return hashed


def _decide_deferred(
    deferred: list[tuple[Owner, bytes]],
    choices: list[Choice],
    keys: Mapping[str, bytes],
    units: Mapping[str, str],
    attributes: Mapping[str, Any],
    sticky: StickyArms | None,
    policies: Mapping[str, Policy],
    draws: dict[Owner, Draw],
    errors: list[AssignmentError],
) -> None:
    """Experiments with prerequisites, each after those it requires; then all choices back into the order of ranks."""
    arm_in = {owner.name: arm.name for owner, arm, _, _ in choices}
    for owner, key in sorted(deferred, key=lambda pair: pair[0].order):
        if all(name in arm_in and (not arms or arm_in[name] in arms) for name, arms in owner.requires):
            arm = _decide(owner, key, keys, units, attributes, sticky, policies, draws, errors)
            if arm is not None:
                choices.append((owner, arm, units[owner.unit_kind], False))
                arm_in[owner.name] = arm.name
    choices.sort(key=lambda choice: (choice[0].rank, choice[0].is_holdout))


def _forced(
    plan: Plan, units: Mapping[str, Any], force: Mapping[str, str], errors: list[AssignmentError]
) -> dict[str, Choice]:
    """Layer → the arm that a tester, or this call, is forced into."""
    out: dict[str, Choice] = {}
    for kind, unit in units.items():
        for owner, arm in plan.testers.get((kind, unit), ()) if isinstance(unit, str) else ():
            out[owner.layer] = (owner, arm, unit, True)
    for name, wanted in force.items():
        found = plan.experiments.get(name)
        arms = [arm for arm in found.arms if arm.name == wanted] if found else []
        if found is None or not arms:
            errors.append(AssignmentError("force_unknown", f"no arm {wanted!r} of a live experiment {name!r} to force"))
        else:
            out[found.layer] = (found, arms[0], str(units.get(found.unit_kind) or ""), True)
    return out


def _held_layers(
    plan: Plan, keys: Mapping[str, bytes], units: Mapping[str, str]
) -> tuple[frozenset[str], list[Choice]]:
    """The layers that global holdouts keep these units from, and the unit's arm in each holdout."""
    held: frozenset[str] = frozenset()
    choices: list[Choice] = []
    for holdout in plan.holdouts:
        owner = holdout.owner
        key = keys.get(owner.unit_kind)
        if key is None:
            continue
        inside = holdout.table[murmur3(holdout.prefix + key) % N_BUCKETS]
        if inside:
            held |= holdout.layers
        choices.append((owner, owner.arms[0 if inside else 1], units[owner.unit_kind], False))
    return held, choices


def _open_holdouts(layer: PlannedLayer, owner: Owner | str | None, units: Mapping[str, str]) -> list[Choice]:
    """The other arm of the layer's holdouts, for a unit that is in none of them."""
    if isinstance(owner, Owner) and owner.is_holdout:
        return []
    return [(holdout, holdout.arms[1], units[layer.unit_kind], False) for holdout in layer.open_holdouts]
