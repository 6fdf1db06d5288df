"""Sample weights: inverse propensity (clipped), or inverse examination probability by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.offline.engine import Engine
from plait.offline.spec import WeightSpec

if TYPE_CHECKING:
    import ibis.expr.types as ir


def with_weights(engine: Engine, table: ir.Table, spec: WeightSpec, label: str) -> ir.Table:
    """`table` plus the float32 column `weight`; with `normalise` its mean over the training split is 1.

    table: `position` int32 (1 = top), `propensity` double, both may be null, and `split`.
    """
    import ibis

    one = ibis.literal(1.0, type="float64")
    clip = ibis.literal(float(spec.clip), type="float64")
    if spec.kind == "none":
        return table.mutate(weight=one.cast("float32"))
    if spec.kind == "propensity":
        known = table.propensity.notnull() & (table.propensity > 0)
        raw = ibis.ifelse(known, ibis.least(one / ibis.ifelse(known, table.propensity, one), clip), one)
    else:
        shown = (table[label] == 1) & table.position.notnull() & (table.position >= 1)
        place = ibis.ifelse(shown, table.position, 1).cast("float64")
        raw = ibis.ifelse(shown, ibis.least(place**spec.eta, clip), one)
    table = table.mutate(raw_weight=raw)
    mean = 1.0
    if spec.normalise:
        train = table.filter(table.split == "train")
        # Engines add floats in different orders; six digits make the mean the same number.
        mean = float(f"{float(train.raw_weight.mean().execute() or 1.0):.6g}")
    return table.mutate(weight=(table.raw_weight / mean).cast("float32")).drop("raw_weight")
