"""What the two sides of a P2P connector tell each other. Plain data: hosts pickle it over their own pipes."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvferry.contract.base import KVConnectorHandshakeMetadata, KVConnectorMetadata, KVConnectorWorkerMetadata
from kvferry.p2p.actions import DigestJob, TransferJob
from kvferry.p2p.proof import RankDigests
from kvferry.p2p.transports.transport import TransferStatus


@dataclass(frozen=True, slots=True)
class P2PHandshake(KVConnectorHandshakeMetadata):
    """One worker's KV cache, and per transport what peers need to reach it."""

    rank: int
    geometry: bytes
    """An encoded `EngineGeometry` of this rank alone."""
    blobs: dict[str, bytes]
    makes_digests: bool = False
    """Of its blocks, where `verify_loads` says so and they lie in host memory."""


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """A peer with which jobs on `connection` will be: both engines' encoded geometry, the peer's blobs by rank."""

    connection: int
    peer: str
    local_geometry: bytes
    remote_geometry: bytes
    blobs: dict[str, tuple[bytes, ...]]
    is_writer: bool
    """The peer writes to us: it must be watched, for closing our end is no fence for what others write."""


@dataclass(slots=True)
class P2PStepMetadata(KVConnectorMetadata):
    """One step's orders to every worker, in the order in which they are carried out."""

    opens: list[OpenOrder] = field(default_factory=list)
    jobs: list[TransferJob] = field(default_factory=list)
    digests: list[DigestJob] = field(default_factory=list)
    prompt_digests: list[DigestJob] = field(default_factory=list)
    """Of prompts whose last token the step computes: made after its forward, told with it."""
    closes: list[int] = field(default_factory=list)
    fences: list[int] = field(default_factory=list)
    """Connections to close as soon as the peer's processes have ended, for they may write to us until then."""
    received: list[str] = field(default_factory=list)
    """Requests whose load has ended."""
    failed: list[str] = field(default_factory=list)
    """Those of them that failed."""
    sent: list[str] = field(default_factory=list)
    """Requests whose blocks nobody needs any more."""

    def is_empty(self) -> bool:
        """True when there is nothing to do."""
        lists = (
            self.opens, self.jobs, self.digests, self.prompt_digests, self.closes, self.fences, self.received,
            self.failed, self.sent,
        )  # fmt: skip
        return not any(lists)


@dataclass(frozen=True, slots=True)
class RankReport:
    """How one worker's part of a job ended."""

    job_id: str
    rank: int
    status: TransferStatus
    reason: str = ""
    num_bytes: dict[str, int] = field(default_factory=dict)
    """By transport."""
    seconds: float = 0.0
    """From the submission of the transfers to the end of the last; neither planning nor the wait for a step."""
    digests: RankDigests | None = None
    """Of what a proved job read, where the peer makes the same of the same KV."""


@dataclass(frozen=True, slots=True)
class DigestReport:
    """One worker's answer to a `DigestJob`."""

    job_id: str
    rank: int
    digests: RankDigests | None


@dataclass(slots=True)
class P2PWorkerReport(KVConnectorWorkerMetadata):
    """What ended on one or more workers since the last step."""

    jobs: list[RankReport] = field(default_factory=list)
    closed: list[tuple[int, int]] = field(default_factory=list)
    """(connection, rank): nothing of it can land on this rank, or from it, any more."""
    digests: list[DigestReport] = field(default_factory=list)

    def is_empty(self) -> bool:
        """True when nothing ended."""
        return not (self.jobs or self.closed or self.digests)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> P2PWorkerReport:
        """Both workers' reports."""
        assert isinstance(other, P2PWorkerReport)
        return P2PWorkerReport(self.jobs + other.jobs, self.closed + other.closed, self.digests + other.digests)
