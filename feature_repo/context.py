"""On-demand feature views: computed from the request and stored features, by the functions in transforms.py."""

from feast import Field
from feast.types import Float64, Int64

from feature_repo.sources import request
from feature_repo.transforms import request_context as compute_request_context
from feature_repo.users import user_stats
from plait.transforms import on_demand_view

request_context = on_demand_view(
    name="request_context",
    sources=[user_stats[["user_last_event_at"]], request],
    schema=[
        Field(name="hour", dtype=Int64),
        Field(name="weekday", dtype=Int64),
        Field(name="days_since_last_event", dtype=Float64),
    ],
    function=compute_request_context,
    description="When the request comes, and how long after the user's last event",
)
