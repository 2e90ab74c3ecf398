"""The decode side: loads, from the announcement of a request to proved blocks or a reported failure.

    pull   announced ──park──► parked ──Granted──► transferring ──all ranks ok──► verifying ──Verdict valid──► done
               │ Claim is sent here │                   │ StartTransfer(READ)        │ Confirm
    push   announced ──park──► parked ──Register sent──► transferring ──────────── Pushed ok ────────────────► done
               │                    │                   │                            │
               └────────────────────┴─────── failed ◄───┴────────────────────────────┘
                                               │ abort, deadline, Refused, invalid, a rank or the connection failed
                                               ▼
                  quarantined, while bytes may still land ──► (blocks safe) gone

A load proves its tokens with its claim or registration, and believes no producer that does not answer their digest: KV
of other tokens is never read, and what such a producer wrote is never used. Where both make digests of their blocks
(`kvferry.p2p.proof`), the bytes are proved too: our ranks hash what they have read, and the producer compares (Confirm,
Verdict); or, pushed, they hash what was written (verifying), and we compare with what it made (Pushed).
A load lives and dies with the connection it is bound to (when its claim or registration is first sent). The claim is
taken at the announcement, so that the lease is held while the request waits for blocks (`give_up_one`: not for ever).

After a failure: `LoadEnded(ok=False)` was emitted once, the claim is withdrawn, nothing of the load may be used. Blocks
are quarantined while one of our ranks has not ended its read, or the producer may still write: until every rank
reported an end, the producer said that nothing can land any more, or the connection was destroyed, which is asked for
after `quarantine_s`, or at once when a rank reports that it does not know. Cancelling is never taken as a fence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Any

from kvferry.errors import TransferError
from kvferry.p2p import messages as m
from kvferry.p2p.actions import BlocksSafe, DigestJob, LoadEnded, StartDigests, StartTransfer, TransferJob
from kvferry.p2p.peers import Peer, Role, same_life, same_tokens
from kvferry.p2p.proof import RankDigests, first_blocks, make_proof
from kvferry.p2p.transports.calls import row
from kvferry.p2p.transports.transport import TransferOp, TransferStatus

_CALLS = ("claim", "register", "confirm")


class LoadPhase(Enum):
    """Where a load is; `done` and `failed` without quarantine are gone from the books."""

    ANNOUNCED = "announced"
    PARKED = "parked"
    TRANSFERRING = "transferring"
    VERIFYING = "verifying"
    FAILED = "failed"


@dataclass(slots=True)
class RemoteLoad:
    """One announced request."""

    request_id: str
    handover: m.Handover
    tokens: m.TokenProof
    claim_id: str
    deadline_s: float
    connect_s: float  # until then it must be bound
    state: LoadPhase = LoadPhase.ANNOUNCED
    blocks: m.GroupBlocks = ()
    token_range: tuple[int, int] = (0, 0)
    connection: int | None = None
    generation: str | None = None
    granted: m.Granted | None = None
    renew_s: float = inf
    job_id: str = ""
    ranks: set[int] = field(default_factory=set)  # of ours that may still read
    may_be_written: bool = False  # push: the producer may write, or will
    pushed: m.Pushed | None = None  # that ended the write
    digest_job_id: str = ""
    digests: dict[int, RankDigests | None] = field(default_factory=dict)  # by rank, of what arrived

    @property
    def is_push(self) -> bool:
        """Whether the producer moves the bytes."""
        return self.handover.transfer_mode == "push"


class Consumer(Role):
    """All loads of this engine. Pure; emits actions."""

    def __init__(self, *surroundings: Any) -> None:
        super().__init__(*surroundings)
        self._loads: dict[str, RemoteLoad] = {}  # by claim
        self._by_request: dict[str, RemoteLoad] = {}
        self._by_job: dict[str, RemoteLoad] = {}
        self._by_digest_job: dict[str, RemoteLoad] = {}
        self._patient_until_s = 0.0

    def announce(self, request_id: str, handover: m.Handover, tokens: m.TokenProof, now: float) -> None:
        """A request that may load from a peer; known already: nothing. TransferError: it is still quarantined."""
        if (known := self._by_request.get(request_id)) is not None:
            if known.state is LoadPhase.FAILED:
                raise TransferError(f"request {request_id!r} still has quarantined blocks; use another request id")
            return
        deadline_s, connect_s = self._deadline(now, self._settings.announce_s), now + self._settings.handshake_s
        load = RemoteLoad(request_id, handover, tokens, self._new_id(), deadline_s, connect_s)
        self._loads[load.claim_id] = self._by_request[request_id] = load
        if refusal := self._peers.refusal(handover.peer, now):
            self._fail(load, refusal, now)
            return
        self._peers.want(handover.peer, now)
        self._bind(load, now)

    def park(self, request_id: str, blocks: m.GroupBlocks, token_range: tuple[int, int], now: float) -> bool:
        """The host's blocks for tokens [first, end), per group. False: the load is over already, they are not used."""
        load = self._by_request.get(request_id)
        if load is None or load.state is not LoadPhase.ANNOUNCED:
            return load is not None and load.state is not LoadPhase.FAILED
        assert token_range[1] <= load.tokens.num_tokens, f"{token_range} wanted, {load.tokens.num_tokens} proved"
        load.state, load.blocks, load.token_range = LoadPhase.PARKED, blocks, token_range
        self._patient_until_s = now + self._settings.load_s
        load.deadline_s = self._deadline(now, self._settings.load_s)
        load.connect_s = now + self._settings.handshake_s
        if token_range[0] >= token_range[1] and not load.is_push:
            self._done(load, load.handover.remote_num_tokens or 0, now)
            return True
        self._peers.want(load.handover.peer, now)
        self._bind(load, now)
        self._read(load, now)
        return True

    def abort(self, request_id: str, now: float) -> None:
        """The host does not want this request any more."""
        if (load := self._by_request.get(request_id)) is not None:
            self._fail(load, "aborted", now)

    def on_message(self, peer: Peer, message: m.ClaimMessage, now: float) -> None:
        """An answer of a producer; whatever does not fit the load's state changes nothing."""
        if isinstance(message, m.Pushed):
            self._send(peer.name, m.PushedSeen(**self._ids(message.claim_id, message.generation)))
        if isinstance(message, m.Verdict | m.Withdrawn | m.Pushed | m.Refused):
            self._calls.answered("withdraw", message.claim_id, by=peer.name)
        load = self._loads.get(message.claim_id)
        if load is None or load.connection is None or not same_life(load.generation, message.generation):
            return
        if load.handover.peer != peer.name:
            return  # whoever claims to live the producer's life
        match message:
            case m.Granted():
                self._on_granted(load, message, now)
            case m.Renewed():
                self._calls.answered("register", load.claim_id)
                load.renew_s = now + self._renew_in_s(message.remaining_ms)
            case m.Verdict() if load.state is LoadPhase.VERIFYING and message.is_valid and load.granted:
                self._done(load, load.granted.num_tokens, now, is_proved=message.is_proved)
            case m.Pushed() if self._is_of_our_tokens(load, message):
                load.may_be_written = False
                self._on_pushed(load, message, now)
            case m.Pushed() if load.pushed is not None:
                pass  # again
            case m.Refused() | m.Verdict() | m.Withdrawn() | m.Pushed():
                load.may_be_written = False
                is_proved = isinstance(message, m.Verdict) and message.is_proved
                self._fail(load, self._reason(message), now, is_proved=is_proved)
                self._free_if_safe(load)
            case _:
                pass

    def transfer_ended(
        self, job_id: str, rank: int, status: TransferStatus, reason: str, digests: RankDigests | None, now: float
    ) -> bool:
        """One rank's part of a read ended. False: not a job of ours."""
        load = self._by_job.get(job_id)
        if load is None or rank not in load.ranks or load.connection is None:
            return load is not None
        if status is not TransferStatus.UNKNOWN:
            load.ranks.discard(rank)
        if status is not TransferStatus.OK:
            self._fail(load, f"read failed on rank {rank}: {status.value}: {reason}", now)
            if status is not TransferStatus.REJECTED:
                self._peers.close_connection(load.handover.peer, load.connection, f"a read failed: {reason}", now)
        elif load.state is LoadPhase.TRANSFERRING:
            load.digests[rank] = digests
            if not load.ranks:
                self._verify(load, now)
        self._free_if_safe(load)
        return True

    def digests_made(self, job_id: str, rank: int, digests: RankDigests | None, now: float) -> None:
        """One rank has read again what was pushed."""
        if (load := self._by_digest_job.get(job_id)) is None or load.pushed is None or load.pushed.proof is None:
            return
        load.digests[rank] = digests
        if load.state is not LoadPhase.VERIFYING or len(load.digests) < self._local.num_ranks:
            return
        told = load.pushed.proof
        made = self._proof(load, told.first_blocks)
        if made is None or made == told:
            self._done(load, load.pushed.num_tokens, now, is_proved=made is not None)
        else:
            self._fail(load, m.OTHER_BYTES, now, is_proved=True)

    def connection_opened(self, peer: str, now: float) -> None:
        for load in list(self._loads.values()):
            if load.handover.peer == peer:
                self._bind(load, now)

    def connection_failing(self, connection: int, reason: str, now: float) -> None:
        for load in list(self._loads.values()):
            if load.connection == connection:
                self._fail(load, reason, now)

    def connection_closed(self, connection: int, now: float) -> None:
        for load in list(self._loads.values()):
            if load.connection == connection:
                load.ranks.clear()
                load.may_be_written = False
                self._free_if_safe(load)

    def peer_refused(self, peer: str, reason: str, now: float) -> None:
        for load in list(self._loads.values()):
            if load.handover.peer == peer and load.connection is None:
                self._fail(load, reason, now)

    def expire(self, now: float) -> None:
        """Deadlines and renewals."""
        for load in list(self._loads.values()):
            peer = load.handover.peer
            if now < self._due_s(load):
                continue
            if load.state is LoadPhase.FAILED:
                load.deadline_s = inf
                self._peers.close_connection(peer, load.connection, "a transfer that was given up does not end", now)
            elif now >= load.deadline_s:
                key = "announce_s" if load.state is LoadPhase.ANNOUNCED else "load_s"
                limit = f"kv_connector_extra_config.{key}={getattr(self._settings, key)} s"
                self._fail(load, f"deadline passed while {load.state.value}: it may take {limit}", now)
            elif load.connection is None:
                limit = f"{self._settings.handshake_s} s (kv_connector_extra_config.handshake_s)"
                why = (
                    "the peer drops our packets (is its port open?), is overloaded, or runs another version of kvferry"
                )
                self._fail(load, f"no connection to {peer} within {limit}: {why}", now)
            else:
                load.renew_s = now + self._settings.renew_s
                self._send(peer, m.Renew(**self._ids(load.claim_id, load.generation)))

    def next_deadline(self) -> float:
        """When `expire` has something to do."""
        return min((self._due_s(load) for load in self._loads.values()), default=inf)

    def stuck_from_s(self, claimed_since_s: float) -> float:
        """From when on `give_up_one` gives one up, if nothing changes. `claimed_since_s`: blocks of ours, by others."""
        waiting_since_s = min((self._announced_s(load) for load in self._holding_while_waiting()), default=inf)
        return max(self._patient_until_s, max(waiting_since_s, claimed_since_s) + self._settings.load_s)

    def give_up_one(self, claimed_since_s: float, now: float) -> None:
        """The newest of our loads, when none has got blocks for so long while others wait with a claim on ours.

        Two engines that prefill for each other may be full of blocks that the other's loads have claimed, each of which
        waits for blocks. One that is given up sets the other engine's free; its own wait goes on, or it is computed.
        """
        if now < self.stuck_from_s(claimed_since_s):
            return
        self._patient_until_s = now + self._settings.claim_s
        newest = max(self._holding_while_waiting(), key=self._announced_s)
        why = (
            f"no load got blocks of this engine for {self._settings.load_s} s (kv_connector_extra_config.load_s), "
            "while other engines have claimed blocks here, so the newest load was given up: give both engines more KV "
            "blocks"
        )
        self._fail(newest, why, now)

    def wanted_peers(self) -> set[str]:
        """Peers that loads wait for."""
        loads = self._loads.values()
        return {x.handover.peer for x in loads if x.connection is None and x.state is not LoadPhase.FAILED}

    def busy_peers(self) -> set[str]:
        """Peers that owe us answers."""
        return {load.handover.peer for load in self._loads.values() if load.connection is not None}

    def snapshot(self) -> list[dict[str, Any]]:
        """One row per load, quarantined ones too."""
        names = "request_id claim_id deadline_s connection ranks may_be_written"
        return [
            row(x, names) | {"state": x.state.value, "peer": x.handover.peer, "mode": x.handover.transfer_mode}
            for x in self._loads.values()
        ]

    def check_integrity(self) -> None:
        """AssertionError when the books contradict each other."""
        assert {x.request_id for x in self._loads.values()} == set(self._by_request), "loads by request"
        for claim_id, load in self._loads.items():
            assert load.claim_id == claim_id
            assert self._by_request[load.request_id] is load
            assert not load.ranks or self._by_job.get(load.job_id) is load, f"{load.request_id} reads without a job"
            assert load.state is not LoadPhase.FAILED or self._is_in_danger(load), (
                f"{load.request_id} is kept for nothing"
            )
            assert load.state is not LoadPhase.VERIFYING or not load.ranks
        assert all(load.claim_id in self._loads for load in self._by_job.values()), "a job without a load"

    def _holding_while_waiting(self) -> list[RemoteLoad]:
        return [x for x in self._loads.values() if x.state is LoadPhase.ANNOUNCED and x.granted is not None]

    def _announced_s(self, load: RemoteLoad) -> float:
        return load.deadline_s - self._settings.announce_s

    def _deadline(self, now: float, seconds: float) -> float:
        return now + seconds

    def _due_s(self, load: RemoteLoad) -> float:
        if load.state in (LoadPhase.FAILED, LoadPhase.VERIFYING):
            return load.deadline_s
        if load.connection is not None:
            return min(load.deadline_s, load.renew_s)
        return min(load.deadline_s, load.connect_s) if self._needs_connection(load) else load.deadline_s

    def _renew_in_s(self, remaining_ms: int) -> float:
        return min(self._settings.renew_s, remaining_ms / 3000 or inf)

    def _needs_connection(self, load: RemoteLoad) -> bool:
        return not load.is_push or load.state is LoadPhase.PARKED

    def _call(self, kind: str, load: RemoteLoad, message: m.ClaimMessage, now: float, deadline_s: float) -> None:
        self._calls.start(kind, load.claim_id, load.handover.peer, load.generation, message, now, deadline_s)

    def _is_of_our_tokens(self, load: RemoteLoad, pushed: m.Pushed) -> bool:
        is_awaited = load.state is LoadPhase.TRANSFERRING and load.is_push
        return is_awaited and pushed.ok and same_tokens(pushed.tokens_digest, load.tokens.digest)

    def _bind(self, load: RemoteLoad, now: float) -> None:
        peer = self._peers.get(load.handover.peer)
        is_waiting = load.connection is None and load.state is not LoadPhase.FAILED and self._needs_connection(load)
        if not is_waiting or peer is None or peer.connection is None:
            return
        load.connection, load.generation = peer.connection, peer.generation
        ids, handover = self._ids(load.claim_id, load.generation), load.handover
        if load.is_push:
            load.state, load.may_be_written = LoadPhase.TRANSFERRING, True
            told_by = handover.remote_generation
            what = load.blocks, *load.token_range, peer.epoch, load.tokens, told_by, self._local.makes_digests
            register = m.Register(handover.transfer_id or "", *what, **ids)
            self._call("register", load, register, now, load.deadline_s)
        else:
            claim = m.Claim(handover.remote_lease_id or "", handover.remote_generation or "", tokens=load.tokens, **ids)
            self._call("claim", load, claim, now, load.deadline_s)

    def _on_granted(self, load: RemoteLoad, granted: m.Granted, now: float) -> None:
        self._calls.answered("claim", load.claim_id)
        if not load.is_push and load.granted is None and load.state in (LoadPhase.ANNOUNCED, LoadPhase.PARKED):
            if not same_tokens(granted.tokens_digest, load.tokens.digest):
                self._fail(load, f"the producer cannot hand over: {m.OTHER_TOKENS}", now)
                return
            load.granted, load.renew_s = granted, now + self._renew_in_s(granted.remaining_ms)
            self._read(load, now)

    def _read(self, load: RemoteLoad, now: float) -> None:
        if load.state is not LoadPhase.PARKED or load.granted is None or load.connection is None:
            return
        if load.token_range[1] > load.granted.num_tokens:
            self._fail(load, f"tokens {load.token_range} wanted, the lease holds {load.granted.num_tokens}", now)
            return
        load.state, load.job_id = LoadPhase.TRANSFERRING, self._new_id()
        load.ranks = set(range(self._local.num_ranks))
        self._by_job[load.job_id] = load
        peer, source = load.handover.peer, load.granted.blocks
        is_proved = load.granted.is_proved and self._local.makes_digests
        job = TransferJob(
            load.job_id, TransferOp.READ, peer, load.connection, load.blocks, source, load.token_range, is_proved
        )
        self._emit(StartTransfer(job))

    def _on_pushed(self, load: RemoteLoad, pushed: m.Pushed, now: float) -> None:
        if pushed.proof is None or not self._local.makes_digests:
            self._done(load, pushed.num_tokens, now)
            return
        load.state, load.pushed, load.digest_job_id = LoadPhase.VERIFYING, pushed, self._new_id()
        self._by_digest_job[load.digest_job_id] = load
        self._emit(StartDigests(DigestJob(load.digest_job_id, load.connection, load.blocks, load.token_range)))

    def _proof(self, load: RemoteLoad, firsts: tuple[int, ...] | None) -> m.BytesProof | None:
        ranks = [load.digests.get(rank) for rank in range(self._local.num_ranks)]
        return make_proof(ranks, self._local.groups, firsts, load.token_range[1])

    def _verify(self, load: RemoteLoad, now: float) -> None:
        load.state = LoadPhase.VERIFYING
        theirs = load.granted.blocks if load.granted else ()
        proof = self._proof(load, first_blocks(load.blocks, theirs, self._local.groups, load.token_range))
        confirm = m.Confirm(proof, **self._ids(load.claim_id, load.generation))
        self._call("confirm", load, confirm, now, load.deadline_s)

    def _is_in_danger(self, load: RemoteLoad) -> bool:
        return bool(load.ranks) or load.may_be_written

    def _done(self, load: RemoteLoad, num_tokens: int, now: float, *, is_proved: bool = False) -> None:
        if load.state is LoadPhase.PARKED:
            self._withdraw(load, now)
        self._forget(load)
        self._emit(LoadEnded(load.request_id, True, "", False, num_tokens, is_proved))

    def _fail(self, load: RemoteLoad, reason: str, now: float, *, is_proved: bool = False) -> None:
        if load.state is LoadPhase.FAILED or load.claim_id not in self._loads:
            return
        load.state = LoadPhase.FAILED
        self._withdraw(load, now)
        is_in_danger = self._is_in_danger(load)
        if is_in_danger:
            load.deadline_s = now + self._settings.quarantine_s
            for kind in _CALLS:
                self._calls.answered(kind, load.claim_id)
        else:
            self._forget(load)
        self._emit(LoadEnded(load.request_id, False, reason, is_in_danger, 0, is_proved))

    def _withdraw(self, load: RemoteLoad, now: float) -> None:
        if load.connection is not None:
            deadline_s = inf if load.may_be_written else now + self._settings.load_s
            self._call("withdraw", load, m.Withdraw(**self._ids(load.claim_id, load.generation)), now, deadline_s)

    def _free_if_safe(self, load: RemoteLoad) -> None:
        if load.state is LoadPhase.FAILED and load.claim_id in self._loads and not self._is_in_danger(load):
            if load.is_push:
                self._calls.answered("withdraw", load.claim_id)
            self._forget(load)
            self._emit(BlocksSafe(load.request_id))

    def _forget(self, load: RemoteLoad) -> None:
        for kind in _CALLS:
            self._calls.answered(kind, load.claim_id)
        del self._loads[load.claim_id]
        del self._by_request[load.request_id]
        self._by_job.pop(load.job_id, None)
        self._by_digest_job.pop(load.digest_job_id, None)

    def _reason(self, message: m.ClaimMessage) -> str:
        match message:
            case m.Refused(why=m.Why.TOKENS):
                return f"the producer refused the claim: {m.OTHER_TOKENS}"
            case m.Verdict(is_proved=True):
                return m.OTHER_BYTES
            case m.Refused():
                return f"the producer refused the claim: {message.why.value}"
            case m.Pushed():
                return f"the producer could not write: {message.reason or m.OTHER_TOKENS}"
            case _:
                return (
                    "the lease did not hold while it was read: the prefill engine restarted, or heard nothing for so "
                    "long as kv_connector_extra_config.claim_s says there; raise it if engines stand still for longer"
                )
