"""Aggregates: windowed features declared in feature_repo, computed point in time into feature tables.

user_stats = aggregate_view(
    name="user_stats", entities=[user], events=feedback("rating"), windows=["7d", "all"],
    features=[Count("user_ratings"), Mean("user_rating_mean", of="value")],
)
"""

from plait.aggregates.declare import aggregate_view, spec_of
from plait.aggregates.feast_sources import home_path, table_source
from plait.aggregates.features import Count, DistinctCount, LastN, LastTime, Max, Mean, Min, Rate, Sum
from plait.aggregates.spec import AggregateSpec, EventSource, feedback, impressions

__all__ = [
    "AggregateSpec",
    "Count",
    "DistinctCount",
    "EventSource",
    "LastN",
    "LastTime",
    "Max",
    "Mean",
    "Min",
    "Rate",
    "Sum",
    "aggregate_view",
    "feedback",
    "home_path",
    "impressions",
    "spec_of",
    "table_source",
]
