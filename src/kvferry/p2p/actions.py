"""What the core asks its driver to do, what the driver tells it, and the core's settings. Times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum

from kvferry.errors import ConfigError
from kvferry.p2p.messages import GroupBlocks, Hello, Message
from kvferry.p2p.transports.transport import TransferOp


class FinishReason(Enum):
    """How a request ended on the producer."""

    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TransferJob:
    """One transfer, for all ranks of this engine; each answers with `transfer_ended`, also one without bytes."""

    job_id: str
    op: TransferOp
    peer: str
    connection: int
    local_blocks: GroupBlocks
    remote_blocks: GroupBlocks
    token_range: tuple[int, int]
    is_proved: bool = False
    """Each rank answers digests of its blocks too, where it knows that the peer makes the same of the same KV."""


@dataclass(frozen=True, slots=True)
class DigestJob:
    """Digests of this engine's blocks that hold [token_range); each rank answers `digests_made`.

    `connection`: they will be compared with a peer's there; where that makes others of the same KV, None is answered.
    `check_range`: of the blocks that hold these tokens too, read after the others; they stand behind those.
    """

    job_id: str
    connection: int | None
    blocks: GroupBlocks
    token_range: tuple[int, int]
    check_range: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Connect:
    """Dial the peer's control listener (`host:port`); answer `peer_connected` or `peer_lost`."""

    peer: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Hang up, also what was never reached. A link that breaks later is told again after the next `Connect` only."""

    peer: str


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to the control channel; it may be lost."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class OpenPeer:
    """The handshake succeeded: transfers may use `connection`, made from the peer's geometry and blobs in `hello`."""

    peer: str
    connection: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class ClosePeer:
    """Destroy the transport connection in all ranks; answer `peer_closed` once nothing can land through it any more."""

    peer: str
    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class StartTransfer:
    """Run this job on every rank of this engine."""

    job: TransferJob


@dataclass(frozen=True, slots=True)
class StartDigests:
    """Run this job on every rank of this engine."""

    job: DigestJob


@dataclass(frozen=True, slots=True)
class Release:
    """Producer: the blocks of this request may be used again. Exactly once per `finish` that answered parameters."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """Consumer: the load is over. Exactly once per announced request.

    ok: the blocks hold the producer's bytes of [token_range), of exactly the announced tokens. Not ok: nothing may be
    used, and where `blocks_quarantined`, nothing may be written there either until `BlocksSafe`. `is_proved`: digests
    of the bytes were compared; of a load that is not ok, they differ.
    """

    request_id: str
    ok: bool
    reason: str
    blocks_quarantined: bool
    num_tokens: int
    is_proved: bool = False


@dataclass(frozen=True, slots=True)
class BlocksSafe:
    """Consumer: nothing can land in the blocks of this failed load any more. Once per quarantined `LoadEnded`."""

    request_id: str


Action = (
    Connect | Disconnect | Send | OpenPeer | ClosePeer | StartTransfer | StartDigests | Release | LoadEnded | BlocksSafe
)


@dataclass(frozen=True, slots=True)
class GroupRule:
    """What of a group is handed over: all, or the last `window_tokens`."""

    block_tokens: int
    window_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """This engine, as its peers get to know it. `generation` is drawn anew at every start (32 hex digits)."""

    engine_id: str
    generation: str
    host: str
    port: int
    num_ranks: int
    geometry: bytes
    transports: Mapping[str, tuple[bytes, ...]]
    groups: tuple[GroupRule, ...]
    makes_digests: bool = False


@dataclass(frozen=True, slots=True)
class P2PSettings:
    """Deadlines (seconds) and bounds of the core."""

    lease_s: float = 30.0  # blocks are kept for consumers that have not claimed them
    claim_s: float = 15.0  # blocks are kept for a claim that is not renewed
    max_lease_s: float = 600.0  # no renewal reaches beyond
    announce_s: float = 300.0  # a load may wait for the host's blocks
    load_s: float = 60.0  # a load with blocks may take, until it is proved
    handshake_s: float = 5.0  # a load may wait for a connection
    retry_s: float = 0.25  # a request is repeated after this, then after twice as long, up to 8 times as long
    liveness_s: float = 15.0  # a peer that owes answers may be silent
    quarantine_s: float = 5.0  # a lost transfer may end by itself before its connection is destroyed
    proof_s: float = 1.0  # a hand-over waits for digests of its producer's; then it goes without
    idle_s: float = 600.0  # a peer without business is kept
    backoff_s: float = 1.0  # after a second failed connection; doubles with every further one
    max_backoff_s: float = 60.0
    memory_s: float = 300.0  # answers are remembered; no message of a control channel is ever later than this
    max_peers: int = 1024
    max_sources: int = 1024  # peers among them that are dialled, for their KV is wanted
    max_claims: int = 4096
    max_remembered: int = field(default=1 << 16)

    def __post_init__(self) -> None:
        for setting in fields(self):
            if not (value := getattr(self, setting.name)) > 0:
                raise ConfigError(f"kv_connector_extra_config.{setting.name}={value} must be above 0")
        if self.claim_s < 4 * self.retry_s:
            raise ConfigError(
                f"kv_connector_extra_config.claim_s={self.claim_s} must be at least 4 times retry_s={self.retry_s}"
            )

    @property
    def renew_s(self) -> float:
        """How often a consumer says that it still needs a claim."""
        return min(self.claim_s, self.liveness_s) / 3
