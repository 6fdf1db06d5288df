"""Offline equals online: the same values, the same encoded arrays, the same scores; and a picked lock is noticed."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.artifacts import load_artifact
from plait.clock import Clock
from plait.models import ModelRegistry
from plait.offline.build import point_in_time
from plait.online import OnlineReader
from plait.service import open_store, resolve_service
from plait.settings import Home

pytestmark = pytest.mark.slow
MODELS = ("deepfm", "lightgbm", "xgboost", "logistic")
N_MOMENTS, ROWS_PER_MOMENT = 5, 100


@pytest.fixture(scope="module")
def home(demo):
    project, _ = demo
    return Home(project=project, root=project / ".plait")


@pytest.fixture(scope="module")
def store(home):
    return open_store(home)


@pytest.fixture(scope="module")
def rows(home):
    """500 random (user, item) pairs, unknown ids among them."""
    rng = np.random.default_rng(5)
    n = N_MOMENTS * ROWS_PER_MOMENT
    users = pq.read_table(home.events / "users")["user_id"].to_numpy()
    items = pq.read_table(home.events / "items")["item_id"].to_numpy()
    user_id = np.where(rng.random(n) < 0.05, 10**9, rng.choice(users, n))
    item_id = np.where(rng.random(n) < 0.05, 10**9, rng.choice(items, n))
    return pa.table({"sample_id": np.arange(n), "user_id": user_id, "item_id": item_id})


@pytest.fixture(scope="module")
def both(home, store, rows):
    """The rows' features, online and offline, at five moments days apart, each just materialized."""
    specs = {name: resolve_service(store, f"click_{name}") for name in MODELS}
    readers = {name: OnlineReader(store, spec) for name, spec in specs.items()}
    start = Clock.of(home).now()
    online = {name: [] for name in MODELS}
    offline = {name: [] for name in MODELS}
    for moment in range(N_MOMENTS):
        now = start + timedelta(days=3 * moment, hours=7 * moment)
        store.materialize(datetime(1990, 1, 1, tzinfo=UTC), now)
        part = rows.slice(moment * ROWS_PER_MOMENT, ROWS_PER_MOMENT)
        times = pa.array([now] * ROWS_PER_MOMENT, pa.timestamp("us", tz="UTC"))
        for name in MODELS:
            for row in part.to_pylist():
                read = readers[name].read(
                    {"user_id": row["user_id"]}, pa.table({"item_id": [row["item_id"]]}), context={}, now=now
                )
                online[name].append((read.request, read.candidates))
            offline[name].append(point_in_time(store, specs[name], part.append_column("event_timestamp", times)))
    return specs, online, {name: pa.concat_tables(tables) for name, tables in offline.items()}


def joined(spec, request, candidates):
    columns = {**dict(zip(request.column_names, request.columns, strict=True))}
    columns |= dict(zip(candidates.column_names, candidates.columns, strict=True))
    return pa.table({feature.name: columns[feature.name] for feature in spec.features}, schema=spec.schema())


@pytest.mark.parametrize("model", MODELS)
def test_every_feature_of_500_rows_is_the_same_offline_and_online(both, model):
    specs, online, offline = both
    read = pa.concat_tables([joined(specs[model], *pair) for pair in online[model]])
    assert read.num_rows == N_MOMENTS * ROWS_PER_MOMENT
    for feature in specs[model].features:
        assert read[feature.name].to_pylist() == offline[model][feature.name].to_pylist(), feature.name


@pytest.mark.parametrize("model", MODELS)
def test_some_of_those_values_are_there(both, model):
    specs, _, offline = both
    for feature in specs[model].features:
        assert offline[model][feature.name].null_count < offline[model].num_rows, feature.name


@pytest.mark.parametrize("model", MODELS)
def test_encoded_arrays_and_scores_are_the_same(home, both, rows, model):
    _, online, offline = both
    artifact = load_artifact(ModelRegistry(home).resolve(model).path)
    keys = {name: rows[name] for name in ("user_id", "item_id")}
    table = pa.table(keys | {name: offline[model][name] for name in offline[model].column_names})
    offline_scores = artifact.score_rows(table)
    for i, (request, candidates) in enumerate(online[model]):
        request = request.append_column("user_id", rows["user_id"].slice(i, 1))
        candidates = candidates.append_column("item_id", rows["item_id"].slice(i, 1))
        ours = artifact.encoders.encode(request, candidates)
        row = table.slice(i, 1)
        for name, array in artifact.encoders.encode(row, row).items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
        assert abs(float(artifact.score(request, candidates)[0]) - float(offline_scores[i])) < 1e-5


def test_a_tampered_log_is_found_by_the_audit(demo, plait):
    """The proof can fail: one logged value changed, one difference reported."""
    project, _ = demo
    part = sorted((project / ".plait/events/impressions").glob("log-*.parquet"))[0]
    original = pq.read_table(part)
    features = original["features"].to_pylist()
    record = json.loads(features[0])
    name = next(name for name, value in record.items() if isinstance(value, int) and not isinstance(value, bool))
    record[name] += 1
    at = original.column_names.index("features")
    tampered = original.set_column(at, "features", pa.array([json.dumps(record), *features[1:]]))
    pq.write_table(tampered, part)
    try:
        run = plait(project, "audit", "--strict", "--format", "json")
    finally:
        pq.write_table(original, part)
    found = [
        (feature["name"], feature["reasons"])
        for model in json.loads(run.stdout)
        for feature in model["features"]
        if feature["reasons"].get("value")
    ]
    assert run.returncode == 1
    assert found == [(name, {"value": 1})]
