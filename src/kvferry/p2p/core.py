"""The P2P core of one engine: producer and consumer, as pure state. No I/O, no threads, no clock.

        host: request_started, finish, abort,            network: message, peer_connected, peer_lost
              announce, park                             workers: transfer_ended, peer_closed
                        │                                             │          tick(now) at next_deadline()
                        ▼                                             ▼
              ┌─────────────────────────── P2PCore ───────────────────────────┐
              │ producer (leases, claims)    peers (handshake, connections)    │
              │ consumer (loads)             calls (repeat until answered)     │
              └───────────────────────────────┬────────────────────────────────┘
                                              ▼
              take_actions(): Connect, Disconnect, Send, OpenPeer, ClosePeer, StartTransfer, Release, LoadEnded, ...

The state drawings, and what is true after a failure, stand in `producer`, `consumer` and `peers`; the messages in
`messages`. Every input takes `now` (seconds of one monotonic clock, which never goes back), none blocks, and none
raises because of what a peer or a client sent, with the exceptions its docstring names. The owner calls from one
thread at a time, runs the actions in order, and calls `tick` no later than `next_deadline()`.

What makes an unreliable world harmless:
  loss            every request is repeated until it is answered or its deadline passed
  repeats         handlers give the same answer again; ended claims are remembered with their answer
  late messages   bound to a claim id and to one life (generation) of sender and receiver; no message opens a claim
                  twice; a registration counts only on the connection (epoch) it was made for; a Hello only as an answer
  late bytes      blocks are quarantined until nothing can land in them; reads count only after the lease was confirmed
  restarts        a new generation at the same address ends everything of the old one
  silence         every wait has a deadline; a peer that owes answers and is silent is given up
Peers' clocks are never compared with ours.

Duties of the driver: a message sent to a peer comes from the same peer name on the other side's answer; an accepted
link is best named by the dialling engine's own address, so that its restart is noticed at once. `StartTransfer` uses
exactly the connection it names. `peer_closed` is told only when nothing can land through it any more, once per
`ClosePeer`. Every rank answers every job, except after `peer_closed` of its connection.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from kvferry.p2p import messages as m
from kvferry.p2p.actions import Action, DigestJob, FinishReason, LocalEngine, P2PSettings, Send
from kvferry.p2p.consumer import Consumer
from kvferry.p2p.peers import GeometryCheck, Peers
from kvferry.p2p.producer import DigestAt, Lease, Producer
from kvferry.p2p.proof import RankDigests
from kvferry.p2p.selection import select_blocks
from kvferry.p2p.transports.calls import Calls
from kvferry.p2p.transports.transport import TransferStatus

_TO_PRODUCER = (m.Claim, m.Renew, m.Confirm, m.Register, m.Withdraw, m.PushedSeen)


def random_id() -> str:
    """128 random bits in hex."""
    return secrets.token_hex(16)


class P2PCore:
    """Producer and consumer of one engine; see the module."""

    def __init__(
        self,
        local: LocalEngine,
        check: GeometryCheck,
        settings: P2PSettings | None = None,
        new_id: Callable[[], str] = random_id,
    ) -> None:
        self.local = local
        self.settings = settings or P2PSettings()
        self._actions: list[Action] = []
        self._last_s: float | None = None
        self._calls = Calls(self.settings.retry_s)
        emit = self._actions.append
        self._peers = Peers(local, self.settings, check, self._calls, emit, new_id)
        self._producer = Producer(local, self.settings, self._peers, self._calls, emit, new_id)
        self._consumer = Consumer(local, self.settings, self._peers, self._calls, emit, new_id)
        self._peers.listen(self._producer, self._consumer)

    # The producer's host.

    def request_started(self, request_id: str, transfer_id: str | None, num_consumers: int, now: float) -> None:
        """A request that shall be handed over has begun; push needs the `transfer_id` that both engines were told."""
        self._begin(now)
        self._producer.request_started(request_id, transfer_id, num_consumers)
        self._end(now)

    def finish(
        self,
        request_id: str,
        reason: FinishReason,
        blocks: Sequence[Sequence[int]],
        num_tokens: int,
        first_token_ids: Sequence[int],
        digest_at: DigestAt,
        now: float,
        *,
        mode: str = "pull",
    ) -> dict[str, Any] | None:
        """The request ended: `kv_transfer_params` for the consumer, or None where nothing is handed over.

        `blocks`: per group the block ids by position; their first `num_tokens` tokens are handed over, to whoever has
        the same digest as `digest_at`. With an answer, the blocks belong to the lease until `Release(request_id)`, also
        when there are none. With None they stay the host's, and consumers are told that nothing comes. ValueError:
        blocks do not cover the tokens; nothing changed.
        """
        selected = select_blocks(blocks, self.local.groups, num_tokens)
        self.request_started(request_id, None, 1, now)
        lease = self._producer.finish(request_id, reason, selected, num_tokens, tuple(first_token_ids), digest_at, now)
        self._end(now)
        return self._params(lease, mode) if lease else None

    def give_back(self, lease_id: str, transfer_id: str, now: float) -> None:
        """Whoever knows one of these ids says that nobody will come for what was handed over under it."""
        self._begin(now)
        self._producer.give_back(lease_id, transfer_id, now)
        self._end(now)

    def prompt_ends(
        self, request_id: str, blocks: Sequence[Sequence[int]], num_tokens: int, now: float
    ) -> DigestJob | None:
        """The step that begins computes the last of these tokens, all of the prompt's, of a request that was started.

        A job for our ranks to carry out after that very step's forward, so that its end needs no step more; or None.
        """
        self._begin(now)
        job = self._producer.prompt_ends(request_id, tuple(map(tuple, blocks)), num_tokens)
        self._end(now)
        return job

    # The consumer's host.

    def announce(self, request_id: str, params: object, tokens: m.TokenProof, now: float) -> None:
        """A request whose KV a peer has; connects and claims ahead. Ends with exactly one `LoadEnded`.

        `tokens` proves to the peer which KV is meant: that of these tokens, and of none behind them.

        TransferError: `params` (left as they are) cannot be used, or the request is still quarantined; nothing changed.
        """
        handover = params if isinstance(params, m.Handover) else m.Handover.parse(params)
        self._begin(now)
        self._consumer.announce(request_id, handover, tokens, now)
        self._end(now)

    def park(self, request_id: str, blocks: Sequence[Sequence[int]], token_range: tuple[int, int], now: float) -> bool:
        """Blocks for tokens [first, end) of an announced request, per group by position; the transfer may start.

        False: the load has ended already (or was never announced); the blocks are not touched.
        """
        self._begin(now)
        accepted = self._consumer.park(request_id, tuple(map(tuple, blocks)), token_range, now)
        self._end(now)
        return accepted

    def abort(self, request_id: str, now: float) -> None:
        """Either role: the host gave this request up. Blocks come back as after any other end."""
        self._begin(now)
        self._producer.abort(request_id, now)
        self._consumer.abort(request_id, now)
        self._end(now)

    # Network and workers.

    def message(self, peer: str, message: m.AnyMessage, now: float) -> None:
        """A decoded message from this peer. Never raises; what does not fit is dropped."""
        self._begin(now)
        if isinstance(message, m.Hello):
            self._peers.on_hello(peer, message, now)
        elif isinstance(message, m.HelloRefused):
            self._peers.on_hello_refused(peer, message, now)
        elif (sender := self._peers.sender(peer, message, now)) is not None:
            self._dispatch(sender, message, now)
        self._end(now)

    def check_of(self, peer: str, hello: m.Hello) -> Callable[[], object]:
        """What finds out, for `message`, whether KV can be exchanged with who says this; also for other threads.

        The check that the core was given must remember its answers.
        """
        return self._peers.check_of(peer, hello)

    def peer_connected(self, peer: str, now: float) -> None:
        """The control link to this peer is up."""
        self._begin(now)
        self._peers.connected(peer, now)
        self._end(now)

    def peer_lost(self, peer: str, reason: str, now: float) -> None:
        """The control link is gone, or could not be made: what depends on the peer fails now."""
        self._begin(now)
        self._peers.lost(peer, reason, now)
        self._end(now)

    def peer_closed(self, peer: str, connection: int, now: float) -> None:
        """The transport connection is destroyed in all ranks: nothing lands through it any more."""
        self._begin(now)
        self._peers.closed(peer, connection, now)
        self._end(now)

    def transfer_ended(
        self,
        job_id: str,
        rank: int,
        status: TransferStatus,
        reason: str,
        now: float,
        digests: RankDigests | None = None,
    ) -> None:
        """One rank's part of a job ended, or (UNKNOWN) will never tell. `digests`: of what a proved one read."""
        self._begin(now)
        if not self._consumer.transfer_ended(job_id, rank, status, reason, digests, now):
            self._producer.transfer_ended(job_id, rank, status, reason, now)
        self._end(now)

    def digests_made(self, job_id: str, rank: int, digests: RankDigests | None, now: float) -> None:
        """One rank's answer to `StartDigests`; None where it has none that a peer could compare."""
        self._begin(now)
        self._consumer.digests_made(job_id, rank, digests, now)
        self._producer.digests_made(job_id, rank, digests, now)
        self._end(now)

    # The driver.

    def tick(self, now: float) -> None:
        """Let time pass: deadlines, repeats, renewals. Any other input does it too."""
        self._begin(now)
        self._end(now)

    def next_deadline(self) -> float:
        """When `tick` is due; infinity when nothing waits."""
        peers = self._peers.next_deadline(self._consumer.wanted_peers(), self._busy_peers())
        stuck_s = self._consumer.stuck_from_s(self._producer.claimed_since_s())
        roles_s = self._producer.next_deadline(), self._consumer.next_deadline()
        return min(self._calls.next_deadline(), *roles_s, stuck_s, peers)

    def take_actions(self) -> list[Action]:
        """What is to be done, in order; each action is handed out once."""
        actions = self._actions[:]
        self._actions.clear()
        return actions

    def snapshot(self) -> dict[str, Any]:
        """Everything that is open, as plain values, for tests and `explain`."""
        return {
            "engine_id": self.local.engine_id,
            "generation": self.local.generation,
            "peers": self._peers.snapshot(),
            "producer": self._producer.snapshot(),
            "consumer": self._consumer.snapshot(),
            "num_open_calls": len(self._calls),
        }

    def check_integrity(self) -> None:
        """AssertionError when our own books contradict each other. Linear; for tests and idle moments."""
        self._producer.check_integrity()
        self._consumer.check_integrity()

    def _dispatch(self, sender: Any, message: m.ClaimMessage, now: float) -> None:
        role = self._producer if isinstance(message, _TO_PRODUCER) else self._consumer
        role.on_message(sender, message, now)

    def _busy_peers(self) -> set[str]:
        return self._consumer.busy_peers() | self._producer.busy_peers()

    def _begin(self, now: float) -> None:
        gap_s = now - (self._last_s if self._last_s is not None else now)
        self._last_s = now
        if gap_s > self.settings.liveness_s / 2:
            self._peers.forgive(now)
        self._producer.expire(now)
        self._consumer.expire(now)
        self._consumer.give_up_one(self._producer.claimed_since_s(), now)

    def _end(self, now: float) -> None:
        self._peers.tick(now, self._consumer.wanted_peers(), self._busy_peers())
        self._actions.extend(Send(call.peer, call.message) for call in self._calls.due(now, self._peers.reaches))

    def _params(self, lease: Lease, mode: str) -> dict[str, Any]:
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.local.engine_id,
            "remote_host": self.local.host,
            "remote_port": self.local.port,
            "remote_block_ids": [list(ids) for ids in lease.blocks],
            "remote_request_id": lease.request_id,
            "remote_num_tokens": lease.num_tokens,
            "remote_lease_id": lease.lease_id,
            "remote_generation": self.local.generation,
            "remote_first_token_ids": list(lease.first_token_ids),
            "tp_size": self.local.num_ranks,
            "transfer_id": lease.transfer_id,
            "transfer_mode": mode,
        }
