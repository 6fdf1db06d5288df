"""The default feature repository, as Feast reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.aggregates import spec_of
from plait.aggregates.discover import declared_aggregates
from plait.errors import UnknownNameError
from plait.settings import Home

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(project=ROOT, root=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def contents(home):
    import os

    from feast.repo_operations import parse_repo

    before = Path.cwd()
    os.chdir(ROOT)
    try:
        yield parse_repo(ROOT)
    finally:
        os.chdir(before)


def test_feast_finds_the_declared_views_and_one_service_per_model(contents):
    views = {view.name for view in contents.feature_views}
    assert views == {"user_profile", "user_stats", "user_history", "user_genre_stats", "movie_profile", "movie_stats"}
    assert {view.name for view in contents.on_demand_feature_views} == {"request_context"}
    services = {service.name for service in contents.feature_services}
    assert services == {"click_deepfm", "click_lightgbm", "click_xgboost", "click_logistic"}


def test_feature_names_are_unique_across_a_service_and_in_declared_order(contents):
    for service in contents.feature_services:
        names = [field.name for view in service.feature_view_projections for field in view.features]
        assert len(names) == len(set(names)) and len(names) > 30
        assert names.index("user_ratings_1d") < names.index("user_ratings_7d") < names.index("user_ratings_all")
        assert "user_last_event_at" not in names and "days_since_last_event" in names


def test_a_view_carries_its_declaration_for_whoever_holds_the_registry(contents):
    from feast import FeatureView

    found = [view for view in contents.feature_views if spec_of(view) is not None]
    assert len(found) == 4
    for view in found:
        read_back = FeatureView.from_proto(view.to_proto())
        assert spec_of(read_back) == spec_of(view)
        assert [field.name for field in read_back.features] == spec_of(view).columns


def test_aggregates_are_found_by_name_with_a_suggestion_for_a_wrong_one(home):
    found = {spec.name for spec in declared_aggregates(home)}
    assert found == {"user_stats", "user_history", "user_genre_stats", "movie_stats"}
    assert [spec.name for spec in declared_aggregates(home, ["movie_stats"])] == ["movie_stats"]
    with pytest.raises(UnknownNameError, match="did you mean 'user_stats'"):
        declared_aggregates(home, ["user_stat"])


def test_values_that_became_known_later_are_hidden_from_training(home):
    from plait.service import open_store
    from plait.stores.offline import created_cutoff

    assert created_cutoff(open_store(home).config)


def test_feasts_own_commands_run_on_plaits_stores_and_engine(home):
    from plait.service import open_store
    from plait.stores.engine import ColumnarComputeEngine
    from plait.stores.offline import AsofDuckDBOfflineStore
    from plait.stores.provider import ColumnarProvider
    from plait.stores.sqlite import PackedSQLiteOnlineStore

    provider = open_store(home)._get_provider()
    assert type(provider) is ColumnarProvider
    assert type(provider.batch_engine) is ColumnarComputeEngine
    assert type(provider.offline_store) is AsofDuckDBOfflineStore
    assert type(provider.online_store) is PackedSQLiteOnlineStore
