"""The point-in-time join against a loop over rows, and against Feast's own store, on random histories."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T0 = datetime(2024, 1, 1, tzinfo=UTC)
MICROS = pa.timestamp("us", tz="UTC")
SLOW_STORE = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def at(hour: float) -> datetime:
    return T0 + timedelta(hours=hour)


# Few keys and few moments, so that ties, gaps, late rows and nulls all happen.
KEYS = st.one_of(st.none(), st.integers(0, 2))
HOURS = st.integers(0, 12)
FEATURE_ROWS = st.lists(
    st.tuples(KEYS, st.one_of(st.none(), HOURS), st.one_of(st.none(), HOURS), st.one_of(st.none(), st.integers(0, 99))),
    max_size=14,
)
ENTITY_ROWS = st.lists(st.tuples(KEYS, st.one_of(st.none(), HOURS)), min_size=1, max_size=10)
TTLS = st.one_of(st.none(), st.integers(1, 6))


def history(rows: list[tuple[Any, ...]], value: str) -> pa.Table:
    """Rows of (key, event hour, created hour, value) as a feature table."""
    keys, events, created, values = zip(*rows, strict=True) if rows else ((), (), (), ())
    moment = lambda hours: pa.array([None if hour is None else at(hour) for hour in hours], MICROS)  # noqa: E731
    return pa.table(
        {
            "user_id": pa.array(keys, pa.int64()),
            "event_timestamp": moment(events),
            "created": moment(created),
            value: pa.array(values, pa.int64()),
        }
    )


def entity_table(rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array([key for key, _ in rows], pa.int64()),
            "event_timestamp": pa.array([None if hour is None else at(hour) for _, hour in rows], MICROS),
        }
    )


def naive_join(
    entities: list[tuple[Any, ...]], rows: list[tuple[Any, ...]], *, ttl: int | None, cutoff: bool
) -> list[int | None]:
    """For each entity row the value of the newest row it may see; nothing clever."""
    values = []
    for key, now in entities:
        best: tuple[Any, ...] | None = None
        for position, (row_key, event, created, value) in enumerate(rows):
            if key is None or now is None or event is None or row_key != key or event > now:
                continue
            if cutoff and (created is None or created > now):
                continue
            if ttl is not None and event + ttl < now:
                continue
            # Equal event time: the newer created wins, none is the oldest; equal again: the one written last.
            rank = (event, -1 if created is None else created, position)
            if best is None or rank > best[0]:
                best = (rank, value)
        values.append(None if best is None else best[1])
    return values


@pytest.mark.parametrize("large", [False, True], ids=["small", "as if large"])
@pytest.mark.parametrize("cutoff", [False, True])
@SLOW_STORE
@given(entities=ENTITY_ROWS, first=FEATURE_ROWS, second=FEATURE_ROWS, ttl=TTLS)
def test_two_views_agree_with_the_naive_loop(
    cutoff: bool,
    large: bool,
    entities: list[tuple[Any, ...]],
    first: list[tuple[Any, ...]],
    second: list[tuple[Any, ...]],
    ttl: int | None,
    two_views: Any,
) -> None:
    from plait.stores import asof_search, asof_ties

    store = two_views(history(first, "a"), history(second, "b"), ttl)
    with pytest.MonkeyPatch.context() as patch:
        if large:  # joined by DuckDB, ties looked for in another way
            patch.setattr(asof_search, "SEARCHED_ROWS", 0)
            patch.setattr(asof_ties, "HASHED_ROWS", 0)
        job = store.get_historical_features(
            entity_table(entities), ["first:a", "second:b"], filter_by_created_timestamp=cutoff
        )
        result = job.to_arrow()
        streamed = job.to_arrow_reader().read_all()
    assert result["a"].to_pylist() == naive_join(entities, first, ttl=ttl, cutoff=cutoff)
    assert result["b"].to_pylist() == naive_join(entities, second, ttl=None, cutoff=cutoff)
    assert result["user_id"].to_pylist() == [key for key, _ in entities]
    # Another query, which carries the features through the join.
    assert streamed.equals(result)


@pytest.fixture
def two_views(fresh_repo: Callable[[], Any], view: Callable[..., Any]) -> Callable[..., Any]:
    """Writes two histories into the same two files and sets the first view's ttl; one registry for all examples."""
    repo = fresh_repo()
    current: dict[str, Any] = {}

    def prepare(first: pa.Table, second: pa.Table, ttl: int | None, **options: Any) -> Any:
        # Small row groups, so that one file already has several.
        path, other = repo.write("first.parquet", first, row_group_size=5), repo.write("second.parquet", second)
        if not current or current["ttl"] != ttl:
            lifetime = None if ttl is None else timedelta(hours=ttl)
            views = [
                view("first", path, features={"a": "Int64"}, ttl=lifetime, created="created"),
                view("second", other, features={"b": "Int64"}, created="created"),
            ]
            repo.apply(views)
            current["ttl"] = ttl
        return repo.store(**options)

    return prepare


