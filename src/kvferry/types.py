"""Small value types that every layer shares. Imports nothing of kvferry but errors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NewType

StoreKey = NewType("StoreKey", bytes)
"""What the store is addressed with: chain value (32 bytes) + group (u16 LE) + rank (u16 LE). Opaque to tiers."""

NULL_BLOCK_ID = 0
"""Block id 0 fills positions a request does not own (outside a sliding window); it never holds KV."""


class Presence(Enum):
    """Where a chunk is, as a lookup sees it. A lookup never waits."""

    HOST = "host"  # proved, in the host arena: may be claimed
    PENDING = "pending"  # on its way into the arena (copy or promotion under way): ask again
    TIER = "tier"  # in a tier below: must be promoted before it may be claimed
    MISS = "miss"


@dataclass(frozen=True, slots=True)
class SlotRef:
    """A place in the arena for one chunk, as of one generation.

    The generation rises each time the slot is given to another key, so a holder of an old ref can be told apart.
    """

    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Namespace:
    """What must agree, beside the key, for stored bytes to be usable as they are.

    `digest` (hex) names the folder/prefix; `description` is the readable content it is the hash of
    (format version, dtype, layer order, chunk_tokens, shard geometry ...), JSON-serialisable.
    """

    digest: str
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MultimodalItem:
    """One media item: content identifier, and the span of its placeholder tokens."""

    identifier: str
    offset_tokens: int
    num_tokens: int


class AttentionKind(Enum):
    """What a KV cache group's layers keep."""

    FULL = "full"
    SLIDING_WINDOW = "sliding_window"
    OTHER = "other"  # recurrent state, chunked-local, encoder ...: not stored by tokens


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """One KV cache group: layers with one KV spec, which share a block table."""

    group_id: int
    layer_names: tuple[str, ...]
    block_tokens: int
    kind: AttentionKind
    window_tokens: int | None = None
