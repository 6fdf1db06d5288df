"""The configuration a running process serves: one immutable snapshot, swapped whole, last good kept.

A thread asks the store every `poll_s` for its newest version. A version that cannot be read or compiled, or a store
that does not answer, changes nothing: what served goes on serving, and `error` and the counters say so. Each snapshot
that was adopted is also written to disk, and at start it is the same rule: store, else last good on disk, else the
project's own files, else defaults. The bandits' policies are part of the snapshot and follow by the same thread.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.live_policies import LivePolicies
from experiments.policy_store import PolicyStore
from experiments.snapshot import Snapshot
from plait.errors import PlaitError, SpecError
from plait.files import write_atomically

if TYPE_CHECKING:
    from experiments.store import ConfigStore

logger = logging.getLogger("experiments")


@dataclass(slots=True)
class ReloadCounts:
    """How polls ended, for metrics."""

    unchanged: int = 0
    adopted: int = 0
    failed: int = 0


class LiveConfig:
    """`snapshot` is always usable. `source` tells where it came from: store, disk, files or defaults."""

    def __init__(
        self,
        store: ConfigStore,
        *,
        poll_s: float = 1.0,
        last_good: Path | None = None,
        on_change: Callable[[Snapshot], None] | None = None,
        on_policies: Callable[[str], None] | None = None,
    ) -> None:
        self._store, self._poll_s, self._on_change = store, poll_s, on_change
        home = store.home
        self._last_good = last_good or (home.root / "experiments" / "last-good.json" if home else None)
        self._sticky = store.sticky()
        kept = self._last_good.with_name("last-good-policies.json") if self._last_good else None
        self.policies = LivePolicies(PolicyStore(store.engine), kept, on_policies)
        self._key: tuple[int, str] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.counts = ReloadCounts()
        self.error: str | None = None
        self.source = "defaults"
        self.snapshot = Snapshot.empty()
        if not self.poll() or self._key is None:
            snapshot, self.source = self._fallback()
            self.policies.from_disk()
            self.snapshot = self.policies.poll(snapshot.with_policies(self.policies.stored))

    def start(self) -> LiveConfig:
        """Follow the store from a thread until close(). Call it after a fork, not before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="plait-experiments", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._sticky.flush()

    def __enter__(self) -> LiveConfig:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def poll(self) -> bool:
        """Adopt the store's newest version if it is another one. False, and `error` set, if that failed."""
        with self._lock:
            try:
                key = self._store.head_key()
                if key == self._key:  # compared for difference, not order: a restored backup may count lower
                    self.counts.unchanged += 1
                else:
                    self._adopt(key)
            except Exception as error:  # whatever is wrong with the new one, the old one serves
                self.counts.failed += 1
                if str(error) != self.error:  # once, not every second
                    logger.error("experiments: version %s goes on serving: %s", self.snapshot.version, error)
                self.error = str(error)
                self._store.engine.dispose()  # an open connection would hold on to a file that was replaced
                return False
            self.error = None
            self.snapshot = self.policies.poll(self.snapshot)
            return True

    def _adopt(self, key: tuple[int, str] | None) -> None:
        head = self._store.head() if key else None
        if head is None:  # the table was emptied; what serves goes on serving
            raise SpecError("the store holds no version any more")
        self._sticky.flush(timeout_s=1.0)  # arms given under the old weights are stored before the new ones count
        snapshot = Snapshot.of(head.document, version=head.version, sticky=self._sticky)
        self._sticky.forget_others(_running(self.snapshot) & _running(snapshot))
        self.policies.poll(snapshot)  # first, so that a bandit never serves its weights between two swaps
        snapshot = snapshot.with_policies(self.policies.stored)
        self.snapshot, self.source, self._key = snapshot, "store", (head.version, head.digest)
        self.counts.adopted += 1
        logger.info("experiments: version %d by %s is live", head.version, head.author)
        if self._last_good is not None:
            saved = {"version": head.version, "digest": head.digest, "document": head.document}
            try:
                write_atomically(self._last_good, json.dumps(saved, ensure_ascii=False).encode())
            except OSError as error:
                logger.warning("experiments: the last good configuration could not be kept on disk: %s", error)
        if self._on_change is not None:
            self._on_change(snapshot)

    def _fallback(self) -> tuple[Snapshot, str]:
        if self._last_good is not None and self._last_good.exists():
            try:
                saved = json.loads(self._last_good.read_bytes())
                return Snapshot.of(saved["document"], version=int(saved["version"]), sticky=self._sticky), "disk"
            except Exception as error:  # damaged in whatever way: the next source is asked
                logger.error("experiments: %s cannot be used: %r", self._last_good, error)
        for folder in self._folders():
            try:
                return Snapshot.from_folder(folder), "files"
            except PlaitError as error:
                logger.error("experiments: %s cannot be used: %s", folder, error)
        return Snapshot.empty(), "defaults"

    def _folders(self) -> list[Path]:
        """The project's own declaration, and the one Plait ships."""
        folders = [self._store.home.project / "experiments"] if self._store.home else []
        shipped = Path(__file__).parent
        return [folder for folder in dict.fromkeys([*folders, shipped]) if any(folder.glob("*.yaml"))]

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_s):  # waits by the monotonic clock
            try:
                self.poll()
            except Exception:
                logger.exception("experiments: poll failed; version %s goes on serving", self.snapshot.version)


def _running(snapshot: Snapshot) -> set[str]:
    """Names of what is neither stopped nor, by the wall's clock, over."""
    now = datetime.now(UTC)
    experiments = snapshot.spec.experiments.values()
    return {each.name for each in experiments if each.state != "stopped" and (each.end is None or now < each.end)}
