"""Artifacts: loaded only whole and only if they reproduce their golden rows; never with torch."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest

from plait.artifacts import ArtifactManifest, load_artifact, read_golden, write_artifact
from plait.encoders import Bag, Column, EncoderSet, Scale, Vocabulary
from plait.errors import ArtifactError, DataError
from trainers.classical import logistic_model, table_offsets

COLUMNS = (
    Column(name="user_id", dtype=pa.int64(), side="request"),
    Column(name="history", dtype=pa.list_(pa.int64()), side="request"),
    Column(name="item_id", dtype=pa.int64(), side="candidate"),
    Column(name="rate", dtype=pa.float64(), side="candidate"),
)
ENCODINGS = {"user_id": Vocabulary(), "history": Bag(share="item_id"), "item_id": Vocabulary(), "rate": Scale()}
MANIFEST = ArtifactManifest(
    name="small", algorithm="logistic", feature_service="click_small", label="click", features=({"name": "user_id"},)
)


def rows(n: int = 30, *, n_items: int = 9) -> pa.Table:
    rng = np.random.default_rng(n)
    history = [rng.integers(0, n_items, rng.integers(0, 4)).tolist() for _ in range(n)]
    return pa.table(
        {
            "user_id": rng.integers(0, 5, n),
            "history": pa.array(history, pa.list_(pa.int64())),
            "item_id": rng.integers(0, n_items, n),
            "rate": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.2),
        }
    )


def a_model(train: pa.Table) -> tuple[onnx.ModelProto, EncoderSet, pa.Table]:
    """A logistic graph of random weights, its encoders, and golden rows computed by a loop in numpy."""
    encoders = EncoderSet.fit(train, COLUMNS, ENCODINGS)
    offsets = table_offsets(encoders)
    weights = np.random.default_rng(0).normal(size=offsets[""] + 2)
    golden = train.slice(0, 20)
    scores = []
    arrays = encoders.encode_rows(golden)
    for i in range(len(golden)):
        bag = [weights[offsets["item_id"] + j] for j in arrays["request_bag_history"][i] if j > 0]
        logit = weights[offsets["user_id"] + arrays["request_ids"][i, 0]]
        logit += weights[offsets["item_id"] + arrays["candidate_ids"][i, 0]]
        logit += sum(bag) / max(len(bag), 1) + arrays["candidate_values"][i] @ weights[offsets[""] :] + 0.3
        scores.append(1 / (1 + np.exp(-logit)))
    model = logistic_model(encoders, offsets, weights, 0.3)
    return model, encoders, golden.append_column("golden_score", pa.array(scores))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, encoders, golden = a_model(rows())
    write_artifact(tmp_path / "artifact", model=model, encoders=encoders, manifest=MANIFEST, golden=golden)
    return tmp_path / "artifact"


def test_an_artifact_is_read_back_with_all_it_says(folder):
    artifact = load_artifact(folder)
    assert artifact.manifest.name == "small"
    assert set(artifact.manifest.files) == {
        "model.onnx", "golden.arrow", "encoders/encoders.json",
        "encoders/vocabulary-0.arrow", "encoders/vocabulary-1.arrow",
    }  # fmt: skip
    assert artifact.request_columns == ("user_id", "history")
    assert artifact.candidate_columns == ("item_id", "rate")
    assert artifact.verify() < 1e-6


def test_scores_are_the_golden_ones_in_any_batch(folder):
    artifact = load_artifact(folder, verify=False)
    golden = read_golden(folder)
    expected = golden.column("golden_score").to_numpy()
    one_by_one = [artifact.score_rows(golden.slice(i, 1))[0] for i in range(len(golden))]
    np.testing.assert_allclose(one_by_one, expected, atol=1e-6)
    np.testing.assert_allclose(artifact.score(golden, golden), expected, atol=1e-6)


def test_no_candidates_have_no_scores(folder):
    scores = load_artifact(folder).score(rows(1), rows(5).slice(0, 0))
    assert scores.shape == (0,) and scores.dtype == np.float32


def test_inputs_and_outputs_are_described_for_the_inference_protocol(folder):
    artifact = load_artifact(folder)
    described = {info.name: (info.datatype, info.shape) for info in (*artifact.inputs, *artifact.outputs)}
    assert described == {
        "request_ids": ("INT64", (-1, 1)),
        "request_bag_history": ("INT64", (-1, -1)),
        "candidate_ids": ("INT64", (-1, 1)),
        "candidate_values": ("FP32", (-1, 2)),
        "score": ("FP32", (-1,)),
    }


def test_encoded_arrays_are_scored_as_their_rows(folder):
    artifact = load_artifact(folder)
    some = rows(7)
    arrays = artifact.encoders.encode_rows(some)
    np.testing.assert_array_equal(artifact.infer(arrays)["score"], artifact.score_rows(some))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request_ids": None}, "input 'request_ids' is missing"),
        ({"extra": np.zeros((7, 1))}, "unknown input 'extra'"),
        ({"candidate_ids": np.zeros((7, 2), np.int64)}, r"of shape \[7, 2\]; it must be INT64 of shape \[-1, 1\]"),
        ({"candidate_ids": np.zeros((7, 1), np.float32)}, "input 'candidate_ids' is float32"),
        ({"candidate_ids": np.full((7, 1), 10**6)}, "input 'candidate_ids' holds ids outside"),
        ({"request_bag_history": np.full((7, 3), -1)}, "input 'request_bag_history' holds ids outside"),
        ({"candidate_values": np.zeros((5, 2), np.float32)}, "do not go together"),
    ],
)
def test_wrong_arrays_are_refused_by_name(folder, change, message):
    artifact = load_artifact(folder)
    arrays = artifact.encoders.encode_rows(rows(7)) | change
    with pytest.raises(DataError, match=message):
        artifact.infer({name: array for name, array in arrays.items() if array is not None})


def test_rows_without_a_column_the_model_reads_are_refused(folder):
    artifact = load_artifact(folder)
    with pytest.raises(DataError, match="no column 'rate'"):
        artifact.score(rows(1), rows(3).drop_columns(["rate"]))


@pytest.mark.parametrize(
    "name", ["model.onnx", "golden.arrow", "encoders/encoders.json", "encoders/vocabulary-0.arrow"]
)
def test_a_file_that_is_gone_or_altered_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"is corrupt: {name}"):
        load_artifact(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"is incomplete: {name} is missing"):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["model.onnx", "golden.arrow", "encoders/encoders.json", "manifest.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_cut_file_is_an_artifact_error_even_without_checksums(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtifactError):
        load_artifact(folder, verify=False).verify()


def test_a_folder_that_is_no_artifact_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        load_artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        load_artifact(tmp_path / "nowhere")


def test_a_graph_that_disagrees_with_its_golden_rows_is_not_loaded(folder):
    """Another model's graph in the folder, with checksums that fit it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    model = onnx.load(str(folder / "model.onnx"))
    bias = next(t for t in model.graph.initializer if t.name.startswith("bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([[0.301]], np.float32), bias.name))
    onnx.save_model(model, str(folder / "model.onnx"))
    manifest["files"]["model.onnx"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"does not reproduce its 20 golden rows: scores differ by up to 0\.000"):
        load_artifact(folder)


def test_an_artifact_of_another_format_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        load_artifact(folder)


def test_a_wrong_graph_is_not_written_and_leaves_the_old_artifact(folder):
    model, encoders, golden = a_model(rows())
    wrong = golden.set_column(golden.column_names.index("golden_score"), "golden_score", pa.array(np.full(20, 0.5)))
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="does not reproduce"):
        write_artifact(folder, model=model, encoders=encoders, manifest=MANIFEST, golden=wrong)
    assert (folder / "manifest.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_golden_rows_must_hold_every_input(tmp_path):
    model, encoders, golden = a_model(rows())
    with pytest.raises(ArtifactError, match="lack \\['rate'\\]"):
        write_artifact(
            tmp_path / "a", model=model, encoders=encoders, manifest=MANIFEST, golden=golden.drop_columns(["rate"])
        )


def test_a_large_table_lies_beside_the_graph_and_moves_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("plait.artifacts.EXTERNAL_DATA_BYTES", 1000)
    model, encoders, golden = a_model(rows(3000, n_items=200_000).slice(0, 3000))
    many = pa.table({**{n: golden.column(n) for n in golden.column_names}})
    table = next(t for t in model.graph.initializer if t.name.startswith("table"))
    padded = np.concatenate([onnx.numpy_helper.to_array(table), np.zeros((50_000, 1), np.float32)])
    table.CopyFrom(onnx.numpy_helper.from_array(padded, table.name))
    write_artifact(tmp_path / "a", model=model, encoders=encoders, manifest=MANIFEST, golden=many)
    assert (tmp_path / "a" / "model.onnx.data").stat().st_size >= padded.nbytes
    assert (tmp_path / "a" / "model.onnx").stat().st_size < padded.nbytes / 4
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load_artifact(tmp_path / "b").verify() < 1e-6
    (tmp_path / "b" / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is missing"):
        load_artifact(tmp_path / "b")


def test_loading_and_scoring_import_neither_torch_nor_any_trainer(folder):
    program = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from plait.artifacts import load_artifact, read_golden
artifact = load_artifact(Path({str(folder)!r}))
golden = read_golden(artifact.folder)
assert abs(artifact.score_rows(golden)[0] - golden["golden_score"][0].as_py()) < 1e-5
heavy = {{"torch", "sklearn", "lightgbm", "xgboost", "feast", "trainers", "onnx", "scipy"}}
print(sorted(name for name in heavy if sys.modules.get(name)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
