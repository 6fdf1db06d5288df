"""Train, validation, test: by global time, by each user's time, leave one out, or by user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.offline.engine import Engine
from plait.offline.hashing import with_draw
from plait.offline.spec import SplitSpec

if TYPE_CHECKING:
    import ibis.expr.types as ir

PARTS = ("train", "valid", "test")


def with_split(engine: Engine, table: ir.Table, spec: SplitSpec, *, seed: int) -> ir.Table:
    """`table` plus the string column `split`. Rows of one request always land in the same part."""
    if spec.kind == "time":
        return _by_time(engine, table, spec)
    if spec.kind == "user_time":
        return _by_user_time(table, spec)
    if spec.kind == "leave_one_out":
        return _leave_one_out(table)
    return _by_user(table, spec, seed)


def _by_time(engine: Engine, table: ir.Table, spec: SplitSpec) -> ir.Table:
    """The cuts are moments, so rows of one instant stay together; shares are met up to such ties."""
    import ibis

    n = engine.count(table)
    ordered = table.select("timestamp").order_by("timestamp")
    cuts = []
    for share in (spec.train, spec.train + spec.valid):
        at = round(n * share)
        cuts.append(engine.to_arrow(ordered.limit(1, offset=at)).column("timestamp")[0].as_py() if at < n else None)
    valid_from, test_from = (None if cut is None else ibis.literal(cut, type=table.timestamp.type()) for cut in cuts)
    moment = table.timestamp
    in_test = ibis.literal(False) if test_from is None else moment >= test_from
    in_valid = ibis.literal(False) if valid_from is None else moment >= valid_from
    return table.mutate(split=_parts(in_valid, in_test))


def _by_user_time(table: ir.Table, spec: SplitSpec) -> ir.Table:
    """Of each user's n rows in time order, those before row train * n train, and so on; equal times go together."""
    import ibis

    by_user = ibis.window(group_by="user_id")
    # rank() counts the rows strictly before, so all rows of an instant get the same number.
    before = ibis.rank().over(ibis.window(group_by="user_id", order_by="timestamp"))
    table = table.mutate(rows_before=before.cast("float64"), rows_of_user=table.count().over(by_user).cast("float64"))
    in_valid = table.rows_before >= table.rows_of_user * spec.train
    in_test = table.rows_before >= table.rows_of_user * (spec.train + spec.valid)
    return table.mutate(split=_parts(in_valid, in_test)).drop("rows_before", "rows_of_user")


def _leave_one_out(table: ir.Table) -> ir.Table:
    """A user's last request is test, the one before valid; users with fewer than three requests only train."""
    import ibis

    back = ibis.dense_rank().over(
        ibis.window(group_by="user_id", order_by=[table.timestamp.desc(), table.request_id.desc()])
    )
    table = table.mutate(back=back)
    table = table.mutate(furthest=table.back.max().over(ibis.window(group_by="user_id")))
    enough = table.furthest >= 2
    return table.mutate(split=_parts((table.back <= 1) & enough, (table.back == 0) & enough)).drop("back", "furthest")


def _by_user(table: ir.Table, spec: SplitSpec, seed: int) -> ir.Table:
    table = with_draw(table, "draw", ["user_id"], seed=seed)
    valid_from, test_from = (round(share * (1 << 32)) for share in (spec.train, spec.train + spec.valid))
    return table.mutate(split=_parts(table.draw >= valid_from, table.draw >= test_from)).drop("draw")


def _parts(in_valid: ir.BooleanValue, in_test: ir.BooleanValue) -> ir.StringValue:
    import ibis

    return ibis.cases((in_test, "test"), (in_valid, "valid"), else_="train")
