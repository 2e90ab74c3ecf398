"""KV groups and their memory: one int8 buffer, one strided view per layer. Two of the layouts (`layout_choice`):

    BLNHC  | block 0                    | block 1 ...      LBHNC  | layer 0                    | layer 1 ...
           | layer 0     | layer 1 ...  |                         | block 0     | block 1 ...  |
           | token 0 | token 1 ...: each heads x (K | V)          | head 0 | head 1 ...: each tokens x (K | V)

Groups overlay each other: layer i of every group lies at the same offset, and a block id belongs to one group at a
time. Attention may work in kernel blocks, `ratio` to a block: block b is kernel blocks [b * ratio, (b + 1) * ratio).
"Block" in a layout's name then means kernel block, so that each layer's view has one stride from block to block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kvferry.contract import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    KVCacheTensor,
    SlidingWindowSpec,
    make_kv_cache_config,
)
from kvferry.errors import ConfigError, ContractError


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The KV one layer keeps per token: `num_kv_heads` x (`head_size` of K, `head_size_v` of V)."""

    num_kv_heads: int
    head_size: int
    head_size_v: int
    window_tokens: int | None = None
    """A token sees itself and the `window_tokens - 1` before it; None: all before it."""


def layer_name(layer_index: int) -> str:
    """The name connectors know a layer by; vLLM's, so that both hosts mean the same layer."""
    return f"model.layers.{layer_index}.self_attn.attn"


def full_attention_specs(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> dict[str, KVCacheSpec]:
    """One spec per layer, all in one group, windows or not. ConfigError when the layers' KV differs in shape."""
    shapes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers}
    if len(shapes) != 1:
        raise ConfigError(
            "layers keep KV of different shapes (heads, head size of K, of V), which one KV group cannot hold: "
            f"{sorted(shapes)}"
        )
    first = layers[0]
    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=first.num_kv_heads,
        head_size=first.head_size,
        head_size_v=first.head_size_v,
        dtype=dtype,
    )
    return {layer_name(i): spec for i in range(len(layers))}


