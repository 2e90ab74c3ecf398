"""The only place that knows how KV lies in memory: (layout, block ids) -> byte ranges.

A host registers one tensor per layer: a strided view [B, H, N, C] (kernel blocks, KV heads, tokens, content = K then V)
of a backing buffer. `KVLayout.from_tensors` normalises that once. After that everything is bytes:

    storage     one backing buffer; a range is (storage, offset_bytes, length_bytes)
    block       logical block b of a group = kernel blocks [b * ratio, (b + 1) * ratio) of each of the group's layers
    template    the ranges of block 0; block b's are the same, moved by b * block stride

The payload of a block (what leaves the engine) is the concatenation of its ranges in *payload order*: layer by layer in
the group's order, then kernel block, then the (H, N, C) dimensions outermost physical first. So layouts that differ
only in where layers and blocks lie (layer-major, block-first), or in how blocks of whole tokens are cut into kernel
blocks, have the same payload, and share stored chunks; a different order within a page, dtype or block size is another
`payload_description`, hence another namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvferry.errors import ConfigError
from kvferry.types import NULL_BLOCK_ID, GroupInfo

if TYPE_CHECKING:
    import torch

PAYLOAD_FORMAT_VERSION = 1
_DIMS = "HNC"
CONTENT = "content"
_EXPONENT_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80),
}  # fmt: skip
"""All of them are set in a NaN and in an infinity, and in nothing else."""
_PIECE = 1 << 14


class ByteRange(NamedTuple):
    """`length` bytes at byte `offset` of backing buffer number `storage`."""

    storage: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer's tensor. Strides and offset in bytes; `shape` and `strides` are of (H, N, C)."""

    name: str
    dtype: str
    storage: int
    offset_bytes: int
    kernel_block_stride_bytes: int
    ratio: int
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    element_bytes: int
    form: str = CONTENT
    """How kernels place tokens and elements within a page: as the shape says, or in a way of their own, which hosts
    name (`HostInfo.page_form`); bytes of one form mean nothing in another."""

    @property
    def dim_order(self) -> str:
        """The dimensions of a page, outermost physical first, e.g. NHC."""
        return "".join(_DIMS[d] for d in _physical_order(self.strides, self.shape))

    @property
    def page_bytes(self) -> int:
        """Bytes of one logical block of this layer."""
        return self.ratio * self.shape[0] * self.shape[1] * self.shape[2] * self.element_bytes

    def payload_description(self) -> dict[str, Any]:
        """What a page's bytes depend on. Where tokens lie outermost, kernel blocks make one longer block."""
        order, (heads, tokens, content), ratio = self.dim_order, self.shape, self.ratio
        if self.form != CONTENT:  # the kernels' own order within the page
            return {"dtype": self.dtype, "form": self.form, "shape": [heads, tokens, content], "ratio": ratio}
        if order.startswith("N") or (order.startswith("HN") and heads == 1):
            tokens, ratio = tokens * ratio, 1
        return {"dtype": self.dtype, "order": order, "shape": [heads, tokens, content], "ratio": ratio}

    def ranges_of_block_zero(self) -> list[ByteRange]:
        """Ranges of logical block 0 in payload order, adjacent ones merged."""
        order = _physical_order(self.strides, self.shape)
        run = self.element_bytes
        outer = list(order)
        while outer and self.strides[outer[-1]] == run:
            run *= self.shape[outer.pop()]
        ranges = []
        for kernel_block in range(self.ratio):
            base = self.offset_bytes + kernel_block * self.kernel_block_stride_bytes
            for index in product(*(range(self.shape[d]) for d in outer)):
                at = base + sum(i * self.strides[d] for i, d in zip(index, outer, strict=True))
                ranges.append(ByteRange(self.storage, at, run))
        return merge_adjacent(ranges)


@dataclass(frozen=True)
class GroupLayout:
    """One KV cache group: its layers in payload order and the precomputed template of a block."""

    group_id: int
    block_tokens: int
    layers: tuple[LayerLayout, ...]

    @cached_property
    def _template(self) -> list[tuple[ByteRange, int]]:
        """Ranges of block 0, each with its block stride; neighbours that move together are merged."""
        template: list[tuple[ByteRange, int]] = []
        for layer in self.layers:
            stride = layer.ratio * layer.kernel_block_stride_bytes
            for r in layer.ranges_of_block_zero():
                if template and template[-1][1] == stride and _touch(template[-1][0], r):
                    last, _ = template.pop()
                    r = ByteRange(r.storage, last.offset, last.length + r.length)
                template.append((r, stride))
        return template

    @property
    def block_bytes(self) -> int:
        """Payload bytes of one block over all layers of the group."""
        return sum(layer.page_bytes for layer in self.layers)

    def block_ranges(self, block_ids: Sequence[int]) -> list[ByteRange]:
        """Ranges of the blocks' payloads, one block after the other, adjacent ones merged.

        Raises ValueError for the null block, which holds no KV.
        """
        if NULL_BLOCK_ID in block_ids:
            raise ValueError(f"block {NULL_BLOCK_ID} is the null block and has no KV: {list(block_ids)}")
        return merge_adjacent(
            [
                ByteRange(r.storage, r.offset + block * stride, r.length)
                for block in map(int, block_ids)
                for r, stride in self._template
            ]
        )

    def is_finite(self, payload: memoryview) -> bool:
        """False where whole blocks' payload has a NaN or an infinity; of 8-bit KV nobody can tell."""
        blocks = np.frombuffer(payload, np.uint8).reshape(-1, self.block_bytes)
        start = 0
        for dtype, layers in groupby(self.layers, lambda layer: layer.dtype):
            end = start + sum(layer.page_bytes for layer in layers)
            if dtype in _EXPONENT_BITS:
                kind, bits = _EXPONENT_BITS[dtype]
                numbers = np.ascontiguousarray(blocks[:, start:end]).view(kind).reshape(-1)
                pieces = (numbers[at : at + _PIECE] for at in range(0, len(numbers), _PIECE))  # they stay in cache
                if any(int((piece & kind(bits)).max()) == bits for piece in pieces):
                    return False
            start = end
        return True

    def payload_description(self) -> dict[str, Any]:
        """What two payloads of this group must agree on to be exchangeable as they are.

        `layers` is [how many alike, what they are like] for each run of layers.
        """
        layers = [layer.payload_description() for layer in self.layers]
        runs = [[len(list(run)), layer] for layer, run in groupby(layers)]
        return {"block_tokens": self.block_tokens, "layers": runs}


