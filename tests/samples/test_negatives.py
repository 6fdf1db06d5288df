"""Drawn negatives: never a user's own positives, never too few, and as frequent as they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from plait.errors import SpecError
from plait.offline.engine import Engine
from plait.offline.hashing import draw, with_draw
from plait.offline.negatives import ALWAYS, with_negatives
from plait.offline.spec import NegativeSpec

START = datetime(2024, 5, 1, tzinfo=UTC)
SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("timestamp", pa.timestamp("us", tz="UTC")),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("scene", pa.string()),
        ("position", pa.int32()),
        ("propensity", pa.float64()),
        ("click", pa.int8()),
        ("label_mature", pa.bool_()),
        ("split", pa.string()),
    ]
)


def table_of(rows: list[tuple[int, int, int, int]]) -> pa.Table:
    """rows: (request, user, item, click); 1 in 5 requests is a test request."""
    made = [
        {
            "request_id": f"r{request}",
            "timestamp": START + timedelta(seconds=request),
            "user_id": user,
            "item_id": item,
            "scene": "home",
            "position": 1,
            "propensity": None,
            "click": click,
            "label_mature": True,
            "split": "test" if request % 5 == 0 else "train",
        }
        for request, user, item, click in rows
    ]
    return pa.Table.from_pylist(made, schema=SCHEMA)


def own_of(rows: list[tuple[int, int, int, int]]) -> set[tuple[int, int]]:
    return {(user, item) for _, user, item, click in rows if click}


def sample(
    engine: Engine,
    rows: list,
    spec: NegativeSpec,
    items: range,
    seed: int = 3,
    since: Callable[[int], int] = lambda item: ALWAYS,
) -> pa.Table:
    """since: item -> the microsecond from which it may be drawn."""
    own = own_of(rows)
    own_table = pa.table(
        {"user_id": pa.array([u for u, _ in own], pa.int64()), "item_id": pa.array([i for _, i in own], pa.int64())}
    )
    out = with_negatives(
        engine,
        engine.from_arrow(table_of(rows)),
        engine.from_arrow(own_table),
        engine.from_arrow(
            pa.table(
                {
                    "item_id": pa.array(list(items), pa.int64()),
                    "since_us": pa.array([since(item) for item in items], pa.int64()),
                }
            )
        ),
        spec,
        labels=("click",),
        seed=seed,
    )
    return engine.to_arrow(out.order_by("timestamp", "request_id", "user_id", "item_id", "origin", "slot"))


histories = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 6), st.integers(0, 1)),
    min_size=1,
    max_size=25,
    unique_by=lambda row: (row[0], row[2]),
).filter(lambda rows: any(row[3] for row in rows))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=histories,
    kind=st.sampled_from(["uniform", "popularity", "in_batch", "hard"]),
    k=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_no_negative_is_ever_one_of_the_users_own_positives(engine: Engine, rows, kind, k, seed) -> None:
    rows = [(max(request, 1), user, item, click) for request, user, item, click in rows]  # keep some in train
    rows = list({(request, item): (request, user, item, click) for request, user, item, click in rows}.values())
    if not any(click and request % 5 for request, _, _, click in rows):
        rows.append((1, 1, 6, 1)) if (1, 6) not in {(r, i) for r, _, i, _ in rows} else rows.append((11, 1, 6, 1))
    own = own_of(rows)
    out = sample(engine, rows, NegativeSpec(kind=kind, per_positive=k), range(1, 9), seed)
    negatives = [row for row in out.to_pylist() if row["click"] == 0]
    positives = [row for row in out.to_pylist() if row["click"] == 1]
    assert len(positives) == sum(row[3] for row in rows)
    assert all((row["user_id"], row["item_id"]) not in own for row in negatives)
    assert all(row["origin"] == kind for row in negatives)
    if kind == "uniform":  # eight items, at most six liked: everyone gets as many as asked
        assert len(negatives) == k * len(positives)
    else:
        assert len(negatives) <= k * len(positives)
    splits = {row["request_id"]: row["split"] for row in positives}
    if kind != "hard":
        assert all(row["split"] == splits[row["request_id"]] for row in negatives)
    shown = {(f"r{request}", user, item) for request, user, item, click in rows if not click}
    if kind == "hard":
        assert all((row["request_id"], row["user_id"], row["item_id"]) in shown for row in negatives)


def naive_catalogue_draws(
    rows: list[tuple[int, int, int, int]], spec: NegativeSpec, since: dict[int, int], seed: int
) -> Counter[tuple[str, int, int]]:
    """(request, user, drawn item) of every draw, by listing for each positive what it may be given."""
    trained = Counter(item for request, _, item, click in rows if click and request % 5)
    total = sum(count**spec.exponent for count in trained.values())
    drawn: Counter[tuple[str, int, int]] = Counter()
    for request, user, item, click in rows:
        at_us = moment_us(request)
        for slot in range(1, spec.per_positive + 1 if click else 1):
            line = []
            for other in sorted(since, key=lambda each: (since[each], each)):
                if since[other] <= at_us and (user, other) not in own_of(rows):
                    weight = 1
                    if spec.kind == "popularity":
                        weight = int(trained[other] ** spec.exponent * min(1e6, (1 << 30) / total) + 0.5)
                    line.append((other, weight))
            keys = [np.array([key]) for key in (user, item, at_us, slot)]
            place = int(draw(keys, seed=seed)[0]) * sum(weight for _, weight in line) >> 32
            for other, weight in line:
                if 0 <= place < weight:
                    drawn[f"r{request}", user, other] += 1
                place -= weight
    return drawn


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=histories,
    kind=st.sampled_from(["uniform", "popularity"]),
    k=st.integers(1, 3),
    seed=st.integers(0, 5),
    seconds=st.lists(st.none() | st.integers(-90_000, 12), min_size=8, max_size=8),
)
def test_draws_agree_with_a_loop_that_lists_what_existed_and_was_never_liked(
    engine: Engine, rows, kind, k, seed, seconds
) -> None:
    rows = [(2, 9, 8, 1), *rows]  # something to train on
    start_us = int(START.timestamp()) * 1_000_000
    since = {
        item: ALWAYS if second is None else start_us + 1_000_000 * second for item, second in enumerate(seconds, 1)
    }
    spec = NegativeSpec(kind=kind, per_positive=k)
    out = sample(engine, rows, spec, range(1, 9), seed, since.__getitem__)
    got = Counter((row["request_id"], row["user_id"], row["item_id"]) for row in out.to_pylist() if not row["click"])
    assert got == naive_catalogue_draws(rows, spec, since, seed)


def moment_us(request: int) -> int:
    return 1_000_000 * int((START + timedelta(seconds=request)).timestamp())


def drawn_for(keys: list[int], seed: int) -> int:
    return int(draw([np.array([key]) for key in keys], seed=seed)[0])


def naive_in_batch(rows: list[tuple[int, int, int, int]], spec: NegativeSpec, seed: int) -> Counter:
    """(request, user, drawn item) of every draw: each positive looks at all others of its group and split."""
    own, positives = own_of(rows), [row[:3] for row in rows if row[3]]
    groups = -(-len(positives) // spec.batch)

    def place(request: int, user: int, item: int) -> tuple[int, bool]:
        return drawn_for([user, item, moment_us(request)], seed + 1) * groups >> 32, request % 5 == 0

    drawn: Counter = Counter()
    for request, user, item in positives:
        others = {other[2] for other in positives if place(*other) == place(request, user, item)}
        line = sorted(
            (drawn_for([user, item, moment_us(request), other], seed + 2), other)
            for other in others
            if (user, other) not in own
        )
        drawn.update((f"r{request}", user, other) for _, other in line[: spec.per_positive])
    return drawn


def naive_hard(rows: list[tuple[int, int, int, int]], spec: NegativeSpec, seed: int) -> Counter:
    """(request, user, item) of every impression taken: of the request itself, or else of others of the user."""
    own = own_of(rows)
    shown = [row[:3] for row in rows if not row[3] and (row[1], row[2]) not in own]
    wanted: Counter[tuple[int, int]] = Counter()
    for request, user, _, click in rows:
        wanted[request, user] += spec.per_positive * click

    def place(row: tuple[int, int, int]) -> tuple[int, str, int]:
        return drawn_for([row[1], row[2], moment_us(row[0])], seed), f"r{row[0]}", row[2]

    taken: list[tuple[int, int, int]] = []
    lonely: Counter[tuple[int, bool]] = Counter()
    for (request, user), n in wanted.items():
        beside = sorted((row for row in shown if row[:2] == (request, user)), key=place)
        taken += beside[:n]
        if not beside:
            lonely[user, request % 5 == 0] += n
    for (user, tested), n in lonely.items():
        elsewhere = [row for row in shown if row[1] == user and (row[0] % 5 == 0) == tested and not wanted[row[:2]]]
        taken += sorted(elsewhere, key=place)[:n]
    return Counter((f"r{request}", user, item) for request, user, item in taken)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=histories,
    kind=st.sampled_from(["in_batch", "hard"]),
    k=st.integers(1, 3),
    batch=st.sampled_from([2, 5, 100]),
    seed=st.integers(0, 5),
)
@example(rows=[(1, 1, 1, 1), (1, 2, 2, 1), (1, 1, 3, 0), (1, 2, 4, 0)], kind="hard", k=1, batch=2, seed=0)  # two users
def test_draws_among_impressions_agree_with_a_loop_over_them(engine: Engine, rows, kind, k, batch, seed) -> None:
    rows = [*rows, (11, 3, 6, 1)]  # something to train on
    spec = NegativeSpec(kind=kind, per_positive=k, batch=batch)
    out = sample(engine, rows, spec, range(1, 9), seed)
    got = Counter((row["request_id"], row["user_id"], row["item_id"]) for row in out.to_pylist() if not row["click"])
    assert got == (naive_hard if kind == "hard" else naive_in_batch)(rows, spec, seed)


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_batch"])
def test_no_item_is_drawn_before_it_existed(engine: Engine, kind: str) -> None:
    rows = many_positives(200, 30, seed=8)
    first = {}
    for request, _, item, _ in rows:
        first.setdefault(item, request)
    start_us = int(START.timestamp()) * 1_000_000
    since = {item: start_us + 1_000_000 * first.get(item, 10**6) for item in range(1, 31)}
    out = sample(engine, rows, NegativeSpec(kind=kind, batch=200), range(1, 31), since=since.__getitem__)
    negatives = [row for row in out.to_pylist() if not row["click"]]
    assert len(negatives) > 500
    for row in negatives:
        assert since[row["item_id"]] <= row["timestamp"].timestamp() * 1_000_000
    late = {item for item, request in first.items() if request > 200}
    assert late & {row["item_id"] for row in negatives}  # and afterwards they are


def many_positives(n: int, n_items: int, seed: int) -> list[tuple[int, int, int, int]]:
    """One positive a request, users of 1 to 40, items drawn with falling popularity."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_items + 1)
    items = rng.choice(n_items, n, p=weights / weights.sum()) + 1
    return [(5 * i + 1, int(rng.integers(1, 41)), int(item), 1) for i, item in enumerate(items)]


