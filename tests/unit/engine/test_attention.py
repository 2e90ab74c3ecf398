"""Paged attention against the obvious slow form, and the KV buffer's layout against byte arithmetic."""

from __future__ import annotations

import pytest
import torch

from kvferry.contract import FullAttentionSpec, KVCacheConfig
from kvferry.engine.attention import (
    AttentionOptions,
    PackedSequence,
    PagedAttention,
    SequenceChunk,
    bucket_decodes,
    causal_attention,
    pack_batch,
)
from kvferry.engine.kv_groups import KVBuffer, LayerShape, full_attention_specs, kv_cache_config_for, layer_name
from kvferry.engine.layout_choice import LAYOUTS
from kvferry.engine.model_loader import NoHooks
from kvferry.errors import ConfigError

PLAIN = AttentionOptions(scale=1.0)


def slow_attention(query, keys, values, options=PLAIN):
    """One query, one head at a time."""
    num_heads, num_tokens, _ = query.shape
    num_kv_heads, kv_tokens, _ = keys.shape
    out = torch.empty(num_tokens, num_heads, values.shape[-1])
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        for i in range(num_tokens):
            visible = kv_tokens - num_tokens + i + 1
            first = max(0, visible - (options.window_tokens or visible))
            scores = keys[kv_head, first:visible] @ query[head, i]
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            weights = scores.exp()
            sink = 0.0 if options.sinks is None else options.sinks[head].exp()
            out[i, head] = weights @ values[kv_head, first:visible] / (weights.sum() + sink)
    return out


