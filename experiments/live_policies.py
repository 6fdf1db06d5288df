"""The bandits' policies that a running process serves: followed like the configuration, last good kept.

One query a second while the configuration has bandits, none otherwise. A policy that cannot be read, or does not fit
the configuration, changes nothing: the one that served goes on serving, and `error` says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.policy import compile_policy
from experiments.policy_store import PolicyStore
from experiments.snapshot import Snapshot
from plait.errors import PlaitError
from plait.files import write_atomically

logger = logging.getLogger("experiments")


class LivePolicies:
    """`stored`: experiment → (version, document) of the last good policies. on_poll gets "adopted" or "failed"."""

    def __init__(
        self, store: PolicyStore, last_good: Path | None, on_poll: Callable[[str], None] | None = None
    ) -> None:
        self._store, self._last_good, self._on_poll = store, last_good, on_poll
        self._keys: dict[str, tuple[int, str]] = {}
        self.stored: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self.error: str | None = None

    def poll(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the newest policies: the same object if nothing changed. Never raises."""
        if not snapshot.bandits:
            return snapshot
        complaints, changed = [], False
        try:
            for name, version, digest in self._store.keys(snapshot.bandits):
                if self._keys.get(name) == (version, digest):
                    continue
                try:
                    found = self._store.get(name, version)
                    if found is None:  # deleted since
                        continue
                    compile_policy(snapshot.spec.experiments[name], version, found.document)
                except PlaitError as error:
                    complaints.append(str(error))
                    continue
                self.stored[name], self._keys[name] = (version, found.document), (version, digest)
                changed = True
        except Exception as error:  # the store is away: what served goes on serving
            complaints.append(str(error))
        self._tell("; ".join(complaints) or None)
        if not changed:
            return snapshot
        self._save()
        if self._on_poll is not None:
            self._on_poll("adopted")
        return snapshot.with_policies(self.stored)

    def from_disk(self) -> None:
        """Begin with the policies that were kept on disk, where the store has not told any."""
        if self._last_good is None or not self._last_good.exists():
            return
        try:
            saved = json.loads(self._last_good.read_bytes())
            read = {str(name): (int(version), dict(document)) for name, (version, document) in saved.items()}
        except Exception as error:  # damaged in whatever way: the weights serve
            logger.error("experiments: %s cannot be used: %r", self._last_good, error)
            return
        self.stored = {**read, **self.stored}

    def _tell(self, error: str | None) -> None:
        if error is not None and self._on_poll is not None:
            self._on_poll("failed")
        if error is not None and error != self.error:  # once, not every second
            logger.error("experiments: the bandits' policies stay as they are: %s", error)
        self.error = error

    def _save(self) -> None:
        if self._last_good is not None:
            try:
                write_atomically(self._last_good, json.dumps(self.stored, ensure_ascii=False).encode())
            except OSError as error:
                logger.warning("experiments: the last good policies could not be kept on disk: %s", error)