@pytest.mark.parametrize(("kind", "exponent"), [("uniform", 0.0), ("popularity", 1.0), ("popularity", 0.75)])
def test_draws_are_as_frequent_as_their_weights(engine: Engine, kind: str, exponent: float) -> None:
    n_items = 30
    rows = many_positives(600, n_items, seed=1)
    out = sample(engine, rows, NegativeSpec(kind=kind, exponent=exponent, per_positive=20), range(1, n_items + 1))
    drawn = [row for row in out.to_pylist() if row["click"] == 0]
    counts = np.bincount([row[2] for row in rows], minlength=n_items + 1)[1:].astype(float)
    weights = np.where(counts > 0, counts**exponent, 0.0) if kind == "popularity" else np.ones(n_items)
    own = own_of(rows)
    expected = np.zeros(n_items)
    for _, user, _, _ in rows:  # each positive draws from what its user never liked
        free = np.array([(user, item) not in own for item in range(1, n_items + 1)]) * weights
        expected += 20 * free / free.sum()
    observed = np.bincount([row["item_id"] for row in drawn], minlength=n_items + 1)[1:]
    assert observed.sum() == 20 * len(rows)
    possible = expected > 0
    assert not observed[~possible].any()
    assert chisquare(observed[possible], expected[possible]).pvalue > 1e-3


