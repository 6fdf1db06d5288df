"""The whole loop runs, small: from no data to a model retrained on the server's own log."""

import json

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow


def test_the_demo_runs_the_loop_and_loses_no_request(demo):
    _, run = demo
    assert "from lightgbm:1 to lightgbm:2 under traffic" in run.stdout
    assert ", 0 failed" in run.stdout
    assert "curl -s http://127.0.0.1" in run.stdout


def test_every_impression_is_logged_with_arm_model_and_features(demo):
    project, _ = demo
    parts = sorted((project / ".plait/events/impressions").glob("log-*.parquet"))
    shown = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert shown
    for row in shown:
        assert row["model"] in {"deepfm", "lightgbm"}
        assert row["model_version"]
        assert json.loads(row["features"])
        assert row["position"] >= 1
    assert {arm["layer"] for row in shown for arm in row["arms"]} >= {"rank"}


def test_the_log_became_samples(demo):
    project, _ = demo
    parts = sorted((project / ".plait/samples/default").glob("*.parquet"))
    samples = pq.read_table(parts, columns=["request_id", "click", "split"]).to_pylist()
    live = [row for row in samples if not row["request_id"].startswith("s")]
    assert any(row["click"] for row in live)
    assert any(row["split"] == "train" for row in live)


def test_live_features_equal_offline_ones(demo, plait):
    project, _ = demo
    run = plait(project, "audit", "--strict", "--format", "json")
    assert run.returncode == 0, run.stdout + run.stderr
    for model in json.loads(run.stdout):
        assert model["n_rows"] > 0
        assert model["logged_score_off_max"] < 1e-5


def test_a_second_demo_reuses_what_is_there(demo, plait, find_port):
    project, _ = demo
    run = plait(project, "demo", "--data", "synthetic", "--port", str(find_port()))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the loop has run on synthetic already" in run.stdout
    assert "plait train" not in run.stdout
