"""What the two sides of the OffloadingConnector tell each other. Plain data: hosts pickle it over their own pipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvferry.contract.base import KVConnectorHandshakeMetadata, KVConnectorMetadata, KVConnectorWorkerMetadata
from kvferry.kv.arena import ArenaInfo
from kvferry.types import SlotRef


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """Blocks of one group that belong to one chunk, and that chunk's slot on each worker.

    `block_ids[i]` is block `first_block + i` of the chunk; a load may want only some blocks of it. It stands at
    position `first_position + i` of the request's block table.
    """

    group_id: int
    first_block: int
    block_ids: tuple[int, ...]
    slots: tuple[SlotRef, ...]
    first_position: int = 0
    payload_bytes: int = 0
    """Loads only: bytes of the whole chunk in a slot."""
    digests: tuple[bytes, ...] = ()
    """Loads only: per worker, what the whole chunk in its slot must have for a digest; empty: not proved again."""


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Copies between pool and slots that succeed or fail part by part. Every worker reports each job once."""

    job_id: int
    request_id: str
    parts: tuple[ChunkPart, ...]
    is_async: bool = True
    """Loads only: False means the copy ends before this step's forward begins."""


@dataclass(slots=True)
class OffloadingStepMetadata(KVConnectorMetadata):
    """One step's orders to every worker."""

    arena: ArenaInfo
    loads: list[CopyJob] = field(default_factory=list)
    stores: list[CopyJob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CopyReport:
    """How one worker fared with one job: per part the digest of its slot (stores), b"" (loads), or None (failed)."""

    job_id: int
    rank: int
    digests: tuple[bytes | None, ...]
    error: str | None = None
    """Type and text of the last failure."""
    seconds: float = 0.0
    """What its copies took, without the time in the queue."""


@dataclass(slots=True)
class OffloadingWorkerReport(KVConnectorWorkerMetadata):
    """Jobs that ended on one or more workers since the last step."""

    reports: list[CopyReport] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> OffloadingWorkerReport:
        """Both workers' reports."""
        assert isinstance(other, OffloadingWorkerReport)
        return OffloadingWorkerReport(self.reports + other.reports)


@dataclass(frozen=True, slots=True)
class OffloadingHandshake(KVConnectorHandshakeMetadata):
    """A worker's normalised layout, as far as the scheduler side needs it."""

    rank: int
    payload_description: dict[str, Any]
    block_bytes: tuple[int, ...]
    """Payload bytes of one block, per group."""
