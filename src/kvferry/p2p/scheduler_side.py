"""Scheduler side of the P2P connectors: tells the core what the host does, and the host what the core says.

    host's hooks ──► agent (core and control channel) ──► events ──► orders to the workers ──► what they tell the host

    a request of ours     with do_remote_decode: leased when it ends, its blocks kept until the core releases them
    a request of a peer's with do_remote_prefill: announced ─► claimed from the host ─► loading ─► over

Blocks into which something may still be written are never given back: of a load that failed they are pinned until the
core calls them safe, so that the request need not wait for that; of a request that is gone the host keeps them.

A hand-over is bound to its tokens: what is leased, and what is asked for, goes by the digest of the tokens, with salt,
adapter and media. Where that cannot be told (prompt embeddings, an adapter that cannot be read, files of adapter or
model that change) nothing is handed over, nor taken.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from kvferry.clock import Clock, SystemClock
from kvferry.contract.base import CacheHitSource, KVConnectorHandshakeMetadata
from kvferry.contract.explain import PrefixRange
from kvferry.contract.host import HostInfo
from kvferry.contract.identity import KeyMaker, peer_facts
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.sides import SchedulerSide
from kvferry.contract.stats import ConnectorStats
from kvferry.contract.views import BlockIds, RequestView, StepView
from kvferry.errors import ConfigError, TransferError, TransferParamsError
from kvferry.kv.keys import HANDOVER, KeyChain, TokenDigests, first_tokens_digest
from kvferry.p2p.actions import (
    BlocksSafe,
    ClosePeer,
    DigestJob,
    FinishReason,
    GroupRule,
    LoadEnded,
    LocalEngine,
    OpenPeer,
    Release,
    StartDigests,
    StartTransfer,
)
from kvferry.p2p.agent import P2PAgent
from kvferry.p2p.config import P2PConfig
from kvferry.p2p.core import P2PCore, random_id
from kvferry.p2p.digests import DigestBooks
from kvferry.p2p.geometry import EngineGeometry, check_geometries, decode_geometry, encode_geometry
from kvferry.p2p.loads import HostLoad, HostLoadState
from kvferry.p2p.messages import CODEC, PROTOCOL, Handover, Hello, TokenProof
from kvferry.p2p.stats import P2PCounters
from kvferry.p2p.step_messages import OpenOrder, P2PHandshake, P2PStepMetadata, P2PWorkerReport
from kvferry.p2p.transports.choice import TRANSPORTS
from kvferry.p2p.transports.transport import TransferOp
from kvferry.p2p.windows import LastTables, begins_with_block
from kvferry.p2p.wire import Address, check_peer
from kvferry.types import NULL_BLOCK_ID

logger = logging.getLogger(__name__)

_REASONS = {
    "FINISHED_LENGTH_CAPPED": FinishReason.LENGTH,
    "FINISHED_ABORTED": FinishReason.ABORT,
    "FINISHED_IGNORED": FinishReason.ABORT,
    "FINISHED_ERROR": FinishReason.ERROR,
}
_MAX_HANDED_TOKENS = 1024
_UNKNOWN = (
    "its tokens do not tell what its KV is (prompt embeddings, media that vLLM numbers because both of its caches are "
    "off, a LoRA adapter whose files cannot be read, or files of adapter or model that may not be what was loaded), so "
    "no engine can prove that the KV is the request's own"
)
_MAX_CHECKED = 32  # geometries of peers, of at most 1 MiB each


class P2PSchedulerSide(SchedulerSide):
    """One per engine, in the scheduler's thread. No hook waits for a peer."""

    cache_hit_source = CacheHitSource.P2P
    registries = (TRANSPORTS,)
    variant: Mapping[str, Any] = {}

    def __init__(self, host: HostInfo, clock: Clock | None = None) -> None:
        super().__init__(host)
        self.config = P2PConfig.parse(host.extra_config, self.variant)
        self._is_consumer = host.kv_role != "kv_producer"
        self.requires_kv_delivery = self._is_producer = host.kv_role != "kv_consumer"
        self.counters = P2PCounters()
        self._clock = clock or SystemClock()
        self._alignment = math.lcm(*(group.block_tokens for group in host.groups))
        self._agent: P2PAgent | None = None
        self._key = self.config.key()
        self._geometry = b""
        self._pool: Any = None
        self._loads: dict[str, HostLoad] = {}
        # Peers compare their weights when they meet; from then on they must stay as they are.
        has_folder = host.has_named_weights and any(Path(host.model).glob("*.safetensors"))
        weights = Path(host.model) if has_folder and self.config.weights_version is None else None
        self._keys = KeyMaker.named(HANDOVER, host, weights)
        self._senders: dict[str, KeyChain] = {}
        self._unknown: set[str] = set()  # to be handed over, which no engine can do
        self._held: dict[str, tuple[int, float]] = {}  # released later: number of blocks, since when
        self._pins: dict[str, list[Any]] = {}
        self._tables = LastTables(host.groups)
        self._kept: dict[str, list[Any]] = {}  # blocks of held requests that the host has dropped already
        self._written: dict[str, str] = {}  # request -> the peer that may write to its blocks
        self._fenced: dict[int, str] = {}  # connection that is closed when nobody writes to us through it -> its peer
        self._orders = P2PStepMetadata()
        self._unopened: dict[int, OpenPeer] = {}
        self._closing: dict[int, tuple[str, set[int], float]] = {}  # peer, ranks that have closed, deadline
        self._jobs: dict[str, tuple[set[int], TransferOp, float]] = {}  # ranks that have ended, and its deadline
        self._digests = DigestBooks(host.world_size)

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """Settings; key, transport and address."""
        return P2PConfig.parse(host.extra_config, cls.variant).problems()

    # ---- start and stop ---------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pool whose blocks are pinned while something may still be written to them."""
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Listen for peers, now that every worker's KV cache is known. ConfigError when a worker is missing."""
        shakes = [shake for _, shake in sorted(metadata.items()) if isinstance(shake, P2PHandshake)]
        if [shake.rank for shake in shakes] != list(range(self.host.world_size)):
            raise ConfigError(
                f"workers {[shake.rank for shake in shakes]} of {self.host.world_size} described their KV cache: "
                "all must run the same P2P connector"
            )
        ranks = tuple(decode_geometry(shake.geometry).ranks[0] for shake in shakes)
        self._geometry = encode_geometry(EngineGeometry(ranks, peer_facts(self.host, self.config.weights_version)))
        names = set.intersection(*(set(shake.blobs) for shake in shakes))
        blobs = {name: tuple(shake.blobs[name] for shake in shakes) for name in sorted(names)}
        self._digests.is_on = all(shake.makes_digests for shake in shakes)
        self._check_fits(blobs)
        self._agent = P2PAgent(
            self.config.control(self._key), lambda address: self._make_core(address, blobs), self._clock
        )
        logger.info(
            "P2P: engine %s listens on %s, %s over %s",
            self.host.engine_id, self._agent.address, self.config.mode, " or ".join(blobs),
        )  # fmt: skip

    def _check_fits(self, blobs: Mapping[str, tuple[bytes, ...]]) -> None:
        """ConfigError when peers would refuse our Hello for its size."""
        me = self.host.engine_id, PROTOCOL, self._geometry, dict(blobs), 0, random_id(), False
        try:
            CODEC.decode(CODEC.encode(Hello(*me, generation=random_id())))
        except TransferError as error:
            largest = {name: max(map(len, ranks)) for name, ranks in blobs.items()}
            raise ConfigError(
                f"this engine cannot introduce itself to peers: {error}; geometry of {len(self._geometry)} bytes, "
                f"largest blob of a worker by transport: {largest}; give the engine fewer KV tensors or workers, or "
                f"kv_connector_extra_config.transport (now {self.config.transport!r}) another value"
            ) from error

    def _make_core(self, address: Address, blobs: Mapping[str, tuple[bytes, ...]]) -> P2PCore:
        rules = tuple(GroupRule(group.block_tokens, group.window_tokens) for group in self.host.groups)
        local = LocalEngine(
            self.host.engine_id, random_id(), address.host, address.port, self.host.world_size, self._geometry, blobs,
            rules, self._digests.is_on,
        )  # fmt: skip
        # The peer reads the same words, so they say who is who. Peers introduce themselves more than once.
        check = lru_cache(_MAX_CHECKED)(partial(check_geometries, sides=(self.host.engine_id, "its peer")))
        return P2PCore(local, check, self.config.waits())

    @property
    def agent(self) -> P2PAgent:
        """Core and control channel; there once the workers' handshake has arrived."""
        assert self._agent is not None, "set_xfer_handshake_metadata comes first"
        return self._agent

    def shutdown(self) -> None:
        """Stop the agent. Peers see their links break."""
        if self._agent is not None:
            self._agent.close()

    # ---- requests ---------------------------------------------------------------------------------------------

    def on_new_request(self, request: RequestView) -> None:
        """Note a request that shall be handed over; ask for the KV of one that was; free what nobody will fetch."""
        params = request.kv_transfer_params or {}
        if params.get("do_release") and self._is_producer:
            lease_id, transfer_id = (str(params.get(name) or "") for name in ("remote_lease_id", "transfer_id"))
            self.agent.use(lambda core, now: core.give_back(lease_id, transfer_id, now))
            return
        if params.get("do_remote_decode") and self._is_producer:
            self._expect_consumer(request, params.get("transfer_id"))
        elif params.get("do_remote_decode"):
            logger.warning("%s: do_remote_decode is ignored, kv_role is %s", request.request_id, self.host.kv_role)
        if params.get("do_remote_prefill") and self._is_consumer:
            self._announce(request, params)
        elif params.get("do_remote_prefill"):
            reason = f"do_remote_prefill, but kv_role is {self.host.kv_role}"
            self._refuse(request.request_id, reason, blames_params=True)

    def _expect_consumer(self, request: RequestView, transfer_id: Any) -> None:
        request_id = request.request_id
        if (chain := self._keys.chain(request)) is None:
            logger.warning("%s: not handed over: %s", request_id, _UNKNOWN)
            if request.lora_path is None:  # else another engine may be able to read the adapter
                self._unknown.add(request_id)
            return
        if not isinstance(transfer_id, str) or not 0 < len(transfer_id) <= 512 or not transfer_id.isprintable():
            if transfer_id is not None:
                logger.warning(
                    "%s: transfer_id=%r is no text of 1 to 512 printable characters; it is ignored",
                    request_id,
                    transfer_id,
                )
            transfer_id = secrets.token_hex(16) if self.config.mode == "push" else None
        self._senders[request_id] = chain
        self._digests.expect(request_id, request.num_prompt_tokens)
        self.agent.use(lambda core, now: core.request_started(request_id, transfer_id, 1, now))

    def _announce(self, request: RequestView, params: dict[str, Any]) -> None:
        request_id = request.request_id
        try:
            handover = self._handover(params)
            load = HostLoad(handover.peer, handover.transfer_mode == "push", handover.remote_num_tokens)
            load.lora_path = request.lora_path
            if (chain := self._keys.chain(request)) is None or not self._keys.is_certain(load.lora_path):
                self._refuse(request_id, _UNKNOWN)
                return
            num_tokens = self._num_wanted_tokens(request, load)
            tokens = TokenProof(num_tokens, TokenDigests(chain, request.token_ids).at(num_tokens))
            self.agent.use(lambda core, now: core.announce(request_id, handover, tokens, now))
            self._loads[request_id] = load
            if self.host.no_hits_reason is not None or request.skip_reading_prefix_cache:
                # The host is told of no hit, whatever the peer has: what it then computes is not computed in silence.
                load.reason = self.host.no_hits_reason or "the request needs every prompt token computed"
        except TransferError as error:
            self._refuse(request_id, str(error), blames_params=isinstance(error, TransferParamsError))

    def _handover(self, params: dict[str, Any]) -> Handover:
        """TransferParamsError when the parameters are malformed, or name a peer that may not be talked to."""
        given = {name: value for name, value in params.items() if value is not None}
        handover = Handover.parse({"transfer_mode": self.config.mode, **given})
        token = given.get("peer_token")
        check_peer(
            Address(handover.remote_host, handover.remote_port),
            allowed=self.config.peers,
            key=self._key,
            token=token if isinstance(token, str) else None,
            transfer_id=handover.transfer_id,
            now_s=time.time(),
        )
        return handover

    def _refuse(self, request_id: str, reason: str, *, blames_params: bool = False) -> None:
        self._loads[request_id] = load = HostLoad(blames_params=blames_params)
        self._fail(request_id, load, reason)

    def _fail(self, request_id: str, load: HostLoad, reason: str, kind: str = "TransferError") -> None:
        load.state, load.reason = HostLoadState.FAILED, reason
        self.counters.failures[f"load {kind}"] += 1
        what = "computing it here" if self.host.load_failure_policy == "recompute" else "the request fails"
        logger.warning("%s: no KV from %s: %s; %s (kv_load_failure_policy)", request_id, load.peer, reason, what)

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim what the peer has. One that failed is claimed as well if the request is to fail with it."""
        load = self._loads.get(request.request_id)
        if load is None or load.state not in (HostLoadState.ANNOUNCED, HostLoadState.FAILED):
            return 0, False
        load.num_local_tokens = num_computed_tokens
        if load.state is HostLoadState.FAILED and self.host.load_failure_policy == "recompute":
            return 0, False
        end = self._num_wanted_tokens(request, load)
        is_whole = end == request.num_tokens
        if is_whole and not self.host.takes_first_tokens and begins_with_block(self.host.groups, end):
            end -= 1
        load.end_token = end
        return (end - num_computed_tokens, True) if end > num_computed_tokens else (0, False)

    def _num_wanted_tokens(self, request: RequestView, load: HostLoad) -> int:
        """All of the prompt, or the whole blocks of it that the peer has."""
        num_remote = load.num_remote_tokens
        if num_remote is None or num_remote >= request.num_tokens:
            return request.num_tokens
        return num_remote // self._alignment * self._alignment

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """The load is on, or the host does without."""
        request_id = request.request_id
        load = self._loads.get(request_id)
        if load is None or load.state not in (HostLoadState.ANNOUNCED, HostLoadState.FAILED):
            return
        if not num_external_tokens:
            load.state = HostLoadState.OVER
            self.agent.use(lambda core, now: core.abort(request_id, now))
        elif load.state is HostLoadState.FAILED:
            load.state = HostLoadState.OVER
            self._order_end(request_id, ok=False)
        else:
            load.state, load.blocks = HostLoadState.LOADING, block_ids
            if load.is_push:
                self._written[request_id] = load.peer
            tokens = load.num_local_tokens, load.num_local_tokens + num_external_tokens
            self.agent.use(lambda core, now: core.park(request_id, block_ids, tokens, now))

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Lease the blocks of a request that is to be handed over; give up the load of one that still loads.

        Of a load that failed, the answer says why, and how many tokens were computed again.
        """
        request_id = request.request_id
        load = self._loads.get(request_id)
        if load is not None:
            load.is_gone = True
            if load.state in (HostLoadState.ANNOUNCED, HostLoadState.LOADING):
                self.agent.use(lambda core, now: core.abort(request_id, now))
            if load.state is not HostLoadState.LOADING:
                del self._loads[request_id]
        told = load.told(request.num_prompt_tokens) if load is not None and load.reason else {}
        params = None
        if request_id in self._senders:
            block_ids = self._with_kept(request, block_ids)
            params = self._lease(request, block_ids)
        self._senders.pop(request_id, None)
        self._digests.forget(request_id)
        if request_id in self._unknown:
            self._unknown.discard(request_id)
            told = {**told, "not_handed_over": _UNKNOWN}
        if params is None:
            self._let_go(request_id)
            return False, told or None
        num_blocks = sum(block != NULL_BLOCK_ID for group in block_ids for block in group)
        self._held[request_id] = num_blocks, self._clock.now()
        return True, {**told, **params}

    def _with_kept(self, request: RequestView, block_ids: BlockIds) -> BlockIds:
        """The request's table, with what a decode engine sees that computes the last prompt token again."""
        restored_ids, ids = self._tables.restore(request.request_id, block_ids, request.num_prompt_tokens)
        if not ids or request.num_computed_tokens > request.num_prompt_tokens:
            return block_ids
        blocks = self._kept[request.request_id] = [self._pool.blocks[block] for block in ids]
        self._pool.touch(blocks)
        return restored_ids

    def _let_go(self, request_id: str) -> None:
        if (blocks := self._kept.pop(request_id, None)) is not None:
            self._pool.free_blocks(blocks)

    def _lease(self, request: RequestView, block_ids: BlockIds) -> dict[str, Any] | None:
        request_id = request.request_id
        reason = _REASONS.get(request.status_name, FinishReason.STOP)
        outputs = [int(token) for token in request.token_ids[request.num_prompt_tokens :]]
        # The last token that was sampled has no KV yet, whatever a host that runs ahead says.
        num_tokens = min(request.num_computed_tokens, request.num_tokens - bool(outputs))
        if not self._keys.is_certain(request.lora_path):
            logger.warning("%s: not handed over: %s", request_id, _UNKNOWN)
            self.agent.use(lambda core, now: core.abort(request_id, now))
            return None
        handed, mode = outputs[:_MAX_HANDED_TOKENS], self.config.mode
        digests = TokenDigests(self._senders[request_id], request.token_ids)
        try:
            params = self.agent.use(
                lambda core, now: core.finish(
                    request_id, reason, block_ids, num_tokens, handed, digests.at, now, mode=mode
                )
            )
            if params is None:
                return None
            sampled = digests.at(request.num_prompt_tokens), handed, request.sampling_facts + self.host.chosen_by
            first_tokens = first_tokens_digest(*sampled, params["remote_generation"])
            return {**params, "remote_first_tokens_digest": first_tokens.hex()}
        except ValueError as error:
            logger.warning("%s: not handed over: %s", request_id, error)
            self.agent.use(lambda core, now: core.abort(request_id, now))
            return None

    # ---- each step --------------------------------------------------------------------------------------------

    def build_connector_meta(self, step: StepView) -> P2PStepMetadata:
        """All orders that have come up since the last step."""
        self._take_events()
        self._tables.note(step, self._senders)
        self._order_prompt_digests(step)
        for opened in list(self._unopened.values()):
            if opened.peer in self._written.values():
                self._open(opened.connection)
        orders, self._orders = self._orders, P2PStepMetadata()
        return orders

    def _order_prompt_digests(self, step: StepView) -> None:
        for item, num_tokens in self._digests.ending_prompts(step):
            what = item.request_id, item.block_ids, num_tokens
            if job := self.agent.use(lambda core, now, what=what: core.prompt_ends(*what, now)):  # type: ignore[misc]
                self._order_digests(job, self._orders.prompt_digests)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Tell the core how the workers fared."""
        report = connector_output.kv_connector_worker_meta
        if not isinstance(report, P2PWorkerReport):
            return
        for ended in report.jobs:
            ranks, op, _ = self._jobs[ended.job_id]
            ranks.add(ended.rank)
            if len(ranks) == self.host.world_size:
                del self._jobs[ended.job_id]
            self.counters.count(ended, op)
            what, digests = (ended.job_id, ended.rank, ended.status, ended.reason), ended.digests
            self.agent.use(lambda core, now, what=what, digests=digests: core.transfer_ended(*what, now, digests))  # type: ignore[misc]
        for made in report.digests:
            self._digests.answered(made)
            self.agent.use(lambda core, now, made=made: core.digests_made(made.job_id, made.rank, made.digests, now))  # type: ignore[misc]
        for connection, rank in report.closed:
            peer, closed, _ = self._closing[connection]
            closed.add(rank)
            if len(closed) == self.host.world_size:
                del self._closing[connection]
                self._fenced.pop(connection, None)
                self._peer_closed(peer, connection)

    def has_pending_push_work(self) -> bool:
        """True while an order waits for a step, or a worker for one to report in; bounded.

        While a push waits for its consumer too, in hosts that would not step otherwise.
        """
        now = self._clock.now()
        waits = [*self._digests.deadlines(), *(due for x in (self._jobs, self._closing) for *_, due in x.values())]
        if self.agent.has_events or not self._orders.is_empty() or any(now < deadline for deadline in waits):
            return True
        if self.config.mode == "pull" or self.host.steps_for_held_blocks:
            return False
        return any(now < at + self.config.lease_s for _, at in self._held.values())

    def _take_events(self) -> None:
        while events := self.agent.take_events():
            for event in events:
                match event:
                    case OpenPeer():
                        self._unopened[event.connection] = event
                    case ClosePeer():
                        self._close(event)
                    case StartTransfer():
                        self._start(event)
                    case StartDigests():
                        self._order_digests(event.job, self._orders.digests)
                    case Release():
                        self._held.pop(event.request_id, None)
                        self._let_go(event.request_id)
                        self._orders.sent.append(event.request_id)
                    case LoadEnded():
                        self._load_ended(event)
                    case BlocksSafe():
                        self._blocks_safe(event.request_id)
                    case _:
                        raise AssertionError(f"the agent left {event} to the engine")

    def _start(self, event: StartTransfer) -> None:
        """Workers learn of a connection with its first job: whoever only reads from us needs nothing of them."""
        job = event.job
        self._open(job.connection)
        self._orders.jobs.append(job)
        self._jobs[job.job_id] = set(), job.op, self._clock.now() + self.config.load_s

    def _order_digests(self, job: DigestJob, orders: list[DigestJob]) -> None:
        if job.connection is not None:
            self._open(job.connection)
        orders.append(job)
        self._digests.ordered(job, self._clock.now() + self.config.load_s)

    def _open(self, connection: int) -> None:
        opened = self._unopened.pop(connection, None)
        if opened is not None:
            peer, hello = opened.peer, opened.hello
            blobs, is_writer = dict(hello.transports), peer in self._written.values()
            self._orders.opens.append(OpenOrder(connection, peer, self._geometry, hello.geometry, blobs, is_writer))

    def _close(self, event: ClosePeer) -> None:
        peer, connection = event.peer, event.connection
        logger.info("closing the connection to %s: %s", peer, event.reason)
        is_written = peer in self._written.values()
        if connection in self._unopened and not is_written:
            del self._unopened[connection]
            self._peer_closed(peer, connection)
            return
        self._open(connection)
        self._closing[connection] = peer, set(), self._clock.now() + self.config.load_s
        if is_written:
            self._fenced[connection] = peer
            self._orders.fences.append(connection)
        else:
            self._orders.closes.append(connection)

    def _not_written(self, request_id: str) -> None:
        """Nothing is written to this request's blocks any more; a connection that waited for that can be closed."""
        self._written.pop(request_id, None)
        for connection, peer in list(self._fenced.items()):
            if peer not in self._written.values():
                del self._fenced[connection]
                self._orders.closes.append(connection)

    def _peer_closed(self, peer: str, connection: int) -> None:
        self.agent.use(lambda core, now: core.peer_closed(peer, connection, now))

    def _load_ended(self, event: LoadEnded) -> None:
        request_id = event.request_id
        if not event.blocks_quarantined:
            self._not_written(request_id)
        load = self._loads.get(request_id)
        if load is None or load.state is HostLoadState.OVER:
            return
        was_loading = load.state is HostLoadState.LOADING
        ok, reason = event.ok, event.reason
        if ok and not self._keys.is_certain(load.lora_path):
            ok, reason = False, _UNKNOWN  # what is behind the loaded tokens is computed with other weights
        if not ok and not load.is_gone:
            self._fail(
                request_id, load, reason, "TransferCorrupt" if event.is_proved and not event.ok else "TransferError"
            )
        if not was_loading:
            return
        if ok:
            self._digests.note_load(request_id, load.peer, is_proved=event.is_proved)
        load.state = HostLoadState.OVER
        self.counters.hit_tokens += load.end_token - load.num_local_tokens if ok else 0
        if load.is_gone and event.blocks_quarantined:
            return  # the host keeps the blocks until `BlocksSafe`
        if event.blocks_quarantined:
            self._pin(request_id, load)
        self._order_end(request_id, ok=ok or load.is_gone)

    def _order_end(self, request_id: str, *, ok: bool) -> None:
        self._orders.received.append(request_id)
        if not ok:
            self._orders.failed.append(request_id)
        load = self._loads[request_id]
        load.blocks = ()
        if load.is_gone:
            del self._loads[request_id]

    def _pin(self, request_id: str, load: HostLoad) -> None:
        """Keep what the load may still write to, so that the host may give it back."""
        ids = {block for group in load.blocks for block in group} - {NULL_BLOCK_ID}
        blocks = self._pins[request_id] = [self._pool.blocks[block] for block in sorted(ids)]
        self._pool.touch(blocks)
        logger.warning("%s: %d blocks stay out of use while something may be written there", request_id, len(blocks))

    def _blocks_safe(self, request_id: str) -> None:
        self._not_written(request_id)
        if (blocks := self._pins.pop(request_id, None)) is not None:
            self._pool.free_blocks(blocks)
        elif request_id in self._loads:
            self._order_end(request_id, ok=True)

    def reset_cache(self) -> bool:
        """True: nothing is stored here. Leased KV lies in the host's blocks, which it does not forget meanwhile."""
        return True

    # ---- what is known ----------------------------------------------------------------------------------------

    def explain_prefix(self, request: RequestView, num_computed_tokens: int) -> list[PrefixRange]:
        """Where the peer's part of the prompt is."""
        load = self._loads.get(request.request_id)
        if load is None:
            return []
        end = min(request.num_tokens, load.num_remote_tokens or request.num_tokens)
        if end <= num_computed_tokens:
            return []
        has_failed = bool(load.reason)
        reason = load.reason or {
            HostLoadState.ANNOUNCED: "a prefill engine has it",
            HostLoadState.LOADING: "on its way from a prefill engine",
        }.get(load.state, "came from a prefill engine")
        place = "nowhere" if has_failed else load.peer
        return [PrefixRange(num_computed_tokens, end, place, reason, is_claimed=not has_failed)]

    def get_kv_connector_stats(self) -> ConnectorStats:
        """Totals since start."""
        pinned = sum(map(len, self._pins.values()))
        leased = sum(num for num, _ in self._held.values())
        now = self._clock.now()
        return self.counters.stats(leased + pinned, now - min((at for _, at in self._held.values()), default=now))

    def check_integrity(self) -> None:
        """AssertionError when books contradict each other; for tests and idle moments."""
        self.agent.use(lambda core, now: core.check_integrity())
        assert not self._senders & self._held.keys(), "a request is running and leased"
        assert self._kept.keys() <= self._held.keys(), "blocks are kept for nobody"
        assert all(
            load.state is HostLoadState.LOADING or not load.blocks for load in self._loads.values() if not load.is_gone
        )
