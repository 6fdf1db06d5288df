"""Impressions that should not teach a model: bots, odd sessions, users and items seen too rarely."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from plait.offline.spec import FilterSpec

if TYPE_CHECKING:
    import ibis.expr.types as ir


def filter_steps(table: ir.Table, spec: FilterSpec, label: str) -> Iterator[tuple[str, ir.Table]]:
    """One (what it did, table after it) per filter that is on, in a fixed order. `table` has the label columns."""
    if spec.scenes:
        table = table.filter(table.scene.isin(spec.scenes))
        yield f"scene in {', '.join(spec.scenes)}", table
    if spec.max_per_day is not None:
        table = without_busy_users(table, spec.max_per_day)
        yield f"users with at most {spec.max_per_day} impressions a day", table
    if spec.max_click_rate is not None:
        table = without_eager_users(table, label, spec.max_click_rate, spec.bot_min_impressions)
        yield f"users with a {label} rate of at most {spec.max_click_rate:g}", table
    if spec.min_session is not None or spec.max_session is not None:
        table = within_session_lengths(table, spec)
        yield f"sessions of {spec.min_session or 1} to {spec.max_session or 'any'} impressions", table
    if spec.min_user is not None:
        table = with_count(table, "user_id", spec.min_user)
        yield f"users with at least {spec.min_user} impressions", table
    if spec.min_item is not None:
        table = with_count(table, "item_id", spec.min_item)
        yield f"items with at least {spec.min_item} impressions", table


def without_busy_users(table: ir.Table, max_per_day: int) -> ir.Table:
    """Without users who saw more than `max_per_day` items on any one UTC day."""
    days = table.group_by("user_id", day=table.timestamp.date()).aggregate(n=table.count())
    return table.anti_join(days.filter(days.n > max_per_day).select("user_id").distinct(), "user_id")


def without_eager_users(table: ir.Table, label: str, max_rate: float, min_impressions: int) -> ir.Table:
    """Without users whose share of positives exceeds `max_rate`, once they have `min_impressions`."""
    users = table.group_by("user_id").aggregate(n=table.count(), hits=table[label].cast("int64").sum())
    eager = users.filter(users.n >= min_impressions, users.hits > users.n.cast("float64") * max_rate)
    return table.anti_join(eager.select("user_id"), "user_id")


def with_session(table: ir.Table, gap: timedelta) -> ir.Table:
    """`table` plus `session`: 0, 1, … per user; a new one begins after more than `gap` without an impression."""
    import ibis

    by_time = ibis.window(group_by="user_id", order_by="timestamp")
    table = table.mutate(before=table.timestamp.lag().over(by_time))
    limit = ibis.interval(microseconds=gap // timedelta(microseconds=1))
    table = table.mutate(begins=ibis.ifelse(table.timestamp > table.before + limit, 1, 0).fill_null(0))
    # A range frame: impressions of one instant are peers and share their session.
    running = ibis.window(group_by="user_id", order_by="timestamp", range=(None, 0))
    return table.mutate(session=table.begins.sum().over(running)).drop("before", "begins")


def within_session_lengths(table: ir.Table, spec: FilterSpec) -> ir.Table:
    """Only impressions of sessions within [min_session, max_session] impressions."""
    import ibis

    table = with_session(table, spec.session_gap)
    table = table.mutate(length=table.count().over(ibis.window(group_by=["user_id", "session"])))
    if spec.min_session is not None:
        table = table.filter(table.length >= spec.min_session)
    if spec.max_session is not None:
        table = table.filter(table.length <= spec.max_session)
    return table.drop("session", "length")


def with_count(table: ir.Table, key: str, least: int) -> ir.Table:
    """Only rows whose `key` has at least `least` rows."""
    counts = table.group_by(key).aggregate(n=table.count())
    return table.semi_join(counts.filter(counts.n >= least), key)
