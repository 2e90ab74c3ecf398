"""The tiered store: chunks in the host arena, written through to the tiers below, brought back on demand.

    reserve -> (worker copies in) -> commit ──> host hit ──> pin -> (worker copies out) -> unpin
                                       │            ▲
                                       ▼            │ digest proved by the tier
                               backlog, tier write  └── promote (tier read)  <── lookup says TIER

Policy is here and only here; tiers move bytes. The store belongs to one thread (the scheduler's). No call waits
except `flush` and `close`: a slow or stuck tier costs hits, never time. A failed load is a miss; a failed write is a
chunk that lives in host memory only; both are counted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace

from kvferry.clock import Clock, SystemClock
from kvferry.errors import ConfigError, TierBusy, TierCorrupt, TierError, TierUnavailable
from kvferry.kv.arena import Arena
from kvferry.kv.keys import digest as digest_of
from kvferry.offloading.store.lost import LostKeys
from kvferry.offloading.store.memory import Chunk, ChunkState, HostIndex
from kvferry.offloading.store.policy import EvictionPolicy, LRUPolicy
from kvferry.offloading.store.tier import ResetReceipt, Tier, TierJob, TierResult, TierStats
from kvferry.types import Presence, SlotRef, StoreKey

logger = logging.getLogger(__name__)

HOST = "host"  # the arena's name in receipts and statistics
_LOG_EVERY_S = 10.0
_DRAIN_SLICE_S = 0.02

OnDurable = Callable[[StoreKey, bytes, str], None]


@dataclass(slots=True)
class TierTraffic:
    """What the store moved to and from one tier, and what became of the rest. Counters since the start."""

    num_stored: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    num_loaded: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    num_dropped: int = 0  # evicted from the arena before their turn to be written came
    failures: Counter[str] = field(default_factory=Counter)  # "store TierUnavailable", "load TierCorrupt" ...

    def snapshot(self) -> TierTraffic:
        """A copy that no longer moves."""
        return replace(self, failures=Counter(self.failures))


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot of the whole store."""

    num_slots: int
    slot_bytes: int
    num_free_slots: int
    num_host_chunks: int
    num_pending_chunks: int  # being copied or promoted in
    num_host_hits: int  # successful pins
    num_committed: int
    committed_bytes: int
    num_evicted: int  # from the host
    num_refused: int  # reservations and promotions for which no slot was free
    num_backlog: int  # tier writes not begun
    invalidated: dict[str, int]  # by reason
    traffic: dict[str, TierTraffic]  # by tier name
    tiers: dict[str, TierStats]


@dataclass(slots=True)
class _Lane:
    """The store's dealings with one tier."""

    tier: Tier
    backlog: OrderedDict[StoreKey, Chunk] = field(default_factory=OrderedDict)  # to be written, oldest first
    writing: dict[int, Chunk] = field(default_factory=dict)  # by job id
    loading: dict[int, Chunk] = field(default_factory=dict)
    failed: set[StoreKey] = field(default_factory=set)  # the tier says it has them, but loading did not work
    traffic: TierTraffic = field(default_factory=TierTraffic)
    logged_at_s: float = float("-inf")

    def offers(self, key: StoreKey) -> bool:
        """The tier has the chunk and did not fail to deliver it before."""
        return self.tier.contains((key,))[0] and key not in self.failed


def check_tier_names(names: Sequence[str]) -> None:
    """ConfigError when two tiers below host memory have one name, or its."""
    if len({*names, HOST}) <= len(names):
        raise ConfigError(f"every tier needs a name of its own, other than {HOST!r}: {list(names)}; set `name`")


