"""Model configurations: defaults, overrides, and errors that name the file and the nearest right word."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from plait.encoders import Bag, Column, Drop, Vocabulary
from plait.errors import SpecError, UnknownNameError
from trainers.config import CONFIGS, DeepFMTraining, configured_names, load_spec, parse_spec
from trainers.pipeline import model_inputs

MINIMAL = {"name": "m", "feature_service": "click_test", "label": "click", "algorithm": "deepfm"}


def test_four_lines_are_a_whole_configuration(service, dataset):
    spec = parse_spec(MINIMAL, source="m.yaml")
    assert spec.training == DeepFMTraining()
    inputs, keys = model_inputs(service, dataset.schema)
    encodings, crosses = spec.encodings(inputs, keys)
    assert crosses == []
    assert encodings["user_id"] == Vocabulary()
    assert encodings["genres"] == Bag()
    assert list(encodings) == ["user_id", "item_id", *(feature.name for feature in service.features)]


def test_trees_leave_the_join_keys_alone(service, dataset):
    spec = parse_spec({**MINIMAL, "algorithm": "lightgbm"}, source="m.yaml")
    encodings, _ = spec.encodings(*model_inputs(service, dataset.schema))
    assert encodings["user_id"] == encodings["item_id"] == Drop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"gendr": "drop"}}, "no feature of service 'click_test' 'gendr'; did you mean 'gender'?"),
        ({"crosses": ["age#genr"]}, "cross age#genr: no feature of service 'click_test' 'genr'; did you mean 'genre"),
    ],
)
def test_a_name_outside_the_service_is_refused_with_the_nearest(service, dataset, change, message):
    spec = parse_spec({**MINIMAL, **change}, source="m.yaml")
    with pytest.raises(UnknownNameError) as caught:
        spec.encodings(*model_inputs(service, dataset.schema))
    assert str(caught.value).startswith("m.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"algoritm": "x"}, UnknownNameError, "m.yaml: no setting 'algoritm'; did you mean 'algorithm'?"),
        ({"algorithm": "lightgmb"}, UnknownNameError, "no algorithm 'lightgmb'; did you mean 'lightgbm'?"),
        ({"label": None}, SpecError, "m.yaml: label is None; it must be given, as text"),
        ({"columns": ["age"]}, SpecError, "m.yaml: columns is ['age']; it must be a mapping"),
        ({"crosses": "a#b"}, SpecError, "m.yaml: crosses is 'a#b'; it must be a list"),
        ({"columns": {"age": "bucket"}}, UnknownNameError, "no encoding 'bucket'; did you mean 'bucketize'?"),
        ({"training": {"epoch": 3}}, UnknownNameError, "m.yaml: training: no setting 'epoch'; did you mean 'epochs'?"),
        ({"training": {"epochs": "3"}}, SpecError, "epochs is '3'; it must be of type int"),
        ({"training": {"epochs": 0}}, SpecError, "epochs is 0; it must be above 0"),
        ({"training": {"dropout": 1}}, SpecError, "dropout is 1.0; it must be in [0, 1)"),
        ({"training": {"hidden": [64, "x"]}}, SpecError, "hidden is 'x'"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_says_what_and_where(change, error, message):
    with pytest.raises(error) as caught:
        parse_spec({**MINIMAL, **change}, source="m.yaml")
    assert message in str(caught.value)


def write(folder: Path, content: object) -> Path:
    path = folder / "m.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_settings_are_overridden_from_the_command_line(tmp_path):
    path = write(tmp_path, {**MINIMAL, "columns": {"age": "bucketize"}})
    overrides = ["training.epochs=3", "training.hidden=[8, 4]", "columns.age.buckets=5", "columns.genre.encode=drop"]
    spec = load_spec(str(path), overrides)
    assert (spec.training.epochs, spec.training.hidden) == (3, (8, 4))
    assert spec.columns == {"age": {"encode": "bucketize", "buckets": 5}, "genre": {"encode": "drop"}}


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training..x=1", "training.epochs=[1"])
def test_an_override_that_is_none_is_refused(tmp_path, override):
    with pytest.raises(SpecError, match="--set"):
        load_spec(str(write(tmp_path, MINIMAL)), [override])


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="no model configuration 'deepmf'; did you mean 'deepfm'"):
        load_spec("deepmf")


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "m.yaml").write_text("a: [")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(str(tmp_path / "m.yaml"))
    (tmp_path / "m.yaml").write_text("- a")
    with pytest.raises(SpecError, match="holds no mapping"):
        load_spec(str(tmp_path / "m.yaml"))


@pytest.mark.parametrize("name", configured_names())
def test_every_configuration_we_ship_is_whole_and_survives_json(name):
    spec = load_spec(name)
    assert spec.name == name == spec.algorithm
    assert parse_spec(spec.to_dict(), source=spec.source) == spec


def test_the_project_may_hold_its_own_configurations(tmp_path):
    write(tmp_path, {**MINIMAL, "name": "mine"})
    assert load_spec("m", folders=(tmp_path, CONFIGS)).name == "mine"
    assert load_spec("deepfm", folders=(tmp_path, CONFIGS)).name == "deepfm"


def test_a_key_column_is_an_input_of_its_side(service, dataset):
    inputs, keys = model_inputs(service, dataset.schema)
    assert keys == ["user_id", "item_id"]
    assert [column.side for column in inputs[:2]] == ["request", "candidate"]
    assert all(isinstance(column, Column) for column in inputs)
