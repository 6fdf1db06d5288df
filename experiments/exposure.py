"""Which exposures are logged: the first of each (unit, experiment, arm, configuration version) in a bounded window,
and every one that a bandit drew.

A key forgotten early, or one whose record could not be queued, is logged again at its next use: twice, never not at
all (the report counts a unit once). Expiry runs on the monotonic clock, so a wall clock that jumps changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(slots=True)
class ExposureCounts:
    """used = logged + repeated + dropped. Of the logged, `lost` could not be written: the table holds the rest.

    `evicted` keys left the window early because it was full.
    """

    used: int = 0
    logged: int = 0
    repeated: int = 0
    dropped: int = 0
    lost: int = 0
    forced: int = 0
    evicted: int = 0


class ExposureWindow:
    """Remembers the last `size` keys for `ttl_s` seconds each."""

    def __init__(
        self, *, size: int = 100_000, ttl_s: float = 3600.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._size, self._ttl_s, self._monotonic = size, ttl_s, monotonic
        self._since: OrderedDict[Hashable, float] = OrderedDict()  # oldest first: entries never move
        self._lock = threading.Lock()
        self.evicted = 0

    def first(self, key: Hashable) -> bool:
        """True the first time within the window."""
        now = self._monotonic()
        with self._lock:
            while self._since and now - next(iter(self._since.values())) >= self._ttl_s:
                self._since.popitem(last=False)
            if key in self._since:
                return False
            self._since[key] = now
            if len(self._since) > self._size:
                self._since.popitem(last=False)
                self.evicted += 1
            return True

    def forget(self, key: Hashable) -> None:
        """Let the next use of `key` count as the first."""
        with self._lock:
            self._since.pop(key, None)

    def clear(self) -> None:
        """Let the next use of every key count as the first."""
        with self._lock:
            self._since.clear()

    def __len__(self) -> int:
        return len(self._since)


def exposure_record(exposure: Any, at: datetime, request_id: str, config_version: int | None) -> dict[str, Any]:
    """One row of events/exposures, of an ArmRef that `Assignment.exposures` returned."""
    return {
        "timestamp": (at - _EPOCH) // _MICROSECOND,
        "request_id": request_id,
        "unit_kind": exposure.unit_kind,
        "unit": exposure.unit,
        "layer": exposure.layer,
        "experiment": exposure.experiment,
        "arm": exposure.arm,
        "config_version": config_version,
        "forced": bool(exposure.forced),
        "counterfactual": bool(exposure.counterfactual),
        "propensity": exposure.propensity,
        "context": exposure.context,
    }


def exposure_key(exposure: Any, version: int | None) -> Hashable:
    """What is logged once. A first counterfactual use is news even where the plain use is known."""
    return (exposure.unit_kind, exposure.unit, exposure.experiment, exposure.arm, version, exposure.counterfactual)


class RecordedExposures(NamedTuple):
    """What became of an answer's exposures; those in neither count were dropped by a full queue."""

    logged: tuple[Any, ...]
    n_repeated: int


class ExposureRecorder:
    """Turns what an assignment was used for into records of the event log.

    `enqueue(records) -> bool` takes them or, when its queue is full, refuses them all (EventLog.enqueue, with the kind
    bound). One recorder per process.
    """

    def __init__(
        self, enqueue: Callable[[Sequence[Mapping[str, Any]]], bool], window: ExposureWindow | None = None
    ) -> None:
        self._enqueue, self._counts = enqueue, ExposureCounts()
        self.window = ExposureWindow() if window is None else window
        self._lock = threading.Lock()

    @property
    def counts(self) -> ExposureCounts:
        self._counts.evicted = self.window.evicted
        return self._counts

    def lost(self, n: int) -> None:
        """Say that `n` of the logged exposures could not be written: all are logged again at their next use."""
        self.window.clear()
        with self._lock:
            self._counts.lost += n

    def record(self, exposures: Sequence[Any], version: int | None, request_id: str, at: datetime) -> RecordedExposures:
        """Log those of an answer's exposures (`Assignment.exposures`) that are new in the window.

        What a bandit drew is logged with every request: each is a decision of its own to learn from.
        """
        fresh: dict[Hashable, Any] = {}
        for exposure in exposures:
            key = exposure_key(exposure, version)
            if exposure.propensity is not None or self.window.first(key):
                fresh[key] = exposure
        records = [exposure_record(exposure, at, request_id, version) for exposure in fresh.values()]
        taken = not fresh or self._enqueue(records)
        if not taken:
            for refused in fresh:
                self.window.forget(refused)
        logged = tuple(fresh.values()) if taken else ()
        n_repeated = len(exposures) - len(fresh)
        with self._lock:
            self._counts.used += len(exposures)
            self._counts.repeated += n_repeated
            self._counts.forced += sum(exposure.forced for exposure in exposures)
            self._counts.logged += len(logged)
            self._counts.dropped += len(fresh) - len(logged)
        return RecordedExposures(logged, n_repeated)
