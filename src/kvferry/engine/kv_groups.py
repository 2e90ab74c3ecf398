"""KV groups and their memory: one int8 buffer, one strided view per layer, block-first and token-major (BLNHC).

    buffer   | block 0                                | block 1 ...
             | layer 0        | layer 1        | ...  |
             | token 0 | token 1 | ...  each: heads x (K | V)

One block of all layers is one contiguous byte run, so a connector moves it with one copy. Groups overlay each other:
layer i of every group lies at the same offset, and a block id belongs to one group at a time.
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
    SlidingWindowSpec,
    make_kv_cache_config,
)
from kvferry.errors import ConfigError, ContractError


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """The KV one layer keeps per token: `num_kv_heads` x (`head_size` of K, `head_size_v` of V)."""

    num_kv_heads: int
    head_size: int
    head_size_v: int
    window_tokens: int | None = None
    """A token sees itself and the `window_tokens - 1` before it; None: all before it."""


def layer_name(layer_index: int) -> str:
    """The name connectors know a layer by; vLLM's, so that both hosts mean the same layer."""
    return f"model.layers.{layer_index}.self_attn.attn"


def full_attention_specs(
    layers: Sequence[LayerGeometry], block_size: int, dtype: torch.dtype
) -> dict[str, KVCacheSpec]:
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
    layers: Sequence[LayerGeometry], block_size: int, dtype: torch.dtype, max_model_len: int
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


def kv_cache_config_for(num_blocks: int, groups: list[dict[str, KVCacheSpec]]) -> KVCacheConfig:
    """The engine's KVCacheConfig; all groups must agree on block size, which is also the hash unit."""
    config = make_kv_cache_config(num_blocks, groups)
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
    `dst_block_ids[i]`. `direction` ("h2d" or "d2h") is vLLM's and follows from the tensors' devices. The copy is done
    on return. ContractError when layers or numbers of blocks differ; nothing is copied then.
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

    Allocate outside `torch.inference_mode`, or other threads (connectors) cannot write to it.
    """

    def __init__(
        self, config: KVCacheConfig, device: str, allocation: AbstractContextManager[Any] | None = None
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
            assert isinstance(group.kv_cache_spec, AttentionSpec)
            for index, name in enumerate(tensor.layers):
                first_byte = tensor.offset + index * tensor.layer_stride
                self.layers[name] = LayerKV(
                    self.storage, config.num_blocks, group.kv_cache_spec, group_id, first_byte, tensor.block_stride
                )

    def views(self) -> dict[str, torch.Tensor]:
        """Layer name -> [blocks, heads, tokens, content], what connectors register."""
        return {name: layer.kv_cache for name, layer in self.layers.items()}


class LayerKV:
    """One layer's pages. Token rows and pages are addressed in the flat buffer, so a write or a read is one kernel."""

    def __init__(
        self,
        storage: torch.Tensor,
        num_blocks: int,
        spec: AttentionSpec,
        group_id: int,
        first_byte: int,
        block_stride_bytes: int,
    ) -> None:
        tokens, heads, content = spec.block_size, spec.num_kv_heads, spec.content_size
        typed = storage.view(spec.dtype)
        item = spec.dtype.itemsize
        page_bytes = spec.page_size_bytes
        assert first_byte % page_bytes == 0 and block_stride_bytes % page_bytes == 0
        self.spec = spec
        self.group_id = group_id
        self.kv_cache = typed.as_strided(
            (num_blocks, heads, tokens, content),
            (block_stride_bytes // item, content, heads * content, 1),
            first_byte // item,
        )
        self._tokens = tokens
        self._rows = typed.view(-1, heads, content)
        self._pages = typed.view(-1, tokens * heads * content)
        self._first_page = first_byte // page_bytes
        self._pages_per_block = block_stride_bytes // page_bytes

    def page_rows(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Rows of `_pages` for block ids."""
        return block_ids * self._pages_per_block + self._first_page

    def write(self, keys: torch.Tensor, values: torch.Tensor, block_ids: torch.Tensor, offsets: torch.Tensor) -> None:
        """Store K [tokens, heads, head_size] and V of one token per (block id, offset)."""
        self._rows.index_copy_(0, self.page_rows(block_ids) * self._tokens + offsets, torch.cat((keys, values), -1))

    def read(self, block_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of K and V of the first `num_tokens` tokens of a block table: [heads, tokens, head_size]."""
        keys, values = self.read_padded(block_ids[None], num_tokens)
        return keys[0], values[0]

    def read_padded(self, block_tables: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of several tables [sequences, blocks] at once: [sequences, heads, tokens, head_size]."""
        pages = self._pages.index_select(0, self.page_rows(block_tables.flatten()))
        rows = pages.view(len(block_tables), -1, self.spec.num_kv_heads, self.spec.content_size)[:, :num_tokens]
        rows = rows.transpose(1, 2)
        return rows[..., : self.spec.head_size], rows[..., self.spec.head_size :]