# Texts that a join could take for one another: where the first ends and the next begins ("" + "ab", "a" + "b"), case,
# spaces, one letter as one code point or two, what only differs after the 12 bytes that DuckDB looks at first, and what
# stock Feast builds its row ids of. A null finds nothing.
TEXTS = [
    *["", "a", "ab", "b", None, "ba", "A", " a", "a ", "é", "e\u0301", "ß", "ss", "日本", "😀", "a\0b"],
    *["1:a", "N", "1", "01", *(f"{'long' * 4}{i}" for i in range(16))],
]
BY_USER = {"user_id": "Int64"}
BY_BOTH = {"shop": "String", "user_id": "Int64"}
BY_TEXTS = {"shop": "String", "genre": "String"}


def key_columns(units: np.ndarray, keys: Mapping[str, str]) -> dict[str, pa.Array]:
    """The join keys of units below 36, each with its own: one key is the unit, two are its digits in base 6.

    Only texts have a null: stock Feast takes entity rows from pandas, which would make floats of integers with nulls.
    """
    digits = [units] if len(keys) == 1 else np.divmod(units, 6)
    return {
        name: pa.array([TEXTS[i] for i in digit], pa.string()) if kind == "String" else pa.array(digit, pa.int64())
        for (name, kind), digit in zip(keys.items(), digits, strict=True)
    }


def random_table(
    rng: np.random.Generator,
    n_rows: int,
    *,
    keys: Mapping[str, str] = BY_USER,
    n_units: int = 30,
    n_hours: int = 200,
    late_share: float = 0.5,
) -> pa.Table:
    """A history whose (key, event, created) are distinct, so that every engine must agree on the newest.

    Of some rows it is not known when they were created: as old as can be.
    """
    event = rng.integers(0, n_hours, n_rows)
    created = event + np.where(rng.random(n_rows) < late_share, rng.integers(1, 100, n_rows), 0)
    created[rng.random(n_rows) < 0.1] = -1
    unit = rng.integers(0, n_units, n_rows)
    _, unique = np.unique(np.stack([unit, event, created]), axis=1, return_index=True)
    unique = rng.permutation(unique)
    hours = np.int64(3_600_000_000)
    start = np.int64(T0.timestamp() * 1_000_000)
    return pa.table(
        {
            **key_columns(unit[unique], keys),
            "event_timestamp": pa.array(start + event[unique] * hours).cast(MICROS),
            "created": pa.array(start + created[unique] * hours, mask=created[unique] < 0).cast(MICROS),
            "a": pa.array(rng.integers(0, 1000, len(unique)), mask=rng.random(len(unique)) < 0.1),
            "score": rng.random(len(unique)),
            "name": pa.array([f"n{i}" for i in rng.integers(0, 50, len(unique))]),
            "tags": pa.array([list(rng.integers(0, 9, rng.integers(0, 4))) for _ in unique], pa.list_(pa.int64())),
        }
    )


@pytest.mark.parametrize(
    "keys_of_views",
    [
        [BY_USER] * 3,
        [{"shop": "String"}] * 3,
        [BY_BOTH] * 3,
        [BY_TEXTS, dict(reversed(BY_TEXTS.items())), BY_TEXTS],
        [BY_BOTH, BY_USER, {"shop": "String"}],
    ],
    ids=["integer", "text", "text and integer", "two texts", "each its own"],
)
@pytest.mark.parametrize("seed", range(3))
def test_it_equals_the_stock_store_cell_by_cell(
    repo: Any, view: Callable[..., Any], seed: int, keys_of_views: list[dict[str, str]]
) -> None:
    rng = np.random.default_rng(seed)
    kinds = {"a": "Int64", "score": "Float64", "name": "String", "tags": "Array(Int64)"}
    views = []
    # Of the second view many rows share key and event time, and the newer created decides.
    for i, (lifetime, n_hours) in enumerate([(None, 200), (timedelta(days=2), 40), (timedelta(hours=5), 200)]):
        keys = keys_of_views[i]
        table = random_table(rng, 300, keys=keys, n_hours=n_hours)
        names = {f"{name}{i}": kind for name, kind in kinds.items()}
        renamed = table.rename_columns([*table.column_names[: -len(kinds)], *names])
        path = repo.write(f"v{i}.parquet", renamed)
        views.append(view(f"view{i}", path, keys=keys, features=names, ttl=lifetime, created="created"))
    repo.apply(views)
    # Of 36 units the views have 30 at most: the others are absent.
    own = random_table(rng, 400, keys=keys_of_views[0], n_units=36)
    entities = own.select([*keys_of_views[0], "event_timestamp"]).to_pandas()
    entities["rid"] = np.arange(len(entities))
    entities["label"] = rng.random(len(entities))
    features = [f"view{i}:{name}{i}" for i in range(3) for name in kinds]
    for cutoff in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ibis calls what DuckDB renamed
            stock, ours = (
                repo.store(type_).get_historical_features(
                    entities, features, full_feature_names=seed % 2 == 0, filter_by_created_timestamp=cutoff
                )
                for type_ in ("duckdb", "plait.stores.offline.AsofDuckDBOfflineStore")
            )
            expected = stock.to_arrow().sort_by("rid")
        result = ours.to_arrow()
        assert result["rid"].to_pylist() == list(range(len(entities)))
        assert result.equals(expected)
        # Another query, which carries the features through the join.
        assert ours.to_arrow_reader().read_all().equals(expected)
        # The comparison is worth something: values, nulls and both.
        for i in range(3):
            assert 0 < expected[len(entities.columns) + i * len(kinds)].null_count < len(entities)


