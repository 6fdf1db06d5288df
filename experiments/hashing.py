"""Where a unit falls: pure functions of a salt and an id, equal in every process, machine and release.

hash(parts) = murmur3_x86_32, seed 0, over the length-prefixed UTF-8 parts, so that ("ab", "c") and ("a", "bc") differ:
    bucket of a layer       parts (layer salt, unit)                 mod 10,000
    arm of an experiment    parts ("arm", experiment salt, unit)     mod 10,000
    arm of a bandit         the same, of the unit or the request     / 2^32, a point in [0, 1)
    group, global holdout   parts ("group" | "holdout", salt, unit)  mod 10,000
The pinned answers in the tests are an interface: changing one moves every user of every running experiment.
murmur3 because FNV and crc32 make layers with similar names copies of each other (docs/experiments.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mmh3
import numpy as np
import numpy.typing as npt

N_BUCKETS = 10_000
MAX_UNIT_CHARS = 512
"""Longer ids are refused: an id that long is a mistake (a cookie jar, a token)."""

_C1, _C2, _M32 = 0xCC9E2D51, 0x1B873593, 0xFFFFFFFF


def prefixed(part: str) -> bytes:
    """UTF-8 with its length before it. A lone surrogate (broken UTF-16 from a client) is hashed, not refused."""
    data = part.encode("utf-8", "surrogatepass")
    return b"%d:%b" % (len(data), data)


def salt_prefix(*parts: str) -> bytes:
    """What comes before the unit in the hashed bytes; made once per layer or experiment."""
    return b"".join(prefixed(part) for part in parts)


def bucket(salt: str, unit: str) -> int:
    """Bucket of `unit` in the layer with this salt, in [0, 10,000).

    >>> bucket("rank", "42")
    3031
    """
    return mmh3.mmh3_32_uintdigest(salt_prefix(salt) + prefixed(unit)) % N_BUCKETS


def arm_bucket(experiment_salt: str, unit: str) -> int:
    """Where `unit` falls among the arms of an experiment, in [0, 10,000); independent of its layer bucket."""
    return mmh3.mmh3_32_uintdigest(salt_prefix("arm", experiment_salt) + prefixed(unit)) % N_BUCKETS


def refusal(unit: object) -> str | None:
    """Why `unit` cannot be assigned, as a code for a metric's label; None if it can."""
    if unit is None:
        return "unit_null"
    if not isinstance(unit, str):
        return "unit_not_string"
    if not unit:
        return "unit_empty"
    if len(unit) > MAX_UNIT_CHARS:
        return "unit_too_long"
    return None


class UnitColumn:
    """Many ids, laid out once so that each further salt costs a few numpy operations.

    Rows whose id is refused hash to 0 and are False in `ok`. Ids are grouped by byte length; within a group the hashed
    bytes line up, so each 4-byte block is one uint32 vector.
    """

    def __init__(self, units: Sequence[object] | npt.NDArray[np.generic] | Iterable[object]) -> None:
        ids = units.tolist() if isinstance(units, np.ndarray) else list(units)
        self.ids = ids
        self.reasons = {row: reason for row, unit in enumerate(ids) if (reason := refusal(unit)) is not None}
        self.ok = np.ones(len(ids), bool)
        self.ok[list(self.reasons)] = False
        by_length: dict[int, tuple[list[int], list[bytes]]] = {}
        for row, unit in enumerate(ids):
            if row in self.reasons:
                continue
            data = prefixed(unit)
            rows, blobs = by_length.setdefault(len(data), ([], []))
            rows.append(row)
            blobs.append(data)
        self._groups = [
            (np.array(rows), np.frombuffer(b"".join(blobs), np.uint8).reshape(len(rows), length).T.astype(np.uint32))
            for length, (rows, blobs) in by_length.items()
        ]
        self._words: dict[tuple[int, int], list[npt.NDArray[np.uint32]]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def buckets(self, prefix: bytes) -> npt.NDArray[np.int64]:
        """Buckets in [0, 10,000) under `salt_prefix(...)`, shape (n,)."""
        return self.hashes(prefix) % N_BUCKETS

    def hashes(self, prefix: bytes) -> npt.NDArray[np.int64]:
        """The 32 bits of the hash under `salt_prefix(...)`, shape (n,)."""
        out = np.zeros(len(self), np.int64)
        for group, (rows, _) in enumerate(self._groups):
            out[rows] = self._hash(group, prefix)
        return out

    def _hash(self, group: int, prefix: bytes) -> npt.NDArray[np.uint32]:
        """murmur3_x86_32 of prefix + id per id of a group; the prefix's whole blocks are hashed once, as ints."""
        _, bytes_LN = self._groups[group]
        whole, rest = divmod(len(prefix), 4)
        state = 0
        for i in range(whole):
            state = _mix_int(state, int.from_bytes(prefix[4 * i : 4 * i + 4], "little"))
        words = self._aligned_words(group, rest)
        head = int.from_bytes(prefix[4 * whole :], "little")
        total = len(prefix) + bytes_LN.shape[0]
        n_full = (rest + bytes_LN.shape[0]) // 4
        hashes = np.full(bytes_LN.shape[1], state, np.uint32)
        for i, word in enumerate(words):
            k = word | np.uint32(head) if i == 0 else word
            k = _scramble(k)
            hashes ^= k
            if i < n_full:  # the tail block is xored in without the rotation
                hashes = _rotate(hashes, 13) * np.uint32(5) + np.uint32(0xE6546B64)
        hashes ^= np.uint32(total)
        hashes ^= hashes >> np.uint32(16)
        hashes *= np.uint32(0x85EBCA6B)
        hashes ^= hashes >> np.uint32(13)
        hashes *= np.uint32(0xC2B2AE35)
        hashes ^= hashes >> np.uint32(16)
        return hashes

    def _aligned_words(self, group: int, offset: int) -> list[npt.NDArray[np.uint32]]:
        """The group's bytes as little-endian uint32 blocks when `offset` prefix bytes open the first block."""
        key = (group, offset)
        if key not in self._words:
            _, bytes_LN = self._groups[group]
            length, n = bytes_LN.shape
            words = [np.zeros(n, np.uint32) for _ in range(-(-(offset + length) // 4))]
            for i in range(length):
                words[(offset + i) // 4] |= bytes_LN[i] << np.uint32(8 * ((offset + i) % 4))
            self._words[key] = words
        return self._words[key]


def _rotate(x: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint32]:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _scramble(k: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    return _rotate(k * np.uint32(_C1), 15) * np.uint32(_C2)


def _mix_int(state: int, k: int) -> int:
    """One full block on plain ints: the same round as above, for the part that all ids share."""
    k = k * _C1 & _M32
    k = (k << 15 | k >> 17) & _M32
    state ^= k * _C2 & _M32
    state = (state << 13 | state >> 19) & _M32
    return (state * 5 + 0xE6546B64) & _M32
