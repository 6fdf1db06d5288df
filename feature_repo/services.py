"""What each model reads: one feature service per model, so that a model can change its features alone."""

from feast import FeatureService

from feature_repo.context import request_context
from feature_repo.movies import movie_profile, movie_stats
from feature_repo.users import user_genre_stats, user_history, user_profile, user_stats

_features = [
    user_profile,
    # All but the date of the last event: a date is no feature, request_context turns it into a distance. (A selection
    # is a view too: given a name of its own in this module, `feast apply` would find user_stats twice.)
    user_stats[[field.name for field in user_stats.features if field.name != "user_last_event_at"]],
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