def test_a_user_who_likes_nearly_everything_still_gets_all_negatives_asked(engine: Engine) -> None:
    rows = [(5 * i + 1, 1, i, 1) for i in range(1, 100)]
    out = sample(engine, rows, NegativeSpec(kind="uniform", per_positive=4), range(1, 101))
    negatives = [row["item_id"] for row in out.to_pylist() if row["click"] == 0]
    assert negatives == [100] * 4 * 99


def test_a_user_who_likes_everything_gets_no_negative_rather_than_a_false_one(engine: Engine) -> None:
    rows = [(5 * i + 1, 1, i, 1) for i in range(1, 5)]
    out = sample(engine, rows, NegativeSpec(kind="uniform"), range(1, 5))
    assert out.column("click").to_pylist() == [1] * 4


def test_the_same_seed_draws_the_same_and_another_seed_draws_anew(engine: Engine) -> None:
    rows = many_positives(50, 30, seed=2)
    spec = NegativeSpec(kind="popularity")
    first, again = (sample(engine, rows, spec, range(1, 31), seed=4) for _ in range(2))
    other = sample(engine, rows, spec, range(1, 31), seed=5)
    assert first.equals(again)
    assert not first.equals(other)


def test_hard_negatives_come_from_the_positives_own_request_first(engine: Engine) -> None:
    rows = [(1, 1, 1, 1), (1, 1, 2, 0), (1, 1, 3, 0), (2, 1, 4, 0), (6, 2, 5, 1), (7, 2, 6, 0)]
    out = sample(engine, rows, NegativeSpec(kind="hard", per_positive=1), range(1, 9))
    negatives = [(row["request_id"], row["item_id"]) for row in out.to_pylist() if row["click"] == 0]
    assert len(negatives) == 2
    assert ("r7", 6) in negatives  # user 2's own request has no other item, so another request of theirs serves
    assert {request for request, _ in negatives} == {"r1", "r7"}


