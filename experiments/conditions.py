"""Conditions on attributes: declared as a tree, compiled once into one function per tree.

    where:
      all:
        - {attribute: country, in: [SE, "NO"]}
        - any: [{attribute: age, at_least: 18}, {segment: staff}]
        - not: {attribute: app, version_less_than: "2.4.0"}

A leaf names one attribute (or a segment: a saved tree) and one operator of OPERATORS. A missing attribute, or one of
the wrong type, makes its leaf false; `not` is plain negation, so negate together with `exists: true` where that
matters. `true` never equals 1. A compiled condition never raises, whatever the attributes hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any

from experiments.patterns import MAX_VALUE, safe_pattern
from plait.errors import SpecError, UnknownNameError

Attributes = Mapping[str, Any]
Test = Callable[[Attributes], bool]
_NUMBER = (int, float)


@dataclass(frozen=True, slots=True)
class Condition:
    """A compiled tree: `test(attributes)`, the attributes it reads, and its text for people."""

    test: Test
    attributes: frozenset[str]
    text: str


def always() -> Condition:
    return Condition(lambda attributes: True, frozenset(), "everyone")


def compile_condition(
    tree: Mapping[str, Any], segments: Mapping[str, Mapping[str, Any]], *, _open: tuple[str, ...] = ()
) -> Condition:
    """The tree as a Condition. SpecError for an unknown segment or operator, a cycle, a value that cannot be tested."""
    if "all" in tree or "any" in tree:
        word = "all" if "all" in tree else "any"
        parts = [compile_condition(part, segments, _open=_open) for part in tree[word]]
        return _combine(word, parts)
    if "not" in tree:
        part = compile_condition(tree["not"], segments, _open=_open)
        test = part.test
        return Condition(lambda attributes: not test(attributes), part.attributes, f"not ({part.text})")
    if "segment" in tree:
        name = tree["segment"]
        if name in _open:
            raise SpecError(f"segments refer to one another in a cycle: {' → '.join((*_open, name))}")
        if name not in segments:
            raise UnknownNameError("segment", name, segments)
        part = compile_condition(segments[name], segments, _open=(*_open, name))
        return Condition(part.test, part.attributes, f"segment {name}")
    return _leaf(tree)


def _leaf(tree: Mapping[str, Any]) -> Condition:
    attribute = tree["attribute"]
    operators = [key for key in tree if key != "attribute"]
    if len(operators) != 1:
        raise SpecError(
            f"a condition on {attribute!r} needs exactly one operator, it has {len(operators)}: {operators}"
        )
    operator, value = operators[0], tree[operators[0]]
    if operator not in OPERATORS:
        raise UnknownNameError("operator", operator, OPERATORS)
    matches = OPERATORS[operator](value)
    if operator == "exists":
        wanted = bool(value)
        return Condition(
            lambda a: (a.get(attribute) is not None) is wanted, frozenset({attribute}), f"{attribute} exists: {wanted}"
        )
    text = f"{attribute} {operator.replace('_', ' ')} {value!r}"

    def test(attributes: Attributes) -> bool:
        try:
            got = attributes.get(attribute)
            return got is not None and matches(got)
        except Exception:  # a value of the wrong type, or one whose own comparison fails: it does not match
            return False

    return Condition(test, frozenset({attribute}), text)


def _combine(word: str, parts: list[Condition]) -> Condition:
    tests = tuple(part.test for part in parts)
    names = frozenset().union(*(part.attributes for part in parts))
    text = f"{word} of ({'; '.join(part.text for part in parts)})"
    if len(tests) == 1:
        return Condition(tests[0], names, parts[0].text)

    def all_of(attributes: Attributes) -> bool:
        for test in tests:  # a plain loop: all(generator) costs twice as much  # noqa: SIM110
            if not test(attributes):
                return False
        return True

    def any_of(attributes: Attributes) -> bool:
        for test in tests:  # noqa: SIM110
            if test(attributes):
                return True
        return False

    return Condition(all_of if word == "all" else any_of, names, text)


# -- operators: value in the configuration -> test of an attribute's value --------------------------------------


def _equals(value: Any) -> Callable[[Any], bool]:
    if isinstance(value, bool):
        return lambda got: got is value
    return lambda got: got == value and not isinstance(got, bool)


def _in(values: Any) -> Callable[[Any], bool]:
    allowed = frozenset(_list(values))
    if all(isinstance(value, str) for value in allowed):
        return lambda got: got in allowed
    typed = frozenset((isinstance(value, bool), value) for value in allowed)
    return lambda got: (isinstance(got, bool), got) in typed


def _negated(make: Callable[[Any], Callable[[Any], bool]]) -> Callable[[Any], Callable[[Any], bool]]:
    def negated(value: Any) -> Callable[[Any], bool]:
        matches = make(value)
        return lambda got: not matches(got)

    return negated


def _number(compare: Callable[[Any, Any], bool]) -> Callable[[Any], Callable[[Any], bool]]:
    def make(limit: Any) -> Callable[[Any], bool]:
        if isinstance(limit, bool) or not isinstance(limit, _NUMBER):
            raise SpecError(f"{limit!r} is not a number")
        return lambda got: isinstance(got, _NUMBER) and got is not True and got is not False and compare(got, limit)

    return make


def _between(limits: Any) -> Callable[[Any], bool]:
    if not isinstance(limits, list) or len(limits) != 2:
        raise SpecError(f"`between` takes two numbers, both included; got {limits!r}")
    low, high = _number(lambda a, b: a >= b)(limits[0]), _number(lambda a, b: a <= b)(limits[1])
    if limits[0] > limits[1]:
        raise SpecError(f"`between` {limits!r} holds nothing; the smaller number comes first")
    return lambda got: low(got) and high(got)


def _versions(compare: Callable[[Any, Any], bool]) -> Callable[[Any], Callable[[Any], bool]]:
    def make(value: Any) -> Callable[[Any], bool]:
        if not isinstance(value, str):
            raise SpecError(f"{value!r} is not a version; write it in quotes, so that 2.10 does not become 2.1")
        limit = version_key(value)
        if limit is None:
            raise SpecError(f'{value!r} is not a version such as "2.4.0" or "2.4.0-beta.1"')

        def matches(got: Any) -> bool:
            key = version_key(got) if isinstance(got, str) else None
            return key is not None and compare(key, limit)

        return matches

    return make


_VERSION = re.compile(r"v?(\d{1,9}(?:\.\d{1,9}){0,3})(?:-([0-9A-Za-z.-]{1,100}))?(?:\+[0-9A-Za-z.-]{1,100})?")


@lru_cache(maxsize=4096)
def version_key(text: str) -> tuple[Any, ...] | None:
    """Sort key by Semantic Versioning 2.0 precedence, lenient in length ("2.4" = "2.4.0"); None if it is no version.

    >>> version_key("1.0.0-rc.1") < version_key("1.0.0") < version_key("1.10")
    True
    """
    match = _VERSION.fullmatch(text) if len(text) <= MAX_VALUE else None
    if match is None:
        return None
    numbers = [int(part) for part in match[1].split(".")]
    numbers += [0] * (4 - len(numbers))
    if match[2] is None:
        return (*numbers, 1)
    # numeric identifiers are below alphanumeric ones, and compare as numbers
    return (
        *numbers,
        0,
        tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in match[2].split(".")),
    )


def _dates(compare: Callable[[Any, Any], bool]) -> Callable[[Any], Callable[[Any], bool]]:
    def make(value: Any) -> Callable[[Any], bool]:
        limit = moment(value)
        if limit is None:
            raise SpecError(f"{value!r} is not a date such as 2026-03-01 or 2026-03-01T08:00:00Z")

        def matches(got: Any) -> bool:
            when = moment(got)
            return when is not None and compare(when, limit)

        return matches

    return make


def moment(value: Any) -> datetime | None:
    """A date, datetime or ISO 8601 text as an aware datetime (UTC unless it says otherwise); None if it is none."""
    if isinstance(value, str):
        return _parse_moment(value) if len(value) <= 40 else None
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    return None


@lru_cache(maxsize=4096)
def _parse_moment(text: str) -> datetime | None:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _matches(value: Any) -> Callable[[Any], bool]:
    fullmatch = safe_pattern(_string(value)).fullmatch
    return lambda got: isinstance(got, str) and len(got) <= MAX_VALUE and fullmatch(got) is not None


def _starts_with(value: Any) -> Callable[[Any], bool]:
    start = _string(value)
    return lambda got: got.startswith(start) if isinstance(got, str) else False


def _ends_with(value: Any) -> Callable[[Any], bool]:
    end = _string(value)
    return lambda got: got.endswith(end) if isinstance(got, str) else False


def _contains(value: Any) -> Callable[[Any], bool]:
    """A substring of a text, or an element of a list."""
    if isinstance(value, str):
        return lambda got: value in got if isinstance(got, (str, list, tuple, set, frozenset)) else False
    return lambda got: value in got if isinstance(got, (list, tuple, set, frozenset)) else False


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value or not all(isinstance(v, (str, bool, *_NUMBER)) for v in value):
        raise SpecError(f"{value!r} must be a list of texts, numbers or booleans")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise SpecError(f"{value!r} must be a text")
    return value


OPERATORS: Mapping[str, Callable[[Any], Callable[[Any], bool]]] = {
    "exists": lambda value: lambda got: True,
    "equals": _equals,
    "not_equals": _negated(_equals),
    "in": _in,
    "not_in": _negated(_in),
    "less_than": _number(lambda got, limit: got < limit),
    "at_most": _number(lambda got, limit: got <= limit),
    "greater_than": _number(lambda got, limit: got > limit),
    "at_least": _number(lambda got, limit: got >= limit),
    "between": _between,
    "version_equals": _versions(lambda got, limit: got == limit),
    "version_less_than": _versions(lambda got, limit: got < limit),
    "version_at_most": _versions(lambda got, limit: got <= limit),
    "version_greater_than": _versions(lambda got, limit: got > limit),
    "version_at_least": _versions(lambda got, limit: got >= limit),
    "before": _dates(lambda got, limit: got < limit),
    "after": _dates(lambda got, limit: got >= limit),
    "matches": _matches,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "contains": _contains,
}