@dataclass(frozen=True)
class KVLayout:
    """The KV cache of one worker."""

    num_blocks: int
    groups: tuple[GroupLayout, ...]

    @classmethod
    def from_tensors(
        cls,
        kv_caches: Mapping[str, torch.Tensor],
        groups: Sequence[GroupInfo],
        num_blocks: int,
        page_form: Callable[[str], str] = lambda name: CONTENT,
    ) -> tuple[KVLayout, list[torch.Tensor]]:
        """Normalise what the host registered. `page_form`: see `LayerLayout.form`, by layer name.

        Returns the layout and, per storage, one tensor that lives in it (its untyped storage is the backing buffer).
        Layers that no group lists (aliases of shared KV) are left out: their bytes belong to the layer they share.
        Raises ConfigError for tensors that are no [B, H, N, C] view of whole blocks.
        """
        storages: dict[int, int] = {}
        anchors: list[torch.Tensor] = []
        out = []
        for group in groups:
            layers = []
            for name in group.layer_names:
                tensor = _attention_tensor(kv_caches, name)
                pointer = tensor.untyped_storage().data_ptr()
                if pointer not in storages:
                    storages[pointer] = len(anchors)
                    anchors.append(tensor)
                layer = _layer_layout(name, tensor, storages[pointer], group.block_tokens, num_blocks)
                layers.append(replace(layer, form=page_form(name)))
            out.append(GroupLayout(group.group_id, group.block_tokens, tuple(layers)))
        return cls(num_blocks, tuple(out)), anchors

    def payload_description(self) -> dict[str, Any]:
        """What stored payloads must agree on, over all groups; plain JSON."""
        return {"payload_format": PAYLOAD_FORMAT_VERSION, "groups": [g.payload_description() for g in self.groups]}


def merge_adjacent(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """The same bytes in the same order, with neighbours that touch made one."""
    merged: list[ByteRange] = []
    for r in ranges:
        if merged and _touch(merged[-1], r):
            merged[-1] = ByteRange(r.storage, merged[-1].offset, merged[-1].length + r.length)
        else:
            merged.append(r)
    return merged


def _touch(first: ByteRange, second: ByteRange) -> bool:
    return first.storage == second.storage and first.offset + first.length == second.offset


def _physical_order(strides: Sequence[int], shape: Sequence[int]) -> list[int]:
    # A dimension of size 1 may carry any stride; it is put where it changes nothing: outermost.
    return sorted(range(len(shape)), key=lambda d: (shape[d] != 1, -strides[d], d))


def _attention_tensor(kv_caches: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    tensor = kv_caches.get(name)
    if tensor is None:
        raise ConfigError(f"layer {name!r} stands in kv_cache_config but no tensor was registered for it")
    if not hasattr(tensor, "untyped_storage") or tensor.dim() != 4:
        kind = f"shape {tuple(tensor.shape)}" if hasattr(tensor, "shape") else type(tensor).__name__
        raise ConfigError(
            f"layer {name!r} registered {kind}; only attention KV [blocks, heads, tokens, content] is known"
        )
    return tensor


def _layer_layout(name: str, tensor: torch.Tensor, storage: int, block_tokens: int, num_blocks: int) -> LayerLayout:
    size = tensor.element_size()
    blocks, heads, tokens, content = tensor.shape
    stride_b, *rest = (stride * size for stride in tensor.stride())
    ratio, remainder = divmod(blocks, num_blocks)
    if remainder or ratio < 1:
        raise ConfigError(f"layer {name!r} has {blocks} kernel blocks, not a multiple of num_blocks={num_blocks}")
    if tokens * ratio != block_tokens:
        raise ConfigError(
            f"layer {name!r} holds {ratio} x {tokens} tokens per block, but its group's block_size is {block_tokens}"
        )
    return LayerLayout(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        storage=storage,
        offset_bytes=int(tensor.storage_offset()) * size,
        kernel_block_stride_bytes=stride_b,
        ratio=ratio,
        shape=(heads, tokens, content),
        strides=(rest[0], rest[1], rest[2]),
        element_bytes=size,
    )
