"""Versions count up, aliases move and move back, and a bad artifact changes nothing."""

import json
import threading

import pytest

import plait.artifacts
from plait.errors import ArtifactError, RegistryError, SpecError
from plait.models import ModelRegistry
from plait.settings import Home


@pytest.fixture
def registry(tmp_path, monkeypatch, database):
    def load(folder, *, threads=1, verify=True):
        if not (folder / "model.onnx").exists():
            raise ArtifactError(f"{folder} holds no model.onnx")

    # What a whole artifact is, is tested in tests/artifacts; here it is a folder with a model in it.
    monkeypatch.setattr(plait.artifacts, "load_artifact", load)
    registry = ModelRegistry(Home(project=tmp_path, root=tmp_path / ".plait"))
    yield registry
    registry.close()


@pytest.fixture
def staged(tmp_path):
    counter = iter(range(1000))

    def make(metrics=None, *, whole=True):
        folder = tmp_path / f"staged-{next(counter)}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"metrics": metrics or {"test": {"auc": 0.7}}}))
        if whole:
            (folder / "model.onnx").write_bytes(b"onnx")
        return folder

    return make


def test_versions_count_up_and_the_newest_is_the_champion(registry, staged):
    assert registry.register("deepfm", staged()).version == "1"
    assert registry.register("deepfm", staged({"test": {"auc": 0.8}})).version == "2"
    champion = registry.resolve("deepfm")
    assert (champion.version, champion.aliases, champion.metrics) == ("2", ("champion",), {"test": {"auc": 0.8}})
    assert (champion.path / "model.onnx").exists()
    assert registry.resolve("deepfm:1").aliases == ()


def test_registering_without_an_alias_leaves_the_champion_alone(registry, staged):
    registry.register("deepfm", staged())
    registry.register("deepfm", staged(), alias=None)
    assert registry.resolve("deepfm@champion").version == "1"
    registry.promote("deepfm", "2", "shadow")
    assert registry.resolve("deepfm@shadow").version == "2"


def test_rollback_walks_back_through_what_the_alias_named(registry, staged):
    for _ in range(3):
        registry.register("deepfm", staged())
    assert registry.rollback("deepfm").version == "2"
    assert registry.rollback("deepfm").version == "1"
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback("deepfm")
    registry.promote("deepfm", "3")
    assert registry.rollback("deepfm").version == "1"


@pytest.mark.parametrize(
    ("reference", "message"),
    [("depfm", "did you mean 'deepfm'"), ("deepfm:7", "no version '7'"), ("deepfm@champ", "did you mean 'champion'")],
)
def test_an_unknown_reference_is_answered_with_what_there_is(registry, staged, reference, message):
    registry.register("deepfm", staged())
    with pytest.raises(RegistryError, match=message):
        registry.resolve(reference)


def test_a_bad_artifact_or_name_registers_nothing(registry, staged):
    with pytest.raises(ArtifactError):
        registry.register("deepfm", staged(whole=False))
    with pytest.raises(SpecError, match="cannot name a model"):
        registry.register("../deepfm", staged())
    assert registry.names() == []


def test_two_registrations_at_once_get_two_versions(registry, staged):
    folders = [staged() for _ in range(8)]
    threads = [threading.Thread(target=registry.register, args=("deepfm", folder)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [model.version for model in registry.versions("deepfm")] == [str(i) for i in range(1, 9)]
