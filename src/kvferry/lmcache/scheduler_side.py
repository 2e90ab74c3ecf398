"""Scheduler side of the built-in LMCacheMPConnector: what is claimed, loaded and stored.

A request asks the server once what it has (answer None meanwhile, for a bounded time). What it claims is loaded
asynchronously. Blocks are stored when the outcome of the step that computed them is known: the server cannot be told to
forget what was computed over another connector's failed load.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from kvferry.clock import Clock, SystemClock
from kvferry.contract.base import KVConnectorHandshakeMetadata
from kvferry.contract.host import HostInfo
from kvferry.contract.identity import KeyMaker, check_identity
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.sides import SchedulerSide
from kvferry.contract.stats import ConnectorStats, MediumStats
from kvferry.contract.views import BlockIds, RequestView, ScheduledRequest, StepView
from kvferry.errors import ConfigError, HostError
from kvferry.kv.keys import KeyChain
from kvferry.lmcache.config import LMCacheConfig, builtin_config, check_builtin
from kvferry.lmcache.lookups import Lookups
from kvferry.lmcache.messages import (
    ChunkMove,
    LMCacheHandshake,
    LMCacheMetadata,
    LMCacheReport,
    ServerTransfer,
    TransferReport,
)
from kvferry.lmcache.session import ServerChunks
from kvferry.lmcache.wire import ServerConnection, ServerKey
from kvferry.lmcache.worker_side import only_group
from kvferry.offloading.requests import LoadState
from kvferry.types import NULL_BLOCK_ID

logger = logging.getLogger(__name__)

_MEDIUM = "lmcache"
_WAYS = ("load", "store")
_FORBIDDEN_IN_SALT = frozenset("@/\\\x00")
_MAX_SALT_CHARACTERS = 128


@dataclass(slots=True)
class _Request:
    """One live request. `key` names its session at the server; a lookup covers all of the key's tokens."""

    view: RequestView
    chain: KeyChain | None
    key: ServerKey | None = None
    num_hit_chunks: int | None = None
    """What the lookup has found; None: it is out, or there is none."""
    is_looking: bool = False
    is_locked: bool = False
    """The server holds what was found until it is read or released."""
    give_up_s: float = 0.0
    num_local_tokens: int = 0
    num_chunks_seen: int = 0
    load: LoadState = LoadState.NONE
    num_jobs: int = 0
    is_finished: bool = False


@dataclass(slots=True)
class _JobRecord:
    """A job on its way. `step` is that of the blocks to be stored; `ranks` have reported."""

    job: ServerTransfer
    is_load: bool
    deadline_s: float
    pinned: list[Any] = field(default_factory=list)
    step: int = 0
    lora_path: str | None = None
    ranks: set[int] = field(default_factory=set)
    has_failed: bool = False


