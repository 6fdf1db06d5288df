"""Regular expressions that cannot stall a request.

Python's `re` backtracks: `(a+)+b` on 30 letters takes minutes. A pattern is accepted only if the number of ways to lay
it over a value of MAX_VALUE characters, a bound on the backtracking, is at most MAX_WAYS; look-around and
back-references are refused. Values longer than MAX_VALUE never match.
"""

from __future__ import annotations

import re
import re._constants as op  # type: ignore[import-not-found]  # no public way to see a parsed pattern
import re._parser as parser  # type: ignore[import-not-found]
from typing import Any

from plait.errors import SpecError

MAX_PATTERN, MAX_VALUE, MAX_WAYS = 200, 256, 200_000
_ATOMS = {op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT, op.CATEGORY}


def safe_pattern(pattern: str) -> re.Pattern[str]:
    """`pattern` compiled; it is meant for `fullmatch`. SpecError if it is wrong, too long or could run away.

    >>> bool(safe_pattern("Chrome/1[0-9]{2}[.].*").fullmatch("Chrome/120.0"))
    True
    """
    if len(pattern) > MAX_PATTERN:
        raise SpecError(f"the pattern has {len(pattern)} characters; at most {MAX_PATTERN} are allowed")
    try:
        compiled = re.compile(pattern)
        ways = _ways(parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise SpecError(f"{pattern!r} is not a regular expression: {error}") from error
    if ways > MAX_WAYS:
        raise SpecError(
            f"{pattern!r} could take too long ({'endlessly many' if ways == float('inf') else f'{ways:,.0f}'} ways to "
            f"match {MAX_VALUE} characters, {MAX_WAYS:,} allowed); use fewer of * + ?, none in another, or `contains`"
        )
    return compiled


def _ways(sequence: Any) -> float:
    """Upper bound on the ways to match the parsed `sequence` at one place."""
    total = 1.0
    for code, argument in sequence:
        total *= _ways_of(code, argument)
    return total


def _ways_of(code: Any, argument: Any) -> float:
    if code in _ATOMS:
        return 1
    if code is op.SUBPATTERN:
        return _ways(argument[3])
    if code is op.BRANCH:
        return sum(_ways(branch) for branch in argument[1])
    if code in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
        low, high, body = argument
        each, high = _ways(body), min(int(high), MAX_VALUE)
        if each == 1:
            return max(high - low + 1, 1)
        return min(sum(each**n for n in range(low, high + 1)), float("inf")) if high < 32 else float("inf")
    if code is op.ATOMIC_GROUP:
        return _ways(argument)
    raise SpecError("look-around, back-references and conditional groups are not allowed in a pattern")
