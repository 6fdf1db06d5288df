"""What ties a loaded model to the features that the registry serves now."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from plait.artifacts import ArtifactManifest
from plait.errors import ArtifactError
from plait.service import FeatureSpec, ServiceSpec
from plait.settings import Home
from serving.build import check_same_features, scenes_file, wanted_models
from serving.scenes import DEFAULT_FILE, Scene


def service(transform_sha: str = "new", dtype: pa.DataType | None = None) -> ServiceSpec:
    feature = FeatureSpec(name="age", view="user_profile", dtype=dtype or pa.int64(), side="request")
    transform = SimpleNamespace(reference="feature_repo.transforms:f", sha=transform_sha)
    return ServiceSpec(
        name="click", features=(feature,), views=(), transforms=(transform,), derived_keys={}, request_fields={}
    )


def manifest(**changes: Any) -> ArtifactManifest:
    settings: dict[str, Any] = {
        "name": "m",
        "algorithm": "a",
        "feature_service": "click",
        "label": "click",
        "features": (
            {"name": "user_id", "dtype": "int64", "side": "request", "key": True},
            {"name": "age", "dtype": "int64", "side": "request", "key": False},
        ),
        "transforms": {"feature_repo.transforms:f": "new"},
    }
    return ArtifactManifest(**{**settings, **changes})


def test_a_model_of_the_same_features_and_transforms_may_serve() -> None:
    check_same_features("m:1", manifest(), service())


def test_a_model_whose_feature_is_gone_may_not_serve() -> None:
    gone = manifest(features=({"name": "height", "dtype": "int64", "side": "request", "key": False},))
    with pytest.raises(ArtifactError, match="m:1 reads 'height', which feature service click no longer has"):
        check_same_features("m:1", gone, service())


def test_a_model_whose_feature_changed_its_type_may_not_serve() -> None:
    with pytest.raises(ArtifactError, match="trained on 'age' as int64"):
        check_same_features("m:1", manifest(), service(dtype=pa.float64()))


def test_a_model_of_another_transform_may_not_serve() -> None:
    with pytest.raises(ArtifactError, match="as of new, but the feature registry has newer"):
        check_same_features("m:1", manifest(), service(transform_sha="newer"))


def test_the_project_s_own_scenes_come_first(tmp_path: Path) -> None:
    home = Home(project=tmp_path, root=tmp_path / ".plait")
    assert scenes_file(home) == DEFAULT_FILE
    own = tmp_path / "serving" / "scenes.yaml"
    own.parent.mkdir()
    own.write_text("scenes: {home: {default_model: deepfm}}")
    assert scenes_file(home) == own


def test_wanted_are_the_models_of_scenes_and_experiments() -> None:
    snapshot: Any = SimpleNamespace(model_references=lambda: frozenset({"lightgbm", "deepfm:3"}))
    scenes = {"home": Scene(name="home", default_model="deepfm")}
    assert list(wanted_models(scenes, snapshot)) == ["deepfm", "deepfm:3", "lightgbm"]