class LMCacheSchedulerSide(SchedulerSide):
    """One instance per engine, in the scheduler's thread; the questions to the server run on another."""

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """Settings, identity, whether the server answers, for which it waits at most some seconds, and whether its
        chunks fit."""
        check_builtin(host.extra_config)
        group = only_group(host)
        config = LMCacheConfig.parse(host.extra_config)
        check_identity(host, config.weights_version)
        connection = ServerConnection(config.url)
        try:
            chunk_tokens = connection.probe(http_port=config.http_port)
            block_bytes = sum(host.page_bytes[name] for name in group.layer_names)
            ServerChunks.of(chunk_tokens, group.block_tokens, block_bytes, config.staging_bytes).check_room()
        except (ConfigError, HostError) as err:
            return [str(err)]
        finally:
            connection.close()
        return []

    def __init__(self, host: HostInfo, clock: Clock | None = None) -> None:
        super().__init__(host)
        self.config = builtin_config(host.extra_config, "scheduler")
        self._block_tokens = only_group(host).block_tokens
        self._clock = clock or SystemClock()
        self._keys = KeyMaker.of(host, self.config.weights_version)
        self._name = secrets.token_hex(8)
        self._epoch = ""
        self._numbers = count(1)
        self._requests: dict[str, _Request] = {}
        self._jobs: dict[int, _JobRecord] = {}
        self._computed: deque[_JobRecord] = deque()
        """Stores that wait for the outcome of their step."""
        self._known_step = 0
        self._bad: set[bytes] = set()
        """Chunks the server has other bytes of than were stored. It cannot be told so, hence they are not asked for."""
        self._new_loads: list[ServerTransfer] = []
        self._num_pinned = 0
        self._pool: Any = None
        self._server: LMCacheHandshake | None = None
        self._lookups: Lookups | None = None
        self._moved = MediumStats()
        self._hit_tokens = 0
        self._stalled_waits = 0

    # ---- start and stop ---------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pool whose blocks are pinned while they are stored."""
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Start asking the server, now that the workers have found it. Workers must agree on it."""
        shakes = {shake for shake in metadata.values() if isinstance(shake, LMCacheHandshake)}
        if len(metadata) != self.host.world_size or len(shakes) != 1:
            raise ConfigError(
                f"{len(metadata)} of {self.host.world_size} workers have found an LMCache server, and they must agree "
                f"on chunks and layout: {sorted(map(str, shakes))}"
            )
        self._server = shakes.pop()
        self._lookups = Lookups(self.config, self._server.chunk_tokens)

    @property
    def server(self) -> LMCacheHandshake:
        """What the workers have told of it."""
        assert self._server is not None, "set_xfer_handshake_metadata comes first"
        return self._server

    @property
    def lookups(self) -> Lookups:
        """The questions to the server."""
        assert self._lookups is not None, "set_xfer_handshake_metadata comes first"
        return self._lookups

    def shutdown(self) -> None:
        """End all sessions at the server, as far as it answers."""
        if self._lookups is not None:
            for state in self._requests.values():
                self._let_go(state)
            self._lookups.close()
            self._lookups = None

    # ---- lookup -----------------------------------------------------------------------------------------------

    def on_new_request(self, request: RequestView) -> None:
        """Begin to remember the request."""
        self._state(request)

    def _state(self, request: RequestView) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            state = self._requests[request.request_id] = _Request(request, self._keys.chain(request))
        return state

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim what the server has; None while it has not said."""
        state = self._state(request)
        if state.load is LoadState.RUNNING:
            return None, False
        if state.load is LoadState.FAILED or request.skip_reading_prefix_cache or not self._extend(state):
            return 0, False
        if state.num_hit_chunks is None and not self._look_up(state, num_computed_tokens):
            return None, False
        hit = self._num_good_chunks(state) * self.server.chunk_tokens
        if hit <= num_computed_tokens:
            return 0, False
        state.num_local_tokens = num_computed_tokens
        return hit - num_computed_tokens, True

    def _extend(self, state: _Request) -> bool:
        """Hash the tokens known by now. False when the request must not be cached (any more)."""
        if state.chain is not None and state.chain.num_media != len(state.view.multimodal_items):
            state.chain = None  # media came later: the chain does not know them
        if not self._keys.is_certain(state.view.lora_path):
            state.chain = None  # the adapter's files changed
        if state.chain is None:
            return False
        state.chain.extend(state.view.token_ids)
        return True

    def _look_up(self, state: _Request, num_local_tokens: int) -> bool:
        """Ask, or see what has been answered. False: wait."""
        if not state.is_looking:
            end = state.view.num_tokens // self.server.chunk_tokens * self.server.chunk_tokens
            if end <= num_local_tokens:
                state.num_hit_chunks = 0
                return True
            self._let_go(state)
            state.key = self._key(state, end)
            state.is_looking = True
            state.give_up_s = self._clock.now() + self.config.lookup_timeout_s
            self.lookups.begin(state.key)
        assert state.key is not None
        found = self.lookups.result(state.key.request_id)
        if found is None and self._clock.now() < state.give_up_s:
            return False
        state.is_looking = False
        if found is None:
            self._stalled_waits += 1
            logger.warning("request %s no longer waits for LMCache", state.view.request_id)
            self._let_go(state)
        state.num_hit_chunks = found or 0
        state.is_locked = bool(found)
        state.num_chunks_seen = max(state.num_chunks_seen, state.num_hit_chunks)
        return True

    def _num_good_chunks(self, state: _Request) -> int:
        """What was found, up to the first chunk that is known to be bad."""
        assert state.chain is not None
        found = state.num_hit_chunks or 0
        ends = ((chunk + 1) * self.server.chunk_tokens for chunk in range(found if self._bad else 0))
        return next((i for i, end in enumerate(ends) if state.chain.value_at(end) in self._bad), found)

    def _key(self, state: _Request, end: int) -> ServerKey:
        tokens = tuple(state.view.token_ids[:end])
        name, salt = f"{self._name}-{next(self._numbers)}", self._salt(state)
        return ServerKey(self.server.model_name, self.host.world_size, None, tokens, 0, end, name, salt)

    def _salt(self, state: _Request) -> str:
        """Keeps apart, at the server, what tokens do not tell apart. A plain salt stays readable, for quotas."""
        view, media = state.view, state.view.multimodal_items
        plain = view.cache_salt or ""
        is_plain = not media and view.lora_path is None and not self._epoch and not plain.startswith("kvferry-")
        if is_plain and len(plain) <= _MAX_SALT_CHARACTERS and not _FORBIDDEN_IN_SALT & set(plain):
            return plain
        assert state.chain is not None
        told = repr((state.chain.root.hex(), media, self._epoch))
        return f"kvferry-{hashlib.sha256(told.encode()).hexdigest()[:32]}"

    def _release(self, state: _Request, first_chunk: int, end_chunk: int) -> None:
        """Unlock found chunks that will not be read."""
        if state.is_locked and state.key is not None:
            chunk_tokens = self.server.chunk_tokens
            self.lookups.release(state.key.part(first_chunk * chunk_tokens, end_chunk * chunk_tokens, None))

    def _release_all(self, state: _Request) -> None:
        self._release(state, 0, state.num_hit_chunks or 0)
        state.is_locked = False

    def _let_go(self, state: _Request) -> None:
        """End the request's session at the server."""
        self._release_all(state)
        if state.key is not None:
            self.lookups.end(state.key)
        state.key, state.is_looking = None, False

    # ---- load and store ---------------------------------------------------------------------------------------

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Plan the load; what is here already, or loaded by another connector, is unlocked."""
        state = self._state(request)
        if state.load is LoadState.RUNNING:
            return
        if num_external_tokens == 0:
            self._release_all(state)
            if state.is_looking:
                self._let_go(state)
        else:
            self._plan_load(state, block_ids[0], num_external_tokens)
        state.num_hit_chunks = None  # asked again only after a preemption

    def _plan_load(self, state: _Request, table: list[int], num_tokens: int) -> None:
        assert state.key is not None
        start, end = state.num_local_tokens, state.num_local_tokens + num_tokens
        chunk_tokens = self.server.chunk_tokens
        while table[start // self._block_tokens] == NULL_BLOCK_ID:  # outside a sliding window
            start += self._block_tokens
        self._release(state, 0, start // chunk_tokens)
        self._release(state, -(-end // chunk_tokens), state.num_hit_chunks or 0)
        state.is_locked = False  # the workers' reads unlock the rest
        moves = []
        for chunk in range(start // chunk_tokens, -(-end // chunk_tokens)):
            first = max(start, chunk * chunk_tokens) // self._block_tokens
            blocks = tuple(table[first : (chunk + 1) * chunk_tokens // self._block_tokens])
            moves.append(self._move(state, chunk, first - chunk * chunk_tokens // self._block_tokens, blocks))
        self._hit_tokens += num_tokens
        state.load = LoadState.RUNNING
        record = self._new_job(state, tuple(moves), is_load=True)
        self._jobs[record.job.job_id] = record
        self._new_loads.append(record.job)

    def _move(self, state: _Request, chunk: int, first_block: int, block_ids: tuple[int, ...]) -> ChunkMove:
        assert state.chain is not None
        return ChunkMove(chunk, state.chain.value_at((chunk + 1) * self.server.chunk_tokens), first_block, block_ids)

    def _new_job(self, state: _Request, moves: tuple[ChunkMove, ...], *, is_load: bool) -> _JobRecord:
        end = (moves[-1].chunk + 1) * self.server.chunk_tokens
        if state.key is None:
            state.key = self._key(state, end)
        key = state.key
        if end > len(key.token_ids):
            key = key.grown(tuple(state.view.token_ids[:end]))
        state.num_jobs += 1
        deadline_s = self._clock.now() + 3 * self.config.mq_timeout
        return _JobRecord(ServerTransfer(next(self._numbers), state.view.request_id, key, moves), is_load, deadline_s)

    def build_connector_meta(self, step: StepView) -> LMCacheMetadata:
        """This step's loads, the stores of steps that have turned out well, and plans for what this one computes."""
        number = next(self._numbers)
        loads, self._new_loads = self._new_loads, []
        metadata = LMCacheMetadata(None, loads)
        while self._computed and self._computed[0].step <= self._known_step:
            record = self._computed.popleft()
            if not self._keys.is_certain(record.lora_path):
                self._end(record)
                continue
            self._jobs[record.job.job_id] = record
            metadata.stores.append(record.job)
        for scheduled in step.scheduled:
            state = self._requests.get(scheduled.request_id)
            if state is not None and (record_or_none := self._plan_store(state, scheduled)) is not None:
                record_or_none.step = metadata.step = number
                self._computed.append(record_or_none)
        return metadata

    def _plan_store(self, state: _Request, scheduled: ScheduledRequest) -> _JobRecord | None:
        """Pin the blocks of the chunks that the step completes, as many as may be; None when there are none."""
        if not self._extend(state):
            return None
        assert state.chain is not None
        computed = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens
        first, end = state.num_chunks_seen, min(computed, state.chain.num_hashed_tokens) // self.server.chunk_tokens
        per_chunk = self.server.chunk_tokens // self._block_tokens
        end = min(end, first + (self.host.num_blocks // 2 - self._num_pinned) // per_chunk)  # the rest in later steps
        table = scheduled.block_ids[0][: max(0, end) * per_chunk]
        if first >= end or NULL_BLOCK_ID in table[first * per_chunk :]:
            return None
        state.num_chunks_seen = end
        blocks = [self._pool.blocks[block_id] for block_id in table[first * per_chunk :]]
        self._pool.touch(blocks)
        self._num_pinned += len(blocks)
        cuts = [(chunk, tuple(table[chunk * per_chunk : (chunk + 1) * per_chunk])) for chunk in range(first, end)]
        record = self._new_job(state, tuple(self._move(state, chunk, 0, cut) for chunk, cut in cuts), is_load=False)
        record.pinned, record.lora_path = blocks, state.view.lora_path
        return record

    # ---- ends -------------------------------------------------------------------------------------------------

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in what became of steps and jobs; what was computed beside another's failed load is dropped."""
        if connector_output.invalid_block_ids or getattr(connector_output, "failed_blocks", None):
            while self._computed:
                record = self._computed.popleft()
                self._see_again(record)
                self._end(record)
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, LMCacheReport):
            self._known_step = max(self._known_step, report.step or 0)
            for item in report.reports:
                self._take(item)

    def _take(self, item: TransferReport) -> None:
        record = self._jobs.get(item.job_id)
        if record is None:
            return
        self._count(record, item)
        record.ranks.add(item.rank)
        record.has_failed |= item.error is not None
        if item.bad_chain_value is not None:
            self._bad.add(item.bad_chain_value)
        if len(record.ranks) == self.host.world_size:
            del self._jobs[item.job_id]
            self._end(record)

    def _see_again(self, record: _JobRecord) -> None:
        if (state := self._requests.get(record.job.request_id)) is not None:
            state.num_chunks_seen = min(state.num_chunks_seen, record.job.moves[0].chunk)

    def _end(self, record: _JobRecord) -> None:
        """A job is over: its blocks may be reused. A request whose load has failed claims nothing any more."""
        self._num_pinned -= len(record.pinned)
        if record.pinned:
            self._pool.free_blocks(reversed(record.pinned))
        state = self._requests.get(record.job.request_id)
        if state is None:
            return
        state.num_jobs -= 1
        if record.is_load:
            state.load = LoadState.FAILED if record.has_failed else LoadState.NONE
            if record.has_failed:
                state.num_chunks_seen = 0
        self._forget_if_over(state)

    def _forget_if_over(self, state: _Request) -> None:
        if state.is_finished and not state.num_jobs:
            self._let_go(state)
            del self._requests[state.view.request_id]

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Never delays the free: blocks being stored are pinned, and a running load is held by the host."""
        if (state := self._requests.get(request.request_id)) is not None:
            state.is_finished = True
            if state.chain is not None:
                num_chunks = min(request.num_computed_tokens, state.chain.num_hashed_tokens) // self.server.chunk_tokens
                self._moved.num_dropped += max(0, num_chunks - state.num_chunks_seen)
            self._forget_if_over(state)
        return False, None

    def has_pending_push_work(self) -> bool:
        """True while jobs are out or wait for their step, up to a deadline each, or the server is still to be told."""
        now = self._clock.now()
        is_busy = bool(self._new_loads) or (self._lookups is not None and self._lookups.is_busy)
        return is_busy or any(now < job.deadline_s for job in (*self._jobs.values(), *self._computed))

    def reset_cache(self) -> bool:
        """This engine finds nothing any more that was stored before; the server keeps it for others until evicted."""
        self._epoch = secrets.token_hex(8)
        for state in self._requests.values():
            if not state.num_jobs:
                self._let_go(state)
                state.num_hit_chunks = None
        return True

    # ---- figures ----------------------------------------------------------------------------------------------

    def _count(self, record: _JobRecord, item: TransferReport) -> None:
        moved, num_chunks = self._moved, len(record.job.moves)
        if item.error is not None:
            reason = f"{'load' if record.is_load else 'store'} {item.error.partition(':')[0]}"
            moved.failures[reason] = moved.failures.get(reason, 0) + 1
        elif record.is_load:
            moved.num_loads += num_chunks
            moved.load_s += item.seconds
        else:
            moved.num_stores += num_chunks
            moved.store_s += item.seconds

    def get_kv_connector_stats(self) -> ConnectorStats:
        """Totals since start, in the vocabulary of all connectors."""
        failed = {what: sum(n for why, n in self._moved.failures.items() if why.startswith(what)) for what in _WAYS}
        return ConnectorStats(
            media={_MEDIUM: replace(self._moved, failures=dict(self._moved.failures))},
            hit_tokens={_MEDIUM: self._hit_tokens},
            fallbacks={
                "stalled wait": self._stalled_waits,
                "dropped store": self._moved.num_dropped,
                **{f"failed {what}": number for what, number in failed.items()},
            },
            held_blocks=self._num_pinned,
        )
