"""What is known about a movie: the catalogue entry, and how it is rated."""

from feast import FeatureView, Field
from feast.types import Array, Int64, String

from feature_repo.entities import movie
from feature_repo.sources import movies, ratings
from plait.aggregates import Count, Mean, Rate, aggregate_view

movie_profile = FeatureView(
    name="movie_profile",
    entities=[movie],
    schema=[
        Field(name="release_year", dtype=Int64),
        Field(name="genres", dtype=Array(String)),
        Field(name="primary_genre", dtype=String),
    ],
    source=movies,
    description="The catalogue entry",
)

# Cadence "day": a movie's numbers move slowly, and a row a day keeps the table small.
movie_stats = aggregate_view(
    name="movie_stats",
    entities=[movie],
    events=ratings,
    windows=["1d", "7d", "30d", "all"],
    cadence="day",
    features=[
        Count("movie_ratings"),
        Mean("movie_rating_mean", of="value"),
        Rate("movie_positive_rate", where="value >= 4", prior=0.55, strength=5),
    ],
    description="How much and how well the movie is rated",
)
