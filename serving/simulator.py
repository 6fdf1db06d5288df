"""Users who really exist: they come from the held-out part of the data and click what they are known to like.

A visit asks the server to rank some of the user's held-out movies; the user looks down the slate, and what they look at
and have rated they rate again, clicking four and five stars. Nothing here knows how the server ranks.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import requests

from plait.errors import DataError

GOOD_STARS = 4.0


class Tastes(Protocol):
    """What held-out users would do. `reaction` draws the events of one user looking at one item, [] for none."""

    @property
    def users(self) -> np.ndarray: ...
    @property
    def position_bias(self) -> float: ...
    def candidates(self, user_id: int, n: int, rng: np.random.Generator) -> np.ndarray: ...
    def reaction(self, user_id: int, item_id: int, rng: np.random.Generator) -> list[tuple[str, float | None]]: ...
    def is_done(self, user_id: int) -> bool: ...


class RatingTastes:
    """Tastes read from real ratings: each rated item answers once, an unrated one never."""

    position_bias = 0.0  # nobody knows how these users looked at a slate, so they look at all of it

    def __init__(
        self, user_ids: np.ndarray, item_ids: np.ndarray, stars: np.ndarray, pool: np.ndarray, *, others: float = 0.0
    ) -> None:
        """Three columns of equal length; `others`: the share of candidates drawn from `pool` that the user never
        rated, of which nothing is known, so that they count as seen and not clicked."""
        self._others = others
        if not len(user_ids):
            raise DataError("the held-out feedback has no ratings; run `plait data prepare` again")
        self._left: dict[int, dict[int, float]] = defaultdict(dict)
        for user, item, value in zip(user_ids.tolist(), item_ids.tolist(), stars.tolist(), strict=True):
            self._left[user][item] = value
        self._rated = {user: frozenset(items) for user, items in self._left.items()}
        self._pool = np.unique(np.concatenate([pool, item_ids]))
        self.users = np.array(sorted(self._left))

    def candidates(self, user_id: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Up to n ids, shuffled: held-out items of this user, and the share of others."""
        own = np.array(sorted(self._left[user_id]))
        own = rng.permutation(own)[: max(1, round(n * (1 - self._others)))]
        if not self._others:
            return own
        others = self._pool[~np.isin(self._pool, list(self._rated[user_id]))]
        others = rng.permutation(others)[: n - len(own)]
        return rng.permutation(np.concatenate([own, others]))

    def reaction(self, user_id: int, item_id: int, rng: np.random.Generator) -> list[tuple[str, float | None]]:
        stars = self._left[user_id].pop(item_id, None)
        if stars is None:
            return []
        return [("rating", stars), ("click", None)] if stars >= GOOD_STARS else [("rating", stars)]

    def is_done(self, user_id: int) -> bool:
        return not self._left[user_id]


class Appeal(Protocol):
    """Click probability of an item that is looked at; the truth behind synthetic data."""

    def __call__(self, user_id: np.ndarray, item_id: np.ndarray) -> np.ndarray: ...


