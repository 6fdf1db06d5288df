"""Synthetic impressions, clicks and purchases of which the truth is known: any size, seeded.

Users and items have taste vectors around genre centres; the probability of a click is

    P(click | user u, item i, time t, position k) = k ** -position_bias * sigmoid(bias + quality_i + drift_i(t) + u . i)

(a position-based model: Craswell et al., WSDM 2008) with a seasonal drift per item. Users and items arrive over time;
slates of 10 come from a logging policy that prefers popular items, whose propensities are logged. A click leads to a
purchase, minutes to hours later, with probability sigmoid(-1 + u . i) / 2. Of the examined items three in ten are
rated with stars that grow with the click probability, clicked or not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from plait.data.tables import TIMESTAMP, EventWriter, Prepared, event_writer
from plait.errors import DataError, SpecError
from plait.progress import Progress, silent
from plait.settings import Home

TRUTH_FILE = "truth.npz"
SLATE = 10
_GENRES = ("Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi", "Thriller", "War")
_JOBS = ("artist", "engineer", "farmer", "lawyer", "student", "writer")
_DIM = 6
_RATED_SHARE = 0.3
_START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSpec:
    """n_requests slates of 10 over `days` days; `new_share` of the users and items arrive after the first day."""

    n_users: int = 2_000
    n_items: int = 500
    n_requests: int = 20_000
    days: int = 60
    new_share: float = 0.3
    position_bias: float = 0.6
    drift: float = 0.8
    base_rate: float = -1.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_users < 1 or self.n_requests < 1 or self.days < 1:
            raise SpecError("synthetic data needs at least one user, one request and one day")
        if self.n_items < 2 * SLATE:
            raise SpecError(f"synthetic data needs at least {2 * SLATE} items to fill slates of {SLATE}")
        if not 0 <= self.new_share < 1:
            raise SpecError(f"new_share is a share in [0, 1), not {self.new_share}")


@dataclass(frozen=True, slots=True)
class Truth:
    """The parameters behind the data. Ids are 1-based; times are unix seconds."""

    users: np.ndarray  # float64, shape (n_users, _DIM)
    items: np.ndarray  # float64, shape (n_items, _DIM)
    quality: np.ndarray  # float64, shape (n_items,)
    phase: np.ndarray  # float64, shape (n_items,), radians
    user_arrival: np.ndarray  # float64 unix seconds, shape (n_users,)
    item_arrival: np.ndarray
    user_genre: np.ndarray  # int64, shape (n_users,)
    item_genre: np.ndarray
    base_rate: float
    drift: float
    position_bias: float
    period_s: float

    @classmethod
    def draw(cls, spec: SyntheticSpec) -> Truth:
        rng = np.random.default_rng([spec.seed, 1])
        centres = rng.normal(size=(len(_GENRES), _DIM))
        user_genre = rng.integers(len(_GENRES), size=spec.n_users)
        item_genre = rng.integers(len(_GENRES), size=spec.n_items)
        span = timedelta(days=spec.days).total_seconds()

        def arrivals(n: int) -> np.ndarray:
            late = rng.random(n) < spec.new_share
            late[: min(n, 2 * SLATE)] = False  # the first request must find a slate
            return _START.timestamp() + np.where(late, rng.random(n) * span, 0.0)

        return cls(
            users=(centres[user_genre] + rng.normal(scale=0.5, size=(spec.n_users, _DIM))) / np.sqrt(_DIM),
            items=centres[item_genre] + rng.normal(scale=0.5, size=(spec.n_items, _DIM)),
            quality=rng.normal(scale=0.7, size=spec.n_items),
            phase=rng.uniform(0, 2 * np.pi, size=spec.n_items),
            user_arrival=arrivals(spec.n_users),
            item_arrival=arrivals(spec.n_items),
            user_genre=user_genre,
            item_genre=item_genre,
            base_rate=spec.base_rate,
            drift=spec.drift,
            position_bias=spec.position_bias,
            period_s=span / 2,
        )

    def appeal(self, user_id: np.ndarray, item_id: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Click probability of an examined item, shape as the inputs broadcast."""
        u, i = np.asarray(user_id) - 1, np.asarray(item_id) - 1
        match = np.einsum("...d,...d->...", self.users[u], self.items[i])
        season = self.drift * np.sin(2 * np.pi * np.asarray(seconds) / self.period_s + self.phase[i])
        return 1 / (1 + np.exp(-(self.base_rate + self.quality[i] + season + match)))

    def click_probability(
        self, user_id: np.ndarray, item_id: np.ndarray, seconds: np.ndarray, position: np.ndarray
    ) -> np.ndarray:
        """Click probability at a position (1 = top)."""
        return np.asarray(position, dtype=float) ** -self.position_bias * self.appeal(user_id, item_id, seconds)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **asdict(self))

    @classmethod
    def load(cls, home: Home) -> Truth:
        """The truth behind the home's synthetic data. DataError if the data is not synthetic."""
        path = home.root / "holdout" / TRUTH_FILE
        if not path.exists():
            raise DataError(f"no {path}: the home's data is not synthetic (run `plait data prepare synthetic`)")
        with np.load(path) as stored:
            values: dict[str, Any] = {
                name: stored[name] if stored[name].ndim else float(stored[name]) for name in stored.files
            }
        return cls(**values)


