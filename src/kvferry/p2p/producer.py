"""The prefill side: leases over the blocks of finished requests, and the claims of consumers on them.

    running ──finish (any normal end)──► leased ◄───────────────► claimed ──every consumer served──► done
       │                                   │    Claim / last claim    │
       │ abort, error                      │ lease deadline passed    │ a claim that is not renewed lapses
       ▼                                   ▼                          │
    aborted ◄───────── abort ───────── expired ◄──────────────────────┘

`finish` makes the lease: an id of 128 random bits over the request's blocks. A lease is held until its deadline
(`give_back` ends it at once, for whoever knows its id), until every consumer is served (a set of engines: repeats count
once), and in any case while a claim is open; claims lapse when they are not renewed, and no renewal reaches beyond
`max_lease_s`. Then `Release` gives the blocks back.
Pull: a consumer's Confirm is answered "valid" only while its claim is open, so whoever was read too late, or in another
life of this engine, is found out. Push: a registration waits for its transfer id, in either order; blocks that our own
write reads are released after the write has ended or its connection is destroyed, not before.
Either way the consumer proves the tokens whose KV it wants: a lease of other tokens is not read, and not written from,
and whoever wants other tokens does not use up the lease.
Our ranks make digests of the blocks (`kvferry.p2p.proof`) in the step that ends the prompt, or, of another number of
tokens, when that is leased or asked for; a block that is then read in another part than before must be what it was. A
Confirm that brings the consumer's is answered when ours are there, "valid" only if they are equal, and so is a Pushed
sent, with ours; after `proof_s` either goes without.

After a failure: a claim that ended is remembered with its last answer (`memory_s`), so a late or repeated request
cannot open it again, above all cannot start a second write; a full memory answers nothing rather than forget.
An aborted or expired lease answers claims with Refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, lcm
from typing import Any

from kvferry.kv.keys import DIGEST_BYTES
from kvferry.p2p import messages as m
from kvferry.p2p.actions import DigestJob, FinishReason, GroupRule, Release, StartDigests, StartTransfer, TransferJob
from kvferry.p2p.messages import Why
from kvferry.p2p.peers import Peer, Role, same_life, same_tokens
from kvferry.p2p.proof import RankDigests, first_blocks, make_proof
from kvferry.p2p.transports.calls import Remembered, row
from kvferry.p2p.transports.transport import TransferOp, TransferStatus

DigestAt = Callable[[int], bytes]
"""The digest of a request's first n tokens, for n up to all that have KV."""


@dataclass(slots=True)
class OpenClaim:
    """A consumer's hold on a lease; with `register`, on a transfer that we write."""

    claim_id: str
    peer: str
    generation: str
    connection: int
    consumer: str  # engine id
    lease: Lease
    tokens: m.TokenProof
    deadline_s: float
    opened_s: float
    register: m.Register | None = None
    job_id: str = ""
    ranks: set[int] = field(default_factory=set)  # of ours that may still write
    error: str = ""
    confirm: m.Confirm | None = None  # that waits for our digests
    proof_s: float = inf  # so long that, or the word that a write has ended, waits for them
    last: m.ClaimMessage | None = None  # the answer it ends with, as soon as there is room to remember it

    @property
    def key(self) -> str:
        """What it is found by."""
        return _key(self.peer, self.claim_id)


