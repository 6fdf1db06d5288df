"""Assignment of many units at once, with numpy: for analysis and simulation. Row by row it equals `assign`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experiments.assignment import HASH_UNIT, AssignmentError, StickyArms
from experiments.hashing import UnitColumn
from experiments.plan import GlobalHoldout, Owner, Plan, PlannedBandit, PlannedLayer, Table
from experiments.policy import Policy
from plait.errors import DataError, UnknownNameError

# Shapes: N rows
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class BatchAssignment:
    """The arms and parameter values of N rows, kept per owner: (owner, rows, arm index of each, forced)."""

    def __init__(
        self,
        version: int,
        n_rows: int,
        decisions: Sequence[tuple[Owner, Ints, Ints, Bools]],
        defaults: Mapping[str, Any],
        errors: Mapping[int, tuple[AssignmentError, ...]],
        propensities: Mapping[str, npt.NDArray[np.float64]],
    ) -> None:
        self.version, self.n_rows, self.errors = version, n_rows, errors
        self._decisions, self._defaults, self._propensities = decisions, defaults, propensities

    def values(self, parameter: str) -> npt.NDArray[np.object_]:
        """The parameter's value in every row, shape (N,). UnknownNameError if there is no such parameter."""
        if parameter not in self._defaults:
            raise UnknownNameError("parameter", parameter, self._defaults)
        out = np.empty(self.n_rows, object)
        out[:] = [self._defaults[parameter]] * self.n_rows
        for owner, rows, arms, _ in self._decisions:
            for i, arm in enumerate(owner.arms):
                if parameter in arm.values:
                    chosen = rows[arms == i]
                    value = arm.values[parameter]
                    out[chosen] = [value] * len(chosen) if isinstance(value, tuple) else value
        return out

    def arm_of(self, experiment: str) -> pa.DictionaryArray:
        """Each row's arm in an experiment or holdout, shape (N,); null where it is not in."""
        codes = np.full(self.n_rows, -1, np.int32)
        names: list[str] = []
        for owner, rows, arms, _ in self._decisions:
            if owner.name == experiment:
                names = [arm.name for arm in owner.arms]
                codes[rows] = arms
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(names, pa.string()))

    def forced(self, experiment: str) -> Bools:
        """Whether each row is a tester of the experiment, shape (N,)."""
        out = np.zeros(self.n_rows, bool)
        for owner, rows, _, forced in self._decisions:
            if owner.name == experiment:
                out[rows] = forced
        return out

    def propensities(self, experiment: str) -> npt.NDArray[np.float64]:
        """The chance with which a bandit drew each row's arm, shape (N,); nan where it drew none."""
        return self._propensities.get(experiment, np.full(self.n_rows, np.nan))

    def table(self) -> pa.Table:
        """One row per (row, experiment it is in): row int64, layer, experiment, arm, forced; by row."""
        empty = [np.empty(0, np.int64)]
        rows = np.concatenate([rows for _, rows, _, _ in self._decisions] or empty)
        order = np.argsort(rows, kind="stable")

        def column(texts: Iterator[list[str]]) -> pa.Array:
            return pa.array([text for block in texts for text in block], pa.string()).take(pa.array(order))

        return pa.table(
            {
                "row": rows[order],
                "layer": column([owner.layer] * len(rows) for owner, rows, _, _ in self._decisions),
                "experiment": column([owner.name] * len(rows) for owner, rows, _, _ in self._decisions),
                "arm": column([owner.arms[i].name for i in arms] for owner, _, arms, _ in self._decisions),
                "forced": np.concatenate([f for _, _, _, f in self._decisions] or [np.empty(0, bool)])[order],
            }
        )


