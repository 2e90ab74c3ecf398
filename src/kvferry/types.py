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
    """A token sees itself and the `window_tokens - 1` before it; None unless `kind` is SLIDING_WINDOW."""

    def first_needed_block(self, num_tokens: int) -> int:
        """Position of the first block that tokens from `num_tokens` on read; what lies before it is of no more use.

        So a hit of `num_tokens` needs the blocks from there on, and a request that has come so far may free the others.
        """
        if self.window_tokens is None:
            return 0
        return max(0, num_tokens - (self.window_tokens - 1)) // self.block_tokens

    def most_blocks(self, num_present: int, num_tokens: int, step_tokens: int) -> int:
        """The most blocks held at one time on the way from `num_present` to `num_tokens` tokens.

        Each step adds at most `step_tokens`, and what left the window is freed after it.
        """
        most = -(-num_tokens // self.block_tokens) - self.first_needed_block(num_present)
        if self.window_tokens is None:
            return most
        return min(most, -(-(self.window_tokens - 1 + step_tokens) // self.block_tokens) + 1)
