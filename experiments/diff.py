"""What changed between two configurations, one line per value: `+` added, `-` removed, `~` changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def diff_documents(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines such as `~ experiments.rank-trees.traffic: 10 → 25`; empty if both say the same.

    >>> diff_documents({"layers": {"a": {"unit": "user"}}}, {"layers": {"a": {"unit": "device"}}})
    ["~ layers.a.unit: 'user' → 'device'"]
    """
    sections = [key for key in [*old, *(key for key in new if key not in old)] if key != "enabled"]
    # a section that is not there holds nothing: its entries are listed one by one
    whole = ({key: document.get(key) or {} for key in sections} for document in (old, new))
    switches = ({"enabled": document.get("enabled", True)} for document in (old, new))
    return [*_walk("", *switches), *_walk("", *whole)]


def _walk(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in new:
                yield f"- {inner}: {_brief(old[key])}"
            elif key not in old:
                yield f"+ {inner}: {_brief(new[key])}"
            else:
                yield from _walk(inner, old[key], new[key])
    elif old != new or type(old) is not type(new):
        yield f"~ {path}: {old!r} → {new!r}"


def _brief(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else repr(value)
