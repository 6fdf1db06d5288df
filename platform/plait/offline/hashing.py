"""Seeded draws that are equal in DuckDB, in Spark and in numpy: lowbias32 in plain 64-bit arithmetic.

Engines' own hash and random functions differ from each other and between releases; this one is an interface.
Source: Chris Wellons, hash-prospector, the two-round function [16 21f0aaad 15 d35a2d97 15].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import ibis.expr.types as ir

MASK = (1 << 32) - 1
_ROUNDS = ((16, 0x21F0AAAD), (15, 0xD35A2D97))
_LAST_SHIFT = 15
_FOLD = 0x1E3779B1  # odd, below 2**31: spreads a key's upper half over its lower


def with_draw(table: ir.Table, name: str, keys: Sequence[str], *, seed: int) -> ir.Table:
    """`table` plus the int64 column `name` in [0, 2**32): a uniform draw fixed by the int64 `keys` and `seed`."""
    import ibis

    table = table.mutate(**{name: ibis.literal(_start(seed), type="int64")})
    for key in keys:
        x = table[key].cast("int64")
        folded = (x & MASK) ^ ((((x >> 32) & MASK) * _FOLD) & MASK)
        table = table.mutate(**{name: table[name] ^ folded})
        # One select a round: inlined into one expression, the formula would double with every step.
        for shift, factor in _ROUNDS:
            h = table[name] ^ (table[name] >> shift)
            # h * factor stays below 2**63 only for factors below 2**31; the top bit is added apart.
            product = h * (factor & 0x7FFFFFFF)
            if factor >> 31:
                product = product + ((h & 1) << 31)
            table = table.mutate(**{name: product & MASK})
        table = table.mutate(**{name: table[name] ^ (table[name] >> _LAST_SHIFT)})
    return table


def _start(seed: int) -> int:
    """The seed, scattered: xored as it is into small keys, seed 2 would only permute the draws of seed 1."""
    h = (seed + 0x9E3779B9) & MASK
    for by, factor in _ROUNDS:
        h ^= h >> by
        h = (h * factor) & MASK
    return h ^ (h >> _LAST_SHIFT)


def draw(keys: Sequence[np.ndarray], *, seed: int) -> np.ndarray:
    """The same draws in numpy: int64 keys of one length -> int64 in [0, 2**32).

    >>> draw([np.array([1, 2])], seed=7).tolist()
    [2802144199, 901285624]
    """
    h = np.full(len(keys[0]), _start(seed), dtype=np.uint64)
    for key in keys:
        bits = key.astype(np.int64).view(np.uint64)
        low, high = bits & np.uint64(MASK), bits >> np.uint64(32)
        h = h ^ low ^ ((high * np.uint64(_FOLD)) & np.uint64(MASK))
        for by, factor in _ROUNDS:
            h ^= h >> np.uint64(by)
            h = (h * np.uint64(factor)) & np.uint64(MASK)
        h ^= h >> np.uint64(_LAST_SHIFT)
    return h.astype(np.int64)
