"""What is known about a user: the profile, how they rate, what they rated last, and which genres they like."""

from feast import FeatureView, Field
from feast.types import Int64, String

from feature_repo.entities import genre, user
from feature_repo.sources import ratings, ratings_by_genre, users
from plait.aggregates import Count, LastN, LastTime, Mean, Rate, aggregate_view

user_profile = FeatureView(
    name="user_profile",
    entities=[user],
    schema=[
        Field(name="age", dtype=Int64),
        Field(name="gender", dtype=String),
        Field(name="occupation", dtype=String),
        Field(name="zip_area", dtype=String),
    ],
    source=users,
    description="Who the user said they are",
)

# Cadence "event": a MovieLens user rates for an hour or two and then is gone; daily tiles would never see them.
user_stats = aggregate_view(
    name="user_stats",
    entities=[user],
    events=ratings,
    windows=["1d", "7d", "30d", "all"],
    cadence="event",
    features=[
        Count("user_ratings"),
        Mean("user_rating_mean", of="value"),
        Rate("user_positive_rate", where="value >= 4", prior=0.55, strength=5),
        LastTime("user_last_event_at"),
    ],
    description="How much and how generously the user rates",
)

user_history = aggregate_view(
    name="user_history",
    entities=[user],
    events=ratings,
    cadence="event",
    features=[LastN("user_last_movies", of="item_id", n=50)],
    description="The last 50 movies the user rated, oldest first",
)

user_genre_stats = aggregate_view(
    name="user_genre_stats",
    entities=[user, genre],
    events=ratings_by_genre,
    windows=["30d", "all"],
    cadence="event",
    features=[
        Count("user_genre_ratings"),
        Mean("user_genre_rating_mean", of="value"),
        Rate("user_genre_positive_rate", where="value >= 4", prior=0.55, strength=5),
    ],
    description="How the user rates movies of a genre; the genre is the candidate's primary one",
)
