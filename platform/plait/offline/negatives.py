"""Rows with label 0: which of the unclicked impressions to keep, or which items to draw, for each positive.

A drawn negative is never an item its user ever gave a positive on, at any time and for any label, and never one that
did not exist yet at the positive's time. Draws are exact, not by rejection: the catalogue is laid on a line in the
order in which its items appeared, so that what existed at a time is the line's beginning; with the user's own
positives cut out of it, a uniform draw on what is left is mapped back over the cuts. So no positive gets fewer than
asked, however many items its user liked, as long as one other item existed. Draws are with replacement and fixed by
the seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.errors import DataError
from plait.offline.engine import Engine, stack
from plait.offline.hashing import with_draw
from plait.offline.spec import NegativeSpec

if TYPE_CHECKING:
    import ibis.expr.types as ir

# draw (32 bits) * total weight must stay inside 63 bits.
MAX_TOTAL_WEIGHT = 1 << 30
ALWAYS = -(1 << 52)  # the `since_us` of an item of which nobody knows when it appeared: before every event
_DAY_US = 86_400_000_000


def with_negatives(
    engine: Engine,
    table: ir.Table,
    own: ir.Table,
    items: ir.Table,
    spec: NegativeSpec,
    *,
    labels: tuple[str, ...],
    seed: int,
) -> ir.Table:
    """`table` with the negatives `spec` asks for, plus `origin` ("impression", or the kind drawn) and `slot`.

    table: labelled and split impressions. own: distinct (user_id, item_id) that must not be negatives of that user.
    items: what may be drawn, distinct item_id with `since_us`, the microsecond (int64, of 1970) of its first sign of
    life. Drawn rows take request, time, scene and split from their positive.
    """
    import ibis

    table = table.mutate(origin=ibis.literal("impression"), slot=ibis.literal(0, type="int64"))
    if spec.kind == "impressions":
        return table
    hit = _any_label(table, labels)
    positives = engine.keep(table.filter(hit))
    if engine.count(positives) == 0:
        raise DataError("no sample bears a label, so there is nothing to draw negatives for; see the counts above")
    unclicked = table.filter(~hit)
    if spec.kind == "hard":
        kept = _hard(engine, positives, unclicked.anti_join(own, ["user_id", "item_id"]), spec, seed)
        kept = kept.mutate(origin=ibis.literal("hard"))
        return stack(positives, kept)
    if spec.kind == "in_batch":
        drawn = _in_batch(engine, positives, own, items, spec, seed)
    else:
        drawn = _from_catalogue(engine, positives, own, items, spec, labels=labels, seed=seed)
    shaped = _as_rows(drawn, table, labels, spec.kind)
    base = table if spec.keep_impressions else positives
    return stack(base, shaped)


def _any_label(table: ir.Table, labels: tuple[str, ...]) -> ir.BooleanValue:
    hit = table[labels[0]] == 1
    for label in labels[1:]:
        hit = hit | (table[label] == 1)
    return hit


def _moment(engine: Engine, table: ir.Table) -> ir.Table:
    """The row's time as an int64 column to draw by."""
    return table.mutate(at_us=engine.micros(table.timestamp))


def _slots(positives: ir.Table, n: int) -> ir.Table:
    """Each positive n times, with `slot` 1 … n."""
    import ibis

    repeated = positives.mutate(slot=ibis.range(1, n + 1).unnest())
    return repeated.mutate(slot=repeated.slot.cast("int64"))


def _catalogue(engine: Engine, positives: ir.Table, items: ir.Table, spec: NegativeSpec, label: str) -> ir.Table:
    """item_id, weight >= 1, since_us and start: items laid end to end, in order of appearance, on [0, total weight)."""
    import ibis

    if spec.kind == "uniform":
        weighed = items.select("item_id", "since_us", weight=ibis.literal(1, type="int64"))
    else:
        # Popularity of the training positives only: what becomes popular later is not known yet.
        train = positives.filter(positives.split == "train", positives[label] == 1)
        counts = train.group_by("item_id").aggregate(n=train.count())
        counts = counts.mutate(raw=counts.n.cast("float64") ** spec.exponent)
        total = float(counts.raw.sum().execute() or 0.0)
        if not total > 0:
            raise DataError(f"popularity needs training positives of {label!r} and found none; use uniform negatives")
        scale = min(1e6, MAX_TOTAL_WEIGHT / total)
        weight = ibis.greatest((counts.raw * scale + 0.5).floor().cast("int64"), ibis.literal(1, type="int64"))
        weighed = counts.mutate(weight=weight).inner_join(items, "item_id").select("item_id", "since_us", "weight")
    up_to = weighed.weight.sum().over(ibis.window(order_by=["since_us", "item_id"], rows=(None, 0)))
    laid = weighed.mutate(start=(up_to - weighed.weight).cast("int64"))
    return engine.keep(laid.select("item_id", "since_us", "weight", "start"))


