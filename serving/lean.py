"""Keeping a server process small: no torch, one thread per native library."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def go_lean() -> None:
    """Call before the first import of feast, numpy or pyarrow in a process that will serve.

    Feast imports torch where it finds it, for nothing that serving uses: 180 MB per worker. A None in sys.modules makes
    that import fail, which Feast expects. Requests are what runs in parallel here, so native threads would only fight.
    """
    for name in _THREAD_LIMITS:
        os.environ.setdefault(name, "1")
    if sys.modules.get("torch") is None:
        sys.modules["torch"] = None  # type: ignore[assignment]


def resident_bytes(pid: int | str = "self") -> int:
    """Resident size of a process, from /proc; 0 where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
