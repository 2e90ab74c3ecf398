"""Attention over the paged KV cache, in the form transformers' AttentionInterface calls.

A step is one flat batch: the new tokens of all scheduled requests side by side, [1, tokens]. Each layer writes its new
K and V into the pool, then every sequence attends to what it reads back through its own block table. KV is read from
the pool and nowhere else.

    sequence   0 ........ first_position ........ first_position + num_tokens
               | in the pool already | this step's tokens: written, then read |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from kvferry.engine.kv_groups import KVBuffer, LayerKV, layer_name
from kvferry.engine.kv_manager import BlockIds

ATTENTION_NAME = "kvferry_paged"
_QUERY_BLOCK_TOKENS = 64  # scores of one block stay in cache
_BUCKET_TOKENS = 4096  # KV of one decode bucket stays in cache
_LEAST_FILL = 0.75  # of a bucket's longest sequence, what each must have


running_step: ContextVar[Any] = ContextVar("running_step")
"""The PagedAttention of this thread's forward. Not an argument: some models hand none on to their attention."""


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
    """Per group, the blocks that hold them: kernel blocks, if those are smaller than the scheduler's."""

    def within(self, window_tokens: int, block_tokens: int) -> PackedSequence:
        """The same without the blocks that none of its tokens sees; they may be gone."""
        first_seen = self.kv_tokens - (self.end - self.start) + 1 - window_tokens
        gone = max(0, first_seen) // block_tokens
        tables = tuple(table[gone:] for table in self.block_tables)
        return PackedSequence(self.start, self.end, self.kv_tokens - gone * block_tokens, tables)


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


@dataclass(frozen=True, slots=True, eq=False)
class AttentionOptions:
    """What a layer adds to plain attention."""

    scale: float
    window_tokens: int | None = None
    """A token sees itself and the `window_tokens - 1` before it. No block before those is read."""
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """[heads]: a logit per head that takes weight and gives no value."""


