"""The API keys a worker knows: all usable ones, read anew every second, kept on disk for when the database is gone.

A request is checked in memory and waits for nobody. A key that was revoked is refused, and a new one taken, at the
latest one poll after; expiry is checked at every request. If the database does not answer, the keys read last go on
working, after a restart too: whoever may not stop the predictions' database may not stop the predictions either.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.files import atomic_file
from plait.keys import ApiKey, KeyStore, read_token

logger = logging.getLogger("serving")


class KeyRing:
    """`find` gives the key of a token. `error`: why the keys could not be read the last time, or None."""

    def __init__(self, store: KeyStore, last_good: Path | None = None, *, poll_s: float = 1.0) -> None:
        self._store, self._last_good, self._poll_s = store, last_good, poll_s
        self._keys: Mapping[str, ApiKey] | None = None  # replaced whole; None: never read, neither here nor on disk
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        if not self.poll():
            self._keys = self._from_disk()

    @property
    def known(self) -> bool:
        """Whether any keys could be read at all, be it none."""
        return self._keys is not None

    def find(self, token: str) -> ApiKey | None:
        """The usable key that `token` is, or None."""
        read = read_token(token)
        key = (self._keys or {}).get(read[0]) if read else None
        if read is None or key is None or not hmac.compare_digest(key.hash, read[1]):
            return None
        return key if key.usable(datetime.now(UTC)) else None

    def poll(self) -> bool:
        """Read the keys anew. False, and `error` set, if that failed: the ones read before stay."""
        try:
            keys = {key.id: key for key in self._store.usable()}
        except PlaitError as error:
            if str(error) != self.error:
                logger.error("API keys: those read last stay: %s", error)
            self.error = str(error)
            return False
        if keys != self._keys:
            self._keys = keys
            self._to_disk(keys)
        self.error = None
        return True

    def start(self) -> KeyRing:
        """Follow the database from a thread until close(). Call it after a fork, not before."""
        self._thread = threading.Thread(target=self._follow, name="plait-keys", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._store.close()

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.poll()
            except Exception:
                logger.exception("API keys: poll failed; those read last stay")

    def _to_disk(self, keys: Mapping[str, ApiKey]) -> None:
        if self._last_good is None:
            return
        try:
            self._last_good.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._last_good) as aside:
                aside.touch(mode=0o600)
                aside.chmod(0o600)  # hashes only, but of nobody's business
                aside.write_text(json.dumps([asdict(key) for key in keys.values()], default=datetime.isoformat))
        except OSError as error:
            logger.warning("API keys could not be kept on disk: %s", error)

    def _from_disk(self) -> Mapping[str, ApiKey] | None:
        if self._last_good is None or not self._last_good.exists():
            return None
        try:
            found = [_key(record) for record in json.loads(self._last_good.read_bytes())]
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.error("API keys: %s cannot be used: %r", self._last_good, error)
            return None
        return {key.id: key for key in found}


def _key(record: dict[str, Any]) -> ApiKey:
    times = {name: datetime.fromisoformat(record[name]) if record[name] else None for name in ("expires", "revoked")}
    created = datetime.fromisoformat(record["created"])
    return ApiKey(**{**record, "scopes": tuple(record["scopes"]), "created": created, **times})
