"""`plait train` and `plait evaluate`: what they print, register and refuse."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from plait.cli import cli
from plait.models import ModelRegistry
from plait.settings import find_home

CONFIG = """
name: small
feature_service: click_test
label: click
algorithm: logistic
columns: {history: drop, item_id: {encode: vocabulary, min_count: 3}}
training: {c: [0.1, 0.3]}
"""


@pytest.fixture
def run(project, service, monkeypatch):
    """Runs a command in a project whose feature registry holds the test's service."""
    monkeypatch.chdir(project)
    (project / "trainers" / "configs" / "small.yaml").write_text(CONFIG)
    monkeypatch.setattr("plait.service.open_store", lambda home: None)
    monkeypatch.setattr("plait.service.resolve_service", lambda store, name: service)

    def invoke(*arguments: str):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return invoke


def test_a_model_is_trained_registered_and_evaluated(run, dataset, monkeypatch):
    done = run("train", "small", "--dataset", dataset.folder)
    assert done.exit_code == 0, done.output
    assert "registered small:1 as champion" in done.output
    assert {"small", "popularity", "user mean"} <= {line[:12].strip() for line in done.output.splitlines()}

    done = run("evaluate", "small", "--dataset", dataset.folder, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    version = ModelRegistry(find_home()).resolve("small")
    assert result["metrics"]["auc"] == pytest.approx(version.metrics["auc"], abs=1e-6)
    assert result["auc"]["low"] < result["auc"]["value"] < result["auc"]["high"]
    assert result["segments"]["warm users"][0] + result["segments"].get("cold users", [0])[0] == 2000

    done = run("evaluate", "small@champion", "--dataset", dataset.folder, "--split", "valid")
    assert "95 % interval" in done.output and "warm users" in done.output


def test_a_second_training_is_the_next_version(run, dataset):
    run("train", "small", "--dataset", dataset.folder)
    done = run("train", "small", "--dataset", dataset.folder, "--set", "training.c=[0.01]", "--alias", "candidate")
    assert "registered small:2 as candidate" in done.output
    registry = ModelRegistry(find_home())
    assert registry.resolve("small").version == "1"
    assert registry.resolve("small@candidate").manifest["config"]["training"]["c"] == [0.01]


def test_a_model_that_a_baseline_beats_warns_and_may_be_kept_out(run, dataset):
    crippled = ["--set", "training.c=[1e-9]", "--dataset", dataset.folder]
    done = run("train", "small", *crippled, "--require-better")
    assert done.exit_code == 2
    assert "warning: log loss" in done.output
    assert "does not beat its baselines and is not registered" in done.output
    assert ModelRegistry(find_home()).names() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "smal"), "no model configuration 'smal'; did you mean 'small'?"),
        (("train", "small", "--set", "columns.gendr=drop"), "small.yaml: no feature of service 'click_test' 'gendr'"),
        (("train", "small", "--set", "label=clik"), "no label 'clik'; did you mean 'click'?"),
        (("evaluate", "none"), "no model 'none' in the registry"),
    ],
)
def test_wrong_names_end_with_2_and_one_line(run, dataset, arguments, message):
    extra = ("--dataset", dataset.folder) if arguments[0] == "train" else ()
    done = run(*arguments, *extra)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_folder_that_is_no_training_set_says_what_to_run(run, tmp_path):
    done = run("train", "small", "--dataset", tmp_path)
    assert done.exit_code == 2
    assert "plait dataset build" in done.output


def test_a_failed_training_leaves_nothing_in_the_models_folder(run, dataset):
    run("train", "small", "--dataset", dataset.folder, "--set", "columns.gendr=drop")
    assert list(find_home().models.iterdir()) == []
