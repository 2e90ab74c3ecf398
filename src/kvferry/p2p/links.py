"""One worker's links to the workers of peers: which transport serves which, and the jobs that run over them.

connection   one handshake with a peer engine; numbered by the core
link         this worker's end of it: per peer worker a handle of the chosen transport, made when first needed
job          becomes one ticket per peer worker; ends when all have, with the worst of their ends
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from kvferry.errors import TransferError
from kvferry.p2p.actions import DigestJob, TransferJob
from kvferry.p2p.digester import Digester
from kvferry.p2p.geometry import EngineGeometry, decode_geometry
from kvferry.p2p.plan import RankTransfer, plan_transfer, unfilled_blocks
from kvferry.p2p.proof import RankDigests, proof_form
from kvferry.p2p.step_messages import DigestReport, OpenOrder, P2PWorkerReport, RankReport
from kvferry.p2p.transports.choice import choose
from kvferry.p2p.transports.transport import PeerHandle, TransferOp, TransferStatus, Transport

logger = logging.getLogger(__name__)

_WORST = (TransferStatus.UNKNOWN, TransferStatus.FAILED, TransferStatus.REJECTED, TransferStatus.OK)
_Ticket = tuple[str, int]


@dataclass(slots=True)
class _Link:
    order: OpenOrder
    local: EngineGeometry
    remote: EngineGeometry
    peers: dict[int, tuple[Transport, PeerHandle]] = field(default_factory=dict)
    is_comparable: bool = False
    """Both engines make the same digests of the same KV."""
    num_gone: int = 0
    """Workers of the peer that had ended before they were reached."""

    def has_ended(self) -> bool:
        """Whether all the peer's workers that we have to do with are known to have ended."""
        return all(transport.peer_has_ended(peer) for transport, peer in self.peers.values())


@dataclass(slots=True, eq=False)
class _Running:
    """A job, or the closing of a link."""

    name: str | int
    started_s: float
    link: _Link | None = None
    tickets: dict[_Ticket, int] = field(default_factory=dict)
    """Those that have not ended, each with the peer's rank."""
    status: TransferStatus = TransferStatus.OK
    reason: str = ""
    num_bytes: Counter[str] = field(default_factory=Counter)
    ended_s: float = 0.0
    awaits_digests: bool = False
    """Of what it reads, which its transport asks for as soon as that is there."""
    digests: RankDigests | None = None

    def note(self, status: TransferStatus, reason: str) -> None:
        """The worst end counts; the first reason is kept."""
        if status is not TransferStatus.OK:
            self.reason = self.reason or reason
        self.status = min(self.status, status, key=_WORST.index)


