"""Every family of models: learns, beats the baselines, is exported exactly, and is trained again to the same scores."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pytest

from plait.artifacts import load_artifact
from plait.errors import DataError, SpecError
from trainers.config import parse_spec
from trainers.pipeline import TrainedModel, retrain, train_model
from trainers.report import beaten, measures_table

NOW = datetime(1998, 4, 1, tzinfo=UTC)
ALGORITHMS = ("deepfm", "lightgbm", "xgboost", "logistic")
TRAINING = {
    "deepfm": {"epochs": 4, "batch_size": 256, "dim": 8, "hidden": [16, 8], "table_learning_rate": 0.02, "threads": 1},
    "lightgbm": {"rounds": 60, "min_leaf": 20, "threads": 1},
    "xgboost": {"rounds": 60, "min_child_weight": 5.0, "threads": 1},
    "logistic": {"c": [0.03, 0.1, 0.3], "max_iterations": 50},
}
COLUMNS = {
    "deepfm": {"history": {"encode": "sequence", "share": "item_id", "last": 4}, "age": "bucketize"},
    "lightgbm": {"gender": "vocabulary", "item_id": "vocabulary"},
    "xgboost": {"gender": "vocabulary", "item_id": "vocabulary"},
    "logistic": {"history": {"encode": "sequence", "share": "item_id", "pool": "sum"}},
}
CROSSES = {"deepfm": ["gender#genre"], "logistic": ["gender#genre"]}


def configuration(algorithm: str, **training) -> dict:
    return {
        "name": f"a_{algorithm}",
        "feature_service": "click_test",
        "label": "click",
        "algorithm": algorithm,
        "columns": COLUMNS[algorithm],
        "crosses": CROSSES.get(algorithm, []),
        "training": TRAINING[algorithm] | training,
    }


@pytest.fixture(scope="session")
def trained(service, dataset):
    """Trains each algorithm once per session."""
    cache: dict[str, TrainedModel] = {}

    def of(algorithm: str) -> TrainedModel:
        if algorithm not in cache:
            spec = parse_spec(configuration(algorithm), source="test")
            cache[algorithm] = train_model(spec, service, dataset, now=NOW, progress=False)
        return cache[algorithm]

    return of


@pytest.fixture(params=ALGORITHMS)
def model(request, trained) -> TrainedModel:
    return trained(request.param)


def test_a_model_beats_both_baselines(model):
    assert beaten(model.metrics, model.manifest.baselines) == []
    assert model.metrics["auc"] > 0.7
    assert 0.8 < model.metrics["calibration"] < 1.25


def test_the_report_names_the_model_and_the_baselines(model):
    text = measures_table({"mine": model.metrics, **model.manifest.baselines})
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["mine", "popularity", "user"]
    assert f"{model.metrics['auc']:.4f}" in text


def test_what_does_not_beat_a_baseline_is_said(model):
    worse = {"auc": 0.5, "log_loss": 0.7}
    assert len(beaten(worse, model.manifest.baselines)) == 4


def test_the_artifact_scores_as_the_trainer_does(model, dataset, tmp_path):
    model.write(tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    rows = dataset.split("test").to_table()
    wanted = model.fitted.predict(model.encoders.encode_rows(rows))
    np.testing.assert_allclose(artifact.score_rows(rows), wanted, atol=1e-5)


def test_one_request_row_is_expanded_to_all_its_candidates(model, dataset, tmp_path):
    model.write(tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    rows = dataset.split("test").to_table()
    for n in (1, 2, 50):
        request, candidates = rows.slice(7, 1), rows.slice(100, n)
        repeated = candidates
        for name in artifact.request_columns:
            column = request.column(name).take(pa.array([0] * n))
            repeated = repeated.set_column(repeated.column_names.index(name), name, column)
        got = artifact.score(request, candidates)
        assert got.shape == (n,) and got.dtype == np.float32
        np.testing.assert_allclose(got, artifact.score_rows(repeated), atol=1e-6)


def test_golden_rows_hold_nulls_and_the_models_thresholds(model):
    golden = model.golden
    assert len(golden) > 64
    assert all(golden.column(item.name).null_count > 0 for item in model.encoders.inputs)
    if model.spec.family == "tree":
        thresholds = model.fitted.thresholds["candidate_values"]
        assert thresholds
        standing = {float(np.float32(v)) for v in golden.column("movie_rate").to_pylist() if v is not None}
        position = next(f.position for f in model.encoders.fields if f.name == "movie_rate")
        assert standing & set(thresholds[position].tolist())


def test_the_manifest_tells_the_lineage(model, dataset):
    manifest = model.manifest
    assert manifest.data_hash == dataset.manifest.data_hash
    assert manifest.dataset == dataset.folder.name
    assert manifest.config["training"]["seed"] == manifest.seed == 17
    assert {"python", "numpy", "onnxruntime"} <= manifest.versions.keys()
    assert "unknown" not in manifest.versions.values()
    assert manifest.created == NOW.isoformat()
    assert manifest.history and "valid_log_loss" in manifest.history[-1]
    read = {feature["name"]: feature for feature in manifest.features}
    assert read["genre"] == {"name": "genre", "dtype": "string", "side": "candidate", "key": False}
    assert all(feature["key"] == (name in ("user_id", "item_id")) for name, feature in read.items())


def test_a_model_is_trained_again_from_its_manifest_to_the_same_scores(model, service, dataset):
    again = retrain(model.manifest, service, dataset, now=NOW)
    np.testing.assert_array_equal(
        again.golden.column("golden_score").to_numpy(), model.golden.column("golden_score").to_numpy()
    )
    assert again.manifest == model.manifest


def test_training_again_on_other_data_is_refused(trained, service, make_dataset, make_clicks, tmp_path):
    other = make_dataset(tmp_path, {name: make_clicks(100, 9) for name in ("train", "valid", "test")})
    with pytest.raises(DataError, match="was trained on data"):
        retrain(trained("logistic").manifest, service, other, now=NOW)


def test_the_graph_is_small_when_the_tables_are(model, tmp_path):
    model.write(tmp_path / "artifact")
    assert {path.name for path in (tmp_path / "artifact").iterdir()} == {
        "model.onnx",
        "encoders",
        "manifest.json",
        "golden.arrow",
    }


def test_the_embedding_table_is_stored_once(trained, tmp_path):
    """Both sides of the graph look rows up in it; history shares the movies' ids."""
    tables = [t for t in trained("deepfm").fitted.model.graph.initializer if list(t.dims)[-1:] == [9]]
    assert len(tables) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_that_reads_nothing_of_the_candidates_is_refused(algorithm, service, dataset):
    candidate = ("item_id", "genres", "genre", "movie_rate", "movie_ratings")
    content = configuration(algorithm) | {"columns": dict.fromkeys((*candidate, "history"), "drop"), "crosses": []}
    with pytest.raises(SpecError, match="reads no candidate column"):
        train_model(parse_spec(content, source="test"), service, dataset, now=NOW, progress=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_may_read_the_candidates_alone(algorithm, service, dataset, tmp_path):
    request = ("user_id", "age", "gender", "user_rate", "history")
    content = configuration(algorithm) | {"columns": dict.fromkeys(request, "drop"), "crosses": []}
    model = train_model(parse_spec(content, source="test"), service, dataset, now=NOW, progress=False)
    model.write(tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    rows = dataset.split("test").to_table().slice(0, 10)
    assert artifact.request_columns == ()
    assert artifact.score(rows.slice(0, 1), rows).shape == (10,)


@pytest.mark.parametrize("algorithm", ["lightgbm", "xgboost"])
def test_trees_refuse_a_pooled_list(algorithm, service, dataset):
    content = configuration(algorithm) | {"columns": {"genres": "pool"}}
    with pytest.raises(SpecError, match="column 'genres' is pooled, which trees cannot read"):
        train_model(parse_spec(content, source="test"), service, dataset, now=NOW, progress=False)


def test_a_split_of_one_class_is_refused(service, make_dataset, make_clicks, tmp_path):
    rows = make_clicks(100, 9)
    column = rows.column_names.index("click")
    ones = rows.set_column(column, "click", pa.array(np.ones(100, np.int8)))
    data = make_dataset(tmp_path, {"train": ones, "valid": rows, "test": rows})
    with pytest.raises(DataError, match="every 'click' of the train split is 1"):
        train_model(parse_spec(configuration("logistic"), source="t"), service, data, now=NOW, progress=False)


def test_a_feature_that_the_training_set_lacks_is_named(service, make_dataset, make_clicks, tmp_path):
    rows = make_clicks(100, 9).drop_columns(["movie_rate"])
    data = make_dataset(tmp_path, {"train": rows, "valid": rows, "test": rows})
    with pytest.raises(DataError, match="lacks movie_rate of service 'click_test'"):
        train_model(parse_spec(configuration("logistic"), source="t"), service, data, now=NOW, progress=False)


def test_sample_weights_count(service, make_dataset, make_clicks, tmp_path):
    """Rows of weight 0 do not move a model: a split whose other rows are nonsense trains as if they were not there."""
    good, bad = make_clicks(1000, 9), make_clicks(1000, 10)
    flipped = pa.array(1 - bad.column("click").to_numpy(), pa.int8())
    bad = bad.set_column(bad.column_names.index("click"), "click", flipped)
    bad = bad.set_column(bad.column_names.index("weight"), "weight", pa.array(np.zeros(1000, np.float32)))
    data = make_dataset(
        tmp_path, {"train": pa.concat_tables([good, bad]), "valid": make_clicks(500, 11), "test": make_clicks(500, 12)}
    )
    for algorithm in ALGORITHMS:
        spec = parse_spec(configuration(algorithm), source="t")
        model = train_model(spec, service, data, now=NOW, progress=False)
        assert model.metrics["auc"] > 0.6, algorithm


def session_of(model: TrainedModel, folder: Path) -> ort.InferenceSession:
    import onnx

    onnx.save_model(model.fitted.model, str(folder / "m.onnx"))
    return ort.InferenceSession(str(folder / "m.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("algorithm", ["lightgbm", "xgboost"])
def test_rows_on_a_threshold_or_missing_go_the_trainers_way(algorithm, trained, dataset, tmp_path):
    from trainers.golden import standing_on_thresholds

    model = trained(algorithm)
    arrays = model.encoders.encode_rows(dataset.split("test").to_table())
    session = session_of(model, tmp_path)
    for seed in range(5):
        moved = standing_on_thresholds(arrays, model.fitted.thresholds, seed=seed)
        assert np.isnan(moved["candidate_values"]).any()
        np.testing.assert_allclose(session.run(["score"], moved)[0], model.fitted.predict(moved), atol=1e-6)
