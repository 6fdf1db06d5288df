"""What each model reads: one feature service per model, so that a model can change its features alone."""

from feast import FeatureService

from feature_repo.context import request_context
from feature_repo.movies import movie_profile, movie_stats
from feature_repo.users import user_genre_stats, user_history, user_profile, user_stats

_windowed_user = [
    f"{name}_{w}"
    for name in ("user_ratings", "user_rating_mean", "user_positive_rate")
    for w in ("1d", "7d", "30d", "all")
]
_features = [
    user_profile,
    # Not user_last_event_at: a date is no feature, request_context turns it into a distance.
    user_stats[_windowed_user],
    user_history,
    movie_profile,
    movie_stats,
    user_genre_stats,
    request_context,
]
# user_genre_stats is keyed by (user_id, genre); the genre of a row is its movie's primary one.
_tags = {"plait.derived_keys": "genre=movie_profile:primary_genre"}

click_deepfm = FeatureService(name="click_deepfm", features=_features, tags=_tags)
click_lightgbm = FeatureService(name="click_lightgbm", features=_features, tags=_tags)
click_xgboost = FeatureService(name="click_xgboost", features=_features, tags=_tags)
click_logistic = FeatureService(name="click_logistic", features=_features, tags=_tags)
