"""A model that is no language model: it makes every misplaced KV byte visible, and runs in microseconds.

The KV of a token is a hash over layer, the KV of the token before it *as read from the pool*, and the token id. The
next token is a hash over all KV bytes of the sequence, read through its block table. So the right answer is a pure
function of the token ids, computed independently by `expected_tokens` and `expected_kv`, and one wrong, stale or
swapped byte anywhere changes all that follows. A layer with a window reads no further back than that: its next token
hangs on the window's bytes, and the KV of a token also on the oldest KV that it sees.

    from kvferry import LLM
    from kvferry.testing.stub_model import StubModel
    llm = LLM(StubModel(), num_kv_blocks=64)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from kvferry.engine.attention import LayerHooks, PackedBatch
from kvferry.engine.kv_groups import KVBuffer, LayerKV, LayerShape, layer_name


class StubModel:
    """Implements the engine's `EngineModel`. `path` is what connectors are told as the model's folder.

    Its weights count as made up (`load_format` "dummy"), so connectors that fingerprint models need a
    `weights_version`.
    """

    load_format = "dummy"
    tokenizer: Any = None
    hf_config: Any = None

    def __init__(
        self,
        *,
        num_layers: int = 2,
        num_kv_heads: int = 2,
        head_size: int = 4,
        vocab_size: int = 1000,
        max_model_len: int = 4096,
        eos_token_ids: frozenset[int] = frozenset(),
        path: str = "stub",
        windows: Sequence[int | None] | None = None,
    ) -> None:
        """`windows`: one per layer, at least 2 tokens; None sees everything. They take the place of `num_layers`."""
        self.path = path
        self.dtype = torch.float32
        self.layers: Sequence[LayerShape] = [
            LayerShape(num_kv_heads, head_size, head_size, window) for window in windows or [None] * num_layers
        ]
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.token_bytes = num_kv_heads * 2 * head_size * self.dtype.itemsize
        """KV bytes of one token in one layer."""

    def forward(self, batch: PackedBatch, kv: KVBuffer, hooks: LayerHooks) -> torch.Tensor:
        """Logits that are 1 at the next token and 0 elsewhere."""
        hashes = [hashlib.sha256() for _ in batch.sequences]
        for layer_index in range(len(self.layers)):
            name = layer_name(layer_index)
            hooks.before_layer(name)
            layer = kv.layers[name]
            self._write(layer_index, layer, batch)
            for seq, seq_hash in zip(batch.sequences, hashes, strict=True):
                kv_bytes = _read(layer, seq.block_tables[layer.group_id], seq.kv_tokens)
                seq_hash.update(self._visible(layer_index, kv_bytes))
            hooks.after_layer(name, layer.kv_cache, batch)
        next_token_of_row = {
            seq.end - 1: self._token(seq_hash.digest()) for seq, seq_hash in zip(batch.sequences, hashes, strict=True)
        }
        logits = torch.zeros(len(batch.logits_rows), self.vocab_size)
        for i, row in enumerate(batch.logits_rows.tolist()):
            logits[i, next_token_of_row[row]] = 1.0
        return logits

    def _write(self, layer_index: int, layer: LayerKV, batch: PackedBatch) -> None:
        new = bytearray()
        tokens, positions = batch.input_ids.tolist(), batch.positions.tolist()
        for seq in batch.sequences:
            first = positions[seq.start]
            seen = _read(layer, seq.block_tables[layer.group_id], first) if first else b""
            new += self._extend(layer_index, seen, tokens[seq.start : seq.end])[len(seen) :]
        rows = torch.frombuffer(new, dtype=self.dtype).view(len(tokens), layer.spec.num_kv_heads, -1)
        size = layer.spec.head_size
        layer.write(rows[..., :size], rows[..., size:], batch.write_blocks[layer.group_id], batch.write_offsets)

    def _extend(self, layer_index: int, kv: bytes, token_ids: Sequence[int]) -> bytes:
        """KV of some tokens, all that they see before them, and then theirs."""
        all_kv, size, window = bytearray(kv), self.token_bytes, self.layers[layer_index].window_tokens
        for token in token_ids:
            text = b"%d %d " % (layer_index, token) + all_kv[-size:]
            if window is not None and len(all_kv) >= (window - 1) * size:
                oldest = len(all_kv) - (window - 1) * size
                text += all_kv[oldest : oldest + size]
            all_kv += hashlib.shake_128(text).digest(size)
        return bytes(all_kv)

    def _visible(self, layer_index: int, kv: bytes) -> bytes:
        window = self.layers[layer_index].window_tokens
        return kv if window is None else kv[-window * self.token_bytes :]

    def _token(self, digest: bytes) -> int:
        return int.from_bytes(digest[:8], "little") % self.vocab_size

    def expected_kv(self, token_ids: Sequence[int], layer_index: int) -> bytes:
        """The right KV bytes of a sequence in one layer, [tokens, heads, K then V], without any pool."""
        return self._extend(layer_index, b"", token_ids)

    def expected_tokens(self, prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The right completion of a prompt (end-of-sequence ignored), without any pool."""
        tokens: list[int] = []
        kv = [self.expected_kv(prompt_token_ids, i) for i in range(len(self.layers))]
        for _ in range(num_tokens):
            parts = [self._visible(i, layer_kv) for i, layer_kv in enumerate(kv)]
            tokens.append(self._token(hashlib.sha256(b"".join(parts)).digest()))
            kv = [self._extend(i, layer_kv, tokens[-1:]) for i, layer_kv in enumerate(kv)]
        return tokens


def _read(layer: LayerKV, block_table: torch.Tensor, num_tokens: int) -> bytes:
    keys, values = layer.read(block_table, num_tokens)
    rows = torch.cat((keys, values), dim=-1).transpose(0, 1).contiguous()
    return bytes(rows.view(torch.uint8).numpy())
