"""The id and the W3C trace of each request: taken over when they come, made when they do not."""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}\Z")
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")


@dataclass(frozen=True, slots=True)
class Trace:
    """A place in a trace; `span_id` is this server's own."""

    trace_id: str
    span_id: str
    flags: str

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def request_id_from(header: str | None) -> str:
    """The caller's X-Request-Id if it is fit for logs (up to 128 plain characters), else a new one."""
    return header if header and _REQUEST_ID.match(header) else uuid.uuid4().hex


def trace_from(header: str | None) -> Trace:
    """A span below the caller's; a new trace if none, or a malformed one, came.

    Source: W3C Trace Context, 3.2; a later version's header is read as far as version 00 goes.
    """
    match = _TRACEPARENT.match(header.strip()) if header else None
    span_id = os.urandom(8).hex()
    if match is None or (match[1] == "00" and match[5]):
        return Trace(os.urandom(16).hex(), span_id, "00")
    return Trace(match[2], span_id, match[4])