@dataclass(slots=True)
class Lease:
    """One request, or (without `request_id`) a transfer that was registered before we heard of its request."""

    request_id: str = ""
    transfer_id: str | None = None
    num_consumers: int = 1
    lease_id: str = ""  # empty while the request runs
    blocks: m.GroupBlocks = ()
    num_tokens: int = 0
    first_token_ids: tuple[int, ...] = ()
    digest_at: DigestAt | None = None  # there with `lease_id`
    deadline_s: float = inf
    last_s: float = inf  # no claim reaches beyond
    claims: dict[str, OpenClaim] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    given_up: dict[str, m.TokenProof] = field(default_factory=dict)  # consumers that withdrew while the request ran
    ended: Why | None = None
    digests: dict[int, dict[int, RankDigests | None]] = field(default_factory=dict)
    """Of the blocks, for the first n tokens that were asked for: by rank, as they come."""

    def serve(self, consumer: str, tokens: m.TokenProof) -> None:
        """This consumer has what it wanted, or does not want it any more.

        One that wanted other tokens is not whom the lease was made for: the lease goes on waiting for that one.
        """
        if not self.lease_id:
            self.given_up[consumer] = tokens
        elif same_tokens(self.digest(tokens), tokens.digest):
            self.served.add(consumer)

    def is_held(self, now: float) -> bool:
        """Whether somebody may still come for it, or reads it."""
        is_awaited = bool(self.lease_id) and len(self.served) < self.num_consumers and now < self.deadline_s
        return bool(self.claims) or is_awaited

    def digest(self, tokens: m.TokenProof) -> bytes:
        """Of as many of its own tokens; empty where it has fewer."""
        if self.digest_at is None or tokens.num_tokens > self.num_tokens:
            return b""
        return self.digest_at(tokens.num_tokens)

    def is_written_from(self) -> bool:
        """Whether our own ranks may still read its blocks."""
        return any(claim.ranks for claim in self.claims.values())

    @property
    def state(self) -> str:
        """One word of the drawing above."""
        if self.ended is not None:
            return self.ended.value
        if not self.lease_id:
            return "running"
        return "claimed" if self.claims else "leased"


