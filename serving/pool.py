"""The models a worker holds. A new version is loaded beside the old one, warmed up, and takes its place in one step.

A request takes a reference once and keeps it, so a swap never touches a request in flight; the old version goes when
the last of them lets go. A version that cannot be loaded leaves the old one serving, and shows in /v1/models, a metric
and the log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from plait.errors import ArtifactError, PlaitError
from serving.metrics import Metrics
from serving.parts import Loader, Registry, ServingModel, VersionLike

logger = logging.getLogger("serving")
MAX_ON_DEMAND = 8
_FIRST_RETRY_S, _LAST_RETRY_S = 2.0, 60.0


@dataclass(frozen=True, slots=True)
class _Failure:
    ref: str
    error: str
    retry_at: float
    wait_s: float


class ModelPool:
    """Models by reference: "deepfm" follows that name's champion, "deepfm:3" is one version.

    wanted: the references that scenes and experiments name, asked for at every poll. Any other registered model is
    loaded when first asked for; of those the pool keeps the `MAX_ON_DEMAND` used last.
    """

    def __init__(
        self,
        registry: Registry,
        load: Loader,
        wanted: Callable[[], Iterable[str]],
        metrics: Metrics,
        *,
        poll_s: float = 1.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._load, self._wanted, self._metrics = registry, load, wanted, metrics
        self._poll_s, self._monotonic = poll_s, monotonic
        self._models: Mapping[str, ServingModel] = {}  # replaced whole, never changed: readers need no lock
        self._on_demand: OrderedDict[str, None] = OrderedDict()
        self._failures: dict[str, _Failure] = {}
        self._lock = threading.RLock()  # one load at a time
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load what is wanted, then follow the registry from a thread until close()."""
        self.refresh()
        self._thread = threading.Thread(target=self._follow, name="plait-models", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=10)

    def loaded(self, ref: str) -> ServingModel | None:
        """The model that serves `ref` now, or None; never loads and never waits."""
        return self._models.get(ref)

    def get(self, ref: str) -> ServingModel:
        """The model for `ref`, loaded if need be. RegistryError: not registered; ArtifactError: does not load."""
        model = self._models.get(ref)
        if model is not None:
            if ref in self._on_demand:
                with self._lock:
                    if ref in self._on_demand:
                        self._on_demand.move_to_end(ref)
            return model
        with self._lock:
            if ref in self._models:
                return self._models[ref]
            self._bring(ref, self._registry.resolve(ref))  # a name nobody registered leaves no trace here
            if ref not in self._models:
                raise ArtifactError(self._failures[ref].error)
            self._on_demand[ref] = None
            while len(self._on_demand) > MAX_ON_DEMAND:
                self._forget(self._on_demand.popitem(last=False)[0])
            return self._models[ref]

    def any(self) -> ServingModel | None:
        """Some loaded model, the first by name: the last resort."""
        models = self._models
        return models[min(models)] if models else None

    @property
    def models(self) -> Mapping[str, ServingModel]:
        """What is loaded, by reference."""
        return self._models

    def status(self) -> dict[str, Any]:
        """For /v1/models and the console."""
        wanted = self._wanted_refs()
        return {
            "models": [
                {"ref": ref, "name": m.name, "version": m.version, "wanted": ref in wanted, **m.details}
                for ref, m in sorted(self._models.items())
            ],
            "failed": [{"ref": ref, "error": failure.error} for ref, failure in sorted(self._failures.items())],
        }

    def missing(self) -> list[str]:
        """Wanted references that nothing serves."""
        return sorted(ref for ref in self._wanted_refs() if ref not in self._models)

    def refresh(self) -> None:
        """One poll: bring every wanted and every on-demand reference up to date. Never raises for a bad model."""
        with self._lock:
            wanted = self._wanted_refs()
            for ref in wanted:
                self._on_demand.pop(ref, None)
            keep = [*wanted, *self._on_demand]
            for ref in keep:
                self._update(ref)
            for ref in [ref for ref in (*self._models, *self._failures) if ref not in keep]:
                self._forget(ref)

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.refresh()
            except Exception:  # the thread must outlive a registry that is away for a moment
                logger.exception("could not poll the model registry; keeping the models there are")

    def _wanted_refs(self) -> list[str]:
        return list(dict.fromkeys(self._wanted()))

    def _update(self, ref: str) -> None:
        try:
            version = self._registry.resolve(ref)
        except PlaitError as error:
            self._fail(ref, ref, error)
        else:
            self._bring(ref, version)

    def _bring(self, ref: str, version: VersionLike) -> None:
        """Make `version` serve `ref`, unless it does already or failed a moment ago."""
        current = self._models.get(ref)
        if current is not None and (current.name, current.version) == (version.name, str(version.version)):
            self._failures.pop(ref, None)
            return
        if (
            (failure := self._failures.get(ref))
            and failure.ref == _ref(version)
            and self._monotonic() < failure.retry_at
        ):
            return
        twin = next((m for m in self._models.values() if m.ref == _ref(version)), None)
        try:
            model = twin or self._load_timed(version)
        except Exception as error:
            self._fail(ref, _ref(version), error)
            return
        self._failures.pop(ref, None)
        self._replace({**self._models, ref: model})
        was = f" in place of version {current.version}" if current else ""
        logger.info("model %s: version %s serves%s", ref, model.version, was)

    def _load_timed(self, version: VersionLike) -> ServingModel:
        started = time.perf_counter()
        model = self._load(version)
        model.warm_up()
        self._metrics.model_load_seconds.observe(time.perf_counter() - started)
        return model

    def _fail(self, ref: str, version_ref: str, error: Exception) -> None:
        before = self._failures.get(ref)
        again = before is not None and before.ref == version_ref
        wait_s = min(before.wait_s * 2, _LAST_RETRY_S) if before is not None and again else _FIRST_RETRY_S
        text = str(error) if isinstance(error, PlaitError) else f"{version_ref} does not load: {error!r}"
        self._failures[ref] = _Failure(version_ref, text, self._monotonic() + wait_s, wait_s)
        if not again:
            self._metrics.model_load_failures.labels(version_ref.split(":")[0]).inc()
            kept = self._models.get(ref)
            logger.error("model %s: %s; %s", ref, text, f"keeping version {kept.version}" if kept else "none serves")

    def _forget(self, ref: str) -> None:
        self._failures.pop(ref, None)
        if ref in self._models:
            self._replace({key: model for key, model in self._models.items() if key != ref})

    def _replace(self, models: Mapping[str, ServingModel]) -> None:
        before, now = {m.ref: m for m in self._models.values()}, {m.ref: m for m in models.values()}
        self._models = models
        for model in before.values():
            if model.ref not in now:
                self._metrics.model_loaded.labels(model.name, model.version).set(0)
        for model in now.values():
            self._metrics.model_loaded.labels(model.name, model.version).set(1)


def _ref(version: VersionLike) -> str:
    return f"{version.name}:{version.version}"
