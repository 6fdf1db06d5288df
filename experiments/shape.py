"""The first check of a document: its shape, by the published JSON Schema, in words that help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from experiments.conditions import OPERATORS
from experiments.problems import Problems
from experiments.source import Path_
from plait.errors import did_you_mean

_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "number": "a number",
    "boolean": "true or false",
}
_COMBINATORS = ("all", "any", "not", "segment", "attribute")


def schema() -> dict[str, Any]:
    """The JSON Schema of a configuration (draft 2020-12): for editors, admin forms and other languages."""
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema())


def check_shape(document: Mapping[str, Any], problems: Problems) -> None:
    """Add a problem for everything in `document` that the schema refuses."""
    for error in sorted(_validator().iter_errors(document), key=lambda e: [str(part) for part in e.absolute_path]):
        path = tuple(error.absolute_path)
        if "where" in path or (path[:1] == ("segments",) and len(path) > 1):
            cut = path.index("where") + 1 if "where" in path else 2
            _check_condition(_at(document, path[:cut]), path[:cut], problems)
        elif error.validator == "additionalProperties" and isinstance(error.instance, Mapping):
            known = error.schema.get("properties", {})
            what = "key" if path else "section"
            for name in sorted(set(error.instance) - set(known)):
                problems.add((*path, name), f"no such {what}; {did_you_mean(name, known)}")
        else:
            problems.add(*_in_words(error, path))


def _at(document: Any, path: Path_) -> Any:
    for part in path:
        document = document[part]
    return document


def _in_words(error: Any, path: Path_) -> tuple[Path_, str]:
    got, rule, allowed = error.instance, error.validator, error.validator_value
    if rule == "required":
        return path, f"needs {', '.join(repr(key) for key in allowed if key not in got)}"
    if rule == "enum":
        return (
            path,
            f"{got!r} is not one of {', '.join(map(str, allowed))}; {did_you_mean(str(got), map(str, allowed))}",
        )
    if rule == "type":
        wanted = [allowed] if isinstance(allowed, str) else allowed
        return path, f"must be {' or '.join(_TYPES.get(t, t) for t in wanted)}, not {_brief(got)}"
    if rule == "oneOf" and "buckets" in str(error.schema.get("description", "")):
        return path, f'{_brief(got)} are not buckets; write "0-4999" (both ends included), a list of such, or all'
    if rule == "oneOf":
        return path, f"{_brief(got)} must be a text, a number, true, false, or a list of these"
    if rule == "pattern":
        return path, f"{_brief(got)} is not allowed here; it must match {allowed}"
    return path, error.message


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_condition(tree: Any, path: Path_, problems: Problems) -> None:
    """The rules of the schema's `condition`, saying which branch is wrong instead of "none of the five matched"."""
    before = len(problems.found)
    if any(problem.path[: len(path)] == path for problem in problems.found):
        return  # already told
    _walk_condition(tree, path, problems)
    if len(problems.found) == before:
        problems.add(path, "is not a condition; see the operators in docs/experiments.md")


def _walk_condition(tree: Any, path: Path_, problems: Problems) -> None:
    if not isinstance(tree, Mapping):
        problems.add(path, f"must be a mapping such as {{attribute: country, in: [SE]}}, not {_brief(tree)}")
        return
    words = [word for word in _COMBINATORS if word in tree]
    if len(words) != 1:
        had = f"both {' and '.join(words)}" if words else ", ".join(map(str, tree)) or "nothing"
        problems.add(path, f"needs exactly one of all, any, not, segment, attribute; it has {had}")
        return
    word = words[0]
    if word == "attribute":
        _walk_leaf(tree, path, problems)
        return
    for key in tree:
        if key != word:
            problems.add((*path, key), f"does not go together with {word!r}; nest it under `all`")
    if word == "not":
        _walk_condition(tree["not"], (*path, "not"), problems)
    elif word in ("all", "any"):
        if not isinstance(tree[word], list) or not tree[word]:
            problems.add((*path, word), "must be a list of conditions, at least one")
            return
        for i, part in enumerate(tree[word]):
            _walk_condition(part, (*path, word, i), problems)


def _walk_leaf(tree: Mapping[str, Any], path: Path_, problems: Problems) -> None:
    operators = [key for key in tree if key != "attribute"]
    for key in operators:
        if key not in OPERATORS:
            problems.add((*path, key), f"no operator {key!r}; {did_you_mean(key, OPERATORS)}")
    if len(operators) != 1:
        problems.add(path, f"a condition on {tree['attribute']!r} needs exactly one operator; use `all` for several")
        return
    for error in _leaf_validator().iter_errors(tree):
        inner = tuple(error.absolute_path)
        if "version" in operators[0] and error.validator == "type":
            problems.add(
                (*path, *inner), f"{_brief(error.instance)} must be in quotes, so that 2.10 does not become 2.1"
            )
        elif error.validator != "additionalProperties":
            problems.add(*_in_words(error, (*path, *inner)))


@cache
def _leaf_validator() -> jsonschema.Draft202012Validator:
    whole = schema()
    return jsonschema.Draft202012Validator({**whole["$defs"]["leaf"], "$defs": whole["$defs"]})
