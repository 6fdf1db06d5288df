"""Prometheus metrics of one worker, added up over all workers of a server.

With PROMETHEUS_MULTIPROC_DIR set (the launcher does, before prometheus_client is first imported) every process keeps
its numbers in mapped files there and any worker can answer /metrics for all. Labels are bounded: never a user, an item
or a request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STAGE_SECONDS = (0.0001, 0.00025, 0.0005, *SECONDS)
_PID = re.compile(r"gauge_live\w*_(\d+)\.db\Z")


class Metrics:
    """All that a worker counts. folder: where the workers of a server add up; None: this process alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "plait_requests_total", "HTTP requests answered.", ["route", "model", "version", "status"], registry=r
        )
        self.request_seconds = Histogram(
            "plait_request_seconds", "Time to answer, by route.", ["route"], buckets=SECONDS, registry=r
        )
        self.stage_seconds = Histogram(
            "plait_stage_seconds", "Time of a prediction's stages.", ["stage"], buckets=STAGE_SECONDS, registry=r
        )
        self.feature_read_seconds = Histogram(
            "plait_feature_read_seconds", "Feature reads that ended in time.", buckets=STAGE_SECONDS, registry=r
        )
        self.inflight = Gauge("plait_inflight", "Requests being answered.", multiprocess_mode="livesum", registry=r)
        self.rejected = Counter("plait_rejected_total", "Requests refused, by reason.", ["reason"], registry=r)
        self.degraded = Counter(
            "plait_degraded_total", "Answers that had to degrade, by reason.", ["reason"], registry=r
        )
        self.candidates = Counter("plait_candidates_total", "Candidates scored.", ["scene"], registry=r)
        self.unknown_candidates = Counter(
            "plait_feature_missing_total", "Candidates whose id no feature view knows.", ["feature_service"], registry=r
        )
        self.model_loaded = Gauge(
            "plait_model_loaded",
            "Workers that hold this version.",
            ["model", "version"],
            multiprocess_mode="livesum",
            registry=r,
        )
        self.model_load_seconds = Histogram(
            "plait_model_load_seconds", "Load, warm-up and golden rows.", buckets=SECONDS, registry=r
        )
        self.model_load_failures = Counter(
            "plait_model_load_failures_total", "Versions that could not be loaded.", ["model"], registry=r
        )
        self.assignments = Counter(
            "plait_assignments_total", "Arms served.", ["layer", "experiment", "arm"], registry=r
        )
        self.unit_missing = Counter(
            "plait_unit_missing_total",
            "Requests without an id that some layer divides by: its defaults served.",
            ["unit_kind"],
            registry=r,
        )
        self.assignment_errors = Counter(
            "plait_assignment_errors_total", "Assignments left at defaults, by reason.", ["code"], registry=r
        )
        self.bandit_choices = Counter(
            "plait_bandit_choices_total",
            "Arms that a bandit drew, by what decided: policy, weights (nothing learned yet) or no_context.",
            ["experiment", "chosen_by"],
            registry=r,
        )
        self.policy_reloads = Counter(
            "plait_policy_reload_total", "Polls that took up a bandit's policy, or could not.", ["result"], registry=r
        )
        self.exposures = Counter("plait_exposures_total", "Exposures logged.", ["experiment", "arm"], registry=r)
        self.exposures_deduped = Counter(
            "plait_exposures_deduped_total", "Exposures not logged again within their window.", registry=r
        )
        self.exposures_dropped = Counter("plait_exposures_dropped_total", "Exposures lost to a full queue.", registry=r)
        self.exposure_queue = Gauge(
            "plait_exposure_queue", "Log records waiting to be written.", multiprocess_mode="livesum", registry=r
        )
        self.log_dropped = Counter("plait_log_dropped_total", "Log records lost to a full queue.", ["kind"], registry=r)
        self.log_lost = Counter(
            "plait_log_lost_total", "Log records taken and then not written: a disk that is full.", ["kind"], registry=r
        )
        self.events = Counter("plait_events_total", "Feedback events taken.", ["type"], registry=r)
        self.config_reloads = Counter(
            "plait_config_reload_total", "Configurations of the experiments taken up.", ["result"], registry=r
        )
        self.config_version = Gauge(
            "plait_config_version",
            "Version of the experiments' configuration.",
            multiprocess_mode="livemin",
            registry=r,
        )

    def collect(self) -> Iterable[Metric]:
        """Every metric, over all workers where they share a folder."""
        return self._readable().collect()

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._readable())

    def _readable(self) -> CollectorRegistry:
        # Not asked of the environment: importing Feast sets that variable to a folder of its own.
        if self._folder is None:
            return self.registry
        forget_dead_workers(self._folder)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(self._folder))
        return registry


def forget_dead_workers(folder: Path) -> None:
    """Drop the live gauges of processes that are gone, killed ones too; counters and histograms stay."""
    pids = {int(match[1]) for file in folder.glob("gauge_live*.db") if (match := _PID.match(file.name))}
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, path=str(folder))
        except PermissionError:  # alive, and somebody else's: a reused id
            continue


def quantile(buckets: list[tuple[float, float]], q: float) -> float | None:
    """The q-quantile of a cumulative histogram [(upper bound, count up to it)], linear within a bucket; None if empty.

    >>> quantile([(1.0, 5.0), (2.0, 10.0), (float("inf"), 10.0)], 0.75)
    1.5
    """
    total = buckets[-1][1] if buckets else 0
    if not total:
        return None
    low, below = 0.0, 0.0
    for high, count in buckets:
        if count >= q * total and count > below:
            return low if high == float("inf") else low + (high - low) * (q * total - below) / (count - below)
        low, below = high, count
    return low
