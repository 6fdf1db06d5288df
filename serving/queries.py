"""What comes over HTTP, checked once at the edge and turned into frozen values; inside nobody looks at JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from plait.errors import RequestError, did_you_mean
from serving.scenes import Scene

INT64_MAX = 2**63 - 1
MAX_EVENTS = 1000
MAX_ID_CHARS = 200
# A clock that runs a little ahead is forgiven; a feature computed from the future would not be.
MAX_AHEAD = timedelta(minutes=10)
_EVENT_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_PREDICT_FIELDS = (
    "scene",
    "entities",
    "session_id",
    "device_id",
    "candidates",
    "candidate_ids",
    "context",
    "top_k",
    "model",
)
_EVENT_FIELDS = (
    "event_id",
    "type",
    "request_id",
    "user_id",
    "session_id",
    "device_id",
    "item_id",
    "timestamp",
    "value",
)
MICROSECOND = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictQuery:
    """One ranking question. item_ids: distinct, in the order they first came. session_id, device_id: where known."""

    scene: Scene
    user_id: int
    session_id: str | None
    device_id: str | None
    item_ids: tuple[int, ...]
    context: Mapping[str, Any]
    top_k: int
    model: str | None
    had_duplicates: bool

    @classmethod
    def from_json(cls, body: Any, scenes: Mapping[str, Scene]) -> PredictQuery:
        """Raises RequestError: 404 for an unknown scene, 413 for too many candidates, else 422 with a JSON pointer."""
        body = _object(body, "", "the body")
        _no_strangers(body, _PREDICT_FIELDS, "")
        scene = _scene(body, scenes)
        entities = _object(body.get("entities"), "/entities", "entities", missing='{"user_id": 42}')
        _no_strangers(entities, ("user_id",), "/entities")
        if "user_id" not in entities:
            raise _wrong("/entities/user_id", "entities must carry user_id, a whole number; it is missing")
        user_id = _int64(entities["user_id"], "/entities/user_id", "user_id")
        item_ids = _candidates(body, scene)
        context = body.get("context")
        context = {} if context is None else _object(context, "/context", "context")
        top_k = body.get("top_k")
        top_k = scene.top_k if top_k is None else _count(top_k, "/top_k", "top_k")
        model = body.get("model")
        if model is not None and (not isinstance(model, str) or not model):
            raise _wrong("/model", f'model must be a name such as "deepfm" or "deepfm:3", not {_show(model)}')
        distinct = tuple(dict.fromkeys(item_ids))
        return cls(
            scene=scene,
            user_id=user_id,
            session_id=_optional_text(body, "session_id", ""),
            device_id=_optional_text(body, "device_id", ""),
            item_ids=distinct,
            context=context,
            top_k=top_k,
            model=model,
            had_duplicates=len(distinct) < len(item_ids),
        )


def parse_events(body: Any, *, now: datetime) -> tuple[list[dict[str, Any]], int]:
    """(feedback records, how many were the same event_id again) of {"events": […]}; all are right or none is taken.

    An event without a timestamp happened `now`. Raises RequestError 413 or 422, the latter with the first 20 faults.
    """
    body = _object(body, "", "the body")
    _no_strangers(body, ("events",), "")
    events = body.get("events")
    if not isinstance(events, list):
        raise _wrong("/events", f"events must be a list of objects, not {_show(events)}")
    if not events:
        raise _wrong("/events", "events is empty; send at least one event")
    if len(events) > MAX_EVENTS:
        raise RequestError(413, "Too many events", f"{len(events)} events came; at most {MAX_EVENTS} fit one request")
    records: dict[str, dict[str, Any]] = {}
    faults: list[dict[str, str]] = []
    for i, event in enumerate(events):
        try:
            record = _event(event, f"/events/{i}", now)
        except RequestError as error:
            faults.append({"pointer": str(error.extra["pointer"]), "detail": error.detail})
        else:
            records.setdefault(record["event_id"], record)
    if faults:
        first = faults[0]
        raise RequestError(
            422,
            "Invalid request",
            f"{len(faults)} of {len(events)} events are wrong, so none was taken; the first: {first['detail']}",
            pointer=first["pointer"],
            errors=faults[:20],
        )
    return list(records.values()), len(events) - len(records)


def _event(event: Any, at: str, now: datetime) -> dict[str, Any]:
    event = _object(event, at, "an event")
    _no_strangers(event, _EVENT_FIELDS, at)
    event_id = _text(event.get("event_id"), f"{at}/event_id", "event_id")
    kind = _text(event.get("type"), f"{at}/type", "type")
    if not _EVENT_TYPE.match(kind):
        raise _wrong(f"{at}/type", f'type must be a lower-case word such as "click", not {_show(kind)}')
    if "user_id" not in event:
        raise _wrong(f"{at}/user_id", "an event must carry user_id, a whole number; it is missing")
    item_id, value = event.get("item_id"), event.get("value")
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise _wrong(f"{at}/value", f"value must be a finite number or null, not {_show(value)}")
    return {
        "event_id": event_id,
        "type": kind,
        "request_id": _optional_text(event, "request_id", at),
        "user_id": _int64(event["user_id"], f"{at}/user_id", "user_id"),
        "session_id": _optional_text(event, "session_id", at),
        "device_id": _optional_text(event, "device_id", at),
        "item_id": None if item_id is None else _int64(item_id, f"{at}/item_id", "item_id"),
        "timestamp": _microseconds(event.get("timestamp"), f"{at}/timestamp", now),
        "value": None if value is None else float(value),
        "created": microseconds(now),
    }


def microseconds(at: datetime) -> int:
    """Whole microseconds since 1970, exactly (a float of seconds would round)."""
    return (at - EPOCH) // MICROSECOND


def _microseconds(value: Any, at: str, now: datetime) -> int:
    if value is None:
        return microseconds(now)
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise _wrong(at, f"timestamp {_show(value)} is not a time such as 1998-04-22T23:10:38Z") from None
        if moment.tzinfo is None:
            raise _wrong(at, f"timestamp {value} names no zone; write Z for UTC")
        result = microseconds(moment)
    else:
        result = _int64(value, at, "timestamp", kind="an RFC 3339 string or whole microseconds since 1970")
    if result < 0 or result > microseconds(now + MAX_AHEAD):
        raise _wrong(at, f"timestamp {value} is not between 1970 and ten minutes from the server's now, {now:%FT%TZ}")
    return result


def _scene(body: Mapping[str, Any], scenes: Mapping[str, Scene]) -> Scene:
    name = body.get("scene")
    if not isinstance(name, str):
        was = "it is missing" if name is None else f"{_show(name)} came"
        raise _wrong("/scene", f"scene must be the name of a scene ({', '.join(sorted(scenes))}); {was}")
    if name not in scenes:
        raise RequestError(
            404, "Unknown scene", f"no scene {_show(name)}; {did_you_mean(name, scenes)}", pointer="#/scene"
        )
    return scenes[name]


def _candidates(body: Mapping[str, Any], scene: Scene) -> list[int]:
    rows, ids = body.get("candidates"), body.get("candidate_ids")
    if (rows is None) == (ids is None):
        were = "both came" if rows is not None else "neither came"
        raise _wrong("/candidates", f"send either candidates or candidate_ids; {were}")
    where = "candidates" if ids is None else "candidate_ids"
    given = rows if ids is None else ids
    if not isinstance(given, list):
        raise _wrong(f"/{where}", f"{where} must be a list, not {_show(given)}")
    if not given:
        raise _wrong(f"/{where}", f"{where} is empty; there is nothing to rank")
    if len(given) > scene.max_candidates:
        raise RequestError(
            413,
            "Too many candidates",
            f"{len(given)} candidates came; scene {scene.name} takes at most {scene.max_candidates}: "
            "send the best of them, or raise max_candidates in scenes.yaml",
            pointer=f"#/{where}",
        )
    if ids is not None:
        return [_int64(item, f"/candidate_ids/{i}", "a candidate id") for i, item in enumerate(given)]
    item_ids: list[int] = []
    for i, row in enumerate(given):
        row = _object(row, f"/candidates/{i}", "a candidate", missing='{"item_id": 1}')
        if "item_id" not in row:
            raise _wrong(f"/candidates/{i}/item_id", f"candidate {i} carries no item_id")
        item_ids.append(_int64(row["item_id"], f"/candidates/{i}/item_id", "item_id"))
    return item_ids


def _object(value: Any, at: str, what: str, *, missing: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hint = f", such as {missing}" if missing else ""
    was = "it is missing" if value is None else f"{_show(value)} came"
    raise _wrong(at, f"{what} must be a JSON object{hint}; {was}")


def _no_strangers(body: Mapping[str, Any], allowed: Sequence[str], at: str) -> None:
    for name in body:
        if name not in allowed:
            raise _wrong(f"{at}/{name}", f"unknown field {_show(name)}; {did_you_mean(name, allowed)}")


def _int64(value: Any, at: str, what: str, *, kind: str = "a whole number") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(at, f"{what} must be {kind}, not {_show(value)}")
    if not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise _wrong(at, f"{what} {value} does not fit 64 bits")
    return value


def _count(value: Any, at: str, what: str) -> int:
    number = _int64(value, at, what)
    if number < 1:
        raise _wrong(at, f"{what} must be at least 1, not {number}")
    return number


def _text(value: Any, at: str, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID_CHARS:
        came = f"one of {len(value)}" if isinstance(value, str) and value else _show(value)
        raise _wrong(at, f"{what} must be a string of 1 to {MAX_ID_CHARS} characters, not {came}")
    return value


def _optional_text(body: Mapping[str, Any], name: str, at: str) -> str | None:
    """The field's text; None where it is absent or null."""
    value = body.get(name)
    return None if value is None else _text(value, f"{at}/{name}", name)


def _wrong(at: str, detail: str) -> RequestError:
    return RequestError(422, "Invalid request", detail, pointer=f"#{at}")


def _show(value: Any) -> str:
    """A value as it would stand in JSON, cut short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