def prepare_synthetic(home: Home, spec: SyntheticSpec, *, holdout: float, progress: Progress = silent) -> Prepared:
    """Generate the events; the last `holdout` share of the time becomes the held-out future.

    progress: called with the requests generated so far.
    """
    truth = Truth.draw(spec)
    span = timedelta(days=spec.days)
    cutoff = _START + span * (1 - holdout)
    source = f"synthetic(users={spec.n_users}, items={spec.n_items}, requests={spec.n_requests}, seed={spec.seed})"
    with event_writer(home, source, cutoff, replay=holdout > 0, extra_files=[TRUTH_FILE]) as writer:
        truth.save(writer.folder / "holdout" / TRUTH_FILE)
        _write_people_and_things(writer, truth, spec)
        chunk = 50_000
        progress("", 0, spec.n_requests)
        for start in range(0, spec.n_requests, chunk):
            n = min(chunk, spec.n_requests - start)
            low, high = start / spec.n_requests, (start + n) / spec.n_requests
            _write_requests(writer, truth, spec, start, n, low, high)
            progress("", start + n, spec.n_requests)
    return writer.done(source)


def _write_requests(
    writer: EventWriter, truth: Truth, spec: SyntheticSpec, start: int, n: int, low: float, high: float
) -> None:
    """Requests start .. start + n, in time order between the shares `low` and `high` of the whole span."""
    rng = np.random.default_rng([spec.seed, 2, start])
    span = spec.days * 86_400.0
    seconds = _START.timestamp() + np.sort(rng.uniform(low, high, size=n)) * span
    by_arrival = np.argsort(truth.user_arrival, kind="stable")
    n_here = np.searchsorted(truth.user_arrival[by_arrival], seconds, side="right")
    user_id = by_arrival[(rng.random(n) * n_here).astype(np.int64)] + 1
    item_id, propensity = _slates(truth, seconds, rng)
    position = np.broadcast_to(np.arange(1, SLATE + 1), item_id.shape)
    probability = truth.click_probability(user_id[:, None], item_id, seconds[:, None], position)
    clicked = rng.random(item_id.shape) < probability

    requests = np.array([f"s{start + i}" for i in range(n)])
    flat_seconds = np.repeat(seconds, SLATE)
    flat = {
        "request_id": np.repeat(requests, SLATE),
        "user_id": np.repeat(user_id, SLATE),
        "item_id": item_id.ravel(),
    }
    when = _micros(flat_seconds)
    impressions = pa.table(
        flat
        | {
            "timestamp": when,
            "created": when,
            "scene": pa.repeat(pa.scalar("home"), n * SLATE),
            "position": position.astype(np.int32).ravel(),
            "propensity": propensity.ravel(),
        }
    )
    writer.write("impressions", impressions)
    index = np.flatnonzero(clicked.ravel())
    click_s = flat_seconds[index] + rng.exponential(20.0, size=index.size)
    match = np.einsum("ij,ij->i", truth.users[flat["user_id"][index] - 1], truth.items[flat["item_id"][index] - 1])
    bought = rng.random(index.size) < 0.5 / (1 + np.exp(1 - match))
    buy_s = click_s[bought] + rng.exponential(3_600.0, size=int(bought.sum()))
    examined = position.ravel().astype(float) ** -spec.position_bias
    rated = np.flatnonzero(rng.random(examined.size) < _RATED_SHARE * examined)
    stars = np.clip(np.rint(1 + 4 * (probability.ravel() / examined)[rated] + rng.normal(0, 0.7, rated.size)), 1, 5)
    rate_s = flat_seconds[rated] + rng.exponential(60.0, size=rated.size)
    for kind, rows, times, value in (
        ("click", index, click_s, pa.nulls(index.size, pa.float64())),
        ("purchase", index[bought], buy_s, pa.nulls(buy_s.size, pa.float64())),
        ("rating", rated, rate_s, pa.array(stars)),
    ):
        stamp = _micros(times)
        identity = [f"{kind}-{start * SLATE + row}" for row in rows]
        writer.write(
            "feedback",
            pa.table(
                {name: values[rows] for name, values in flat.items()}
                | {"event_id": pa.array(identity, pa.string()), "timestamp": stamp, "created": stamp}
                | {"type": pa.repeat(pa.scalar(kind), len(rows)), "value": value}
            ),
        )