@pytest.mark.parametrize("n_late", [1, 40])
def test_the_cutoff_of_the_settings_counts_what_it_took_away(repo: Any, view: Any, n_late: int) -> None:
    from plait.stores.asof_job import CreatedCutoffWarning

    rows = [(1, 0, 0, 10)] + [(2, hour, 12, hour) for hour in range(min(n_late, 10))]
    repo.apply([view("v", repo.write("v.parquet", history(rows, "a")), features={"a": "Int64"}, created="created")])
    entities = entity_table([(1, 3), (2, 11), (2, 12), (2, 1)])
    job = repo.store(created_cutoff=True).get_historical_features(entities, ["v:a"])
    with pytest.warns(CreatedCutoffWarning, match=r"for 2 of 4 entity rows; 0 got an older value, 2 none"):
        result = job.to_arrow()
    assert result["a"].to_pylist() == [10, None, min(n_late, 10) - 1, None]


def test_the_cutoff_warns_of_older_values_too_and_is_silent_when_nothing_was_late(repo: Any, view: Any) -> None:
    from plait.stores.asof_job import CreatedCutoffWarning

    late = repo.write("late.parquet", history([(1, 0, 0, 10), (1, 5, 9, 20)], "a"))
    prompt = repo.write("prompt.parquet", history([(1, 0, 0, 10), (1, 5, 4, 20)], "b"))
    repo.apply(
        [
            view("late", late, features={"a": "Int64"}, created="created"),
            view("prompt", prompt, features={"b": "Int64"}, created="created"),
        ]
    )
    entities = entity_table([(1, 6), (1, 9)])
    store = repo.store(created_cutoff="on")
    with pytest.warns(CreatedCutoffWarning, match="'late'.* 1 of 2 entity rows; 1 got an older value, 0 none"):
        assert store.get_historical_features(entities, ["late:a"]).to_arrow()["a"].to_pylist() == [10, 20]
    # Warnings are errors here.
    assert store.get_historical_features(entities, ["prompt:b"]).to_arrow()["b"].to_pylist() == [20, 20]
    asked = store.get_historical_features(entities, ["late:a"], filter_by_created_timestamp=True)
    assert asked.to_arrow()["a"].to_pylist() == [10, 20]


def test_the_count_of_what_was_taken_away_agrees_with_two_loops(two_views: Any) -> None:
    """On random histories: the rows whose answer the cutoff changed, told by values that are all different."""
    from plait.stores.asof_job import CreatedCutoffWarning

    rng = np.random.default_rng(5)
    for ttl in (None, 4):
        rows = [(int(k), int(e), int(c), i) for i, (k, e, c) in enumerate(rng.integers(0, [3, 20, 40], (60, 3)))]
        entities = [(int(k), int(t)) for k, t in rng.integers(0, [4, 30], (50, 2))]
        free = naive_join(entities, rows, ttl=ttl, cutoff=False)
        known = naive_join(entities, rows, ttl=ttl, cutoff=True)
        older = sum(k is not None and k != f for f, k in zip(free, known, strict=True))
        none = sum(k is None and f is not None for f, k in zip(free, known, strict=True))
        store = two_views(history(rows, "a"), history([], "b"), ttl, created_cutoff=True)
        job = store.get_historical_features(entity_table(entities), ["first:a"])
        with pytest.warns(CreatedCutoffWarning, match=f"{older} got an older value, {none} none"):
            assert job.to_arrow()["a"].to_pylist() == known
        assert older
        assert none


def test_rows_that_tie_in_both_times_go_to_the_one_written_last_across_parts(repo: Any, view: Any) -> None:
    for i, value in enumerate([1, 2, 3]):
        repo.write(f"v/part-{i}.parquet", history([(1, 5, 5, value * 10), (1, 5, 5, value)], "a"))
    repo.apply([view("v", str(repo.path / "data/v"), features={"a": "Int64"}, created="created")])
    result = repo.store().get_historical_features(entity_table([(1, 6)]), ["v:a"]).to_arrow()
    assert result["a"].to_pylist() == [3]


def test_order_and_duplicates_of_a_large_frame_survive(repo: Any, view: Any) -> None:
    rng = np.random.default_rng(7)
    table = random_table(rng, 2_000)
    repo.apply([view("v", repo.write("v.parquet", table), features={"score": "Float64"}, created="created")])
    rows = random_table(rng, 40_000).select(["user_id", "event_timestamp"])
    rows = pa.concat_tables([rows] * 40)
    entities = rows.append_column("rid", pa.array(rng.permutation(len(rows))))
    result = repo.store().get_historical_features(entities, ["v:score"]).to_arrow()
    assert result.select(["user_id", "event_timestamp", "rid"]).equals(entities)