class Links:
    """All links of one worker. Single-threaded; never blocks: the transports have threads of their own."""

    def __init__(self, rank: int, requested: str, transports: Mapping[str, Transport]) -> None:
        self._rank = rank
        self._requested = requested
        self._transports = transports
        self._links: dict[int, _Link] = {}
        self._fenced: set[int] = set()
        self._unfenced: dict[int, _Link] = {}
        self._tickets: dict[_Ticket, _Running] = {}
        self._digesting: dict[str, _Running] = {}
        self._report = P2PWorkerReport()
        self.digester: Digester | None = None

    def open(self, order: OpenOrder) -> None:
        """Jobs on this connection may come. What was checked at the handshake is not checked again."""
        local, remote = decode_geometry(order.local_geometry), decode_geometry(order.remote_geometry)
        self._links[order.connection] = _Link(
            order, local, remote, is_comparable=proof_form(local) == proof_form(remote)
        )
        if order.is_writer:
            for rank in range(len(remote.ranks)):
                self._reach_writer(order, rank)

    def _reach_writer(self, order: OpenOrder, rank: int) -> None:
        blobs = _blobs(order, rank)
        try:
            self._reach(order.connection, rank)
        except TransferError as error:
            if any(self._transports[name].maker_has_ended(blobs[name]) for name in self._transports.keys() & blobs):
                self._links[order.connection].num_gone += 1
                return
            logger.warning("%s writes to this engine, which cannot see whether that peer lives: %s", order.peer, error)

    def start(self, job: TransferJob) -> None:
        """Plan and submit this rank's part; a part without bytes ends at once, an impossible one is rejected."""
        running = _Running(job.job_id, time.perf_counter())
        try:
            transfers = self._plan(job)
            running.started_s = time.perf_counter()
            then = self._digests_after(running, job) if len(transfers) == 1 else None
            for peer_rank, transfer in transfers:
                transport, peer = self._reach(job.connection, peer_rank)
                ticket = transport.submit(peer, job.op, transfer.pieces, then)
                self._add(running, transport, ticket, peer_rank)
        except TransferError as error:
            running.note(TransferStatus.REJECTED, str(error))
        self._end_if_over(running)

    def _digests_after(self, running: _Running, job: TransferJob) -> Callable[[], None] | None:
        """What asks for the digests of what the job reads; None where they are not wanted, or cannot be compared."""
        if not job.is_proved or self.digester is None or not self._links[job.connection].is_comparable:
            return None
        running.awaits_digests = True
        self._digesting[job.job_id] = running
        wanted = DigestJob(job.job_id, job.connection, job.local_blocks, job.token_range)
        return partial(self.digester.submit, wanted)

    def digest(self, job: DigestJob) -> None:
        """Make digests of blocks; None at once where nobody could compare them."""
        link = None if job.connection is None else self._links.get(job.connection)
        if self.digester is None or (job.connection is not None and (link is None or not link.is_comparable)):
            self._report.digests.append(DigestReport(job.job_id, self._rank, None))
        else:
            self.digester.submit(job)

    def digest_now(self, job: DigestJob) -> None:
        """The same, on the caller's thread."""
        digests = None if self.digester is None else self.digester.digests(job)
        self._report.digests.append(DigestReport(job.job_id, self._rank, digests))

    def fence(self, connection: int) -> None:
        """Close a connection as soon as the peer's processes have ended."""
        if connection in self._links:
            self._fenced.add(connection)

    def close(self, connection: int) -> None:
        """Destroy a connection; told as closed once nothing of it can land any more."""
        if (link := self._links.pop(connection, None)) is None:
            return  # its fence came first
        self._fenced.discard(connection)
        running = _Running(connection, time.perf_counter(), link)
        for peer_rank, (transport, peer) in link.peers.items():
            self._add(running, transport, transport.close_peer(peer), peer_rank)
        self._end_if_over(running)

    def poll(self) -> P2PWorkerReport:
        """What ended since the last call."""
        for connection in list(self._fenced):
            link = self._links[connection]
            if len(link.peers) + link.num_gone == len(link.remote.ranks) and link.has_ended():
                self.close(connection)
        for connection in [number for number, link in self._unfenced.items() if link.has_ended()]:
            del self._unfenced[connection]
            self._report.closed.append((connection, self._rank))
        for name, transport in self._transports.items():
            for done in transport.poll():
                running = self._tickets.pop((name, done.ticket))
                peer_rank = running.tickets.pop((name, done.ticket))
                if running.link is not None and done.status is TransferStatus.OK:
                    del running.link.peers[peer_rank]  # fenced; nobody waits for its end
                running.ended_s = max(running.ended_s, done.ended_s)
                running.num_bytes[name] += done.num_bytes
                running.note(done.status, done.reason)
                self._end_if_over(running)
        for job_id, digests in self.digester.poll() if self.digester is not None else ():
            if (reading := self._digesting.pop(job_id, None)) is None:
                self._report.digests.append(DigestReport(job_id, self._rank, digests))
            else:
                reading.digests, reading.awaits_digests = digests, False
                self._end_if_over(reading)
        report, self._report = self._report, P2PWorkerReport()
        return report

    def _add(self, running: _Running, transport: Transport, ticket: int, peer_rank: int) -> None:
        key = transport.capabilities.name, ticket
        running.tickets[key] = peer_rank
        self._tickets[key] = running

    def _end_if_over(self, running: _Running) -> None:
        is_ok = running.status is TransferStatus.OK
        if running.tickets or (running.awaits_digests and is_ok):
            return
        if isinstance(running.name, str):
            self._digesting.pop(running.name, None)
            seconds = max(0.0, running.ended_s - running.started_s)
            self._report.jobs.append(
                RankReport(
                    running.name, self._rank, running.status, running.reason, dict(running.num_bytes), seconds,
                    running.digests,
                )
            )  # fmt: skip
        elif running.status is TransferStatus.OK:
            self._report.closed.append((running.name, self._rank))
        elif running.link is not None:
            self._unfenced[running.name] = running.link
            logger.error(
                "connection %d to %s could not be destroyed (%s): its blocks stay out of use until that engine ends",
                running.name, running.link.order.peer, running.reason,
            )  # fmt: skip

    def _plan(self, job: TransferJob) -> list[tuple[int, RankTransfer]]:
        """(the peer's rank, the copies) of this rank's part."""
        link = self._links.get(job.connection)
        if link is None:
            raise TransferError(f"connection {job.connection} with {job.peer} is closed")
        is_write = job.op is TransferOp.WRITE
        engines, blocks = (link.local, link.remote), (job.local_blocks, job.remote_blocks)
        what = (*engines, *blocks) if is_write else (*engines[::-1], *blocks[::-1])
        if any(group.window_tokens for group in link.local.ranks[0].groups):
            for group, position in unfilled_blocks(*what, job.token_range):
                raise TransferError(
                    f"block {position} of group {group} would be filled in part: the prefill engine has dropped tokens "
                    "that the decode engine's window shows; it must end with the prompt (max_tokens=1)"
                )
        if is_write:
            return [(x.destination_rank, x) for x in plan_transfer(*what, job.token_range, source_rank=self._rank)]
        return [(x.source_rank, x) for x in plan_transfer(*what, job.token_range, destination_rank=self._rank)]

    def _reach(self, connection: int, peer_rank: int) -> tuple[Transport, PeerHandle]:
        link = self._links[connection]
        if peer_rank not in link.peers:
            blobs = _blobs(link.order, peer_rank)
            transport = choose(self._requested, self._transports, blobs)
            link.peers[peer_rank] = transport, transport.connect(blobs[transport.capabilities.name])
            logger.info(
                "KV between %s (rank %d) and this engine (rank %d) moves over %s",
                link.order.peer, peer_rank, self._rank, transport.capabilities.name,
            )  # fmt: skip
        return link.peers[peer_rank]


def _blobs(order: OpenOrder, rank: int) -> dict[str, bytes]:
    return {name: ranks[rank] for name, ranks in order.blobs.items() if rank < len(ranks)}
