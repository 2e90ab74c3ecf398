"""What the two sides of the built-in LMCacheMPConnector tell each other. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvferry.contract.base import KVConnectorHandshakeMetadata, KVConnectorMetadata, KVConnectorWorkerMetadata
from kvferry.lmcache.wire import ServerKey


@dataclass(frozen=True, slots=True)
class ChunkMove:
    """One chunk of a job. `block_ids[i]` is block `first_block + i` of it; a load may want only some of its blocks."""

    chunk: int
    chain_value: bytes
    """Names the chunk's content; stands with the bytes at the server and is proved on load."""
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ServerTransfer:
    """Chunks that follow one another, to or from the server. Every worker reports each job once."""

    job_id: int
    request_id: str
    key: ServerKey
    moves: tuple[ChunkMove, ...]


@dataclass(slots=True)
class LMCacheMetadata(KVConnectorMetadata):
    """One step's orders to every worker."""

    step: int | None
    """Number of a step whose blocks are to be stored once its outcome is known; workers report it back."""
    loads: list[ServerTransfer] = field(default_factory=list)
    stores: list[ServerTransfer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TransferReport:
    """How one worker fared with one job; the first word of `error` is its type."""

    job_id: int
    rank: int
    error: str | None
    seconds: float
    bad_chain_value: bytes | None = None
    """Names a chunk that came with other bytes than were stored."""


@dataclass(slots=True)
class LMCacheReport(KVConnectorWorkerMetadata):
    """What workers tell after a step."""

    step: int | None
    reports: list[TransferReport] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LMCacheReport:
        """Both workers' reports."""
        assert isinstance(other, LMCacheReport)
        return LMCacheReport(self.step, self.reports + other.reports)


@dataclass(frozen=True, slots=True)
class LMCacheHandshake(KVConnectorHandshakeMetadata):
    """What all workers must agree on."""

    chunk_tokens: int
    """Of the server."""
    model_name: str
    """What server keys name the model: its identity and layout."""
