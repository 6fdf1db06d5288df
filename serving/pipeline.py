"""One prediction: assign, read features, drop candidates, score, sort, log. A stage that fails degrades the answer."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from experiments.exposure import ExposureRecorder
from plait.errors import PlaitError, RegistryError, RequestError
from serving.metrics import Metrics
from serving.parts import AssignmentLike, ClockLike, Experiments, Log, Rows, ServingModel
from serving.pool import ModelPool
from serving.queries import PredictQuery, microseconds
from serving.rows import DeadlinePool, defaults_of, take
from serving.slate import METHODS, Slate, explored_slate, interleaved_slate, sorted_slate

logger = logging.getLogger("serving")

MODEL, EXCLUDE_SEEN, MAX_CANDIDATES = "rank.model", "recall.exclude_seen", "recall.max_candidates"
INTERLEAVE_WITH, INTERLEAVE_METHOD, EXPLORATION = "rank.interleave_with", "rank.interleave_method", "rank.exploration"


@dataclass(slots=True)
class Answer:
    """A ranking, best first, with all that the response and the log say. Arrays have one value per ranked item."""

    request_id: str
    query: PredictQuery
    at: datetime
    model: ServingModel | None = None
    arms: Sequence[Any] = ()
    config_version: int | None = None
    item_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    scores: np.ndarray | None = None
    known: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    slate: Slate | None = None
    request_features: pa.Table | None = None
    candidate_features: pa.Table | None = None
    degraded: list[str] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def degrade(self, reason: str) -> None:
        if reason not in self.degraded:
            self.degraded.append(reason)

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        scores = [None] * len(self.item_ids) if self.scores is None else self.scores.tolist()
        ranking = [{"item_id": i, "score": s} for i, s in zip(self.item_ids.tolist(), scores, strict=True)]
        for position in np.flatnonzero(~self.known):
            ranking[position]["known"] = False
        return {
            "request_id": self.request_id,
            "scene": self.query.scene.name,
            "model": {"name": self.model.name, "version": self.model.version} if self.model else None,
            "experiments": [{"layer": arm.layer, "experiment": arm.experiment, "arm": arm.arm} for arm in self.arms],
            "ranking": ranking,
            "degraded": self.degraded,
            "timings_ms": {stage: round(seconds * 1e3, 3) for stage, seconds in self.stage_seconds.items()},
        }


class Predictor:
    """Answers PredictQueries from the parts it is given.

    n_reads: feature reads that may run at a time. timer: seconds; another one than the wall's serves benchmarks.
    """

    def __init__(
        self,
        pool: ModelPool,
        experiments: Experiments,
        log: Log,
        clock: ClockLike,
        metrics: Metrics,
        *,
        n_reads: int = 8,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pool, self._experiments, self._log, self._clock, self._metrics = pool, experiments, log, clock, metrics
        self._reads, self._timer = DeadlinePool(n_reads), timer
        self._exposures = ExposureRecorder(partial(self._enqueue, "exposure"))
        self._config_version: int | None = None
        self.recent: deque[dict[str, Any]] = deque(maxlen=50)  # of this worker, for the console
        self._stages = {
            stage: metrics.stage_seconds.labels(stage)
            for stage in ("parse", "assign", "features", "score", "log", "total")
        }

    def predict(self, query: PredictQuery, request_id: str, *, parse_s: float = 0.0, log: bool = True) -> Answer:
        """The answer to `query`. RequestError 404 for an unknown model override, 503 if no model at all is loaded.

        log=False shows what would be answered and leaves no trace in the event log (the console's form).
        """
        started = self._timer()
        answer = Answer(request_id=request_id, query=query, at=self._clock.now())
        stages = answer.stage_seconds
        stages["parse"] = parse_s
        if query.had_duplicates:
            answer.degrade("duplicate_candidates")

        mark = self._timer()
        assignment = self._assign(answer)
        answer.model = self._choose_model(answer, assignment)
        item_ids = np.array(query.item_ids, np.int64)
        exclude_seen = bool(self._parameter(assignment, EXCLUDE_SEEN, False))
        limit = self._limit(assignment)
        if not exclude_seen:  # nothing will be dropped later, so nothing more need be read
            item_ids = item_ids[:limit]
        mark = self._lap(stages, "assign", mark)

        rows = self._read(answer, item_ids)
        if assignment is not None:
            self._mark_counterfactuals(answer, assignment, rows, exclude_seen=exclude_seen, limit=limit)
        if exclude_seen:
            item_ids, rows = self._drop_seen(answer, item_ids, rows, limit)
        mark = self._lap(stages, "features", mark)

        scores = self._score(answer, item_ids, rows)
        self._show(answer, self._slate(answer, assignment, item_ids, scores), item_ids, scores, rows)
        mark = self._lap(stages, "score", mark)

        if assignment is not None:
            answer.arms = _used_arms(assignment)
        if log:
            self._log_answer(answer)
        self._lap(stages, "log", mark)
        stages["total"] = self._timer() - started + parse_s
        if log:
            self._count(answer, len(item_ids))
        return answer

    def log_lost(self, kind: str, n_records: int) -> None:
        """Count records that the log took and could not write."""
        self._metrics.log_lost.labels(kind).inc(n_records)
        if kind == "exposure":
            self._exposures.lost(n_records)

    def close(self) -> None:
        self._reads.close()

    def _lap(self, stages: dict[str, float], stage: str, since: float) -> float:
        now = self._timer()
        stages[stage] = now - since
        return now

    # -- stages ------------------------------------------------------------------------------------------------------

    def _assign(self, answer: Answer) -> AssignmentLike | None:
        try:
            snapshot = self._experiments.snapshot
            answer.config_version = snapshot.version
            query = answer.query
            units = {"user": str(query.user_id), "request": answer.request_id}
            if query.session_id is not None:
                units["session"] = query.session_id
            if query.device_id is not None:
                units["device"] = query.device_id
            attributes = {**answer.query.context, "scene": answer.query.scene.name}
            assignment = snapshot.assign(units, attributes, answer.at)
        except Exception:
            logger.exception("request %s: no assignment, serving defaults", answer.request_id)
            answer.degrade("experiments_unavailable")
            self._metrics.assignment_errors.labels("unavailable").inc()
            return None
        for kind in assignment.missing:
            self._metrics.unit_missing.labels(kind).inc()
        for error in assignment.errors:
            self._metrics.assignment_errors.labels(error.code).inc()
            answer.degrade("experiment_errors")
        return assignment

    def _parameter(self, assignment: AssignmentLike | None, name: str, default: Any) -> Any:
        if assignment is None:
            return default
        try:
            return assignment[name]
        except LookupError:  # a configuration without this parameter: the scene's own default
            return default

    def _limit(self, assignment: AssignmentLike | None) -> int | None:
        limit = self._parameter(assignment, MAX_CANDIDATES, None)
        return _at_least_one(limit) if limit is not None else None

    def _choose_model(self, answer: Answer, assignment: AssignmentLike | None) -> ServingModel:
        query = answer.query
        if query.model is not None:
            try:
                return self._pool.get(query.model)
            except RegistryError as error:
                raise RequestError(404, "Unknown model", str(error), pointer="#/model") from error
            except PlaitError as error:
                raise RequestError(503, "Model not available", str(error), pointer="#/model") from error
        wanted = str(self._parameter(assignment, MODEL, query.scene.default_model))
        model = self._pool.loaded(wanted)
        if model is None:
            answer.degrade("model_fallback")
            model = self._pool.loaded(query.scene.default_model) or self._pool.any()
        if model is None:
            raise RequestError(
                503, "No model loaded", f"neither {wanted} nor any other model is loaded; GET /v1/models says why"
            )
        return model

    def _read(self, answer: Answer, item_ids: np.ndarray) -> Rows:
        model, query = _present(answer.model), answer.query
        _check_context(query.context, model.context_fields)
        candidates = pa.table({"item_id": pa.array(item_ids)})

        def read() -> Rows:
            return model.reader.read({"user_id": query.user_id}, candidates, context=query.context, now=answer.at)

        try:
            rows = self._reads.run(read, timeout_s=query.scene.features_timeout_ms / 1e3)
        except Exception as error:
            logger.error("request %s: features unavailable, serving defaults: %r", answer.request_id, error)
            answer.degrade("features_unavailable")
            return defaults_of(model, len(item_ids))
        if rows.request_unknown:
            answer.degrade("unknown_user")
        return rows

    def _mark_counterfactuals(
        self, answer: Answer, assignment: AssignmentLike, rows: Rows, *, exclude_seen: bool, limit: int | None
    ) -> None:
        """Mark, in every arm alike, the answers that another arm would have made from other candidates."""
        excluding = {bool(value) for value in assignment.alternatives(EXCLUDE_SEEN).values()}
        limits = {_at_least_one(value) for value in assignment.alternatives(MAX_CANDIDATES).values()}
        if len(excluding) < 2 and len(limits) < 2:  # usual: nothing of this is under experiment
            return
        item_ids = np.array(answer.query.item_ids, np.int64)
        unseen = item_ids[~np.isin(item_ids, self._seen(answer, rows))]
        if len(excluding) > 1 and not np.array_equal(unseen[:limit], item_ids[:limit]):
            assignment.mark_counterfactual(EXCLUDE_SEEN)
        if len(limits) > 1 and len(unseen if exclude_seen else item_ids) > min(limits):
            assignment.mark_counterfactual(MAX_CANDIDATES)

    def _drop_seen(
        self, answer: Answer, item_ids: np.ndarray, rows: Rows, limit: int | None
    ) -> tuple[np.ndarray, Rows]:
        if answer.query.scene.history_feature not in rows.request.column_names:
            answer.degrade("history_unavailable")
        keep = np.flatnonzero(~np.isin(item_ids, self._seen(answer, rows)))[:limit]
        return item_ids[keep], take(rows, keep)

    def _seen(self, answer: Answer, rows: Rows) -> np.ndarray:
        """Ids in the user's history; none where the model's features hold no history."""
        name = answer.query.scene.history_feature
        seen = rows.request.column(name)[0].as_py() if name in rows.request.column_names else None
        return np.array(seen or [], np.int64)

    def _score(self, answer: Answer, item_ids: np.ndarray, rows: Rows) -> np.ndarray | None:
        """Scores (N,), or None if no model could: then the candidates keep the order they came in."""
        model, user_id = _present(answer.model), answer.query.user_id
        if not len(item_ids):
            return np.empty(0, np.float32)
        try:
            return _checked(model, user_id, item_ids, rows)
        except Exception as error:
            logger.error("request %s: %s could not score: %r", answer.request_id, model.ref, error)
        answer.degrade("model_failed")
        fallback = self._pool.loaded(answer.query.scene.default_model)
        if fallback is not None and fallback is not model:
            try:
                scores = _checked(fallback, user_id, item_ids, rows)
            except Exception as error:
                logger.error("request %s: %s could not score either: %r", answer.request_id, fallback.ref, error)
            else:
                answer.degrade("model_fallback")
                answer.model = fallback
                return scores
        answer.model = None
        return None

    def _slate(
        self, answer: Answer, assignment: AssignmentLike | None, item_ids: np.ndarray, scores: np.ndarray | None
    ) -> Slate:
        """What is shown. A model that the caller named is shown as it ranks: it takes part in no experiment."""
        k = min(answer.query.top_k, len(item_ids))
        plain = sorted_slate(item_ids, scores, k)
        if scores is None or not k or assignment is None or answer.query.model is not None:
            return plain
        other = self._parameter(assignment, INTERLEAVE_WITH, "")
        if other:
            theirs = self._score_again(answer, str(other), item_ids)
            method = str(self._parameter(assignment, INTERLEAVE_METHOD, METHODS[0]))
            if theirs is None:
                answer.degrade("not_interleaved")
                return plain
            return interleaved_slate(item_ids, scores, theirs, k, method, answer.request_id)
        temperature = float(self._parameter(assignment, EXPLORATION, 0.0) or 0.0)
        if temperature > 0:
            return explored_slate(item_ids, scores, k, temperature, answer.request_id)
        return plain

    def _score_again(self, answer: Answer, ref: str, item_ids: np.ndarray) -> np.ndarray | None:
        """The scores of a second model, by its own features; None if it cannot."""
        model, query = self._pool.loaded(ref), answer.query
        if model is None:
            return None
        candidates = pa.table({"item_id": pa.array(item_ids)})

        def read() -> Rows:
            return model.reader.read({"user_id": query.user_id}, candidates, context=query.context, now=answer.at)

        try:
            rows = self._reads.run(read, timeout_s=query.scene.features_timeout_ms / 1e3)
            return _checked(model, query.user_id, item_ids, rows)
        except Exception as error:
            logger.error("request %s: %s could not score: %r", answer.request_id, model.ref, error)
            return None

    def _show(self, answer: Answer, slate: Slate, item_ids: np.ndarray, scores: np.ndarray | None, rows: Rows) -> None:
        shown = slate.order
        answer.slate = slate
        answer.item_ids = item_ids[shown]
        answer.scores = None if scores is None else scores[shown]
        answer.known = ~rows.unknown[shown]
        answer.request_features = rows.request
        answer.candidate_features = rows.candidates.take(pa.array(shown))

    # -- the log -----------------------------------------------------------------------------------------------------

    def _log_answer(self, answer: Answer) -> None:
        if len(answer.item_ids) and not self._enqueue("request", [request_record(answer)]):
            answer.degrade("not_logged")
        recorded = self._exposures.record(answer.arms, answer.config_version, answer.request_id, answer.at)
        self._metrics.exposures_deduped.inc(recorded.n_repeated)
        for arm in recorded.logged:
            self._metrics.exposures.labels(arm.experiment, arm.arm).inc()

    def _enqueue(self, kind: str, records: Sequence[Mapping[str, Any]]) -> bool:
        try:
            taken = self._log.enqueue(kind, records)
        except Exception:
            logger.exception("the event log did not take a %s record", kind)
            taken = False
        if not taken:
            self._metrics.log_dropped.labels(kind).inc(len(records))
            if kind == "exposure":
                self._metrics.exposures_dropped.inc(len(records))
        return taken

    def _count(self, answer: Answer, n_candidates: int) -> None:
        metrics = self._metrics
        for stage, seconds in answer.stage_seconds.items():
            self._stages[stage].observe(seconds)
        for reason in answer.degraded:
            metrics.degraded.labels(reason).inc()
        if answer.config_version not in (None, self._config_version):
            self._config_version = answer.config_version
            metrics.config_version.set(float(answer.config_version or 0))
        for arm in answer.arms:
            metrics.assignments.labels(arm.layer, arm.experiment, arm.arm).inc()
            if arm.propensity is not None:
                metrics.bandit_choices.labels(arm.experiment, arm.chosen_by).inc()
        metrics.exposure_queue.set(self._log.queue_length)
        if "features_unavailable" not in answer.degraded:
            metrics.feature_read_seconds.observe(answer.stage_seconds["features"])
        metrics.candidates.labels(answer.query.scene.name).inc(n_candidates)
        n_unknown = int((~answer.known).sum())
        if n_unknown and answer.model:
            metrics.unknown_candidates.labels(str(answer.model.details.get("feature_service", ""))).inc(n_unknown)
        self.recent.appendleft(
            {
                "at": answer.at,
                "request_id": answer.request_id,
                "scene": answer.query.scene.name,
                "user_id": answer.query.user_id,
                "n_candidates": len(answer.query.item_ids),
                "n_returned": len(answer.item_ids),
                "model": answer.model.ref if answer.model else None,
                "arms": [f"{arm.experiment}={arm.arm}" for arm in answer.arms],
                "degraded": list(answer.degraded),
                "total_ms": round(answer.stage_seconds["total"] * 1e3, 2),
            }
        )


def request_record(answer: Answer) -> dict[str, Any]:
    """What the event log keeps of one answer: its impressions and the features they were scored with.

    propensity is the chance that this policy, in these arms, shows the item at its position, given the items above it:
    1 for a sorted list, none for an interleaved one.
    """
    request_features, candidate_features, slate = answer.request_features, answer.candidate_features, answer.slate
    assert request_features is not None and candidate_features is not None and slate is not None
    n = len(answer.item_ids)
    rows = request_features.to_pylist()
    return {
        "request_id": answer.request_id,
        "timestamp": microseconds(answer.at),
        "scene": answer.query.scene.name,
        "user_id": answer.query.user_id,
        "session_id": answer.query.session_id,
        "device_id": answer.query.device_id,
        "items": answer.item_ids.tolist(),
        "positions": list(range(1, n + 1)),
        "scores": None if answer.scores is None else answer.scores.tolist(),
        "propensities": None if slate.propensities is None else slate.propensities.tolist(),
        "teams": None if slate.teams is None else list(slate.teams),
        "model": answer.model.name if answer.model else None,
        "model_version": answer.model.version if answer.model else None,
        "arms": [
            {"layer": arm.layer, "experiment": arm.experiment, "arm": arm.arm, "propensity": arm.propensity}
            for arm in answer.arms
        ],
        "config_version": answer.config_version,
        "features_request": rows[0] if rows else {},
        "features_candidates": candidate_features.to_pydict(),
    }


def _at_least_one(limit: Any) -> int:
    return max(1, int(limit))


def _checked(model: ServingModel, user_id: int, item_ids: np.ndarray, rows: Rows) -> np.ndarray:
    scores = np.asarray(model.score(user_id, item_ids, rows.request, rows.candidates), np.float32)
    if scores.shape != item_ids.shape or not np.isfinite(scores).all():
        raise ValueError(f"scores of shape {scores.shape} for {len(item_ids)} candidates, or not finite")
    return scores


def _used_arms(assignment: AssignmentLike) -> Sequence[Any]:
    """The arms whose parameters made this answer: an overridden model takes no part in its experiment."""
    return tuple(assignment.exposures())


def _check_context(context: Mapping[str, Any], fields: Mapping[str, pa.DataType]) -> None:
    """RequestError 422 for a context field of another type than the model's feature service declares."""
    for name, dtype in fields.items():
        if name in context:
            try:
                pa.array([context[name]], dtype)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                detail = f"context field {name!r} must be {dtype}: {error}"
                raise RequestError(422, "Invalid request", detail, pointer=f"#/context/{name}") from error


def _present(model: ServingModel | None) -> ServingModel:
    assert model is not None, "a model is chosen before any stage that needs one"
    return model
