"""Conditions on events, written as text: `value >= 4 and type != "like"`.

A small, closed language (Python's own syntax for names, numbers, strings, comparison, `in`, and / or / not), turned
into an ibis expression. A comparison with a missing value holds no more than its opposite does, as in SQL.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from plait.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    import ibis.expr.types as ir

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_GRAMMAR = (
    "write comparisons of columns with numbers or strings, joined by and, or, not: 'value >= 4 and type in (\"like\",)'"
)


def columns_of(condition: str | None) -> set[str]:
    """The column names a condition reads. Raises SpecError if it is not one."""
    if condition is None:
        return set()
    names: set[str] = set()
    _build(_parse(condition), _Names(names), condition)
    return names


def holds(condition: str, events: ir.Table) -> ir.BooleanValue:
    """True where the condition holds, else False (never null). Raises UnknownNameError for a column not there."""
    return _build(_parse(condition), events, condition).fill_null(False)


class _Anything:
    """Stands for a column when only the names matter: every operation on it gives it back."""

    def _same(self, *_: object) -> _Anything:
        return self

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _same  # type: ignore[assignment]
    __and__ = __or__ = __invert__ = isin = _same
    __hash__ = None  # type: ignore[assignment]


class _Names:
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def __getitem__(self, name: str) -> _Anything:
        self.names.add(name)
        return _Anything()


def _parse(condition: str) -> ast.expr:
    try:
        return ast.parse(condition, mode="eval").body
    except SyntaxError as error:
        raise SpecError(f"condition {condition!r} cannot be read ({error.msg}); {_GRAMMAR}") from error


def _build(node: ast.expr, events: Any, condition: str) -> Any:
    match node:
        case ast.BoolOp():
            parts = [_build(part, events, condition) for part in node.values]
            result = parts[0]
            for part in parts[1:]:
                result = result & part if isinstance(node.op, ast.And) else result | part
            return result
        case ast.UnaryOp(op=ast.Not()):
            return ~_build(node.operand, events, condition)
        case ast.Compare():
            left, result = node.left, None
            for op, right in zip(node.ops, node.comparators, strict=True):
                one = _compare(op, left, right, events, condition)
                result = one if result is None else result & one
                left = right
            return result
    raise SpecError(f"condition {condition!r}: {ast.unparse(node)!r} is no comparison; {_GRAMMAR}")


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, events: Any, condition: str) -> Any:
    column = _operand(left, events, condition)
    if isinstance(op, (ast.In, ast.NotIn)):
        if not isinstance(right, (ast.Tuple, ast.List, ast.Set)) or not isinstance(left, ast.Name):
            raise SpecError(f"condition {condition!r}: `in` needs a column before and a list of values after it")
        found = column.isin([_constant(value, condition) for value in right.elts])
        return found if isinstance(op, ast.In) else ~found
    if type(op) not in _COMPARE:
        raise SpecError(f"condition {condition!r}: {type(op).__name__!r} is not allowed; {_GRAMMAR}")
    if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
        raise SpecError(f"condition {condition!r} compares no column; {_GRAMMAR}")
    if isinstance(left, ast.Name):
        return _COMPARE[type(op)](column, _operand(right, events, condition))
    mirrored = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}.get(type(op), type(op))
    return _COMPARE[mirrored](_operand(right, events, condition), column)


def _operand(node: ast.expr, events: Any, condition: str) -> Any:
    if isinstance(node, ast.Name):
        known = getattr(events, "columns", None)
        if known is not None and node.id not in known:
            raise UnknownNameError("column", node.id, known, where=f"condition {condition!r}")
        return events[node.id]
    return None if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else _constant(node, condition)


def _constant(node: ast.expr, condition: str) -> int | float | str | bool:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if isinstance(inner, ast.Constant) and isinstance(inner.value, (int, float, str, bool)):
        value = inner.value
        if negative and not isinstance(value, str):
            return -value
        if not negative:
            return value
    raise SpecError(f"condition {condition!r}: {ast.unparse(node)!r} is neither a column nor a constant; {_GRAMMAR}")
