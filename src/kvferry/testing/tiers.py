"""Tiers for tests: in memory, slow, or broken on purpose. Use them as models of a `Tier`, or to try your own store.

All can be named in a configuration:
`{"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers", "block_s": 5}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from kvferry.clock import Clock, SystemClock
from kvferry.errors import ConfigError, TierCorrupt, TierError, TierUnavailable
from kvferry.offloading.store.tier import ResetReceipt, TierJob, TierResult, TierStats
from kvferry.types import Namespace, StoreKey

__all__ = ["BlockingTier", "FailingTier", "MemoryTier"]


class MemoryTier:
    """The smallest whole tier: a dict. Moves bytes only when polled, so that a buffer given away too early shows."""

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.chunks: dict[StoreKey, tuple[bytes, bytes]] = {}  # key -> payload, digest; tests may look and meddle
        self.is_closed = False
        self._stores: list[TierJob] = []
        self._loads: list[TierJob] = []
        self._lost: list[TierResult] = []
        self._corrupt: list[StoreKey] = []
        self._num_corrupt = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> MemoryTier:
        """Takes the settings of the constructor."""
        try:
            return cls(**config)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}") from error

    def contains(self, keys: Sequence[StoreKey]) -> list[bool]:
        """What the dict says."""
        return [key in self.chunks and not self.is_closed for key in keys]

    def keys(self) -> list[StoreKey]:
        """The dict's."""
        return [] if self.is_closed else list(self.chunks)

    def check_fits(self, payload_bytes: int) -> None:
        """Everything does."""

    def submit_store(self, job: TierJob) -> None:
        """Done at the next `poll`."""
        self._check_open()
        self._stores.append(job)

    def submit_load(self, job: TierJob) -> None:
        """Done at the next `poll`."""
        self._check_open()
        self._loads.append(job)

    def poll(self) -> list[TierResult]:
        """Do all that is due."""
        results, self._lost = self._lost, []
        for jobs, action in ((self._loads, self._load), (self._stores, self._store)):
            for job in [job for job in jobs if self._is_due(job)]:
                jobs.remove(job)
                try:
                    digest = action(job)
                except TierError as error:
                    results.append(TierResult(job.job_id, job.key, False, None, error, 0, 0.0))
                else:
                    results.append(TierResult(job.job_id, job.key, True, digest, None, len(job.buffer), 0.0))
        return results

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """Nothing is ever evicted."""

    def remove(self, keys: Sequence[StoreKey]) -> None:
        """Out of the dict; stores of them under way fail."""
        for key in keys:
            self.chunks.pop(key, None)
        self._lose([job for job in self._stores if job.key in keys], "removed while it was stored")

    def clear(self) -> ResetReceipt:
        """`remove` of everything."""
        receipt = ResetReceipt(self.name, len(self.chunks), sum(len(payload) for payload, _ in self.chunks.values()))
        self.remove([*self.chunks, *(job.key for job in self._stores)])
        return receipt

    def take_lost(self) -> list[tuple[StoreKey, str]]:
        """What turned out to be corrupt."""
        lost, self._corrupt = self._corrupt, []
        return [(key, "corrupt") for key in lost]

    def stats(self) -> TierStats:
        """A snapshot."""
        used_bytes = sum(len(payload) for payload, _ in self.chunks.values())
        num_queued = len(self._stores) + len(self._loads)
        return TierStats(len(self.keys()), used_bytes, None, num_queued, num_corrupt=self._num_corrupt)

    def check_integrity(self) -> None:
        """No job twice."""
        job_ids = [job.job_id for job in (*self._stores, *self._loads)]
        assert len(job_ids) == len(set(job_ids))

    def drain(self, timeout_s: float) -> bool:
        """True: all that is due will be done by the next `poll`. Does not wait for what is not due."""
        return all(self._is_due(job) for job in (*self._stores, *self._loads))

    def close(self) -> None:
        """Give up what is under way."""
        self.is_closed = True
        self._lose([*self._stores, *self._loads], "the tier was closed")

    def _is_due(self, job: TierJob) -> bool:
        return True

    def _store(self, job: TierJob) -> bytes | None:
        payload = bytes(job.buffer)
        if xxhash.xxh3_128_digest(payload) != job.digest:
            raise TierCorrupt(f"chunk {job.key.hex()}: the bytes do not match their digest")
        self.chunks[job.key] = (payload, job.digest)
        return job.digest

    def _load(self, job: TierJob) -> bytes | None:
        if job.key not in self.chunks:
            raise TierUnavailable(f"chunk {job.key.hex()} is not there")
        payload, digest = self.chunks[job.key]
        if len(payload) != len(job.buffer):
            raise TierUnavailable(f"chunk {job.key.hex()} has {len(payload)} bytes, not {len(job.buffer)}")
        job.buffer[:] = payload
        if xxhash.xxh3_128_digest(job.buffer) != digest:
            del self.chunks[job.key]
            self._note_corrupt(job.key)
            raise TierCorrupt(f"chunk {job.key.hex()}: the bytes do not match their digest")
        return digest

    def _note_corrupt(self, key: StoreKey) -> None:
        self._corrupt.append(key)
        self._num_corrupt += 1

    def _lose(self, jobs: list[TierJob], why: str) -> None:
        for job in jobs:
            (self._stores if job in self._stores else self._loads).remove(job)
            self._lost.append(TierResult(job.job_id, job.key, False, None, TierUnavailable(why), 0, 0.0))

    def _check_open(self) -> None:
        if self.is_closed:
            raise TierUnavailable("the tier is closed")


