"""Which exposures are logged: the first of each (unit, experiment, arm, configuration) in a bounded window."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from datetime import datetime
from typing import Any

from serving.queries import microseconds


class ExposureWindow:
    """Remembers the last `size` keys for `ttl_s` seconds. A key forgotten early is logged twice, never not at all."""

    def __init__(
        self, *, size: int = 100_000, ttl_s: float = 3600.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._size, self._ttl_s, self._monotonic = size, ttl_s, monotonic
        self._seen: OrderedDict[Hashable, float] = OrderedDict()
        self._lock = threading.Lock()

    def first(self, key: Hashable) -> bool:
        """True the first time within the window."""
        now = self._monotonic()
        with self._lock:
            since = self._seen.get(key)
            if since is not None and now - since < self._ttl_s:
                return False
            self._seen[key] = now
            self._seen.move_to_end(key)
            if len(self._seen) > self._size:
                self._seen.popitem(last=False)
            return True

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Take back keys whose exposure could not be logged after all."""
        with self._lock:
            for key in keys:
                self._seen.pop(key, None)


def exposure_record(arm: Any, at: datetime, request_id: str, config_version: int | None) -> dict[str, Any]:
    """One row of events/exposures."""
    return {
        "timestamp": microseconds(at),
        "request_id": request_id,
        "unit_kind": arm.unit_kind,
        "unit": arm.unit,
        "layer": arm.layer,
        "experiment": arm.experiment,
        "arm": arm.arm,
        "config_version": config_version,
        "forced": bool(arm.forced),
        "counterfactual": bool(arm.counterfactual),
    }
