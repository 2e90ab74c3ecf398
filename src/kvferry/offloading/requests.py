"""What the scheduler side remembers of a request and of a copy job, and which groups a hit reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvferry.contract.views import RequestView
from kvferry.kv.keys import KeyChain
from kvferry.offloading.config import ChunkGeometry
from kvferry.offloading.messages import ChunkPart, CopyJob, CopyReport
from kvferry.types import NULL_BLOCK_ID, AttentionKind, GroupInfo, SlotRef, StoreKey


class LoadState(Enum):
    """How far a request's external load is."""

    NONE = "none"
    RUNNING = "running"
    FAILED = "failed"  # this request claims nothing any more, so that a persistent failure cannot loop


@dataclass(slots=True)
class RequestState:
    """One live request."""

    view: RequestView
    chain: KeyChain | None
    """None when the request's tokens do not identify its KV (prompt embeddings, unreadable adapter)."""
    num_local_tokens: int = 0
    """Tokens the engine's own cache holds, as of the last lookup."""
    num_chunks_seen: int = 0
    """Chunks already considered for storing."""
    pins: dict[StoreKey, SlotRef] = field(default_factory=dict)
    """Slots this request keeps from eviction until its load is planned."""
    promoted: set[StoreKey] = field(default_factory=set)
    """Keys fetched from a tier below for this request, for the statistics."""
    load: LoadState = LoadState.NONE
    is_finished: bool = False
    wait_until_s: float | None = None
    """While waiting for tiers below: give up at this time unless there is progress."""
    num_pins_seen: int = 0
    """Pins held when the wait was last extended: more of them now is progress."""


@dataclass(slots=True)
class JobRecord:
    """A copy job that workers have not all reported yet. Failures are remembered per (part, rank)."""

    job: CopyJob
    deadline_s: float
    pinned_blocks: list[Any]
    keys: tuple[tuple[StoreKey, ...], ...]
    """Per part, the key of each rank's shard."""
    reports: dict[int, CopyReport]
    is_load: bool
    chunk: int | None = None
    """Stores: which chunk of its request."""
    is_tainted: bool = False
    """Stores: computed in a step that read KV which had failed to load."""
    lora_path: str | None = None
    """Stores: the adapter that computed it."""


def groups_needed(
    groups: tuple[GroupInfo, ...], geometry: ChunkGeometry, chunk: int, hit_tokens: int
) -> Iterator[GroupInfo]:
    """The groups whose part of `chunk` a hit of `hit_tokens` tokens reads.

    tokens   0 ............. hit - (window - 1) ............ hit
    full     |====================== all ====================|
    window                   |========= tail only ===========|
    """
    chunk_end = (chunk + 1) * geometry.chunk_tokens
    for group in groups:
        if group.kind is AttentionKind.FULL or chunk_end > hit_tokens - ((group.window_tokens or 1) - 1):
            yield group


def load_part(
    group: GroupInfo,
    geometry: ChunkGeometry,
    chunk: int,
    table: list[int],
    slots: tuple[SlotRef, ...],
    digests: tuple[bytes, ...],
    span: tuple[int, int],
) -> ChunkPart | None:
    """The blocks of `chunk` within tokens `span` that the request really owns (null blocks lead the list)."""
    per_chunk = geometry.chunk_tokens // group.block_tokens
    first = max(chunk * per_chunk, span[0] // group.block_tokens)
    last = min((chunk + 1) * per_chunk, span[1] // group.block_tokens)
    while first < last and table[first] == NULL_BLOCK_ID:
        first += 1
    if first >= last:
        return None
    payload_bytes = geometry.payload_bytes[group.group_id]
    blocks = tuple(table[first:last])
    return ChunkPart(group.group_id, first - chunk * per_chunk, blocks, slots, first, payload_bytes, digests)


def starts_with_a_block(group: GroupInfo) -> bool:
    """True when the tail of a whole number of blocks does not reach one token further back.

    Hosts compute the last token of a prompt that was loaded whole, so such a load would be no good to them.
    """
    return group.window_tokens is not None and (group.window_tokens - 1) % group.block_tokens == 0
