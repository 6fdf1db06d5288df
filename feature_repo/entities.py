"""What features are about: a user, a movie, and a genre (with a user: what one user thinks of one genre)."""

from feast import Entity, ValueType

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64, description="Someone who rates")
movie = Entity(name="movie", join_keys=["item_id"], value_type=ValueType.INT64, description="Something to be shown")
genre = Entity(name="genre", join_keys=["genre"], value_type=ValueType.STRING, description="A movie's genre")
