"""Scheduler side of the OffloadingConnector: what is claimed, loaded and stored, over a TieredStore.

A chunk's life:

    computed by the engine -> slot reserved, blocks pinned -> copied by every worker -> digest committed: in HOST
    -> written to the tiers below in the background -> (evicted from HOST) -> found below -> promoted -> HOST
    -> slot pinned -> copied into the pool by every worker -> slot unpinned

Claims cover only chunks whose every shard is in HOST, hence proved. Chunks found only below are promoted first while
the request waits (lookup answers None), at most `stall_timeout_s` without progress. No call here waits for anything.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from kvferry.clock import Clock, SystemClock
from kvferry.contract.base import CacheHitSource, KVConnectorHandshakeMetadata
from kvferry.contract.explain import PrefixRange
from kvferry.contract.host import HostInfo
from kvferry.contract.identity import KeyMaker, check_identity
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.sides import SchedulerSide
from kvferry.contract.stats import ConnectorStats
from kvferry.contract.views import BlockIds, RequestView, ScheduledRequest, StepView
from kvferry.errors import ConfigError
from kvferry.kv.arena import Arena
from kvferry.kv_events import KVCacheEvent
from kvferry.offloading.config import EXTRA_CONFIG, ChunkGeometry, OffloadingConfig, check_groups
from kvferry.offloading.events import ChunkEvents
from kvferry.offloading.explain import explain_prefix
from kvferry.offloading.identity import store_namespace
from kvferry.offloading.messages import (
    ChunkPart,
    CopyJob,
    OffloadingHandshake,
    OffloadingStepMetadata,
    OffloadingWorkerReport,
)
from kvferry.offloading.requests import (
    JobRecord,
    LoadState,
    RequestState,
    groups_needed,
    load_part,
    starts_with_a_block,
)
from kvferry.offloading.stats import OffloadingCounters
from kvferry.offloading.store.registry import TIER_TYPES, create_tier
from kvferry.offloading.store.tiered import HOST, OnDurable, TieredStore
from kvferry.types import NULL_BLOCK_ID, GroupInfo, Presence, SlotRef, StoreKey

logger = logging.getLogger(__name__)

_JOB_DEADLINE_S = 30.0
_FREES_WAIT_S = 1.0  # stores older than this are not waited for
_SCRUB_SLOTS = 1  # proved again in each idle step
_IDLE_YIELD_S = 0.0005  # an engine that spins keeps the interpreter from the threads that read and copy (3-7 x slower)


class OffloadingSchedulerSide(SchedulerSide):
    """Index, policy and tier I/O; one instance per engine, in the scheduler's thread."""

    cache_hit_source = CacheHitSource.HOST
    registries = (TIER_TYPES,)

    def __init__(self, host: HostInfo, clock: Clock | None = None) -> None:
        super().__init__(host)
        check_groups(host.groups)
        self.config = OffloadingConfig.parse(host.extra_config)
        self.counters = OffloadingCounters()
        self.on_durable: OnDurable | None = None
        """Called with (key, digest, tier name) when a chunk will outlive this process in a tier."""
        self._clock = clock or SystemClock()
        # vLLM cannot be told that a synchronous load into several groups failed.
        self._is_async = self.config.load_async or (len(host.groups) > 1 and not host.reads_failed_blocks)
        self._may_claim_all = self._is_async and not any(map(starts_with_a_block, host.groups))
        self._keys = KeyMaker.of(host, self.config.weights_version)
        self._requests: dict[str, RequestState] = {}
        self._jobs: dict[int, JobRecord] = {}
        self._next_job_id = 0
        self._new_loads: list[CopyJob] = []
        self._num_pinned_blocks = 0
        self._pool: Any = None
        self._geometry: ChunkGeometry | None = None
        self._block_bytes: tuple[int, ...] = ()
        self._store: TieredStore | None = None
        self._arena: Arena | None = None
        self._events: ChunkEvents | None = None

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """Settings and identity; what the tiers lack `offloading_capacity` knows, and they say when they are opened."""
        check_identity(host, OffloadingConfig.parse(host.extra_config).weights_version)
        return []

    # ---- start and stop ---------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pool whose blocks are pinned while they are copied."""
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Open arena and tiers, now that the workers' layout is known. Workers must agree on it."""
        first = self._agreed_layout(metadata)
        geometry = ChunkGeometry.of(self.config, self.host.groups, first.block_bytes, self.host.world_size)
        namespace = store_namespace(self.host, geometry, first.payload_description)
        with ExitStack() as undo:  # a failure below must leave no folder locked and no segment behind
            tiers = []
            for i, config in enumerate(self.config.secondary_tiers):
                where = f"{EXTRA_CONFIG}.secondary_tiers[{i}]"
                tiers.append(create_tier(config, namespace, self._clock, where=where))
                undo.callback(tiers[-1].close)
            arena = Arena.create(
                engine_id=self.host.engine_id,
                num_slots=geometry.num_slots,
                slot_bytes=geometry.slot_bytes,
                directory=self.config.arena_folder,
            )
            undo.callback(arena.close)
            self._geometry = geometry
            self._block_bytes = first.block_bytes
            self._store = TieredStore(
                arena,
                tiers,
                payload_bytes=self._payload_bytes,
                clock=self._clock,
                # Tier writes begin only while the engine steps, so as many as may be are handed over at once.
                max_tier_writes=max(1, geometry.num_slots // 2),
                on_durable=self._durable,
            )
            self._arena = arena
            undo.pop_all()
        if self.host.wants_kv_events:
            self._events = ChunkEvents(self._store, self._keys, geometry.chunk_tokens)
        logger.info(
            "offloading: %d slots of %d bytes, chunks of %d tokens, tiers: %s",
            geometry.num_slots, geometry.slot_bytes, geometry.chunk_tokens, ", ".join((HOST, *(t.name for t in tiers))),
        )  # fmt: skip

    def _agreed_layout(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> OffloadingHandshake:
        shakes = [shake for _, shake in sorted(metadata.items()) if isinstance(shake, OffloadingHandshake)]
        if len(shakes) != self.host.world_size:
            raise ConfigError(
                f"{len(shakes)} of {self.host.world_size} workers sent their KV layout; "
                "all must run kvferry's OffloadingConnector"
            )
        first = shakes[0]
        for shake in shakes[1:]:
            if (shake.payload_description, shake.block_bytes) != (first.payload_description, first.block_bytes):
                raise ConfigError(f"workers {first.rank} and {shake.rank} have different KV layouts")
        return first

    def _durable(self, key: StoreKey, digest: bytes, tier: str) -> None:
        if self.on_durable is not None:
            self.on_durable(key, digest, tier)

    @property
    def store(self) -> TieredStore:
        """The store; open once the workers' handshake has arrived."""
        assert self._store is not None, "set_xfer_handshake_metadata comes first"
        return self._store

    @property
    def geometry(self) -> ChunkGeometry:
        """Chunk and slot sizes; known once the workers' handshake has arrived."""
        assert self._geometry is not None, "set_xfer_handshake_metadata comes first"
        return self._geometry

    def shutdown(self) -> None:
        """Write what is still owed to the tiers (bounded), then close them and release the arena."""
        if self._store is not None:
            self._store.close(self.config.shutdown_timeout_s)
            self._store = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    # ---- lookup -----------------------------------------------------------------------------------------------

    def on_new_request(self, request: RequestView) -> None:
        """Begin to remember the request."""
        self._state(request)

    def _state(self, request: RequestView) -> RequestState:
        state = self._requests.get(request.request_id)
        if state is None:
            state = self._requests[request.request_id] = RequestState(request, self._keys.chain(request))
        return state

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim the proved prefix; answer None while chunks are on their way up from a tier below."""
        state = self._state(request)
        state.num_local_tokens = num_computed_tokens
        self.counters.num_lookups += 1
        if state.load is LoadState.RUNNING:
            return None, False  # its workers have not reported yet
        if state.chain is None or state.load is LoadState.FAILED or request.skip_reading_prefix_cache:
            return 0, False
        self.store.poll()
        if not self._keys.is_certain(request.lora_path) or not self._extend(state):
            return 0, False
        limit = request.num_tokens if self._may_claim_all else request.num_tokens - 1
        hit = self._ready_hit(state, limit)
        if hit is None:
            return None, False
        if hit <= num_computed_tokens:
            self._release_pins(state)
            return 0, False
        return hit - num_computed_tokens, self._loads_async(state)

    def _loads_async(self, state: RequestState) -> bool:
        return self._is_async or self.host.must_load_early(state.view)

    def _extend(self, state: RequestState) -> bool:
        """Hash the tokens known by now. False when the request must not be cached (any more)."""
        if state.chain is not None and state.chain.num_media != len(state.view.multimodal_items):
            logger.warning("request %s got further media: the KV of this request is not cached", state.view.request_id)
            self._release_pins(state)
            state.chain = None
        if state.chain is None:
            return False
        state.chain.extend(state.view.token_ids)
        return True

    def _ready_hit(self, state: RequestState, limit: int) -> int | None:
        """The longest prefix of at most `limit` tokens that is local or pinned in HOST; None while one is on its way.

        Starts promotions and pins what is ready, so that repeated calls only add to it.
        """
        chunk_tokens, alignment = self.geometry.chunk_tokens, self.geometry.block_alignment_tokens
        first = state.num_local_tokens // chunk_tokens
        num_known = self._num_known_chunks(state)
        while num_known > first:
            hit = min(num_known * chunk_tokens, limit) // alignment * alignment
            missing = self._missing_tail(state, first, hit)
            if missing is not None:
                num_known = missing  # a shorter hit: windowed groups need other chunks
                continue
            found = [self._fetch(state, chunk, hit) for chunk in range(first, -(-hit // chunk_tokens))]
            if Presence.MISS in found:
                num_known = first + found.index(Presence.MISS)
            elif Presence.PENDING not in found:
                return hit
            elif self._may_wait(state):
                return None
            else:
                num_known = first + found.index(Presence.PENDING)
        return state.num_local_tokens

    def _missing_tail(self, state: RequestState, first: int, hit: int) -> int | None:
        """The first chunk from `first` on that a windowed group lacks for a hit of `hit` tokens.

        Asked before anything is fetched: without its windows' tails, what a prefix has in full groups is of no use.
        """
        windows = tuple(group for group in self.host.groups if group.window_tokens is not None)
        reach = max(((group.window_tokens or 1) - 1 for group in windows), default=0)
        chunk_tokens = self.geometry.chunk_tokens
        for chunk in range(max(first, (hit - reach) // chunk_tokens), -(-hit // chunk_tokens)):
            needed = groups_needed(windows, self.geometry, chunk, hit)
            if any(self.store.lookup(key) is Presence.MISS for key in self._chunk_keys(state, chunk, needed)):
                return chunk
        return None

    def _num_known_chunks(self, state: RequestState) -> int:
        """Chunks from 0 on that are somewhere in the store in every full-attention group (local ones not asked)."""
        assert state.chain is not None
        chunk_tokens = self.geometry.chunk_tokens
        chunk = state.num_local_tokens // chunk_tokens
        while (chunk + 1) * chunk_tokens <= state.chain.num_hashed_tokens:
            needed = groups_needed(self.host.groups, self.geometry, chunk, 1 << 62)
            if any(self.store.lookup(key) is Presence.MISS for key in self._chunk_keys(state, chunk, needed)):
                break
            chunk += 1
        return chunk

    def _chunk_keys(self, state: RequestState, chunk: int, groups: Iterable[GroupInfo]) -> Iterator[StoreKey]:
        assert state.chain is not None
        value = state.chain.value_at((chunk + 1) * self.geometry.chunk_tokens)
        for group in groups:
            yield from self._keys.shards(value, group.group_id)

    def _fetch(self, state: RequestState, chunk: int, hit_tokens: int) -> Presence:
        """HOST when all needed shards of the chunk are pinned for this request; starts what is missing."""
        result = Presence.HOST
        needed = groups_needed(self.host.groups, self.geometry, chunk, hit_tokens)
        for key in self._chunk_keys(state, chunk, needed):
            if key in state.pins:
                continue
            presence = self.store.lookup(key)
            if presence is Presence.TIER:
                presence = self.store.promote(key, self._payload_bytes(key))
                state.promoted.add(key)
            if presence is Presence.HOST:
                ref = self.store.pin(key)
                assert ref is not None, "a chunk in HOST can be pinned"
                state.pins[key] = ref
            elif presence is Presence.MISS:
                return Presence.MISS
            else:
                result = Presence.PENDING
        return result

    def _payload_bytes(self, key: StoreKey) -> int:
        group_id = int.from_bytes(key[32:34], "little")
        return self.geometry.payload_bytes[group_id]

    def _may_wait(self, state: RequestState) -> bool:
        """True while promotions make progress; a stalled tier costs a request at most `stall_timeout_s`."""
        now = self._clock.now()
        progress = len(state.pins)
        if state.wait_until_s is None or progress > state.num_pins_seen:
            state.num_pins_seen = progress
            state.wait_until_s = now + self.config.stall_timeout_s
        if now < state.wait_until_s:
            return True
        self.counters.stalled_waits += 1
        logger.warning("request %s no longer waits for tiers below host memory", state.view.request_id)
        return False

    def _release_pins(self, state: RequestState) -> None:
        for ref in state.pins.values():
            self.store.unpin(ref)
        state.pins.clear()

    # ---- load -------------------------------------------------------------------------------------------------

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Plan the load of `num_external_tokens` tokens into the blocks behind the local ones."""
        state = self._state(request)
        state.wait_until_s = None
        if num_external_tokens > 0:
            self._plan_load(state, block_ids, num_external_tokens)
        if state.load is not LoadState.RUNNING:
            self._release_pins(state)

    def _plan_load(self, state: RequestState, block_ids: BlockIds, num_external_tokens: int) -> None:
        start = state.num_local_tokens
        end = start + num_external_tokens
        parts: list[ChunkPart] = []
        keys: list[tuple[StoreKey, ...]] = []
        for chunk in range(start // self.geometry.chunk_tokens, -(-end // self.geometry.chunk_tokens)):
            for group in groups_needed(self.host.groups, self.geometry, chunk, end):
                part_keys = tuple(self._chunk_keys(state, chunk, (group,)))
                slots = tuple(state.pins[key] for key in part_keys)
                digests = tuple(map(self.store.digest, slots)) if self.config.verify_host_loads else ()
                table = block_ids[group.group_id]
                part = load_part(group, self.geometry, chunk, table, slots, digests, (start, end))
                if part is not None:
                    parts.append(part)
                    keys.append(part_keys)
        self.store.touch([key for part_keys in keys for key in part_keys])
        job = self._new_job(state, tuple(parts), tuple(keys), is_load=True)
        state.load = LoadState.RUNNING
        self.counters.hit_tokens.update(self._tokens_by_medium(state, num_external_tokens))
        self._new_loads.append(job.job)

    def get_external_cache_hit_sources(
        self, request: RequestView, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Tokens from chunks that were in host memory already, and from chunks fetched from below for this request."""
        by_medium = self._tokens_by_medium(self._state(request), num_external_tokens)
        disk = sum(tokens for medium, tokens in by_medium.items() if medium != HOST)
        sources = {CacheHitSource.HOST: num_external_tokens - disk, CacheHitSource.DISK: disk}
        return {source: tokens for source, tokens in sources.items() if tokens}

    def _tokens_by_medium(self, state: RequestState, num_external_tokens: int) -> Counter[str]:
        """The claimed tokens by where their chunks were found; only while these are pinned."""
        chunk_tokens = self.geometry.chunk_tokens
        start, end = state.num_local_tokens, state.num_local_tokens + num_external_tokens
        tokens: Counter[str] = Counter()
        for chunk in range(start // chunk_tokens, -(-end // chunk_tokens)):
            groups = groups_needed(self.host.groups, self.geometry, chunk, end)
            promoted = [key for key in self._chunk_keys(state, chunk, groups) if key in state.promoted]
            medium = self.store.origin(promoted[0]) if promoted else HOST
            tokens[medium] += min(end, (chunk + 1) * chunk_tokens) - max(start, chunk * chunk_tokens)
        return tokens

    # ---- store ------------------------------------------------------------------------------------------------

    def build_connector_meta(self, step: StepView) -> OffloadingStepMetadata:
        """This step's loads, and stores of the chunks that this step completes."""
        assert self._arena is not None, "set_xfer_handshake_metadata comes first"
        self.store.poll()
        if not step.scheduled and not self._new_loads:  # those go out at once
            if self.store.is_loading or self.has_pending_push_work():
                time.sleep(_IDLE_YIELD_S)
            else:
                self.store.scrub(_SCRUB_SLOTS)
        loads, self._new_loads = self._new_loads, []
        metadata = OffloadingStepMetadata(self._arena.info, loads)
        for scheduled in step.scheduled:
            state = self._requests.get(scheduled.request_id)
            if state is not None and state.chain is not None and self._keys.is_certain(state.view.lora_path):
                metadata.stores.extend(self._plan_stores(state, scheduled))
        return metadata

    def _plan_stores(self, state: RequestState, scheduled: ScheduledRequest) -> Iterator[CopyJob]:
        if not self._extend(state):
            return
        assert state.chain is not None
        computed = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens
        # Tokens beyond the chain are not known yet (sampled in this very step, or speculative).
        num_chunks = min(computed, state.chain.num_hashed_tokens) // self.geometry.chunk_tokens
        for chunk in range(state.num_chunks_seen, num_chunks):
            for group in self.host.groups:
                job = self._plan_store(state, chunk, group, scheduled.block_ids[group.group_id])
                if job is not None:
                    yield job
        state.num_chunks_seen = max(state.num_chunks_seen, num_chunks)

    def _plan_store(self, state: RequestState, chunk: int, group: GroupInfo, table: list[int]) -> CopyJob | None:
        """Reserve slots and pin blocks for one chunk of one group; None when it is stored or there is no room."""
        keys = tuple(self._chunk_keys(state, chunk, (group,)))
        present = [key for key in keys if self.store.lookup(key) is not Presence.MISS]
        if len(present) == len(keys):
            return None
        per_chunk = self.geometry.chunk_tokens // group.block_tokens
        blocks = table[chunk * per_chunk : (chunk + 1) * per_chunk]
        if NULL_BLOCK_ID in blocks or len(blocks) < per_chunk:
            return None  # behind the window already
        if self._num_pinned_blocks + len(blocks) > self.host.num_blocks * 3 // 4:
            self._drop_store(keys, "too many blocks are pinned")
            return None
        for key in present:
            self.store.invalidate(key, "another worker's shard of its chunk is missing")
        refs = self._reserve(keys)
        if refs is None:
            self._drop_store(keys, "no slot is free in host memory")
            return None
        part = ChunkPart(group.group_id, 0, tuple(blocks), refs, chunk * per_chunk)
        pinned = [self._pool.blocks[block_id] for block_id in blocks]
        self._pool.touch(pinned)
        self._num_pinned_blocks += len(pinned)
        record = self._new_job(state, (part,), (keys,), is_load=False, pinned=pinned)
        record.chunk, record.lora_path = chunk, state.view.lora_path
        return record.job

    def _drop_store(self, keys: tuple[StoreKey, ...], reason: str) -> None:
        self.counters.dropped_stores += 1
        for key in keys:
            self.store.note_missing(key, f"computed, but not stored: {reason}")

    def _reserve(self, keys: tuple[StoreKey, ...]) -> tuple[SlotRef, ...] | None:
        """A slot for each shard, or none at all."""
        refs: list[SlotRef] = []
        for key in keys:
            ref = self.store.reserve(key)
            if ref is None:
                for taken in refs:
                    self.store.abort(taken)
                return None
            refs.append(ref)
        return tuple(refs)

    # ---- jobs -------------------------------------------------------------------------------------------------

    def _new_job(
        self,
        state: RequestState,
        parts: tuple[ChunkPart, ...],
        keys: tuple[tuple[StoreKey, ...], ...],
        *,
        is_load: bool,
        pinned: list[Any] | None = None,
    ) -> JobRecord:
        self._next_job_id += 1
        job = CopyJob(self._next_job_id, state.view.request_id, parts, self._loads_async(state))
        deadline_s = self._clock.now() + _JOB_DEADLINE_S
        record = JobRecord(job, deadline_s, pinned or [], keys, {}, is_load)
        self._jobs[job.job_id] = record
        return record

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in the workers' reports; a job ends when every worker has reported it."""
        report = connector_output.kv_connector_worker_meta
        ended = self._ended_jobs(report) if isinstance(report, OffloadingWorkerReport) else []
        loads = [record for record in ended if record.is_load]
        for record in loads:
            self._end_load(record, ended)
        loaded_ids = {block for record in loads for part in record.job.parts for block in part.block_ids}
        if set(connector_output.invalid_block_ids) - loaded_ids:
            self._taint(ended, after_job_id=0)  # another connector's load failed: stores may have read it
        for record in ended:
            if not record.is_load:
                self._end_store(record)

    def _ended_jobs(self, report: OffloadingWorkerReport) -> list[JobRecord]:
        ended: list[JobRecord] = []
        for item in report.reports:
            record = self._jobs.get(item.job_id)
            if record is None or item.rank in record.reports:
                continue
            record.reports[item.rank] = item
            self.counters.add_copies(record.job, item, self._block_bytes, is_load=record.is_load)
            if len(record.reports) == self.host.world_size:
                ended.append(self._jobs.pop(item.job_id))
        return ended

    def _taint(self, ended: list[JobRecord], after_job_id: int) -> None:
        for record in (*ended, *self._jobs.values()):
            if not record.is_load and record.job.job_id > after_job_id:
                record.is_tainted = True

    def _end_store(self, record: JobRecord) -> None:
        for i, (part, keys) in enumerate(zip(record.job.parts, record.keys, strict=True)):
            payload = self.geometry.payload_bytes[part.group_id]
            digests = [record.reports[rank].digests[i] for rank in range(len(keys))]
            is_good = None not in digests and not record.is_tainted and self._keys.is_certain(record.lora_path)
            for key, ref, value in zip(keys, part.slots, digests, strict=True):
                if is_good and value is not None:
                    self.store.commit(ref, value, payload)
                else:
                    self.store.abort(ref)
                    self.store.note_missing(key, "computed, but not stored: the copy failed")
            self.counters.stored_chunks += is_good
            if not is_good:
                self.counters.failed_stores += 1
                self._see_again(record)
        self._num_pinned_blocks -= len(record.pinned_blocks)
        self._pool.free_blocks(reversed(record.pinned_blocks))

    def _see_again(self, record: JobRecord) -> None:
        """The chunk is considered anew when its request computes it again."""
        state = self._requests.get(record.job.request_id)
        if state is not None and record.chunk is not None:
            state.num_chunks_seen = min(state.num_chunks_seen, record.chunk)

    def _end_load(self, record: JobRecord, ended: list[JobRecord]) -> None:
        """Release what the load held. A failed one makes its request claim nothing more; of what it was to load,
        chunks whose bytes are no longer those of their digest are dropped from host memory, and the others stay.
        """
        state = self._requests.get(record.job.request_id)
        num_failed = sum(report.digests.count(None) for report in record.reports.values())
        self.counters.failed_loads += num_failed
        for i, keys in enumerate(record.keys):
            if any(report.digests[i] is None for report in record.reports.values()):
                self.store.prove(keys)
        if num_failed and not record.job.is_async:
            # The step went on over KV that never came; what it, and steps planned since, computed is worthless.
            self._taint(ended, after_job_id=record.job.job_id)
        if state is not None:
            self._release_pins(state)
            if num_failed:
                state.num_chunks_seen = 0  # what it computes now is stored wherever it is missing
            state.load = LoadState.FAILED if num_failed else LoadState.NONE
            if state.is_finished:
                del self._requests[record.job.request_id]

    def has_pending_push_work(self) -> bool:
        """True while copies are out (their results arrive only while the engine steps), up to a deadline each."""
        now = self._clock.now()
        return bool(self._new_loads) or any(now < record.deadline_s for record in self._jobs.values())

    def has_pending_block_frees(self) -> bool:
        """True while blocks that nobody else has any more (they left a window) wait for a recent store's end."""
        began_s = self._clock.now() - _FREES_WAIT_S
        recent = (job for job in self._jobs.values() if job.deadline_s - _JOB_DEADLINE_S > began_s)
        return any(block.ref_cnt == 1 for job in recent for block in job.pinned_blocks)

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """Totals since start, in the vocabulary of all connectors; None before the store is open and after its end."""
        if self._store is None:
            return None
        oldest = next((record for record in self._jobs.values() if record.pinned_blocks), None)
        # Less the rounding of a deadline, which makes what began just now younger than nothing.
        held_s = 0.0 if oldest is None else max(0.0, self._clock.now() - (oldest.deadline_s - _JOB_DEADLINE_S))
        return self.counters.told(self._store.stats(), self._num_pinned_blocks, held_s)

    def explain_prefix(self, request: RequestView, num_computed_tokens: int) -> list[PrefixRange]:
        """Chunk by chunk what the store says of the tokens behind `num_computed_tokens`. Changes nothing."""
        live = self._requests.get(request.request_id)
        chain = self._keys.chain(request) if live is None else live.chain
        if chain is not None:
            chain.extend(request.token_ids)
        state = RequestState(request, chain, num_computed_tokens, load=LoadState.NONE if live is None else live.load)
        return explain_prefix(state, self.store, self._keys, self.host, self.geometry)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Chunks that came to or went from a tier since the last call, when the host wants to know."""
        return () if self._events is None else self._events.take()

    # ---- ends -------------------------------------------------------------------------------------------------

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Never delays the free: blocks being stored are pinned, and a running load is held by the host."""
        state = self._requests.get(request.request_id)
        if state is not None:
            if state.load is LoadState.RUNNING:
                state.is_finished = True
            else:
                self._release_pins(state)
                del self._requests[request.request_id]
        return False, None

    def reset_cache(self) -> bool:
        """Forget every stored chunk in every tier; the store lets go of copies under way when they end."""
        for state in self._requests.values():
            if state.load is not LoadState.RUNNING:
                self._release_pins(state)
        for receipt in self.store.clear():
            logger.info("reset: %s dropped %d chunks", receipt.tier, receipt.num_chunks)
        return True
