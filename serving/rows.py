"""Feature rows of one request, read within a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from serving.parts import Rows, ServingModel


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Rows made here: defaults, or a selection of what a reader returned."""

    request: pa.Table
    candidates: pa.Table
    unknown: np.ndarray
    request_unknown: bool


def defaults_of(model: ServingModel, n_candidates: int) -> FeatureRows:
    """Rows without a value. Nothing is known, so no candidate is called unknown."""
    request, candidates = model.defaults(n_candidates)
    return FeatureRows(request, candidates, np.zeros(n_candidates, bool), False)


def take(rows: Rows, keep: np.ndarray) -> FeatureRows:
    """The same request with only the candidates at `keep`."""
    return FeatureRows(rows.request, rows.candidates.take(pa.array(keep)), rows.unknown[keep], rows.request_unknown)


class DeadlinePool:
    """Runs a read with a deadline. Reads that hang keep their thread; when all hang, the next fails at once."""

    def __init__(self, n_threads: int) -> None:
        self._executor = ThreadPoolExecutor(n_threads, thread_name_prefix="plait-features")
        self._free = threading.Semaphore(n_threads)

    def run(self, call: Callable[[], Rows], *, timeout_s: float) -> Rows:
        """The call's result, or its exception; TimeoutError after `timeout_s`."""
        if not self._free.acquire(timeout=timeout_s):
            raise TimeoutError(f"every feature read hangs; waited {timeout_s} s for one to end")
        try:
            future = self._executor.submit(call)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(self._done)
        try:
            return future.result(timeout=timeout_s)
        except FutureTimeout:
            future.cancel()
            raise TimeoutError(f"the feature read took longer than {timeout_s} s") from None

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _done(self, _: Future[Rows]) -> None:
        self._free.release()