@dataclass(slots=True)
class _DigestOrder:
    """Digests that our ranks make of a lease's first tokens."""

    lease: Lease
    num_tokens: int
    made: dict[int, RankDigests | None]
    before: dict[int, RankDigests | None]
    """Those of its first `num_before` tokens, which stay for the blocks that are whole in both."""
    num_before: int
    check_range: tuple[int, int] | None = None
    """Tokens whose blocks are read as they were read before, so that what is read of a part of them is theirs."""

    def joined(self, rank: int, digests: RankDigests | None, groups: Sequence[GroupRule]) -> RankDigests | None:
        """What a rank answered, behind what it had answered before."""
        if digests is None or not self.num_before:
            return digests
        before, same = self.before.get(rank), min(self.num_before, self.num_tokens)
        if before is None:
            return None
        digests, checks = digests[: len(groups)], digests[len(groups) :]
        if self.check_range is not None and self._has_changed(before, checks, groups):
            return tuple(bytes(len(of)) for of in digests)  # equal to nobody's
        cuts = [same // group.block_tokens * DIGEST_BYTES for group in groups]
        return tuple(old[:cut] + new[cut:] for old, new, cut in zip(before, digests, cuts, strict=True))

    def _has_changed(self, before: RankDigests, checks: RankDigests, groups: Sequence[GroupRule]) -> bool:
        assert self.check_range is not None
        first, end = self.check_range
        for old, new, group in zip(before, checks, groups, strict=True):
            at, stop = (-(-token // group.block_tokens) * DIGEST_BYTES for token in (first, end))
            if old[at:stop] != new[at:stop]:
                return True
        return False


def _key(peer: str, claim_id: str) -> str:
    """Of a claim: an id that somebody else has overheard names a claim of its own there, and nobody else's."""
    return f"{peer} {claim_id}"


def is_handed_over(reason: FinishReason) -> bool:
    """Any normal end counts, also a stop token as the first token."""
    return reason not in (FinishReason.ABORT, FinishReason.ERROR)


class Producer(Role):
    """All leases of this engine. Pure; emits actions."""

    def __init__(self, *surroundings: Any) -> None:
        super().__init__(*surroundings)
        settings = self._settings
        self._requests: dict[str, Lease] = {}
        self._leases: dict[str, Lease] = {}
        self._transfers: dict[str, Lease] = {}
        self._claims: dict[str, OpenClaim] = {}
        self._jobs: dict[str, OpenClaim] = {}
        self._digest_jobs: dict[str, _DigestOrder] = {}
        self._ended_claims: Remembered[m.ClaimMessage] = Remembered(settings.memory_s, settings.max_remembered)
        self._ended_leases: Remembered[Why] = Remembered(settings.memory_s, settings.max_remembered)

    def request_started(self, request_id: str, transfer_id: str | None, num_consumers: int) -> None:
        """A request that will be handed over runs. A transfer id that another live request has is not taken twice."""
        if request_id in self._requests:
            return
        lease = self._transfers.get(transfer_id) if transfer_id else None
        if lease is None or lease.request_id:
            is_taken = lease is not None
            lease = Lease(transfer_id=None if is_taken else transfer_id)
        lease.request_id, lease.num_consumers = request_id, max(1, num_consumers)
        self._requests[request_id] = lease
        if lease.transfer_id:
            self._transfers[lease.transfer_id] = lease
            self._ended_leases.forget(lease.transfer_id)

    def finish(
        self,
        request_id: str,
        reason: FinishReason,
        blocks: m.GroupBlocks,
        num_tokens: int,
        first_token_ids: tuple[int, ...],
        digest_at: DigestAt,
        now: float,
    ) -> Lease | None:
        """Make the lease; None when nothing is handed over (the blocks stay the host's)."""
        lease = self._requests.get(request_id)
        if lease is None or lease.lease_id:
            return None
        if not is_handed_over(reason):
            self.abort(request_id, now)
            return None
        lease.lease_id, lease.blocks = self._new_id(), blocks
        lease.num_tokens, lease.first_token_ids, lease.digest_at = num_tokens, first_token_ids, digest_at
        lease.deadline_s = min(lease.deadline_s, now + self._settings.lease_s)  # given back before: at once
        lease.last_s = now + self._settings.max_lease_s
        self._leases[lease.lease_id] = lease
        self._order_digests(lease, num_tokens)
        for consumer, tokens in lease.given_up.items():
            lease.serve(consumer, tokens)
        for claim in list(lease.claims.values()):
            self._write(claim, now)
        self._release_if_over(lease, now)
        return lease

    def prompt_ends(self, request_id: str, blocks: m.GroupBlocks, num_tokens: int) -> DigestJob | None:
        """The step that begins computes the last token of its prompt: what our ranks answer in that very step."""
        lease = self._requests.get(request_id)
        if lease is None or lease.lease_id or lease.ended is not None or not self._local.makes_digests:
            return None
        return self._digest_job(lease, blocks, (0, num_tokens), 0)

    def abort(self, request_id: str, now: float) -> None:
        """Take everything back: nothing can be claimed or confirmed any more. Blocks: `Release`, when leased."""
        lease = self._requests.get(request_id)
        if lease is None or lease.ended is not None:
            return
        lease.ended = Why.ABORTED
        for claim in list(lease.claims.values()):
            if not claim.job_id:
                self._end(claim, self._refused(claim.claim_id, claim.generation, Why.ABORTED), now)
            else:
                self._written_if_over(claim, now)
        self._release_if_over(lease, now)

    def give_back(self, lease_id: str, transfer_id: str, now: float) -> None:
        """Nobody will come for this lease; whoever reads it already may go on. Unknown ids: nothing.

        Of a request that still runs, the lease is over as soon as it is made.
        """
        lease = self._leases.get(lease_id) or self._transfers.get(transfer_id)
        if lease is not None and lease.request_id:
            lease.deadline_s = now
            self._release_if_over(lease, now)

    def on_message(self, peer: Peer, message: m.ClaimMessage, now: float) -> None:
        """A request of a consumer. Answers are the same however often it comes."""
        if isinstance(message, m.PushedSeen):
            self._calls.answered("pushed", _key(peer.name, message.claim_id))
            return
        if (answer := self._ended_claims.get(_key(peer.name, message.claim_id))) is not None:
            self._send(peer.name, answer)
            return
        claim = self._claims.get(_key(peer.name, message.claim_id))
        if claim is not None and not same_life(claim.generation, message.generation):
            return
        if claim is not None and claim.last is not None:
            return
        match message:
            case m.Claim():
                self._on_claim(peer, message, claim, now)
            case m.Register():
                self._on_register(peer, message, claim, now)
            case m.Renew():
                if claim is not None:
                    self._renewed(claim, now)
                else:
                    self._answer_for_good(peer, self._refused(message.claim_id, message.generation, Why.UNKNOWN), now)
            case m.Confirm():
                self._on_confirm(peer, message, claim, now)
            case m.Withdraw():
                self._on_withdraw(peer, message, claim, now)
            case _:
                pass

    def transfer_ended(self, job_id: str, rank: int, status: TransferStatus, reason: str, now: float) -> None:
        """One rank's part of a write ended."""
        claim = self._jobs.get(job_id)
        if claim is None or rank not in claim.ranks:
            return
        if status is not TransferStatus.OK:
            claim.error = claim.error or f"write failed on rank {rank}: {status.value}: {reason}"
        if status is not TransferStatus.UNKNOWN:
            claim.ranks.discard(rank)
        self._written_if_over(claim, now)
        if status in (TransferStatus.FAILED, TransferStatus.UNKNOWN):
            self._peers.close_connection(claim.peer, claim.connection, f"a write failed: {reason}", now)

    def digests_made(self, job_id: str, rank: int, digests: RankDigests | None, now: float) -> None:
        """One rank has read its blocks."""
        if (order := self._digest_jobs.get(job_id)) is None:
            return
        lease = order.lease
        order.made[rank] = order.joined(rank, digests, self._local.groups)
        if len(order.made) < self._local.num_ranks:
            return
        del self._digest_jobs[job_id]
        for claim in list(lease.claims.values()):
            self._go_on(claim, now)

    def _go_on(self, claim: OpenClaim, now: float) -> None:
        """What may have waited for digests."""
        if claim.confirm is not None:
            self._answer_confirm(claim, claim.confirm, now)
        else:
            self._written_if_over(claim, now)

    def connection_failing(self, connection: int, reason: str, now: float) -> None:
        for claim in list(self._claims.values()):
            if claim.connection == connection and not claim.job_id:
                self._end(claim, self._refused(claim.claim_id, claim.generation, Why.ABORTED), now)

    def connection_closed(self, connection: int, now: float) -> None:
        for claim in list(self._claims.values()):
            if claim.connection == connection:
                claim.error = claim.error or "the connection was destroyed"
                claim.ranks.clear()
                self._written_if_over(claim, now)

    def expire(self, now: float) -> None:
        """Lapsed claims, writes that do not end, leases nobody came for, old memories."""
        self._ended_claims.expire(now)
        self._ended_leases.expire(now)
        for claim in list(self._claims.values()):
            if now >= claim.proof_s and claim.last is None:
                self._go_on(claim, now)
                continue
            if now < claim.deadline_s:
                continue
            if claim.last is not None:
                self._end(claim, claim.last, now)
            elif claim.job_id:
                claim.deadline_s = inf
                self._peers.close_connection(claim.peer, claim.connection, "a write does not end", now)
            else:
                self._end(claim, self._refused(claim.claim_id, claim.generation, Why.EXPIRED), now)
        for lease in list(self._leases.values()):
            self._release_if_over(lease, now)

    def next_deadline(self) -> float:
        """When `expire` has something to do."""
        open_leases = (lease.deadline_s for lease in self._leases.values() if not lease.claims)
        open_claims = (x.deadline_s if x.last else min(x.deadline_s, x.proof_s) for x in self._claims.values())
        return min(min(open_claims, default=inf), min(open_leases, default=inf))

    def claimed_since_s(self) -> float:
        """When the oldest open claim on blocks of ours was made; infinity when there is none."""
        return min((claim.opened_s for claim in self._claims.values() if claim.lease.lease_id), default=inf)

    def busy_peers(self) -> set[str]:
        """Peers with claims: their records are kept."""
        return {claim.peer for claim in self._claims.values()}

    def snapshot(self) -> list[dict[str, Any]]:
        """One row per request, leased or running."""
        leases = {id(lease): lease for lease in (*self._requests.values(), *self._transfers.values())}
        names = "request_id transfer_id state lease_id deadline_s num_tokens served"
        claims = "claim_id peer consumer deadline_s ranks"
        return [row(x, names) | {"claims": [row(c, claims) for c in x.claims.values()]} for x in leases.values()]

    def check_integrity(self) -> None:
        """AssertionError when the books contradict each other."""
        for key, claim in self._claims.items():
            assert claim.lease.claims.get(key) is claim, f"claim {key} hangs in the air"
            assert self._ended_claims.get(key) is None, f"claim {key} is open and ended"
            assert not claim.ranks or self._jobs.get(claim.job_id) is claim
        leases = [*self._requests.values(), *(x for x in self._transfers.values() if not x.request_id)]
        live = [claim for claim in self._claims.values() if claim.lease.ended is None]
        assert sum(len(lease.claims) for lease in leases if lease.ended is None) == len(live), "claims of no lease"
        assert all(self._requests.get(lease.request_id) is lease for lease in self._leases.values())
        assert all(job in (claim.job_id for claim in self._claims.values()) for job in self._jobs), (
            "a job without a claim"
        )

    def _refused(self, claim_id: str, to: str, why: Why) -> m.Refused:
        return m.Refused(why, **self._ids(claim_id, to))

    def _answer_for_good(self, peer: Peer, answer: m.ClaimMessage, now: float) -> None:
        """Answer about a claim that is not open, and never open it again; no room to remember: no answer."""
        if len(self._ended_claims) >= self._settings.max_remembered // 2:
            return  # the other half is for claims that were open: whoever makes claims up does not use that up
        if self._ended_claims.put(_key(peer.name, answer.claim_id), answer, now):
            self._send(peer.name, answer)

    def _open(self, peer: Peer, message: m.Claim | m.Register, lease: Lease, now: float) -> OpenClaim | None:
        # Half of them are for requests that we know: whoever registers for others does not use those up.
        limit = self._settings.max_claims // (1 if lease.request_id else 2)
        if peer.connection is None or peer.hello is None or len(self._claims) >= limit:
            return None
        claim_id, register = message.claim_id, message if isinstance(message, m.Register) else None
        claim = OpenClaim(
            claim_id, peer.name, peer.hello.generation, peer.connection, peer.hello.engine_id, lease, message.tokens,
            inf, now, register,
        )  # fmt: skip
        self._claims[claim.key] = lease.claims[claim.key] = claim
        return claim

    def _extend(self, claim: OpenClaim, now: float) -> int:
        claim.deadline_s = min(now + self._settings.claim_s, claim.lease.last_s)
        return max(0, int(1000 * (claim.deadline_s - now)))

    def _find(self, message: m.Claim) -> Lease | None:
        """The lease a claim means, of this life of the engine."""
        lease = self._leases.get(message.lease_id)
        is_ours = message.lease_generation == self._local.generation
        return lease if is_ours and lease is not None and lease.ended is None else None

    def _on_claim(self, peer: Peer, message: m.Claim, claim: OpenClaim | None, now: float) -> None:
        lease = self._find(message)
        if claim is not None and claim.lease is not lease:
            return
        if lease is None:
            why = self._ended_leases.get(message.lease_id) or Why.UNKNOWN
            self._answer_for_good(peer, self._refused(message.claim_id, message.generation, why), now)
            return
        if claim is not None and claim.tokens != message.tokens:
            return
        digest = lease.digest(message.tokens)
        if not same_tokens(digest, message.tokens.digest):
            self._answer_for_good(peer, self._refused(message.claim_id, message.generation, Why.TOKENS), now)
            return
        claim = claim or self._open(peer, message, lease, now)
        if claim is None and peer.connection is not None:
            self._send(peer.name, self._refused(message.claim_id, message.generation, Why.BUSY))
        if claim is not None:
            self._order_digests(lease, message.tokens.num_tokens)
            remaining_ms, is_proved = self._extend(claim, now), self._local.makes_digests
            ids = self._ids(message.claim_id, message.generation)
            self._send(peer.name, m.Granted(lease.blocks, lease.num_tokens, remaining_ms, digest, is_proved, **ids))

    def _order_digests(self, lease: Lease, num_tokens: int) -> None:
        """Of its first tokens. Blocks that are whole among others that have been read keep the digests of then."""
        is_known = num_tokens in lease.digests or not num_tokens
        if not self._local.makes_digests or is_known or lease.ended is not None:
            return
        known = max((n for n, made in lease.digests.items() if self._is_made(made)), default=0)
        same = min(known, num_tokens)
        first = min((same // group.block_tokens * group.block_tokens for group in self._local.groups), default=0)
        if first == num_tokens:
            lease.digests[num_tokens] = lease.digests[known]
        else:
            self._emit(StartDigests(self._digest_job(lease, lease.blocks, (first, num_tokens), known)))

    def _digest_job(self, lease: Lease, blocks: m.GroupBlocks, token_range: tuple[int, int], known: int) -> DigestJob:
        """Of blocks that hold both what is `known` and what is not, those of what is known are made once more: a bit
        may have flipped since then."""
        made: dict[int, RankDigests | None] = {}
        lease.digests[token_range[1]] = made
        first, num_tokens = token_range
        same, together = min(known, num_tokens), lcm(*(group.block_tokens for group in self._local.groups))
        end = min(known, -(-same // together) * together)
        check_range = (first, end) if first < end else None
        job = DigestJob(self._new_id(), None, blocks, token_range, check_range)
        before = lease.digests.get(known, {})
        self._digest_jobs[job.job_id] = _DigestOrder(lease, num_tokens, made, before, known, check_range)
        return job

    def _is_made(self, made: dict[int, RankDigests | None]) -> bool:
        return len(made) == self._local.num_ranks and None not in made.values()

    def _is_waiting(self, claim: OpenClaim, num_tokens: int, now: float) -> bool:
        """Whether our ranks still make digests of the lease's first tokens, and have the time to."""
        lease = claim.lease
        made = None if lease.ended is not None else lease.digests.get(num_tokens)
        if made is None or len(made) >= self._local.num_ranks:
            return False
        claim.proof_s = min(claim.proof_s, now + self._settings.proof_s)
        return now < claim.proof_s

    def _proof(self, lease: Lease, firsts: tuple[int, ...] | None, num_tokens: int) -> m.BytesProof | None:
        """Ours; None where we cannot tell. An aborted lease's blocks may have been others' when they were read."""
        by_rank = lease.digests.get(num_tokens, {}) if lease.ended is None else {}
        ranks = [by_rank.get(rank) for rank in range(self._local.num_ranks)]
        return make_proof(ranks, self._local.groups, firsts, num_tokens)

    def _renewed(self, claim: OpenClaim, now: float) -> None:
        remaining_ms = 0 if claim.job_id else self._extend(claim, now)
        ids = self._ids(claim.claim_id, claim.generation)
        self._send(claim.peer, m.Renewed(remaining_ms, **ids))

    def _on_register(self, peer: Peer, message: m.Register, claim: OpenClaim | None, now: float) -> None:
        if peer.hello is None or message.epoch != peer.hello.epoch:
            return  # of a connection that the consumer destroyed: its blocks may be somebody else's
        if claim is None:
            lease = self._transfers.get(message.transfer_id)
            over = lease.ended if lease else self._ended_leases.get(message.transfer_id)
            is_there = lease is not None and bool(lease.lease_id)
            if message.lease_generation and not (
                is_there and same_life(message.lease_generation, self._local.generation)
            ):
                over = over or Why.UNKNOWN  # the life that told of it had made the lease already
            if over is not None:
                self._answer_for_good(peer, self._refused(message.claim_id, message.generation, over), now)
                return
            lease = lease or Lease(transfer_id=message.transfer_id)
            claim = self._open(peer, message, lease, now)
            if claim is None:
                return
            self._transfers[message.transfer_id] = lease
        self._renewed(claim, now)
        if claim.lease.lease_id and not claim.job_id:
            self._write(claim, now)

    def _on_confirm(self, peer: Peer, message: m.Confirm, claim: OpenClaim | None, now: float) -> None:
        if claim is None or claim.register is not None:
            self._send(peer.name, m.Verdict(False, False, **self._ids(message.claim_id, message.generation)))
        elif claim.confirm is None or claim.confirm == message:
            if message.proof is not None and message.proof.end_token <= claim.tokens.num_tokens:
                self._order_digests(claim.lease, message.proof.end_token)
            self._answer_confirm(claim, message, now)

    def _answer_confirm(self, claim: OpenClaim, confirm: m.Confirm, now: float) -> None:
        """As soon as our digests are there."""
        told, ours = confirm.proof, None
        if told is not None:
            if self._is_waiting(claim, told.end_token, now):
                claim.confirm = confirm
                self._extend(claim, now)
                return
            ours = self._proof(claim.lease, told.first_blocks, told.end_token)
        ids = self._ids(claim.claim_id, claim.generation)
        claim.lease.serve(claim.consumer, claim.tokens)
        self._end(claim, m.Verdict(ours is None or ours == told, ours is not None, **ids), now)

    def _on_withdraw(self, peer: Peer, message: m.ClaimMessage, claim: OpenClaim | None, now: float) -> None:
        withdrawn = m.Withdrawn(**self._ids(message.claim_id, message.generation))
        if claim is None:
            self._answer_for_good(peer, withdrawn, now)
        elif not claim.job_id:  # a running write answers with Pushed when it has ended
            claim.lease.serve(claim.consumer, claim.tokens)
            self._end(claim, withdrawn, now)

    def _write(self, claim: OpenClaim, now: float) -> None:
        """Start the write of a registered claim whose lease is there."""
        register, lease = claim.register, claim.lease
        if register is None or claim.job_id or claim.last is not None or lease.ended is not None:
            return
        claim.job_id = self._new_id()
        self._jobs[claim.job_id] = claim
        claim.deadline_s = now + self._settings.load_s
        if register.end_token > lease.num_tokens:
            claim.error = f"tokens up to {register.end_token} wanted, the lease holds {lease.num_tokens}"
        elif not same_tokens(lease.digest(register.tokens), register.tokens.digest):
            claim.error = m.OTHER_TOKENS
        elif register.first_token < register.end_token:
            if register.wants_proof:
                self._order_digests(lease, register.end_token)
            claim.ranks = set(range(self._local.num_ranks))
            tokens = (register.first_token, register.end_token)
            job = TransferJob(
                claim.job_id, TransferOp.WRITE, claim.peer, claim.connection, lease.blocks, register.blocks, tokens
            )
            self._emit(StartTransfer(job))
        self._written_if_over(claim, now)

    def _written_if_over(self, claim: OpenClaim, now: float) -> None:
        if claim.ranks or not claim.job_id or claim.last is not None:
            return
        lease, ids, register = claim.lease, self._ids(claim.claim_id, claim.generation), claim.register
        digest, proof = lease.digest(claim.tokens), None
        if register is not None and register.wants_proof and not claim.error:
            if self._is_waiting(claim, register.end_token, now):
                return
            tokens = register.first_token, register.end_token
            firsts = first_blocks(lease.blocks, register.blocks, self._local.groups, tokens)
            proof = self._proof(lease, firsts, register.end_token)
        pushed = m.Pushed(not claim.error, claim.error[:2048], lease.num_tokens, digest, proof, **ids)
        lease.serve(claim.consumer, claim.tokens)
        self._end(claim, pushed, now)

    def _end(self, claim: OpenClaim, answer: m.ClaimMessage, now: float) -> None:
        """Close a claim with its last answer; one that may be registered again stays while there is no room for it."""
        if claim.key not in self._claims:
            return
        if not self._ended_claims.put(claim.key, answer, now) and claim.register is not None:
            claim.last, claim.deadline_s = answer, now + self._settings.retry_s
            return
        del self._claims[claim.key]
        del claim.lease.claims[claim.key]
        self._jobs.pop(claim.job_id, None)
        if isinstance(answer, m.Pushed):
            deadline_s = now + self._settings.load_s
            self._calls.start("pushed", claim.key, claim.peer, claim.generation, answer, now, deadline_s)
        else:
            self._send(claim.peer, answer)
        self._release_if_over(claim.lease, now)

    def _release_if_over(self, lease: Lease, now: float) -> None:
        if lease.ended is None:
            if lease.is_held(now) or (lease.request_id and not lease.lease_id):
                return
            lease.ended = Why.DONE if len(lease.served) >= lease.num_consumers else Why.EXPIRED
        if lease.is_written_from():
            return
        self._digest_jobs = {job: order for job, order in self._digest_jobs.items() if order.lease is not lease}
        if lease.transfer_id and self._transfers.get(lease.transfer_id) is lease:
            del self._transfers[lease.transfer_id]
            if lease.request_id:
                self._ended_leases.put(lease.transfer_id, lease.ended, now)
        self._requests.pop(lease.request_id, None)
        if self._leases.pop(lease.lease_id, None) is not None:
            self._ended_leases.put(lease.lease_id, lease.ended, now)
            self._emit(Release(lease.request_id, lease.ended.value))