def grouped_specs(
    layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype, max_model_len: int
) -> list[dict[str, KVCacheSpec]]:
    """Layers in groups that keep alike: one dict (layer name -> spec) per group. ConfigError as in the case of one.

    Groups overlay each other, so they get equal numbers of layers, as vLLM 0.32 does it: as many as the rarest kind
    has, unless the most frequent has less than a quarter more. Where that does not divide, groups are one layer short.
    """
    (full,) = set(full_attention_specs(layers, block_size, dtype).values())
    assert isinstance(full, FullAttentionSpec)
    kinds: dict[int | None, list[int]] = {}
    for i, layer in enumerate(layers):
        window = layer.window_tokens
        kinds.setdefault(None if window is None or window >= max_model_len else window, []).append(i)
    most, least = (choose(map(len, kinds.values())) for choose in (max, min))
    size = most if most < 1.25 * least else least
    groups = []
    for window, indexes in kinds.items():
        spec: KVCacheSpec = full if window is None else SlidingWindowSpec(**vars(full), sliding_window=window)
        num_groups = -(-len(indexes) // size)
        groups += [{layer_name(i): spec for i in indexes[first::num_groups]} for first in range(num_groups)]
    return groups


def kv_cache_config_for(num_blocks: int, groups: list[dict[str, KVCacheSpec]], layout: str = "BLNHC") -> KVCacheConfig:
    """The engine's KVCacheConfig; all groups must agree on block size, which is also the hash unit."""
    config = make_kv_cache_config(num_blocks, groups, layout)
    sizes = {group.kv_cache_spec.block_size for group in config.kv_cache_groups}
    if len(sizes) != 1:
        raise ConfigError(f"KV groups of different block sizes ({sorted(sizes)}) are not supported by this engine")
    config.hash_block_size = config.cache_hit_alignment_tokens = sizes.pop()
    return config


def copy_kv_blocks(
    src_kv_caches: Mapping[str, torch.Tensor],
    dst_kv_caches: Mapping[str, torch.Tensor],
    src_block_ids: Sequence[int],
    dst_block_ids: Sequence[int],
    direction: str,
) -> None:
    """Copy blocks between two sets of KV tensors, layer by layer; what `set_host_xfer_buffer_ops` offers connectors.

    Both map layer names to [blocks, heads, tokens, content], on any device; block `src_block_ids[i]` goes to
    `dst_block_ids[i]` (ids count the tensors' own, that is kernel blocks). `direction` ("h2d" or "d2h") is vLLM's
    and follows from the tensors' devices. The copy is done on return. ContractError when layers or numbers of blocks
    differ; nothing is copied then.
    """
    if direction not in ("h2d", "d2h"):
        raise ContractError(f"copy direction {direction!r} is neither 'h2d' nor 'd2h'")
    if len(src_block_ids) != len(dst_block_ids) or src_kv_caches.keys() != dst_kv_caches.keys():
        raise ContractError("source and destination of a block copy must have the same layers and numbers of blocks")
    for name, src in src_kv_caches.items():
        dst = dst_kv_caches[name]
        taken = src[torch.tensor(src_block_ids, dtype=torch.long, device=src.device)]
        dst[torch.tensor(dst_block_ids, dtype=torch.long, device=dst.device)] = taken.to(dst.device)


class KVBuffer:
    """The KV memory of all layers. The only place KV is read from.

    `kernel_block_tokens` divides the block size of every group; None: attention works in whole blocks.
    Allocate outside `torch.inference_mode`, or other threads (connectors) cannot write to it.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        device: str,
        allocation: AbstractContextManager[Any] | None = None,
        kernel_block_tokens: int | None = None,
    ) -> None:
        self.config = config
        total_bytes = max(tensor.offset + tensor.size for tensor in config.kv_cache_tensors)
        try:
            with allocation if allocation is not None else nullcontext():
                self.storage = torch.zeros(total_bytes, dtype=torch.int8, device=device)
        except RuntimeError as err:
            raise ConfigError(
                f"the KV cache of {total_bytes} bytes cannot be allocated on {device}: "
                f"lower num_kv_blocks or kv_cache_bytes ({str(err).splitlines()[0]})"
            ) from err
        self.layers: dict[str, LayerKV] = {}
        for group_id, (group, tensor) in enumerate(zip(config.kv_cache_groups, config.kv_cache_tensors, strict=True)):
            spec = group.kv_cache_spec
            assert isinstance(spec, AttentionSpec)
            for index, name in enumerate(tensor.layers):
                place = _place(config, tensor, index, spec.block_size // (kernel_block_tokens or spec.block_size))
                self.layers[name] = LayerKV(self.storage, spec, group_id, place)

    def views(self) -> dict[str, torch.Tensor]:
        """Layer name -> [kernel blocks, heads, tokens, content], what connectors register."""
        return {name: layer.kv_cache for name, layer in self.layers.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one layer's kernel blocks lie, in bytes."""

    num_blocks: int
    ratio: int
    first: int
    stride: int
    is_head_major: bool


def _place(config: KVCacheConfig, tensor: KVCacheTensor, index: int, ratio: int) -> _Place:
    layout = config.kv_cache_layout or "BLNHC"
    # In a block-first layout all layers of one kernel block lie side by side.
    layer_stride = tensor.layer_stride // (ratio if layout.startswith("B") else 1)
    return _Place(
        config.num_blocks * ratio,
        ratio,
        tensor.offset + index * layer_stride,
        tensor.block_stride // ratio,
        is_head_major=layout.endswith("HNC"),
    )


class LayerKV:
    """One layer's pages, one per kernel block; addressed in the flat buffer, so a write or a read is one kernel."""

    def __init__(self, storage: torch.Tensor, spec: AttentionSpec, group_id: int, place: _Place) -> None:
        tokens, heads, content = spec.block_size // place.ratio, spec.num_kv_heads, spec.content_size
        typed = storage.view(spec.dtype)
        item = spec.dtype.itemsize
        page_bytes = tokens * heads * content * item
        assert place.first % page_bytes == 0 and place.stride % page_bytes == 0
        self.spec = spec
        self.group_id = group_id
        self.block_tokens = tokens
        """Tokens of one kernel block."""
        self._is_head_major = place.is_head_major
        head, token = (tokens * content, content) if place.is_head_major else (content, heads * content)
        self.kv_cache = typed.as_strided(
            (place.num_blocks, heads, tokens, content), (place.stride // item, head, token, 1), place.first // item
        )
        self._heads = torch.arange(heads, device=storage.device)
        # What is written and read at once: all heads of a token and of a page, or one head of them.
        self._rows = typed.view(-1, content) if place.is_head_major else typed.view(-1, heads, content)
        self._pages = typed.view(-1, tokens * content * (1 if place.is_head_major else heads))
        self._first_page = place.first // page_bytes
        self._pages_per_block = place.stride // page_bytes

    def page_rows(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Numbers of the pages of block ids, counted through the whole buffer."""
        return block_ids * self._pages_per_block + self._first_page

    def write(self, keys: torch.Tensor, values: torch.Tensor, block_ids: torch.Tensor, offsets: torch.Tensor) -> None:
        """Store K [tokens, heads, head_size] and V of one token per (block id, offset)."""
        pages, content = self.page_rows(block_ids), torch.cat((keys, values), -1)
        if self._is_head_major:
            pages = pages[:, None] * len(self._heads) + self._heads
            rows = (pages * self.block_tokens + offsets[:, None]).flatten()
            self._rows.index_copy_(0, rows, content.flatten(0, 1))
        else:
            self._rows.index_copy_(0, pages * self.block_tokens + offsets, content)

    def read(self, block_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of K and V of the first `num_tokens` tokens of a block table: [heads, tokens, head_size]."""
        keys, values = self.read_padded(block_ids[None], num_tokens)
        return keys[0], values[0]

    def read_padded(self, block_tables: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of several tables [sequences, blocks] at once: [sequences, heads, tokens, head_size]."""
        pages, heads, content = self.page_rows(block_tables), self.spec.num_kv_heads, self.spec.content_size
        if self._is_head_major:
            pages = pages[:, None] * heads + self._heads[:, None]
            rows = self._pages.index_select(0, pages.flatten()).view(len(block_tables), heads, -1, content)
        else:
            rows = self._pages.index_select(0, pages.flatten()).view(len(block_tables), -1, heads, content)
            rows = rows.transpose(1, 2)
        rows = rows[:, :, :num_tokens]
        return rows[..., : self.spec.head_size], rows[..., self.spec.head_size :]
