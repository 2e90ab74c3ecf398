"""Offloading with the KV pool on a CUDA device."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvferry import LLM, SamplingParams
from kvferry.kv.layout import KVLayout
from kvferry.offloading.copier import DeviceCopier, make_copier
from kvferry.types import AttentionKind, GroupInfo


@pytest.mark.parametrize("pinned", [True, False])
def test_device_copies_are_byte_exact_and_see_queued_work(pinned: bool) -> None:
    pool = torch.zeros(32, 4, 16, 2, 64, device="cuda")
    caches = {f"l{i}": pool[:, i].permute(0, 2, 1, 3) for i in range(4)}
    layout, anchors = KVLayout.from_tensors(caches, [GroupInfo(0, tuple(caches), 16, AttentionKind.FULL)], 32)
    copier = make_copier(anchors)
    assert isinstance(copier, DeviceCopier)
    group = layout.groups[0]
    host = (ctypes.c_uint8 * (3 * group.block_bytes))()
    address = ctypes.addressof(host)
    if pinned:
        copier.map_host(address, len(host))
    for round_ in range(20):
        big = torch.rand(2048, 2048, device="cuda")
        for _ in range(10):
            big = big @ big / 2048  # keeps the stream busy, so that an unordered copy would read too early
        pool.copy_(torch.rand(pool.shape, generator=torch.Generator().manual_seed(round_)), non_blocking=True)
        copier.gather(copier.mark(), group.block_ranges([5, 9, 10]), address)
        expected = torch.stack([pool[b] for b in (5, 9, 10)]).cpu().flatten().view(torch.uint8)
        assert bytes(host) == expected.numpy().tobytes()
        copier.scatter(copier.mark(), address, group.block_ranges([20, 21, 22]))
        assert torch.equal(pool[20:23], torch.stack([pool[b] for b in (5, 9, 10)]))
    copier.unmap_host()
    copier.unmap_host()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=2000,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load_async", [True, False])
def test_engine_on_cuda_serves_from_host_and_disk(model: Path, tmp_path: Path, load_async: bool) -> None:
    tokens = [(i * 37 + i * i) % 2000 for i in range(700)]
    extra = {
        "cpu_bytes_to_use": 1 << 28,
        "load_async": load_async,
        "secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}],
    }
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    options: dict[str, Any] = {"dtype": "float32", "device": "cuda", "max_model_len": 1024}
    greedy = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    reference = LlamaForCausalLM.from_pretrained(model).cuda()
    wanted = reference.generate(torch.tensor([tokens], device="cuda"), max_new_tokens=16, do_sample=False)
    expected = wanted[0, len(tokens) :].tolist()
    with LLM(str(model), kv_transfer_config=transfer, **options) as llm:
        first = llm.generate(tokens, greedy)[0]
        assert first.outputs[0].token_ids == expected
        assert llm.reset_prefix_cache()
        second = llm.generate(tokens, greedy)[0]
        assert second.num_external_tokens == 640
        assert second.outputs[0].token_ids == expected
    with LLM(str(model), kv_transfer_config=transfer, **options) as llm:
        third = llm.generate(tokens, greedy)[0]
        assert third.num_external_tokens == 640
        assert third.external_hit_sources == {"disk": 640}
        assert third.outputs[0].token_ids == expected