def test_in_batch_negatives_are_items_of_other_positives(engine: Engine) -> None:
    rows = many_positives(300, 30, seed=7)
    out = sample(engine, rows, NegativeSpec(kind="in_batch", per_positive=3, batch=50), range(1, 100))
    negatives = [row for row in out.to_pylist() if row["click"] == 0]
    assert len(negatives) > 2.5 * 300
    assert {row["item_id"] for row in negatives} <= {row[2] for row in rows}
    per_positive: dict[str, list[int]] = {}
    for row in negatives:
        per_positive.setdefault(row["request_id"], []).append(row["item_id"])
    assert all(len(items) == len(set(items)) <= 3 for items in per_positive.values())


def test_draws_in_the_engine_equal_draws_in_numpy_and_are_pinned(engine: Engine) -> None:
    users = np.array([0, 1, -1, 2**40 + 3, 7], dtype=np.int64)
    items = np.array([9, 9, 9, -(2**50), 0], dtype=np.int64)
    table = engine.from_arrow(pa.table({"u": users, "i": items}))
    got = engine.to_arrow(with_draw(table, "d", ["u", "i"], seed=7).order_by("u"))
    expected = draw([users, items], seed=7)[np.argsort(users)]
    assert got.column("d").to_pylist() == expected.tolist()
    assert draw([np.array([1, 2])], seed=7).tolist() == [2802144199, 901285624]


def test_draws_are_uniform_over_consecutive_keys_and_differ_between_seeds() -> None:
    keys = [np.arange(200_000)]
    first, second = draw(keys, seed=1), draw(keys, seed=2)
    for values in (first, second, first ^ second):
        assert chisquare(np.bincount(values >> 24, minlength=256)).pvalue > 1e-4


def test_an_impossible_number_of_negatives_is_refused() -> None:
    with pytest.raises(SpecError, match="1 to 1000"):
        NegativeSpec(kind="uniform", per_positive=0)