class KnownTastes:
    """Tastes of which the click probability is known: synthetic data."""

    def __init__(self, users: np.ndarray, pool: np.ndarray, appeal: Appeal, position_bias: float) -> None:
        """users: who may come. pool: the items that are there now."""
        self.users, self._pool, self._appeal, self.position_bias = (
            np.unique(users),
            np.unique(pool),
            appeal,
            position_bias,
        )

    def candidates(self, user_id: int, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self._pool)[:n]

    def reaction(self, user_id: int, item_id: int, rng: np.random.Generator) -> list[tuple[str, float | None]]:
        chance = float(self._appeal(np.array(user_id), np.array(item_id)))
        return [("click", None)] if rng.random() < chance else []

    def is_done(self, user_id: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How to simulate. position_bias b: position k is looked at with chance k^-b; None: as the tastes."""

    url: str
    scene: str = "home"
    n_users: int = 50
    n_visits: int = 1
    seconds: float | None = None
    slate: int = 10
    n_candidates: int = 100
    position_bias: float | None = None
    concurrency: int = 4
    seed: int = 0
    timeout_s: float = 10.0


@dataclass(slots=True)
class ArmCount:
    """What one arm got."""

    n_requests: int = 0
    n_impressions: int = 0
    n_clicks: int = 0


@dataclass(slots=True)
class Outcome:
    """What came of a simulation; latencies of /v1/predict in seconds, seen from the client."""

    n_requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    n_impressions: int = 0
    events: Counter[str] = field(default_factory=Counter)
    degraded: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    arms: dict[tuple[str, str, str], ArmCount] = field(default_factory=lambda: defaultdict(ArmCount))
    seconds: float = 0.0

    @property
    def n_errors(self) -> int:
        return self.errors.total()

    def latency_ms(self, q: float) -> float | None:
        """The q-quantile; None before the first answer."""
        return float(np.quantile(self.latencies_s, q)) * 1e3 if self.latencies_s else None

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": self.n_requests,
            "errors": dict(self.errors),
            "impressions": self.n_impressions,
            "events": dict(self.events),
            "degraded": dict(self.degraded),
            "models": dict(self.models),
            "latency_ms": {f"p{round(q * 100)}": self.latency_ms(q) for q in (0.5, 0.95, 0.99)},
            "seconds": round(self.seconds, 3),
            "arms": [
                {
                    "layer": layer,
                    "experiment": experiment,
                    "arm": arm,
                    "requests": count.n_requests,
                    "impressions": count.n_impressions,
                    "clicks": count.n_clicks,
                }
                for (layer, experiment, arm), count in sorted(self.arms.items())
            ],
        }


class Http(Protocol):
    """Posts JSON and returns (status, body). Raises OSError if no answer comes."""

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]: ...


class Simulator:
    """Runs a plan. `connect` makes one Http per thread; the same seed asks the same questions."""

    def __init__(self, plan: Plan, tastes: Tastes, connect: Callable[[], Http]) -> None:
        self._plan, self._tastes, self._connect = plan, tastes, connect
        self._local = threading.local()
        self._lock = threading.Lock()
        self.outcome = Outcome()

    def run(self, on_visit: Callable[[], None] = lambda: None) -> Outcome:
        """Visit after visit until the plan is done, or its seconds are over, or every user ran out of items."""
        plan = self._plan
        rng = np.random.default_rng(plan.seed)
        users = rng.permutation(self._tastes.users)[: plan.n_users]
        started = time.monotonic()
        with ThreadPoolExecutor(plan.concurrency, thread_name_prefix="plait-visitor") as executor:
            for round_number, visitors in enumerate(self._rounds(users)):

                def visit(user: int, round_number: int = round_number) -> None:
                    if plan.seconds is None or time.monotonic() - started < plan.seconds:
                        self._visit(user, np.random.default_rng([plan.seed, round_number, user & 0xFFFFFFFF]))
                        on_visit()

                # A user's visits follow each other: the next round waits for this one.
                list(executor.map(visit, visitors))
                if plan.seconds is not None and time.monotonic() - started >= plan.seconds:
                    break
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _rounds(self, users: np.ndarray) -> Iterator[list[int]]:
        round_number = 0
        while self._plan.seconds is not None or round_number < self._plan.n_visits:
            visitors = [user for user in users.tolist() if not self._tastes.is_done(user)]
            if not visitors:
                return
            yield visitors
            round_number += 1

    def _visit(self, user: int, rng: np.random.Generator) -> None:
        plan, outcome = self._plan, self.outcome
        # A visit is a session, new in every run; a user has one device, the same in all of them.
        visitor = {"session_id": uuid.uuid4().hex, "device_id": f"device-{user}"}
        body = {
            "scene": plan.scene,
            "entities": {"user_id": user},
            **visitor,
            "candidate_ids": self._tastes.candidates(user, plan.n_candidates, rng).tolist(),
            "top_k": plan.slate,
        }
        started = time.perf_counter()
        answer = self._post("/v1/predict", body, expected=200)
        seconds = time.perf_counter() - started
        with self._lock:
            outcome.n_requests += 1
            if answer is not None:
                outcome.latencies_s.append(seconds)
        if answer is None:
            return
        shown = [row["item_id"] for row in answer["ranking"]]
        events = [event | visitor for event in self._look(user, answer["request_id"], shown, rng)]
        if events and self._post("/v1/events", {"events": events}, expected=202) is None:
            events = []
        self._count(answer, len(shown), events)

    def _look(self, user: int, request_id: str, shown: Sequence[int], rng: np.random.Generator) -> list[dict[str, Any]]:
        bias = self._tastes.position_bias if self._plan.position_bias is None else self._plan.position_bias
        events = []
        for position, item in enumerate(shown, start=1):
            if rng.random() >= position**-bias:
                continue
            for kind, value in self._tastes.reaction(user, item, rng):
                events.append(
                    {
                        "event_id": f"{request_id}:{item}:{kind}",  # sending it again cannot count twice
                        "type": kind,
                        "request_id": request_id,
                        "user_id": user,
                        "item_id": item,
                        "value": value,
                    }
                )
        return events

    def _count(self, answer: Mapping[str, Any], n_shown: int, events: Sequence[Mapping[str, Any]]) -> None:
        n_clicks = sum(event["type"] == "click" for event in events)
        with self._lock:
            outcome = self.outcome
            outcome.n_impressions += n_shown
            outcome.events.update(event["type"] for event in events)
            outcome.degraded.update(answer["degraded"])
            if answer["model"]:
                outcome.models["{name}:{version}".format(**answer["model"])] += 1
            for arm in answer["experiments"]:
                count = outcome.arms[arm["layer"], arm["experiment"], arm["arm"]]
                count.n_requests += 1
                count.n_impressions += n_shown
                count.n_clicks += n_clicks

    def _post(self, path: str, body: Mapping[str, Any], *, expected: int) -> Any:
        """The answer's body, or None after counting what went wrong."""
        http = getattr(self._local, "http", None)
        if http is None:
            http = self._local.http = self._connect()
        try:
            status, answer = http.post(path, body)
        except OSError as error:
            fault = f"{path}: {type(error).__name__}"
        else:
            if status == expected:
                return answer
            fault = f"{path}: {status}"
        with self._lock:
            self.outcome.errors[fault] += 1
        return None


class RequestsHttp:
    """Http over one kept-alive connection."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the environment is not for a local server

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        response = self._session.post(f"{self._url}{path}", json=body, timeout=self._timeout_s)
        try:
            return response.status_code, response.json()
        except requests.JSONDecodeError:
            return response.status_code, None