OPTIONS = {
    "plain": PLAIN,
    "window": AttentionOptions(1.0, window_tokens=9),
    "long window": AttentionOptions(1.0, window_tokens=100),
    "softcap": AttentionOptions(1.0, softcap=2.0),
    "sinks": AttentionOptions(1.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, 1.0])),
    "all": AttentionOptions(1.0, window_tokens=9, softcap=2.0, sinks=torch.arange(6.0)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("num_tokens", "kv_tokens"), [(1, 1), (1, 40), (7, 7), (5, 33), (64, 64), (128, 128), (129, 300), (9, 18)]
)
def test_causal_attention_equals_the_slow_form(num_tokens, kv_tokens, options):
    torch.manual_seed(num_tokens)
    query, keys = torch.randn(6, num_tokens, 8), torch.randn(2, kv_tokens, 8)
    values = torch.randn(2, kv_tokens, 5)
    torch.testing.assert_close(
        causal_attention(query, keys, values, options), slow_attention(query, keys, values, options)
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lengths", [[1], [40], [13, 13], [5, 40, 33, 36, 31, 1, 39]])
def test_a_mixed_batch_equals_the_slow_form_and_never_reads_past_an_end(lengths, options):
    """Decodes in padded buckets beside a prefill, every byte outside the sequences NaN."""
    torch.manual_seed(len(lengths))
    specs = full_attention_specs([LayerShape(2, 8, 5)], 4, torch.float32)
    kv = KVBuffer(kv_cache_config_for(90, [specs]), "cpu")
    view = kv.views()[layer_name(0)]
    view.fill_(float("nan"))
    free = torch.randperm(89).add(1).tolist()
    chunks, expected = [], []
    for length, num_new in [*((n, 1) for n in lengths), (22, 6)]:
        table = [free.pop() for _ in range(-(-length // 4))]
        keys, values, query = torch.randn(2, length, 8), torch.randn(2, length, 5), torch.randn(6, num_new, 8)
        for position in range(length - num_new):
            view[table[position // 4], :, position % 4] = torch.cat((keys[:, position], values[:, position]), -1)
        chunks.append((SequenceChunk([0] * num_new, length - num_new, (table,), True), query, keys, values))
        expected.append(slow_attention(query, keys, values, options))
    paged = PagedAttention(pack_batch([c[0] for c in chunks], 4, "cpu"), kv, NoHooks())
    new = [torch.cat([c[i][:, -c[1].shape[1] :] for c in chunks], 1) for i in (1, 2, 3)]
    torch.testing.assert_close(paged.attend(0, *new, options)[0], torch.cat(expected))


@pytest.mark.parametrize("window", [1, 5, 9, 16, 40])
def test_blocks_behind_the_window_are_not_read(window):
    """They may belong to others by then: here they are NaN, and their place in the table is the null block's."""
    torch.manual_seed(window)
    kv = KVBuffer(kv_cache_config_for(40, [full_attention_specs([LayerShape(2, 8, 5)], 4, torch.float32)]), "cpu")
    view, options = kv.views()[layer_name(0)], AttentionOptions(1.0, window_tokens=window)
    view.fill_(float("nan"))
    free = torch.randperm(39).add(1).tolist()
    chunks, news, expected = [], [], []
    for length, num_new in ((37, 1), (30, 1), (3, 1), (33, 7)):
        keys, values, query = torch.randn(2, length, 8), torch.randn(2, length, 5), torch.randn(6, num_new, 8)
        num_gone = max(0, length - num_new + 1 - window) // 4
        table = [0] * num_gone + [free.pop() for _ in range(-(-length // 4) - num_gone)]
        for position in range(4 * num_gone, length - num_new):
            view[table[position // 4], :, position % 4] = torch.cat((keys[:, position], values[:, position]), -1)
        chunks.append(SequenceChunk([0] * num_new, length - num_new, (table,), True))
        news.append((query, keys[:, -num_new:], values[:, -num_new:]))
        expected.append(slow_attention(query, keys, values, options))
    new = [torch.cat([part[i] for part in news], 1) for i in range(3)]
    paged = PagedAttention(pack_batch(chunks, 4, "cpu"), kv, NoHooks())
    torch.testing.assert_close(paged.attend(0, *new, options)[0], torch.cat(expected))


def test_buckets_hold_like_lengths_and_are_bounded():
    lengths = [10, 2000, 9, 1900, 1000, 1800, 8, 7]
    sequences = [PackedSequence(i, i + 1, n, ()) for i, n in enumerate(lengths)]
    buckets = bucket_decodes([*sequences, PackedSequence(8, 12, 100, ())])
    assert [[s.kv_tokens for s in b] for b in buckets] == [[2000, 1900], [1800], [1000], [10, 9, 8], [7]]


def buffer(
    num_blocks=5, block_size=4, layers=3, dtype=torch.float16, layout="BLNHC", kernel_block_tokens=None
) -> KVBuffer:
    specs = full_attention_specs([LayerShape(2, 8, 6)] * layers, block_size, dtype)
    return KVBuffer(kv_cache_config_for(num_blocks, [specs], layout), "cpu", None, kernel_block_tokens)


def test_views_are_block_first_token_major():
    kv = buffer()
    config: KVCacheConfig = kv.config
    page = 4 * 2 * 14 * 2
    assert config.kv_cache_layout == "BLNHC"
    assert kv.storage.dtype == torch.int8
    assert kv.storage.numel() == 5 * 3 * page
    for index, (name, view) in enumerate(kv.views().items()):
        assert name == f"model.layers.{index}.self_attn.attn"
        assert view.shape == (5, 2, 4, 14)
        for block, head, token in ((0, 0, 0), (3, 1, 2), (4, 0, 3)):
            byte = (block * 3 + index) * page + (token * 2 + head) * 14 * 2
            assert view[block, head, token].data_ptr() == kv.storage.data_ptr() + byte


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_lie_as_their_layout_says(layout, ratio):
    """Against the address arithmetic of the name: B is the kernel block, N its token."""
    sizes = {"L": 3, "B": 5 * ratio, "H": 2, "N": 8 // ratio, "C": 14}
    kv = buffer(block_size=8, layout=layout, kernel_block_tokens=8 // ratio)
    assert kv.config.kv_cache_layout == layout
    assert kv.storage.numel() == 5 * 3 * 8 * 2 * 14 * 2
    for layer, view in enumerate(kv.views().values()):
        assert view.shape == (5 * ratio, 2, 8 // ratio, 14)
        for block, head, token in ((0, 0, 0), (5 * ratio - 1, 1, 8 // ratio - 1), (2, 0, 1)):
            index, element = {"L": layer, "B": block, "H": head, "N": token, "C": 0}, 0
            for dim in layout:
                element = element * sizes[dim] + index[dim]
            assert view[block, head, token].data_ptr() == kv.storage.data_ptr() + 2 * element


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_write_and_read_meet_in_the_views(layout, ratio):
    torch.manual_seed(0)
    kv = buffer(num_blocks=5, block_size=4 * ratio, layout=layout, kernel_block_tokens=4)
    for name, layer in kv.layers.items():
        keys, values = torch.randn(6, 2, 8).half(), torch.randn(6, 2, 6).half()
        blocks, offsets = torch.tensor([3, 3, 3, 3, 1, 1]), torch.tensor([0, 1, 2, 3, 0, 1])
        layer.write(keys, values, blocks, offsets)
        read_keys, read_values = layer.read(torch.tensor([3, 1]), 6)
        assert read_keys.equal(keys.transpose(0, 1))
        assert read_values.equal(values.transpose(0, 1))
        assert kv.views()[name][1, :, 1, :8].equal(keys[5])
    assert not kv.storage.is_inference()


@pytest.mark.parametrize("kernel_tokens", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlaid_groups_share_memory(layout, kernel_tokens):
    spec = FullAttentionSpec(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float16)
    groups = [{f"a{i}": spec for i in range(2)}, {"b0": spec}]
    views = KVBuffer(kv_cache_config_for(3, groups, layout), "cpu", None, kernel_tokens).views()
    assert views["a0"].data_ptr() == views["b0"].data_ptr() != views["a1"].data_ptr()
    assert views["b0"].stride() == views["a0"].stride()


def test_layers_of_different_shapes_are_refused():
    with pytest.raises(ConfigError, match="different shapes"):
        full_attention_specs([LayerShape(2, 8, 8), LayerShape(1, 8, 8)], 4, torch.float32)


def test_packing():
    chunks = [SequenceChunk([7, 8, 9], 3, ([5, 2],), True), SequenceChunk([1], 0, ([4],), False)]
    batch = pack_batch(chunks, 4, "cpu")
    assert batch.input_ids.tolist() == [7, 8, 9, 1]
    assert batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.write_blocks[0].tolist() == [5, 2, 2, 4]
    assert batch.write_offsets.tolist() == [3, 0, 1, 0]
    assert batch.logits_rows.tolist() == [2]
    assert [(s.start, s.end, s.kv_tokens, s.block_tables[0].tolist()) for s in batch.sequences] == [
        (0, 3, 6, [5, 2]),
        (3, 4, 1, [4]),
    ]