def _slates(truth: Truth, seconds: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The logging policy: items there at the time, weighted by exp(quality), without replacement (Gumbel top-k).

    Returns item ids, shape (n, SLATE), and for each the chance to be drawn first, its logged propensity.
    """
    n = len(seconds)
    items = np.empty((n, SLATE), dtype=np.int64)
    propensity = np.empty((n, SLATE))
    for rows in np.array_split(np.arange(n), max(1, n * truth.quality.size // 4_000_000)):
        there = truth.item_arrival[None, :] <= seconds[rows, None]
        logits = np.where(there, truth.quality[None, :], -np.inf)
        keys = logits + rng.gumbel(size=logits.shape)
        best = np.argpartition(-keys, SLATE, axis=1)[:, :SLATE]
        order = np.argsort(-np.take_along_axis(keys, best, axis=1), axis=1)
        best = np.take_along_axis(best, order, axis=1)
        weight = np.exp(logits)
        items[rows] = best + 1
        propensity[rows] = np.take_along_axis(weight, best, axis=1) / weight.sum(axis=1, keepdims=True)
    return items, propensity


def _write_people_and_things(writer: EventWriter, truth: Truth, spec: SyntheticSpec) -> None:
    rng = np.random.default_rng([spec.seed, 3])
    # A person or an item is known a moment before its first chance to appear.
    user_known, item_known = _micros(truth.user_arrival - 1), _micros(truth.item_arrival - 1)
    n_users, n_items = spec.n_users, spec.n_items
    writer.write(
        "users",
        pa.table(
            {
                "user_id": np.arange(1, n_users + 1),
                "event_timestamp": user_known,
                "created": user_known,
                "age": rng.integers(16, 80, size=n_users),
                "gender": rng.choice(["F", "M"], size=n_users),
                "occupation": np.array(_JOBS)[truth.user_genre % len(_JOBS)],
                "zip_area": np.char.zfill(rng.integers(0, 100, size=n_users).astype(str), 2),
            }
        ),
    )
    second = rng.integers(len(_GENRES), size=n_items)
    genres = [
        [_GENRES[a]] if a == b else [_GENRES[a], _GENRES[b]] for a, b in zip(truth.item_genre, second, strict=True)
    ]
    writer.write(
        "items",
        pa.table(
            {
                "item_id": np.arange(1, n_items + 1),
                "event_timestamp": item_known,
                "created": item_known,
                "title": [f"Item {i}" for i in range(1, n_items + 1)],
                "release_year": rng.integers(1950, 2024, size=n_items),
                "genres": pa.array(genres, pa.list_(pa.string())),
                "primary_genre": [names[0] for names in genres],
            }
        ),
    )


def _micros(seconds: np.ndarray) -> pa.Array:
    return pa.array((np.asarray(seconds) * 1e6).astype(np.int64), pa.int64()).cast(TIMESTAMP)
