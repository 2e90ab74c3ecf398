"""Attention over the paged KV cache, in the form transformers' AttentionInterface calls.

A step is one flat batch: the new tokens of all scheduled requests side by side, [1, tokens]. Each layer writes its new
K and V into the pool, then every sequence attends to what it reads back through its own block table. KV is read from
the pool and nowhere else.

    sequence   0 ........ first_position ........ first_position + num_tokens
               | in the pool already | this step's tokens: written, then read |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvferry.engine.kv_groups import KVBuffer, layer_name
from kvferry.engine.kv_manager import BlockIds
from kvferry.errors import HostError

ATTENTION_NAME = "kvferry_paged"
_QUERY_BLOCK_TOKENS = 64  # scores of one block stay in cache


class LayerHooks(Protocol):
    """Called around each layer's attention."""

    def before_layer(self, name: str) -> None:
        """This layer's KV is about to be read."""

    def after_layer(self, name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """This layer's new KV is in the pool."""


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """One sequence's tokens in this step; what `pack_batch` is made from."""

    token_ids: Sequence[int]
    first_position: int
    block_ids: BlockIds
    samples: bool


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One sequence's place in the flat batch."""

    start: int
    end: int
    kv_tokens: int
    """Tokens to attend to, this step's included."""
    block_tables: tuple[torch.Tensor, ...]
    """Per group, the blocks that hold them."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """All tokens of a step. Also the `attn_metadata` connectors see."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    write_blocks: tuple[torch.Tensor, ...]
    """Per group, the block id of each token."""
    write_offsets: torch.Tensor
    """The place of each token in its block."""
    logits_rows: torch.Tensor
    """Rows whose next token is wanted."""
    sequences: tuple[PackedSequence, ...]


def pack_batch(chunks: Sequence[SequenceChunk], block_size: int, device: str) -> PackedBatch:
    """Lay the chunks side by side; all tensors are int64 of length [tokens] unless said otherwise."""
    tokens: list[int] = []
    positions: list[int] = []
    logits_rows: list[int] = []
    sequences = []
    num_groups = len(chunks[0].block_ids)
    write_blocks: list[list[int]] = [[] for _ in range(num_groups)]
    for chunk in chunks:
        start, last = len(tokens), chunk.first_position + len(chunk.token_ids)
        tokens.extend(chunk.token_ids)
        positions.extend(range(chunk.first_position, last))
        num_blocks = -(-last // block_size)
        for blocks, table in zip(write_blocks, chunk.block_ids, strict=True):
            blocks.extend(table[p // block_size] for p in range(chunk.first_position, last))
        tables = tuple(torch.tensor(table[:num_blocks], device=device) for table in chunk.block_ids)
        sequences.append(PackedSequence(start, len(tokens), last, tables))
        if chunk.samples:
            logits_rows.append(len(tokens) - 1)
    flat_positions = torch.tensor(positions, device=device)
    return PackedBatch(
        input_ids=torch.tensor(tokens, device=device),
        positions=flat_positions,
        write_blocks=tuple(torch.tensor(blocks, device=device) for blocks in write_blocks),
        write_offsets=flat_positions % block_size,
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
        sequences=tuple(sequences),
    )


class PagedAttention:
    """One step's attention over one buffer; travels through the model as the keyword argument `paged`."""

    def __init__(self, batch: PackedBatch, kv: KVBuffer, hooks: LayerHooks) -> None:
        self._batch = batch
        self._kv = kv
        self._hooks = hooks

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, _: Any
    ) -> torch.Tensor:
        """Query [heads, tokens, head_size] and new K and V [kv heads, tokens, ...] -> [1, tokens, heads, size_v]."""
        name = layer_name(layer_index)
        layer, batch = self._kv.layers[name], self._batch
        self._hooks.before_layer(name)
        layer.write(key.transpose(0, 1), value.transpose(0, 1), batch.write_blocks[layer.group_id], batch.write_offsets)
        num_heads, num_tokens, _size = query.shape
        out = query.new_empty(num_tokens, num_heads, value.shape[-1])
        query = query * scale
        for seq in batch.sequences:
            keys, values = layer.read(seq.block_tables[layer.group_id], seq.kv_tokens)
            out[seq.start : seq.end] = causal_attention(query[:, seq.start : seq.end], keys, values)
        self._hooks.after_layer(name, layer.kv_cache, batch)
        return out[None]


def causal_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of the last tokens of a sequence to all of it.

    `query` [heads, tokens, size], already scaled; `keys`, `values` [kv heads, kv tokens, size]; the last query is at
    the last kv token. Heads that share a KV head are folded into query rows, and queries go in blocks, so that neither
    K and V are repeated nor scores kept for the whole prompt. Returns [tokens, heads, size_v].
    """
    num_heads, num_tokens, size = query.shape
    num_kv_heads, kv_tokens, _ = keys.shape
    folded = query.reshape(num_kv_heads, num_heads // num_kv_heads, num_tokens, size)
    out = []
    for start in range(0, num_tokens, _QUERY_BLOCK_TOKENS):
        end = min(start + _QUERY_BLOCK_TOKENS, num_tokens)
        rows, visible = end - start, kv_tokens - num_tokens + end
        block = folded[:, :, start:end].reshape(num_kv_heads, -1, size)
        scores = torch.bmm(block, keys[:, :visible].transpose(1, 2))
        if rows > 1:
            _mask_future(scores.view(num_kv_heads, -1, rows, visible)[..., visible - rows :])
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.bmm(weights, values[:, :visible])
        out.append(mixed.view(num_heads, rows, -1).transpose(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _mask_future(scores: torch.Tensor) -> None:
    rows = scores.shape[-1]
    future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
    scores.masked_fill_(future, float("-inf"))


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every attention layer; [1, heads, tokens, size] in, [1, tokens, heads, size] out."""
    if paged is None:
        raise HostError(f"{type(module).__name__} does not hand keyword arguments on to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return paged.attend(module.layer_idx, query[0], key[0], value[0], scale, kwargs), None
