"""What an engine tells a connector about its KV cache: groups, specs, tensors. Names as in vLLM 0.32.

Layers with one KV spec form a group. All groups draw block ids from one pool, and their tensors may overlay each
other in memory: a block id belongs to one group at a time, so only that group's layers may be moved for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from kvferry.contract.base import LoadFailure


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """The KV format of one layer."""

    block_size: int
    """Tokens per (logical) block."""

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block of one layer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(KVCacheSpec):
    """A layer that keeps K and V per token."""

    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    head_size_v: int | None = None
    """Width of V; as K unless given (0 for latent attention)."""

    @property
    def content_size(self) -> int:
        """Elements per token and head: K then V."""
        return self.head_size + (self.head_size if self.head_size_v is None else self.head_size_v)

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.block_size * self.num_kv_heads * self.content_size * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec(AttentionSpec):
    """Every token attends to all before it."""


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec(AttentionSpec):
    """A token attends to the last `sliding_window` tokens, itself included."""

    sliding_window: int


@dataclass(frozen=True)
class KVCacheTensor:
    """Where the pages of some layers lie in the backing buffer (all in bytes).

    Page of layers[l], block b: offset + l * layer_stride + b * block_stride. Where a block is several kernel blocks and
    the layout is block-first, only the block lies there; its layers take turns in it, kernel block by kernel block.
    """

    size: int
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0


@dataclass(frozen=True)
class KVCacheGroupSpec:
    """Layers that share one block table."""

    layer_names: list[str]
    kv_cache_spec: KVCacheSpec


@dataclass
class KVCacheConfig:
    """The engine's KV cache: `num_blocks` logical blocks (id 0 is the null block) shared by all groups."""

    num_blocks: int
    kv_cache_tensors: list[KVCacheTensor]
    kv_cache_groups: list[KVCacheGroupSpec]
    kv_cache_layout: str | None = None
    """Physical order of (L)ayer, (B)lock, (H)ead, toke(N), (C)ontent, outermost first, e.g. BLNHC."""
    hash_block_size: int | None = None
    cache_hit_alignment_tokens: int | None = None

    @property
    def transfer_group_ids(self) -> tuple[int, ...]:
        """Ids of the groups a connector may move."""
        return tuple(range(len(self.kv_cache_groups)))

    @property
    def transfer_groups(self) -> tuple[KVCacheGroupSpec, ...]:
        """The groups a connector may move."""
        return tuple(self.kv_cache_groups)

    @property
    def prefix_cacheable_group_ids(self) -> tuple[int, ...]:
        """Ids of the groups whose blocks may be found again by content."""
        return self.transfer_group_ids


def make_kv_cache_config(
    num_blocks: int, specs: dict[str, KVCacheSpec] | list[dict[str, KVCacheSpec]], layout: str = "BLNHC"
) -> KVCacheConfig:
    """A KVCacheConfig for tests and simple engines: one dict (layer name -> spec) per group.

    Groups overlay each other at offset 0. Block-first (`layout` BL...): all layers of a block lie side by side.
    Layer-first (LB...): all blocks of a layer do, and the largest page of any group is the stride of all.
    """
    groups = [specs] if isinstance(specs, dict) else specs
    stride = max(sum(spec.page_size_bytes for spec in group.values()) for group in groups)
    widest = max(spec.page_size_bytes for group in groups for spec in group.values())
    tensors = []
    for group in groups:
        layers = list(group)
        if layout.startswith("L"):
            size = num_blocks * widest * max(map(len, groups))
            tensors.append(KVCacheTensor(size, layers, num_blocks * widest, widest))
        else:
            tensors.append(KVCacheTensor(num_blocks * stride, layers, group[layers[0]].page_size_bytes, stride))
    return KVCacheConfig(
        num_blocks,
        tensors,
        [KVCacheGroupSpec(list(group), next(iter(group.values()))) for group in groups],
        kv_cache_layout=layout,
    )


@dataclass
class KVConnectorOutput:
    """What the worker's connector reported in one step, merged over ranks; given to `update_connector_output`."""

    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    failed_recving: set[str] = field(default_factory=set)
    invalid_block_ids: set[int] = field(default_factory=set)
    failed_blocks: set[LoadFailure] = field(default_factory=set)
    kv_connector_stats: object | None = None
    kv_cache_events: object | None = None
    kv_connector_worker_meta: object | None = None
    expected_finished_count: int = 0

    def is_empty(self) -> bool:
        """True when nothing was reported."""
        return not (
            self.finished_sending
            or self.finished_recving
            or self.failed_recving
            or self.invalid_block_ids
            or self.failed_blocks
            or self.kv_connector_stats
            or self.kv_cache_events
            or self.kv_connector_worker_meta
        )
