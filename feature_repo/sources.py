"""Where features come from: events (for aggregates), tables of users and movies, and the request itself."""

from feast import Field, RequestSource
from feast.types import Int64

from plait.aggregates import feedback, home_path, table_source

ratings = feedback("rating")
ratings_by_genre = feedback("rating", genre="items.genres")

users = table_source("users_table", home_path("events", "users"))
movies = table_source("movies_table", home_path("events", "items"))

# The server fills it from the request's time, the training set from the sample's: whole unix seconds.
request = RequestSource(name="request", schema=[Field(name="request_timestamp", dtype=Int64)])
