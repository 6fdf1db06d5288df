"""The one source of "now".

A home that replays a historical data set (MovieLens ends in 1998) keeps an offset in clock.json, written by
`plait data prepare`; server, simulator, samples and materialization then agree on a present at which the held-out
part of the data is about to happen. Without that file the clock is the wall's.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from plait.errors import SettingsError
from plait.files import write_atomically
from plait.settings import Home


class Clock:
    """Wall time plus a fixed offset: monotone, and equal in every process of a home."""

    def __init__(self, offset: timedelta = timedelta(0)) -> None:
        self.offset = offset

    @classmethod
    def of(cls, home: Home) -> Clock:
        """The home's clock: replaying if clock.json says so, else the wall's."""
        if not home.clock_file.exists():
            return cls()
        try:
            offset_us = int(json.loads(home.clock_file.read_text())["offset_us"])
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{home.clock_file} is not a clock ({error}); delete it to use the wall clock, "
                "or run `plait data prepare` again"
            ) from error
        return cls(timedelta(microseconds=offset_us))

    def now(self) -> datetime:
        """Now, aware, in UTC."""
        return datetime.now(UTC) + self.offset

    @property
    def replaying(self) -> bool:
        return bool(self.offset)


def replay_from(home: Home, start: datetime) -> Clock:
    """Make the home's clock read `start` (aware) at this moment and run on from there."""
    offset = start - datetime.now(UTC)
    payload = {"offset_us": offset // timedelta(microseconds=1), "replay_from": start.isoformat()}
    write_atomically(home.clock_file, json.dumps(payload, indent=2).encode() + b"\n")
    return Clock(offset)
