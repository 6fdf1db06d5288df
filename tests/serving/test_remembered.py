"""What models' names mean outlives the registry's database, over a restart, for as long as it is away and no longer."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from plait.database import open_database
from plait.errors import RegistryError, SettingsError, StoreError
from plait.models import ModelRegistry
from plait.settings import Home
from serving.launcher import check_ready_to_serve
from serving.remembered import RememberedRegistry, remembered_file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("PLAIT_DATABASE_URL", f"sqlite:///{tmp_path}/elsewhere.db")
    home = Home(project=tmp_path, root=tmp_path / ".plait")
    (tmp_path / "feature_store.yaml").write_text("registry: {registry_type: sql, path: postgresql://elsewhere}\n")
    registry = ModelRegistry(home)
    registry.names()
    engine = open_database(home)
    with engine.begin() as db:
        for version in (1, 2):
            values = f"('deepfm', {version}, '2026-03-01 00:00:00.000000', '{{}}')"
            db.exec_driver_sql(f"INSERT INTO model_versions (name, version, created, manifest) VALUES {values}")
    engine.dispose()
    registry.promote("deepfm", "1")
    return home


def take_away(home: Home) -> None:
    (home.project / "elsewhere.db").rename(home.project / "aside.db")
    (home.project / "elsewhere.db").mkdir()


def bring_back(home: Home) -> None:
    (home.project / "elsewhere.db").rmdir()
    (home.project / "aside.db").rename(home.project / "elsewhere.db")


def open_registry(home: Home) -> RememberedRegistry:
    return RememberedRegistry(ModelRegistry(home), remembered_file(home))


def test_a_name_means_what_it_meant_while_the_database_is_gone(home):
    registry, other = open_registry(home), open_registry(home)
    assert registry.resolve("deepfm").version == "1"
    assert other.resolve("deepfm:2").version == "2"
    registry.close()
    other.close()
    take_away(home)
    again = open_registry(home)  # as after a restart; it knows what both workers asked for
    for one in (registry, again):
        found = one.resolve("deepfm")
        assert (found.name, found.version, found.path) == ("deepfm", "1", home.models / "deepfm" / "1")
    assert again.resolve("deepfm:2").version == "2"
    with pytest.raises(StoreError, match="the model registry does not answer"):
        again.resolve("lightgbm")
    with pytest.raises(StoreError, match="the model registry does not answer"):
        again.names()
    bring_back(home)
    again.promote("deepfm", "2", "champion", author="anna")
    assert again.resolve("deepfm").version == "2"
    assert registry.resolve("deepfm").version == "2"
    with pytest.raises(RegistryError):
        again.resolve("lightgbm")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"deepfm": 1}'])
def test_a_damaged_memory_is_no_memory(home, text):
    remembered_file(home).write_text(text)
    assert open_registry(home).resolve("deepfm").version == "1"


def test_a_server_starts_without_its_database_only_if_it_served_before(home):
    check_ready_to_serve(home)
    take_away(home)
    with pytest.raises(StoreError, match="does not answer"):
        check_ready_to_serve(home)
    bring_back(home)
    open_registry(home).resolve("deepfm")
    take_away(home)
    check_ready_to_serve(home)


def test_an_empty_database_is_named_without_its_password(home, monkeypatch):
    engine = open_database(home)
    with engine.begin() as db:
        db.execute(sa.text("DELETE FROM model_versions"))
    engine.dispose()
    with pytest.raises(SettingsError, match=r"no model is registered in .*elsewhere\.db; run `plait train"):
        check_ready_to_serve(home)