class BlockingTier(MemoryTier):
    """Every job takes `block_s` seconds of `clock`, or until `release` is called. No call waits for that."""

    def __init__(self, name: str = "blocking", block_s: float = float("inf"), clock: Clock | None = None) -> None:
        super().__init__(name)
        self._block_s = block_s
        self._clock = clock if clock is not None else SystemClock()
        self._due_s: dict[int, float] = {}
        self._is_released = False

    def release(self) -> None:
        """Let everything through, now and from now on."""
        self._is_released = True

    def submit_store(self, job: TierJob) -> None:
        """Due in `block_s`."""
        super().submit_store(job)
        self._due_s[job.job_id] = self._clock.now() + self._block_s

    def submit_load(self, job: TierJob) -> None:
        """Due in `block_s`."""
        super().submit_load(job)
        self._due_s[job.job_id] = self._clock.now() + self._block_s

    def _is_due(self, job: TierJob) -> bool:
        return self._is_released or self._clock.now() >= self._due_s[job.job_id]


class FailingTier(MemoryTier):
    """Fails on demand. `store_error`, `load_error`: results. `submit_error`: raised by both submits."""

    def __init__(
        self,
        name: str = "failing",
        *,
        store_error: TierError | None = None,
        load_error: TierError | None = None,
        submit_error: TierError | None = None,
    ) -> None:
        super().__init__(name)
        self.store_error = store_error
        self.load_error = load_error
        self.submit_error = submit_error

    def submit_store(self, job: TierJob) -> None:
        """Raises `submit_error`, if there is one."""
        if self.submit_error is not None:
            raise self.submit_error
        super().submit_store(job)

    def submit_load(self, job: TierJob) -> None:
        """Raises `submit_error`, if there is one."""
        if self.submit_error is not None:
            raise self.submit_error
        super().submit_load(job)

    def _store(self, job: TierJob) -> bytes | None:
        if self.store_error is not None:
            raise self.store_error
        return super()._store(job)

    def _load(self, job: TierJob) -> bytes | None:
        if self.load_error is not None:
            if isinstance(self.load_error, TierCorrupt):
                self.chunks.pop(job.key, None)
                self._note_corrupt(job.key)
            raise self.load_error
        return super()._load(job)
