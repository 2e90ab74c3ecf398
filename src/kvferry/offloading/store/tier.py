"""The seam of the store: what a tier below the host arena must do. Disk, Redis, S3 ... are small `Tier`s.

    TieredStore (index, policy; scheduler thread) ──owns──> Arena (host memory)
         │ submit_store / submit_load (never wait)                ▲ job.buffer: bytes of one slot
         ▼                                                        │ read (store) or written (load)
       Tier ──owns──> threads, sockets, files ────────────────────┘
         │
         └── poll() -> TierResult, exactly one for every submitted job

Life cycle
    Constructed (may block: opens, locks, scans; raises ConfigError) -> used -> `drain` (may block) -> `close`.
    After `close`, `contains` says no, submits raise TierUnavailable, and `poll` still hands out the results of jobs
    submitted before: those the tier gave up end in TierUnavailable.

Threading
    All methods are called from one thread, the owner's. Only the constructor, `drain` and `close` may wait. A tier that
    does I/O has threads of its own; nothing of the caller's runs on them.

Buffers
    `job.buffer` is borrowed from submit until the job's result has been returned by `poll`. A store only reads it. A
    load writes it and may leave anything in it when it fails. A tier that cannot stop an operation does not report its
    end: it keeps the job (and the buffer) until the operation really is over.

Proof
    A store is given the digest of its bytes. Before the bytes leave the process the tier checks them, in its own
    thread, and answers TierCorrupt if they differ: then it is the host's copy that is bad, and nothing is written. A
    load returns the digest it has proved. `ok` on a store means durable against the death of this process.

Failure states
    store failed    the chunk is not in the tier, the tier is otherwise as before (but room may have been made for it)
    load failed     TierCorrupt: the chunk is no longer in the tier (`contains` is False), the bytes are kept aside for
                    inspection where that is cheap. TierUnavailable: it may still be there, and may be asked for again.
    submit raised   nothing has happened; no result will come. TierBusy: the same job may be submitted again later.
                    TierUnavailable: not worth trying again soon.

To write a tier: fill in `Tier` and a `from_config`, pass `kvferry.testing.TierChecks`, and name the class in an entry
point of the group `kvferry.tiers` (docs/guides/extending.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvferry.clock import Clock
from kvferry.errors import TierError
from kvferry.types import Namespace, StoreKey


@dataclass(slots=True)
class TierJob:
    """One chunk to move. `job_id` is the caller's and unique among jobs without a result."""

    job_id: int
    key: StoreKey
    buffer: memoryview  # uint8, as long as the payload; the tier's until the result is polled
    digest: bytes | None = None  # 16 bytes: given for a store, None for a load


@dataclass(slots=True)
class TierResult:
    """How one job ended. `error` is None exactly when `ok`."""

    job_id: int
    key: StoreKey
    ok: bool
    digest: bytes | None  # of the payload; a load's has been proved. None when not ok
    error: TierError | None
    payload_bytes: int
    seconds: float  # of work, without the time in the queue


@dataclass(frozen=True, slots=True)
class ResetReceipt:
    """What `clear` dropped. Bytes of chunks in use are given back when their users are done."""

    tier: str
    num_chunks: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier's own account. Counters run since it was opened."""

    num_chunks: int  # that `contains` would say yes to
    used_bytes: int  # as held against the quota
    max_bytes: int | None
    num_queued: int  # jobs without a result
    num_evicted: int = 0
    num_corrupt: int = 0  # refused: bytes did not match digest or header
    num_unknown_format: int = 0  # refused by format version, left untouched
    is_up: bool = True  # False from a refused write on until one succeeds; the tier tries again by itself
    details: Mapping[str, int] = field(default_factory=dict)  # counters only this kind of tier has


@dataclass(frozen=True, slots=True)
class TierRoom:
    """What a tier of some settings would hold, told without opening it (`kvferry doctor`)."""

    name: str
    num_chunks: int | None  # None: not known
    reason: str
    problem: str | None = None  # why it could not be opened on this machine, and the remedy
    folder: Path | None = None  # that it has for itself alone


class Tier(Protocol):
    """One tier. The module docstring is the contract."""

    name: str  # unique in the store, e.g. "fs"

    def contains(self, keys: Sequence[StoreKey]) -> list[bool]:
        """Whether each chunk could be loaded now, as far as the tier knows without asking anybody. Never waits."""
        ...

    def keys(self) -> list[StoreKey]:
        """Every chunk that `contains` would say yes to. O(chunks); never waits."""
        ...

    def check_fits(self, payload_bytes: int) -> None:
        """ConfigError when a chunk of so many bytes could never be stored (quota, value limit)."""
        ...

    def submit_store(self, job: TierJob) -> None:
        """Begin to write a chunk (replacing one of that key). Never waits; raises TierBusy, TierUnavailable."""
        ...

    def submit_load(self, job: TierJob) -> None:
        """Begin to read a chunk into `job.buffer`. Never waits; raises TierBusy, TierUnavailable."""
        ...

    def poll(self) -> list[TierResult]:
        """Results not handed out before. Never waits. Each submitted job appears exactly once."""
        ...

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """These were used, in this order: the last counts as the most recent. Unknown keys are ignored. Never waits."""
        ...

    def remove(self, keys: Sequence[StoreKey]) -> None:
        """Forget these chunks: misses from now on. A store of one under way ends as failed. Never waits."""
        ...

    def clear(self) -> ResetReceipt:
        """`remove` of every chunk of this tier's namespace. Never waits."""
        ...

    def take_lost(self) -> list[tuple[StoreKey, str]]:
        """Chunks that went since the last call although nobody asked for it, each with the reason: "evicted", ...

        One may be back since (its file could not be deleted): ask `contains`. The owner calls it as often as `poll`.
        Never waits.
        """
        ...

    def stats(self) -> TierStats:
        """A snapshot. Never waits."""
        ...

    def check_integrity(self) -> None:
        """AssertionError when the tier's own books do not add up. For tests and idle moments. Does no I/O."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Wait until every submitted job has a result to poll (True), at most `timeout_s` seconds (False)."""
        ...

    def close(self) -> None:
        """Let go of threads, files, locks. Idempotent. Waits a few seconds at most for operations under way."""
        ...


class TierFactory(Protocol):
    """What a class named in a tier's `type` must offer.

    A classmethod `room(config, payload_bytes, where) -> TierRoom` is welcome; it opens nothing.
    """

    def from_config(self, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> Tier:
        """Build the tier (classmethod). `config` is without `type` and `tier_module_path`; `where` is its path in the
        user's configuration, for messages (`secondary_tiers[0]`). ConfigError for whatever is wrong in it."""
        ...