def assign_many(
    plan: Plan,
    version: int,
    units: Mapping[str, Sequence[Any]],
    attributes: pa.Table | Mapping[str, Sequence[Any]] | None,
    *,
    sticky: StickyArms | None = None,
    policies: Mapping[str, Policy],
) -> BatchAssignment:
    """Every layer of `plan` for all rows. DataError if the columns differ in length."""
    lengths = {name: len(column) for name, column in units.items()}
    if attributes is not None:
        lengths.update({name: len(attributes[name]) for name in _names(attributes)})
    if len(set(lengths.values())) > 1:
        raise DataError(f"columns of different lengths: {lengths}; one value per row in each")
    n_rows = next(iter(lengths.values()), 0)
    return _Batch(plan, n_rows, units, attributes, sticky, policies).assign(version)


def _names(attributes: pa.Table | Mapping[str, Sequence[Any]]) -> Sequence[str]:
    return attributes.column_names if isinstance(attributes, pa.Table) else list(attributes)


class _Batch:
    def __init__(
        self,
        plan: Plan,
        n_rows: int,
        units: Mapping[str, Sequence[Any]],
        attributes: pa.Table | Mapping[str, Sequence[Any]] | None,
        sticky: StickyArms | None,
        policies: Mapping[str, Policy],
    ) -> None:
        self._plan, self._n, self._sticky, self._policies = plan, n_rows, sticky, policies
        self._attributes = attributes
        self._lists: dict[str, list[Any]] = {}
        self._coded: dict[str, tuple[Ints, int]] = {}
        self._columns = {
            kind: UnitColumn(column.to_pylist() if isinstance(column, (pa.Array, pa.ChunkedArray)) else column)
            for kind, column in units.items()
            if kind in plan.kinds
        }
        self._errors: dict[int, list[AssignmentError]] = {}
        self._propensities: dict[str, npt.NDArray[np.float64]] = {}
        self._arms_in: dict[str, Ints] = {}  # experiment -> arm index of each row, -1 = not in

    def assign(self, version: int) -> BatchAssignment:
        for kind, given in self._columns.items():
            for row, code in given.reasons.items():
                self._error(row, AssignmentError(code, f"the {kind} id cannot be assigned; defaults serve"))
        forced = self._forced()
        held, above = self._held()
        owned: list[tuple[Owner, Ints]] = []
        below: list[tuple[Owner, Ints, Ints, Bools]] = []
        domains: dict[str, Bools] = {}
        for layer in self._plan.layers:
            column = self._columns.get(layer.unit_kind)
            rows_forced = forced.get(layer.name, {})
            if column is None:
                continue
            free = column.ok & ~held.get(layer.name, np.zeros(self._n, bool))
            free[list(rows_forced)] = False
            if layer.domain is not None:
                free &= domains.get(layer.domain, np.zeros(self._n, bool))
            self._divide(layer, column, free, domains, owned, below)
        decisions = self._forced_decisions(forced)
        for owner, rows, arms, _ in decisions:
            self._arms_in.setdefault(owner.name, np.full(self._n, -1))[rows] = arms
        for owner, rows in sorted(owned, key=lambda pair: pair[0].order):
            rows, arms = self._decide(owner, rows)
            self._arms_in.setdefault(owner.name, np.full(self._n, -1))[rows] = arms
            decisions.append((owner, rows, arms, np.zeros(len(rows), bool)))
        decisions = sorted([*decisions, *below], key=lambda made: (made[0].rank, made[0].is_holdout)) + above
        return BatchAssignment(
            version,
            self._n,
            decisions,
            self._plan.defaults,
            {row: tuple(e) for row, e in self._errors.items()},
            self._propensities,
        )

    def _divide(
        self,
        layer: PlannedLayer,
        column: UnitColumn,
        free: Bools,
        domains: dict[str, Bools],
        owned: list[tuple[Owner, Ints]],
        below: list[tuple[Owner, Ints, Ints, Bools]],
    ) -> None:
        """Give each free row to the owner of its bucket."""
        codes = np.where(free, _array(layer.table)[column.buckets(layer.prefix)], 0)
        outside = free.copy()
        for code, owner in enumerate(layer.owners):
            if owner is None:
                continue
            mine = codes == code
            if isinstance(owner, str):
                domains[owner] = mine
                continue
            rows = np.flatnonzero(mine)
            if owner.is_holdout:
                below.append(_uniform(owner, rows, 0))
                outside &= ~mine
            else:
                owned.append((owner, rows))
        for holdout in layer.open_holdouts:
            below.append(_uniform(holdout, np.flatnonzero(outside), 1))

    def _decide(self, owner: Owner, rows: Ints) -> tuple[Ints, Ints]:
        """The rows that stay in, and their arms."""
        for name, wanted in owner.requires:
            index = self._arms_in.get(name, np.full(self._n, -1))[rows]
            needed = self._plan.experiments.get(name)
            names = [arm.name for arm in needed.arms] if needed else []
            allowed = [i for i, arm in enumerate(names) if not wanted or arm in wanted]
            rows = rows[np.isin(index, allowed)]
        if owner.test is not None and len(rows):
            rows = rows[self._matches(owner, rows)]
        if owner.group is not None:
            kind, prefix, marks = owner.group
            column = self._columns.get(kind)
            inside = (
                np.zeros(self._n, bool) if column is None else (_array(marks)[column.buckets(prefix)] > 0) & column.ok
            )
            rows = rows[inside[rows]]
        if owner.bandit is not None:
            return rows, self._draw(owner, owner.bandit, rows)
        units = self._columns[owner.unit_kind]
        arms = _array(owner.arm_table)[units.buckets(owner.arm_prefix)[rows]].astype(np.int64)
        if owner.sticky and self._sticky is not None:
            return self._stick(owner, rows, arms, units)
        return (rows, arms) if owner.enrolling else (rows[:0], arms[:0])

    def _draw(self, owner: Owner, bandit: PlannedBandit, rows: Ints) -> Ints:
        """The arms that the bandit's policy draws; propensities are kept beside."""
        hashes = self._columns[owner.unit_kind].hashes(owner.arm_prefix)
        drawn_by = self._columns.get(bandit.drawn_by)
        if drawn_by is not None:
            hashes = np.where(drawn_by.ok, drawn_by.hashes(owner.arm_prefix), hashes)
        policy = self._policies.get(owner.name, bandit.initial)
        present = _names(self._attributes) if self._attributes is not None else []
        columns = [(name, self._column(name)) for name in present if name in bandit.reads]
        arms, propensities = np.zeros(len(rows), np.int64), np.full(self._n, np.nan)
        for at, (row, u) in enumerate(zip(rows.tolist(), (hashes[rows] * HASH_UNIT).tolist(), strict=True)):
            attributes = {name: column[row] for name, column in columns}
            try:
                draw = policy.choose(u, attributes)
            except Exception as error:
                self._error(row, AssignmentError("bandit_failed", f"{owner.name}: {error!r}"))
                draw = bandit.initial.choose(u, attributes)
            arms[at], propensities[row] = draw.arm, draw.propensity
        self._propensities[owner.name] = propensities
        return arms

    def _stick(self, owner: Owner, rows: Ints, arms: Ints, units: UnitColumn) -> tuple[Ints, Ints]:
        """Rows with their stored arms; rows without one only where the experiment enrols. Nothing is stored: looking
        at many units is not serving them."""
        assert self._sticky is not None
        names = {arm.name: i for i, arm in enumerate(owner.arms)}
        keep = np.full(len(rows), owner.enrolling)
        for at, row in enumerate(rows.tolist()):
            try:
                stored = self._sticky.get(owner.name, owner.unit_kind, units.ids[row])
            except Exception as error:
                self._error(row, AssignmentError("sticky_unavailable", f"{owner.name}: {error}"))
                continue
            if stored in names:
                arms[at], keep[at] = names[stored], True
        return rows[keep], arms[keep]

    def _matches(self, owner: Owner, rows: Ints) -> Bools:
        """The condition of each row; combinations of attributes are tested once each."""
        assert owner.test is not None
        present = _names(self._attributes) if self._attributes is not None else []
        names = [name for name in present if name in owner.attributes]
        combined = np.zeros(len(rows), np.int64)
        for name in names:
            codes, n_codes = self._codes(name)
            combined = np.unique(combined, return_inverse=True)[1] * n_codes + codes[rows]
        _, first, inverse = np.unique(combined, return_index=True, return_inverse=True)
        columns = [(name, self._column(name)) for name in names]
        answers = [owner.test({name: column[row] for name, column in columns}) for row in rows[first].tolist()]
        return np.array(answers, bool)[inverse]

    def _codes(self, name: str) -> tuple[Ints, int]:
        """Rows of a column that are equal (and of one type: True is not 1) share a code. Made once."""
        if name not in self._coded:
            seen: dict[Any, int] = {}
            codes = []
            for row, value in enumerate(self._column(name)):
                try:
                    codes.append(seen.setdefault((type(value), value), len(seen)))
                except TypeError:  # a list, say: a code of its own
                    codes.append(seen.setdefault((_Batch, row), len(seen)))
            self._coded[name] = np.array(codes, np.int64), max(len(seen), 1)
        return self._coded[name]

    def _column(self, name: str) -> list[Any]:
        assert self._attributes is not None
        if name not in self._lists:
            column = self._attributes[name]
            if isinstance(column, (pa.Array, pa.ChunkedArray)):
                self._lists[name] = column.to_pylist()
            else:
                self._lists[name] = column.tolist() if isinstance(column, np.ndarray) else list(column)
        return self._lists[name]

    def _forced(self) -> dict[str, dict[int, tuple[Owner, int]]]:
        """Layer → row → the tester's (owner, arm index)."""
        out: dict[str, dict[int, tuple[Owner, int]]] = {}
        if not self._plan.testers:
            return out
        for kind, column in self._columns.items():
            wanted = {unit for k, unit in self._plan.testers if k == kind}
            for row, unit in enumerate(column.ids if wanted else ()):
                if isinstance(unit, str) and unit in wanted:
                    for owner, arm in self._plan.testers[kind, unit]:
                        out.setdefault(owner.layer, {})[row] = (owner, owner.arms.index(arm))
        return out

    @staticmethod
    def _forced_decisions(
        forced: Mapping[str, Mapping[int, tuple[Owner, int]]],
    ) -> list[tuple[Owner, Ints, Ints, Bools]]:
        out = []
        for by_row in forced.values():
            for owner in {owner for owner, _ in by_row.values()}:
                rows = np.array([row for row, (o, _) in by_row.items() if o is owner], np.int64)
                arms = np.array([arm for o, arm in by_row.values() if o is owner], np.int64)
                out.append((owner, rows, arms, np.ones(len(rows), bool)))
        return out

    def _held(self) -> tuple[dict[str, Bools], list[tuple[Owner, Ints, Ints, Bools]]]:
        """Layer → rows that global holdouts keep from it, and each row's arm in each of them."""
        held: dict[str, Bools] = {}
        decisions = []
        for holdout in self._plan.holdouts:
            column = self._columns.get(holdout.owner.unit_kind)
            if column is None:
                continue
            inside = self._inside(holdout, column)
            for layer in holdout.layers:
                held[layer] = held.get(layer, np.zeros(self._n, bool)) | inside
            rows = np.flatnonzero(column.ok)
            decisions.append((holdout.owner, rows, np.where(inside[rows], 0, 1), np.zeros(len(rows), bool)))
        return held, decisions

    @staticmethod
    def _inside(holdout: GlobalHoldout, column: UnitColumn) -> Bools:
        return (_array(holdout.table)[column.buckets(holdout.prefix)] > 0) & column.ok

    def _error(self, row: int, error: AssignmentError) -> None:
        self._errors.setdefault(row, []).append(error)


def _array(table: Table) -> npt.NDArray[Any]:
    return np.frombuffer(table, np.uint8 if isinstance(table, bytes) else np.uint16)


def _uniform(owner: Owner, rows: Ints, arm: int) -> tuple[Owner, Ints, Ints, Bools]:
    return owner, rows, np.full(len(rows), arm), np.zeros(len(rows), bool)
