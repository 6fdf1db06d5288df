"""Which impression did a feedback follow from? Impressions joined to feedback, and labels made of the pairs.

Expressions only. An impression is a row of the impressions table; feedback is credited to it if it happened within
[impression - skew, impression + window] and names it by request and item, or by user and item.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from plait.offline.spec import AttributionSpec, LabelSpec, SampleSpec

if TYPE_CHECKING:
    import ibis.expr.types as ir

KEY = ("request_id", "item_id")  # one impression


def first_of_each(table: ir.Table, keys: tuple[str, ...], order: tuple[str, ...]) -> ir.Table:
    """One row per distinct `keys`: the first by `order`, nulls last."""
    import ibis

    window = ibis.window(
        group_by=[table[key] for key in keys], order_by=[table[column].asc(nulls_first=False) for column in order]
    )
    numbered = table.mutate(row_of_key=ibis.row_number().over(window))
    return numbered.filter(numbered.row_of_key == 0).drop("row_of_key")


def attribute(impressions: ir.Table, feedback: ir.Table, spec: AttributionSpec, window: timedelta) -> ir.Table:
    """Credited pairs: request_id, item_id of the impression, type and value of the feedback, event_id.

    impressions: request_id, item_id, user_id, timestamp; one row per (request_id, item_id). feedback: event_id,
    type, request_id, user_id, item_id, timestamp, value; one row per event_id. A feedback credits at most one
    impression with touch "last" (equal times: the greatest request_id) and all in the window with "any".
    """
    import ibis

    pairs = _candidates(impressions, feedback, spec)
    # Strictly smaller steps would lose feedback at the impression's own instant (a rating is both at once).
    pairs = pairs.filter(
        pairs.timestamp >= pairs.shown_at - _interval(spec.skew),
        pairs.timestamp <= pairs.shown_at + _interval(window),
    )
    if spec.touch == "last":
        order = ibis.window(group_by=pairs.event_id, order_by=[pairs.shown_at.desc(), pairs.request_id.desc()])
        pairs = pairs.mutate(rank_of_touch=ibis.row_number().over(order))
        pairs = pairs.filter(pairs.rank_of_touch == 0)
    return pairs.select("request_id", "item_id", "event_id", "type", "value")


def _candidates(impressions: ir.Table, feedback: ir.Table, spec: AttributionSpec) -> ir.Table:
    """Every pair of a feedback and an impression it may follow from, at whatever distance in time."""
    import ibis

    shown = impressions.select("request_id", "item_id", "user_id", shown_at="timestamp")
    told = feedback.rename(feedback_request="request_id", feedback_user="user_id", feedback_item="item_id")
    told = told.select("event_id", "type", "value", "feedback_request", "feedback_user", "feedback_item", "timestamp")

    by_request = told.inner_join(
        shown, [told.feedback_request == shown.request_id, told.feedback_item == shown.item_id]
    )
    by_user = told.inner_join(shown, [told.feedback_user == shown.user_id, told.feedback_item == shown.item_id])
    if spec.join == "request":
        return by_request
    if spec.join == "user_item":
        return by_user
    # Feedback that names an impression we have belongs to that one alone, even if it comes too late for it.
    named = by_request.select("event_id").distinct()
    return ibis.union(by_request, by_user.anti_join(named, "event_id"))


def fates(impressions: ir.Table, feedback: ir.Table, spec: SampleSpec) -> ir.Table:
    """For each feedback of a label's type: event_id and whether it was `credited`, or came too `late` or too `early`.

    int8, 0 or 1, at most one of them 1; all 0 where there is no impression it could belong to.
    """
    import ibis

    one, zero = (ibis.literal(value, type="int8") for value in (1, 0))
    found = []
    for window in sorted({spec.window(label) for label in spec.labels}):
        types = {kind for label in spec.labels if spec.window(label) == window for kind in label.types}
        told = feedback.filter(feedback.type.isin(sorted(types)))
        pairs = _candidates(impressions, told, spec.attribution)
        early = pairs.timestamp < pairs.shown_at - _interval(spec.attribution.skew)
        late = pairs.timestamp > pairs.shown_at + _interval(window)
        pairs = pairs.select(
            "event_id", credited=ibis.ifelse(early | late, zero, one), late=ibis.ifelse(late, one, zero), matched=one
        )
        alone = told.select("event_id", credited=zero, late=zero, matched=zero)
        found.append(ibis.union(alone, pairs))
    table = ibis.union(*found) if len(found) > 1 else found[0]
    each = table.group_by("event_id").aggregate(
        credited=table.credited.max(), late=table.late.max(), matched=table.matched.max()
    )
    return each.select(
        "event_id",
        "credited",
        late=ibis.ifelse(each.credited == 1, zero, each.late),
        early=ibis.ifelse((each.credited == 1) | (each.late == 1), zero, each.matched),
    )


def label_values(pairs: ir.Table, label: LabelSpec) -> ir.Table:
    """Impressions (request_id, item_id) that bear the label, once each."""
    of_type = pairs.filter(pairs.type.isin(label.types))
    if label.min_value is None:
        return of_type.select(*KEY).distinct()
    if not label.total:
        return of_type.filter(of_type.value >= label.min_value).select(*KEY).distinct()
    sums = of_type.group_by(*KEY).aggregate(total=of_type.value.sum())
    return sums.filter(sums.total >= label.min_value).select(*KEY)


def label_impressions(impressions: ir.Table, feedback: ir.Table, spec: SampleSpec) -> ir.Table:
    """`impressions` plus one int8 column per label, 0 or 1."""
    import ibis

    table = impressions
    for label in spec.labels:
        told = feedback.filter(feedback.type.isin(label.types))
        pairs = attribute(impressions, told, spec.attribution, spec.window(label))
        bearing = label_values(pairs, label).mutate(bears=ibis.literal(1, type="int8"))
        bearing = bearing.rename(bearing_request="request_id", bearing_item="item_id")
        joined = table.left_join(
            bearing, [table.request_id == bearing.bearing_request, table.item_id == bearing.bearing_item]
        )
        table = joined.mutate(**{label.name: ibis.coalesce(joined.bears, ibis.literal(0, type="int8"))}).select(
            *table.columns, label.name
        )
    return table


def positives_by_user(feedback: ir.Table, labelled: ir.Table, label: LabelSpec) -> ir.Table:
    """Distinct (user_id, item_id) of every positive ever: attributed or not, in whichever part of the data.

    A drawn negative must not be one of these: a click that came a week late is still a like.
    """
    import ibis

    told = feedback.filter(feedback.type.isin(label.types), feedback.item_id.notnull())
    if label.min_value is not None and not label.total:
        told = told.filter(told.value >= label.min_value)
    seen = labelled.filter(labelled[label.name] == 1)
    return ibis.union(told.select("user_id", "item_id"), seen.select("user_id", "item_id"), distinct=True)


def _interval(duration: timedelta) -> ir.IntervalScalar:
    import ibis

    return ibis.interval(microseconds=duration // timedelta(microseconds=1))