def _existing(catalogue: ir.Table, positives: ir.Table) -> ir.Table:
    """For each distinct `at_us` of the positives, `existing`: the weight of the catalogue that had appeared by then.

    Summed within days and over days, so that no engine has to sort all moments in one place.
    """
    import ibis

    moments = positives.select("at_us").distinct()
    moments = moments.select("at_us", weight=ibis.literal(0, type="int64"), asked=ibis.literal(1, type="int64"))
    appeared = catalogue.select(at_us="since_us", weight="weight", asked=ibis.literal(0, type="int64"))
    line = stack(moments, appeared)
    line = line.mutate(day=(line.at_us // _DAY_US).cast("int64"))
    of_day = line.weight.sum().over(ibis.window(group_by="day", order_by="at_us", range=(None, 0)))
    line = line.mutate(of_day=of_day)
    days = line.group_by("day").aggregate(weight=line.weight.sum())
    before = days.weight.sum().over(ibis.window(order_by="day", rows=(None, 0))) - days.weight
    days = days.mutate(before=before).select("day", "before")
    line = line.filter(line.asked == 1).inner_join(days, "day")
    return line.select("at_us", existing=(line.of_day + line.before).cast("int64"))


def _from_catalogue(
    engine: Engine,
    positives: ir.Table,
    own: ir.Table,
    items: ir.Table,
    spec: NegativeSpec,
    *,
    labels: tuple[str, ...],
    seed: int,
) -> ir.Table:
    import ibis

    catalogue = _catalogue(engine, positives, items, spec, labels[0])
    size = catalogue.aggregate(total=catalogue.weight.sum(), n=catalogue.count()).execute()
    total, n_items = int(size["total"][0] or 0), int(size["n"][0])
    if n_items == 0:
        raise DataError("the catalogue holds no item to draw negatives from; run `plait data prepare` again")

    cuts = own.inner_join(catalogue, "item_id").select("user_id", "start", "weight", "since_us")
    before = ibis.window(group_by="user_id", order_by="start", rows=(None, 0))
    cuts = cuts.mutate(up_to=cuts.weight.sum().over(before))
    cuts = engine.keep(cuts.mutate(place=(cuts.start - (cuts.up_to - cuts.weight)).cast("int64")))

    # What the user's own positives take away of what existed by then: their weights up to that moment.
    asked = _moment(engine, positives).drop("slot").mutate(cut=ibis.literal(0, type="int64"))
    own_marks = cuts.select(
        **{name: ibis.null(dtype) for name, dtype in asked.schema().items() if name not in ("user_id", "at_us", "cut")},
        user_id="user_id",
        at_us="since_us",
        cut="weight",
    )
    timed = stack(asked, own_marks)
    taken = timed.cut.sum().over(ibis.window(group_by="user_id", order_by="at_us", range=(None, 0)))
    timed = timed.mutate(taken=taken)
    timed = timed.filter(timed.request_id.notnull()).inner_join(_existing(catalogue, asked), "at_us")
    timed = engine.keep(timed.mutate(room=(timed.existing - timed.taken).cast("int64")))

    slots = with_draw(_slots(timed, spec.per_positive), "draw", _DRAW_KEYS, seed=seed)
    slots = slots.filter(slots.room > 0)
    slots = slots.mutate(place=(slots.draw * slots.room) >> 32)

    # One sorted pass per user: a draw at `place` skips every cut that lies at or before it. Cuts of what came later
    # lie at or beyond the draw's room, so none of them is skipped.
    draws = slots.select(*_ROW, "slot", "place", cut=ibis.literal(0, type="int64"))
    no_row = {name: ibis.null(draws[name].type()) for name in _ROW if name != "user_id"}
    marks = cuts.select("user_id", "place", **no_row, slot=ibis.literal(0, type="int64"), cut=cuts.weight)
    line = stack(draws, marks)
    skipped = line.cut.sum().over(ibis.window(group_by="user_id", order_by="place", range=(None, 0)))
    line = line.mutate(skipped=skipped)
    line = line.filter(line.slot > 0)
    line = line.mutate(at=(line.place + line.skipped).cast("int64"))

    # Find the item whose stretch holds `at`: by equal-width buckets, so that it is an equi-join in both engines.
    width = max(1, -(-total // n_items))
    shelves = catalogue.select(drawn="item_id", start="start", stop=catalogue.start + catalogue.weight)
    shelves = shelves.mutate(bucket=ibis.range(shelves.start // width, (shelves.stop - 1) // width + 1).unnest())
    shelves = shelves.mutate(bucket=shelves.bucket.cast("int64"))
    line = line.mutate(bucket=(line.at // width).cast("int64"))
    found = line.inner_join(shelves, "bucket")
    return found.filter(found.at >= found.start, found.at < found.stop).select(*_ROW, "slot", "drawn")


def _in_batch(
    engine: Engine, positives: ir.Table, own: ir.Table, items: ir.Table, spec: NegativeSpec, seed: int
) -> ir.Table:
    """Up to per_positive distinct items of other positives in the same random group (of `batch` on average)."""
    import ibis

    groups = max(1, -(-engine.count(positives) // spec.batch))
    grouped = with_draw(_moment(engine, positives), "group", _ROW_KEYS, seed=seed + 1)
    grouped = grouped.mutate(group=(grouped.group * groups) >> 32)
    grouped = engine.keep(grouped.select(*_ROW, "at_us", "group"))
    # Groups are made within a split: a test positive must not become a training negative.
    members = grouped.select("group", "split", drawn="item_id").distinct()
    members = members.inner_join(items.select(drawn="item_id", since_us="since_us"), "drawn")
    pairs = grouped.inner_join(members, ["group", "split"])
    pairs = pairs.filter(pairs.since_us <= pairs.at_us)
    pairs = pairs.anti_join(own, [pairs.user_id == own.user_id, pairs.drawn == own.item_id])
    pairs = with_draw(pairs, "draw", [*_ROW_KEYS, "drawn"], seed=seed + 2)
    order = ibis.window(group_by=["request_id", "item_id"], order_by=["draw", "drawn"])
    pairs = pairs.mutate(slot=(ibis.row_number().over(order) + 1).cast("int64"))
    return pairs.filter(pairs.slot <= spec.per_positive).select(*_ROW, "slot", "drawn")


def _hard(engine: Engine, positives: ir.Table, unclicked: ir.Table, spec: NegativeSpec, seed: int) -> ir.Table:
    """Unclicked impressions of the positives' own requests, each once; for requests without any, as many of the user's
    requests without positives. Should a request be of several users, each one's part of it is a request of its own."""
    import ibis

    k, request = spec.per_positive, ("request_id", "user_id", "split")
    ranked = with_draw(_moment(engine, unclicked), "draw", _ROW_KEYS, seed=seed)
    wanted = positives.group_by(*request).aggregate(wanted=positives.count() * k)
    beside = ranked.inner_join(wanted, request)
    order = ibis.window(group_by=request, order_by=["draw", "item_id"])
    beside = beside.mutate(rank=ibis.row_number().over(order))
    chosen = beside.filter(beside.rank < beside.wanted).select(*unclicked.columns)

    lonely = wanted.anti_join(unclicked.select(*request).distinct(), request)
    lonely = lonely.group_by("user_id", "split").aggregate(wanted=lonely.wanted.sum())
    elsewhere = ranked.anti_join(wanted.select(*request), request)
    elsewhere = elsewhere.inner_join(lonely, ["user_id", "split"])
    order = ibis.window(group_by=["user_id", "split"], order_by=["draw", "request_id", "item_id"])
    elsewhere = elsewhere.mutate(rank=ibis.row_number().over(order))
    return stack(chosen, elsewhere.filter(elsewhere.rank < elsewhere.wanted))


def _as_rows(drawn: ir.Table, like: ir.Table, labels: tuple[str, ...], kind: str) -> ir.Table:
    """Drawn items as rows with the columns of `like`: the positive's row with another item and no label."""
    import ibis

    columns = {}
    for name, dtype in like.schema().items():
        if name == "item_id":
            columns[name] = drawn.drawn
        elif name in labels:
            columns[name] = ibis.literal(0, type=dtype)
        elif name == "origin":
            columns[name] = ibis.literal(kind)
        elif name in drawn.columns:
            columns[name] = drawn[name]
        else:
            # Not shown, so without position, score or propensity.
            columns[name] = ibis.null(dtype)
    return drawn.select(**columns)


_ROW = ("request_id", "user_id", "item_id", "timestamp", "scene", "split", "label_mature")
_ROW_KEYS = ("user_id", "item_id", "at_us")
_DRAW_KEYS = (*_ROW_KEYS, "slot")