class TieredStore:
    """Host arena over tiers, as the module docstring tells. Does not close the arena: whoever made it does."""

    def __init__(
        self,
        arena: Arena,
        tiers: Sequence[Tier],
        *,
        payload_bytes: int | Callable[[StoreKey], int],
        policy: EvictionPolicy[StoreKey] | None = None,
        clock: Clock | None = None,
        max_tier_writes: int = 32,
        on_durable: OnDurable | None = None,
    ) -> None:
        """`tiers` are asked in the order given; the store closes them. `payload_bytes` is the size of a chunk, or says
        it by key. At most `max_tier_writes` slots (and never more than half of the arena) are pinned by tier writes.
        `on_durable(key, digest, tier name)` is called from `poll` once a chunk is durable in a tier.

        ConfigError when a chunk does not fit a slot or a tier, or two tiers have one name; the tiers stay open then.
        """
        largest_bytes = payload_bytes if isinstance(payload_bytes, int) else arena.info.slot_bytes
        if not 0 < largest_bytes <= arena.info.slot_bytes:
            raise ConfigError(f"a chunk of {largest_bytes} bytes does not fit a slot of {arena.info.slot_bytes} bytes")
        check_tier_names([tier.name for tier in tiers])
        for tier in tiers:
            tier.check_fits(largest_bytes)
        self._slot_bytes = arena.info.slot_bytes
        self._num_slots = arena.info.num_slots
        self._host = HostIndex(arena, policy if policy is not None else LRUPolicy(), self._on_evict)
        self._lanes = [_Lane(tier) for tier in tiers]
        self._writes_per_lane = max(1, min(max_tier_writes, arena.info.num_slots // 2) // max(1, len(tiers)))
        self._clock = clock if clock is not None else SystemClock()
        self._on_durable = on_durable
        self._next_job_id = 0
        self._is_closed = False
        self._num_host_hits = self._num_committed = self._committed_bytes = self._num_evicted = self._num_refused = 0
        self._invalidated: Counter[str] = Counter()
        self._lost = LostKeys()
        self._moved: dict[str, set[StoreKey]] | None = None  # by place; None: nobody wants to know

    # -- asking ----------------------------------------------------------------------------------------------------

    def lookup(self, key: StoreKey) -> Presence:
        """Where the chunk is now. Changes nothing, never waits."""
        chunk = self._host.get(key)
        if chunk is not None:
            return Presence.HOST if chunk.state is ChunkState.READY else Presence.PENDING
        return Presence.TIER if any(lane.offers(key) for lane in self._lanes) else Presence.MISS

    def explain(self, key: StoreKey) -> tuple[str, str]:
        """Where the chunk is now (host, the name of a tier, "pending", "nowhere"), and why, in words. As `lookup`."""
        chunk = self._host.get(key)
        if chunk is not None and chunk.state is ChunkState.READY:
            return HOST, "in host memory"
        if chunk is not None:
            is_copied = chunk.state is ChunkState.COPYING
            return "pending", "being copied into host memory" if is_copied else f"being read from {chunk.origin}"
        for lane in self._lanes:
            if lane.offers(key):
                return lane.tier.name, f"in {lane.tier.name}, not in host memory"
        return "nowhere", self._lost.reason(key)

    def note_missing(self, key: StoreKey, reason: str) -> None:
        """Remember for `explain` why this chunk was not stored."""
        self._lost.note(key, reason)

    def track_moves(self) -> None:
        """From now on `take_moved` tells what came and went; what the tiers hold already counts as having come."""
        self._moved = {HOST: set(), **{lane.tier.name: set(lane.tier.keys()) for lane in self._lanes}}

    def take_moved(self) -> dict[str, Set[StoreKey]]:
        """By place: chunks that may have come there or gone since the last call; `has` tells which."""
        if self._moved is None:
            return {}
        for lane in self._lanes:
            self._take_losses(lane)
        moved: dict[str, Set[StoreKey]] = {place: keys for place, keys in self._moved.items() if keys}
        self._moved.update({place: set() for place in moved})
        return moved

    def has(self, place: str, key: StoreKey) -> bool:
        """The host or this tier has the whole chunk."""
        if place != HOST:
            return any(lane.tier.contains((key,))[0] for lane in self._lanes if lane.tier.name == place)
        chunk = self._host.get(key)
        return chunk is not None and chunk.state is ChunkState.READY

    def _note_move(self, place: str, key: StoreKey) -> None:
        if self._moved is not None:
            self._moved[place].add(key)

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """Used just now. `keys` is a prefix, head to tail; the head counts as the most recent: tails go first."""
        tail_first = keys[::-1]
        for key in tail_first:
            self._host.touch(key)
        for lane in self._lanes:
            lane.tier.touch(tail_first)

    # -- storing ---------------------------------------------------------------------------------------------------

    def reserve(self, key: StoreKey) -> SlotRef | None:
        """A slot to copy the chunk into; `commit` or `abort` must follow.

        None when the host has it or is about to, or when every slot is in use (counted). Lookups say PENDING till then.
        """
        if self._is_closed or self._host.get(key) is not None:
            return None
        chunk = self._acquire(key, ChunkState.COPYING)
        return chunk.ref if chunk is not None else None

    def commit(self, ref: SlotRef, digest: bytes, payload_bytes: int) -> None:
        """The bytes are in the slot and have this digest: a host hit from now on, to be written to the tiers.

        A chunk that was invalidated or cleared meanwhile is let go without a word. ValueError when `ref` is no open
        reservation or `payload_bytes` exceeds the slot; nothing has changed then.
        """
        chunk = self._host.held(ref)
        if chunk is None or chunk.state is not ChunkState.COPYING:
            raise ValueError(f"{ref} is not reserved")
        if not 0 < payload_bytes <= self._slot_bytes:
            raise ValueError(f"{payload_bytes} bytes do not fit a slot of {self._slot_bytes} bytes")
        self._host.make_ready(chunk, digest, payload_bytes)
        if chunk.is_dropped:
            return
        self._note_move(HOST, chunk.key)
        self._num_committed += 1
        self._committed_bytes += payload_bytes
        for lane in self._lanes:
            if not lane.offers(chunk.key):
                lane.backlog[chunk.key] = chunk
            self._advance(lane)

    def abort(self, ref: SlotRef) -> None:
        """The reservation is given back, the slot is free. Idempotent; a committed chunk is left alone.

        Only when no copy into the slot is under way any more.
        """
        chunk = self._host.held(ref)
        if chunk is not None and chunk.state is ChunkState.COPYING:
            self._host.give_up(chunk)

    # -- loading ---------------------------------------------------------------------------------------------------

    def pin(self, key: StoreKey) -> SlotRef | None:
        """Hold a host chunk so that its slot is not given away; one `unpin` per pin must follow. None: not in host."""
        chunk = self._host.get(key)
        if chunk is None or chunk.state is not ChunkState.READY:
            return None
        chunk.num_pins += 1
        self._num_host_hits += 1
        return chunk.ref

    def digest(self, ref: SlotRef) -> bytes:
        """The proved digest of the bytes in a pinned chunk's slot. ValueError when the chunk is not pinned."""
        chunk = self._host.held(ref)
        if chunk is None or not chunk.num_pins:
            raise ValueError(f"{ref} is not pinned")
        return chunk.digest

    def unpin(self, ref: SlotRef) -> None:
        """Let go of one pin. ValueError when there is none."""
        chunk = self._host.held(ref)
        if chunk is None or not chunk.num_pins:
            raise ValueError(f"{ref} is not pinned")
        chunk.num_pins -= 1
        self._host.release(chunk)

    def promote(self, key: StoreKey, payload_bytes: int) -> Presence:
        """Bring a chunk from a tier into the host, or join whoever does so already.

        HOST: it is there. PENDING: on its way; `poll` and look up again. MISS: no tier offers it, none can take the job
        now, or no slot is free (counted). A load that fails ends as a miss, and is not tried again on that tier before
        the chunk has been stored there anew.
        """
        chunk = self._host.get(key)
        if chunk is not None:
            return Presence.HOST if chunk.state is ChunkState.READY else Presence.PENDING
        if not 0 < payload_bytes <= self._slot_bytes:
            raise ValueError(f"{payload_bytes} bytes do not fit a slot of {self._slot_bytes} bytes")
        if self._is_closed or not any(lane.offers(key) for lane in self._lanes):
            return Presence.MISS
        chunk = self._acquire(key, ChunkState.LOADING)
        if chunk is None:
            return Presence.MISS
        chunk.payload_bytes = payload_bytes
        return Presence.PENDING if self._load_from_any(chunk) else Presence.MISS

    # -- progress --------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what the tiers finished, begin what waits. Never waits. Calls `on_durable` at the end."""
        durable: list[tuple[StoreKey, bytes, str]] = []
        for lane in self._lanes:
            for result in lane.tier.poll():
                if result.job_id in lane.writing:
                    self._finish_write(lane, result)
                    if result.ok and result.digest is not None:
                        durable.append((result.key, result.digest, lane.tier.name))
                else:
                    self._finish_load(lane, result)
            self._take_losses(lane)
            self._advance(lane)
        if self._on_durable is not None:
            for key, digest, name in durable:
                self._on_durable(key, digest, name)

    @property
    def is_loading(self) -> bool:
        """True while a tier reads a chunk."""
        return any(lane.loading for lane in self._lanes)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or under way in any tier (True), at most `timeout_s` seconds (False)."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.poll()
            busy = [lane for lane in self._lanes if lane.backlog or lane.writing or lane.loading]
            remaining_s = deadline_s - time.monotonic()
            if not busy or remaining_s <= 0:
                return not busy
            # In slices: a stuck tier must not keep the others from being fed. A tier that is Busy with nothing under
            # way drains at once, hence the pause.
            if all(lane.tier.drain(min(remaining_s, _DRAIN_SLICE_S)) for lane in busy):
                time.sleep(0.002)

    def close(self, timeout_s: float) -> None:
        """`flush`, then close the tiers. Idempotent. What was not written in time is lost to the tiers; `lookup` says
        MISS for all that is not in host, and the arena may be closed once the pins are gone."""
        if self._is_closed:
            return
        if not self.flush(timeout_s):
            num_lost = sum(len(lane.backlog) + len(lane.writing) for lane in self._lanes)
            logger.warning("closed after %.1f s with %d chunk(s) not written to the tiers below", timeout_s, num_lost)
        self._is_closed = True
        for lane in self._lanes:
            lane.tier.close()
            lane.backlog.clear()
        self.poll()

    # -- forgetting ------------------------------------------------------------------------------------------------

    def invalidate(self, key: StoreKey, reason: str) -> None:
        """The chunk is known to be bad: a miss everywhere from now on. Who holds its slot keeps it until letting go."""
        chunk = self._host.get(key)
        if chunk is not None:
            self._forget(chunk)
        for lane in self._lanes:
            lane.tier.remove((key,))
            self._note_move(lane.tier.name, key)
        self._invalidated[reason] += 1
        self._lost.note(key, f"invalidated: {reason}")
        logger.warning("chunk %s was dropped everywhere: %s", key.hex(), reason)

    def clear(self) -> list[ResetReceipt]:
        """Forget every chunk, in the host and in every tier. One receipt each, the host's (named "host") first."""
        chunks = self._host.chunks()
        ready_bytes = sum(chunk.payload_bytes for chunk in chunks if chunk.state is ChunkState.READY)
        for chunk in chunks:
            self._forget(chunk)
        receipts = [ResetReceipt(HOST, len(chunks), ready_bytes)]
        for lane in self._lanes:
            lane.failed.clear()
            self._take_losses(lane)
            if self._moved is not None:
                self._moved[lane.tier.name].update(lane.tier.keys())
            receipts.append(lane.tier.clear())
        self._lost.note_all_gone("forgotten at a reset")
        return receipts

    def scrub(self, max_slots: int) -> list[StoreKey]:
        """Digest the next `max_slots` host chunks again (about 20 GB/s); drop those that changed, return their keys."""
        return self._drop_changed(self._host.take_for_scrub(max_slots), "scrub")

    def prove(self, keys: Iterable[StoreKey]) -> list[StoreKey]:
        """Digest these chunks in host memory again; drop those that changed (there only), return their keys."""
        found = (self._host.get(key) for key in keys)
        return self._drop_changed([x for x in found if x is not None and x.state is ChunkState.READY], "load")

    def _drop_changed(self, chunks: list[Chunk], found_by: str) -> list[StoreKey]:
        bad = []
        for chunk in chunks:
            if digest_of(self._host.view(chunk, chunk.payload_bytes)) != chunk.digest:
                self._forget(chunk)
                self._invalidated[found_by] += 1
                self._lost.note(chunk.key, "it changed in host memory")
                logger.error("chunk %s changed in host memory and was dropped", chunk.key.hex())
                bad.append(chunk.key)
        return bad

    # -- looking in ------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """A snapshot. Costs nothing worth mentioning, however many chunks there are: may be taken in every step."""
        return StoreStats(
            num_slots=self._num_slots,
            slot_bytes=self._slot_bytes,
            num_free_slots=self._host.num_free,
            num_host_chunks=self._host.num_ready,
            num_pending_chunks=self._host.num_pending,
            num_host_hits=self._num_host_hits,
            num_committed=self._num_committed,
            committed_bytes=self._committed_bytes,
            num_evicted=self._num_evicted,
            num_refused=self._num_refused,
            num_backlog=sum(len(lane.backlog) for lane in self._lanes),
            invalidated=dict(self._invalidated),
            traffic={lane.tier.name: lane.traffic.snapshot() for lane in self._lanes},
            tiers={lane.tier.name: lane.tier.stats() for lane in self._lanes},
        )

    def num_pinned_chunks(self) -> int:
        """Chunks held by callers or by tier writes; O(chunks in host)."""
        return sum(bool(chunk.num_pins or chunk.num_writes) for chunk in self._host.chunks())

    def origin(self, key: StoreKey) -> str:
        """The tier from which the chunk in host memory was read; the host's name when a worker copied it in."""
        chunk = self._host.get(key)
        return (chunk.origin if chunk is not None else "") or HOST

    def check_integrity(self) -> None:
        """AssertionError when the books of the store or of a tier do not add up."""
        self._host.check_integrity()
        writes: Counter[Chunk] = Counter()
        for lane in self._lanes:
            lane.tier.check_integrity()
            assert len(lane.writing) <= self._writes_per_lane, "more slots are pinned by tier writes than allowed"
            writes.update(lane.writing.values())
            for key, chunk in lane.backlog.items():
                assert self._host.get(key) is chunk and chunk.state is ChunkState.READY, "a backlog holds a lost chunk"
            assert all(self._host.held(chunk.ref) is chunk for chunk in lane.loading.values()), "a load lost its slot"
        held = {*self._host.chunks(), *writes}
        assert all(chunk.num_writes == writes[chunk] for chunk in held), "a tier write lost its chunk"

    # -- inside ----------------------------------------------------------------------------------------------------

    def _acquire(self, key: StoreKey, state: ChunkState) -> Chunk | None:
        chunk = self._host.acquire(key, state)
        if chunk is None:
            self._num_refused += 1
        return chunk

    def _on_evict(self, chunk: Chunk) -> None:
        self._num_evicted += 1
        self._lost.note(chunk.key, "evicted (host)")
        self._note_move(HOST, chunk.key)
        for lane in self._lanes:
            if lane.backlog.pop(chunk.key, None) is not None:
                lane.traffic.num_dropped += 1

    def _forget(self, chunk: Chunk) -> None:
        for lane in self._lanes:
            lane.backlog.pop(chunk.key, None)
        self._host.drop(chunk)
        self._note_move(HOST, chunk.key)

    def _take_losses(self, lane: _Lane) -> None:
        for key, reason in lane.tier.take_lost():
            self._note_move(lane.tier.name, key)
            if not lane.offers(key):
                self._lost.note(key, f"{reason} ({lane.tier.name})")

    def _advance(self, lane: _Lane) -> None:
        """Hand the tier as much of the backlog as it takes."""
        while lane.backlog and len(lane.writing) < self._writes_per_lane:
            key, chunk = lane.backlog.popitem(last=False)
            job = self._job(chunk, chunk.digest)
            try:
                lane.tier.submit_store(job)
            except TierBusy:
                lane.backlog[key] = chunk
                lane.backlog.move_to_end(key, last=False)
                return
            except TierError as error:
                self._count_failure(lane, "store", error)
            else:
                lane.writing[job.job_id] = chunk
                chunk.num_writes += 1

    def _finish_write(self, lane: _Lane, result: TierResult) -> None:
        chunk = lane.writing.pop(result.job_id)
        chunk.num_writes -= 1
        self._note_move(lane.tier.name, chunk.key)
        lane.traffic.store_s += result.seconds
        if result.error is None:
            lane.failed.discard(chunk.key)
            lane.traffic.num_stored += 1
            lane.traffic.stored_bytes += result.payload_bytes
        else:
            self._count_failure(lane, "store", result.error)
            if isinstance(result.error, TierCorrupt):  # it is the host's copy that is bad
                self._forget(chunk)
                self._lost.note(chunk.key, "it changed in host memory")
        self._host.release(chunk)

    def _load_from_any(self, chunk: Chunk) -> bool:
        """Begin to load from the first tier that offers it; without one the slot is given back (False)."""
        is_started = False
        try:
            is_started = any(lane.offers(chunk.key) and self._load_from(lane, chunk) for lane in self._lanes)
        finally:
            if not is_started:
                self._host.give_up(chunk)
        return is_started

    def _load_from(self, lane: _Lane, chunk: Chunk) -> bool:
        job = self._job(chunk, None)
        try:
            lane.tier.submit_load(job)
        except TierError as error:
            self._count_failure(lane, "load", error)
            return False
        lane.loading[job.job_id] = chunk
        chunk.origin = lane.tier.name
        return True

    def _finish_load(self, lane: _Lane, result: TierResult) -> None:
        chunk = lane.loading.pop(result.job_id)
        lane.traffic.load_s += result.seconds
        if result.error is None and result.digest is not None:
            lane.traffic.num_loaded += 1
            lane.traffic.loaded_bytes += result.payload_bytes
            self._host.make_ready(chunk, result.digest, result.payload_bytes)
            self._note_move(HOST, chunk.key)
            return
        error = result.error if result.error is not None else TierUnavailable("a load without a proved digest")
        self._count_failure(lane, "load", error)
        self._lost.note(chunk.key, f"failed to load from {lane.tier.name}: {type(error).__name__}")
        if not isinstance(error, TierBusy) and lane.tier.contains((chunk.key,))[0]:
            lane.failed.add(chunk.key)
        self._load_from_any(chunk)

    def _job(self, chunk: Chunk, digest: bytes | None) -> TierJob:
        self._next_job_id += 1
        return TierJob(self._next_job_id, chunk.key, self._host.view(chunk, chunk.payload_bytes), digest)

    def _count_failure(self, lane: _Lane, what: str, error: TierError) -> None:
        lane.traffic.failures[f"{what} {type(error).__name__}"] += 1
        now_s = self._clock.now()
        is_told = not lane.tier.stats().is_up  # by the tier itself, once
        if isinstance(error, TierCorrupt) or (not is_told and now_s - lane.logged_at_s >= _LOG_EVERY_S):
            lane.logged_at_s = now_s
            logger.warning("tier %s: %s failed: %s", lane.tier.name, what, error)