class PagedAttention:
    """One step's attention over one buffer; `running_step` while the model runs."""

    def __init__(self, batch: PackedBatch, kv: KVBuffer, hooks: LayerHooks) -> None:
        self._batch = batch
        self._kv = kv
        self._hooks = hooks
        self._work: dict[tuple[int, int] | None, tuple[list[PackedSequence], list[DecodeBucket]]] = {}

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Query [heads, tokens, head_size] and new K and V [kv heads, tokens, ...] -> [1, tokens, heads, size_v]."""
        name = layer_name(layer_index)
        layer, batch = self._kv.layers[name], self._batch
        self._hooks.before_layer(name)
        layer.write(key.transpose(0, 1), value.transpose(0, 1), batch.write_blocks[layer.group_id], batch.write_offsets)
        num_heads, num_tokens, _size = query.shape
        out = query.new_empty(num_tokens, num_heads, value.shape[-1])
        query = query * options.scale
        prefills, decodes = self._seen_by(options.window_tokens, layer.block_tokens)
        for seq in prefills:
            keys, values = layer.read(seq.block_tables[layer.group_id], seq.kv_tokens)
            out[seq.start : seq.end] = causal_attention(query[:, seq.start : seq.end], keys, values, options)
        for bucket in decodes:
            out[bucket.rows] = bucket.attend(query.transpose(0, 1)[bucket.rows], layer, options)
        self._hooks.after_layer(name, layer.kv_cache, batch)
        return out[None]

    def _seen_by(self, window_tokens: int | None, block_tokens: int) -> tuple[list[PackedSequence], list[DecodeBucket]]:
        """Prefills and decodes as layers with this window see them; made once per step."""
        key = None if window_tokens is None else (window_tokens, block_tokens)
        if key not in self._work:
            sequences = self._batch.sequences
            if key is not None:
                sequences = tuple(seq.within(*key) for seq in sequences)
            prefills = [seq for seq in sequences if seq.end - seq.start > 1]
            self._work[key] = prefills, [DecodeBucket(bucket) for bucket in bucket_decodes(sequences)]
        return self._work[key]


def bucket_decodes(sequences: Sequence[PackedSequence]) -> list[list[PackedSequence]]:
    """Single-token sequences in buckets of like length: little padding, and KV that stays in cache while it is used."""
    buckets: list[list[PackedSequence]] = []
    longest = 0
    for seq in sorted((s for s in sequences if s.end - s.start == 1), key=lambda s: -s.kv_tokens):
        is_alike = seq.kv_tokens >= longest * _LEAST_FILL
        if not buckets or not is_alike or longest * (len(buckets[-1]) + 1) > _BUCKET_TOKENS:
            buckets.append([])
            longest = seq.kv_tokens
        buckets[-1].append(seq)
    return buckets


class DecodeBucket:
    """Sequences with one new token each, attended to as one padded batch; the first is the longest."""

    def __init__(self, sequences: Sequence[PackedSequence]) -> None:
        self._sequences = sequences
        self._longest, self._shortest = sequences[0].kv_tokens, sequences[-1].kv_tokens
        device = sequences[0].block_tables[0].device
        self.rows = torch.tensor([seq.start for seq in sequences], device=device)
        self._tables = tuple(pad_sequence(tables, batch_first=True) for tables in self._tables_by_group())
        ends = torch.tensor([seq.kv_tokens for seq in sequences], device=device)[:, None]
        self._after_end = torch.arange(self._longest, device=device)[None] - ends  # [sequences, tokens], < 0: a token

    def _tables_by_group(self) -> list[list[torch.Tensor]]:
        return [list(tables) for tables in zip(*(seq.block_tables for seq in self._sequences), strict=True)]

    def attend(self, query: torch.Tensor, layer: LayerKV, options: AttentionOptions) -> torch.Tensor:
        """Query [sequences, heads, size], already scaled -> [sequences, heads, size_v]."""
        keys, values = layer.read_padded(self._tables[layer.group_id], self._longest)
        num_seqs, num_heads, size = query.shape
        num_kv_heads = keys.shape[1]
        # Contiguous copies: the batched products over strided KV take two to four times as long.
        keys, values = (x.reshape(num_seqs * num_kv_heads, self._longest, -1).contiguous() for x in (keys, values))
        if self._shortest < self._longest:  # a weight of 0 does not undo a NaN that an earlier owner left there
            tail = (self._after_end[:, self._shortest :] >= 0).repeat_interleave(num_kv_heads, 0)
            values[:, self._shortest :].masked_fill_(tail[..., None], 0)
        scores = torch.bmm(query.reshape(num_seqs * num_kv_heads, -1, size), keys.transpose(1, 2))
        scores = _cap(scores.view(num_seqs, num_heads, -1), options)
        hidden = self._hidden(options.window_tokens)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None], float("-inf"))
        weights = _weights(scores, options.sinks)
        mixed = torch.bmm(weights.view(num_seqs * num_kv_heads, -1, self._longest), values)
        return mixed.view(num_seqs, num_heads, -1)

    def _hidden(self, window_tokens: int | None) -> torch.Tensor | None:
        """[sequences, tokens]: True where a sequence must not look; None when all look everywhere."""
        has_padding = self._shortest < self._longest
        if window_tokens is None or window_tokens >= self._longest:
            return self._after_end >= 0 if has_padding else None
        return (self._after_end >= 0) | (self._after_end < -window_tokens)


def causal_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Attention of the last tokens of a sequence to all of it.

    `query` [heads, tokens, size], already scaled; `keys`, `values` [kv heads, kv tokens, size]; the last query is at
    the last kv token. Heads that share a KV head are folded into query rows, and queries go in blocks, so that neither
    K and V are repeated nor scores kept for the whole prompt. Returns [tokens, heads, size_v].
    """
    num_heads, num_tokens, size = query.shape
    num_kv_heads, kv_tokens, _ = keys.shape
    folded = query.reshape(num_kv_heads, num_heads // num_kv_heads, num_tokens, size)
    keys, values = keys.contiguous(), values.contiguous()
    out = query.new_empty(num_tokens, num_heads, values.shape[-1])
    for start in range(0, num_tokens, _QUERY_BLOCK_TOKENS):
        end = min(start + _QUERY_BLOCK_TOKENS, num_tokens)
        rows, visible = end - start, kv_tokens - num_tokens + end
        window = options.window_tokens or visible
        first_key = max(0, visible - rows + 1 - window)
        block = folded[:, :, start:end].reshape(num_kv_heads, -1, size)
        scores = _cap(torch.bmm(block, keys[:, first_key:visible].transpose(1, 2)), options)
        scores = scores.view(num_heads, rows, -1)
        _mask_future(scores[..., -rows:])
        if visible > window:
            _mask_past(scores, visible - first_key - window)
        sinks = None if options.sinks is None else options.sinks[:, None]
        weights = _weights(scores, sinks).view(num_kv_heads, -1, visible - first_key)
        mixed = torch.bmm(weights, values[:, first_key:visible])
        out[start:end] = mixed.view(num_heads, rows, -1).transpose(0, 1)
    return out


def _mask_future(scores: torch.Tensor) -> None:
    """Hide from each query, at the diagonal of the square [..., rows, rows], what comes after it."""
    rows = scores.shape[-1]
    if rows > 1:
        future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(future, float("-inf"))


def _mask_past(scores: torch.Tensor, num_last_hidden: int) -> None:
    """Hide what left the window: the last of [..., rows, keys] loses `num_last_hidden` keys, each before one less."""
    rows = scores.shape[-2]
    past = torch.ones(rows, num_last_hidden, dtype=torch.bool, device=scores.device).tril_(num_last_hidden - rows)
    scores[..., :num_last_hidden].masked_fill_(past, float("-inf"))


def _cap(scores: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    return scores if options.softcap is None else torch.tanh(scores / options.softcap) * options.softcap


def _weights(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; `sinks` broadcasts to the others and takes its share of the weight."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    with_sinks = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1])[..., None]), dim=-1)
    return torch.softmax(with_sinks, dim=-1)[..., :-1].contiguous()


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every attention layer; [1, heads, tokens, size] in, [1, tokens, heads, size] out."""
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window_tokens=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return running_step.get().attend(module.layer_idx, query[0], key[0], value[0], options), None
