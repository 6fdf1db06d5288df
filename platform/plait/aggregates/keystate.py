"""The running values of one key: what the feature table's expression computes over all rows, one event at a time."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plait.aggregates.events import ENTER, FULL, ID, TIME
from plait.aggregates.plan import US_PER_S, Plan
from plait.aggregates.spec import ALL_TIME

_ENTERS = -1


class KeyState:
    """Events wait in a heap until they enter, then until they leave each window; sums move as they do.

    `at` is the moment of the last change, the event_timestamp that the feature table gives the same values.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.at: int | None = None
        self.ids: set[str] = set()
        self._windows = len(plan.spec.windows)
        self._sums = [[0] * self._windows for _ in plan.measures]
        self._present: list[list[Counter[str]]] = [[Counter() for _ in plan.spec.windows] for _ in plan.distincts]
        # Least and greatest within windows that end: how often each value is inside. Over all time: the value alone.
        self._inside: list[list[Counter[Any]]] = [[Counter() for _ in plan.spec.bounded_us] for _ in plan.extremes]
        self._ever: list[Any] = [None] * len(plan.extremes)
        self._list: list[tuple[Any, ...]] = []
        self._longest = max((feature.n for feature in plan.lists), default=0)
        self._pending: list[tuple[int, int, int, Mapping[str, Any]]] = []
        self._n = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Take the rows of one normalised event in; False if it was there already. Nothing changes before `advance`.

        An event has several rows if an attribute of it is a list.
        """
        name = rows[0][ID]
        if name is not None:
            if name in self.ids:
                return False
            self.ids.add(name)
        for row in rows:
            self._push(row[ENTER], _ENTERS, row)
            for i, length in enumerate(self.plan.spec.bounded_us):
                if row[FULL] + length > row[ENTER]:
                    self._push(row[FULL] + length, i, row)
        return True

    def _push(self, at: int, what: int, event: Mapping[str, Any]) -> None:
        self._n += 1  # no two entries compare by their events
        heapq.heappush(self._pending, (at, self._n, what, event))

    @property
    def next_at(self) -> int | None:
        """When something will change next, as far as is known."""
        return self._pending[0][0] if self._pending else None

    def advance(self, now: int) -> bool:
        """Let everything due by `now` (us, inclusive) happen; whether anything did."""
        changed = False
        while self._pending and self._pending[0][0] <= now:
            at, _, what, event = heapq.heappop(self._pending)
            if what == _ENTERS:
                self._enter(event)
            else:
                self._change(event, what, -1)
            self.at = at if self.at is None else max(self.at, at)
            changed = True
        return changed

    def _enter(self, event: Mapping[str, Any]) -> None:
        bounded = self.plan.spec.bounded_us
        for j in range(self._windows):
            if j >= len(bounded) or event[FULL] + bounded[j] > event[ENTER]:
                self._change(event, j, 1)
        for i, extreme in enumerate(self.plan.extremes):
            value = event[f"_x{i}"]
            if value is not None:
                ever = self._ever[i]
                self._ever[i] = value if ever is None else (min if extreme.op == "least" else max)(ever, value)
        if self._longest:
            name = event[ID]
            # As the engines have it, an event without an id comes after those that have one.
            place = (event[ENTER], event[TIME], name is None, name or "")
            insort(self._list, (*place, *(event[f"_l{i}"] for i in range(len(self.plan.lists)))))
            del self._list[: -self._longest]

    def _change(self, event: Mapping[str, Any], window: int, sign: int) -> None:
        for i, sums in enumerate(self._sums):
            sums[window] += sign * event[f"_m{i}"]
        for i, present in enumerate(self._present):
            _count(present[window], event[f"_d{i}"], sign)
        if window < len(self.plan.spec.bounded_us):
            for i, inside in enumerate(self._inside):
                _count(inside[window], event[f"_x{i}"], sign)

    def values(self) -> dict[str, Any]:
        """The feature columns now."""
        if self.plan.lists:
            return {
                feature.name: [entry[4 + i] for entry in self._list[-feature.n :]]
                for i, feature in enumerate(self.plan.lists)
            }
        values = self.plan.features(self._read, _if_else, float)
        for feature in self.plan.spec.features:
            if feature.kind == "last_time" and values[feature.name] is not None:
                values[feature.name] //= US_PER_S
        return values

    def _read(self, name: str) -> Any:
        stem, _, window = name.rpartition("_")
        kind, i = stem[1], int(stem[2:])
        if kind == "x" and window == ALL_TIME:
            return self._ever[i]
        j = self.plan.spec.windows.index(window)
        if kind == "m":
            return self._sums[i][j]
        if kind == "d":
            return len(self._present[i][j])
        inside = self._inside[i][j]
        return (min if self.plan.extremes[i].op == "least" else max)(inside) if inside else None


def _count(counter: Counter[Any], value: Any, sign: int) -> None:
    if value is None:
        return
    counter[value] += sign
    if not counter[value]:
        del counter[value]


def _if_else(condition: bool, then: Callable[[], Any], otherwise: Any) -> Any:
    return then() if condition else otherwise
