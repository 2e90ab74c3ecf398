"""Greedy float32 output equals transformers' `generate()`: alone, batched, any chunk size, with and without hits."""

from __future__ import annotations

import random

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.engine.layout_choice import LAYOUTS
from kvferry.errors import ConfigError

GREEDY = SamplingParams(max_tokens=24, temperature=0)


def prompts(seed: int = 0, lengths=(1, 5, 16, 33, 64, 131)) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(211) for _ in range(n)] for n in lengths]


def check_all(reference, outputs) -> None:
    for output in outputs:
        reference.check(output.prompt_token_ids, output.outputs[0].token_ids)
    reference.check_near_ties()


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
@pytest.mark.parametrize("block_size", [4, 16])
def test_batched_under_any_chunk_size(tiny_llama, reference, chunk, block_size):
    with LLM(tiny_llama, block_size=block_size, max_num_batched_tokens=chunk) as llm:
        check_all(reference(tiny_llama), llm.generate(prompts(), GREEDY))


@pytest.mark.parametrize(
    ("use_v2", "block_size", "kernel_tokens"), [(False, 16, None), (True, 16, None), (True, 128, 32), (True, 128, 16)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_both_runners(tiny_llama, reference, layout, use_v2, block_size, kernel_tokens):
    settings = {"use_v2_model_runner": use_v2, "block_size": block_size, "kernel_block_size": kernel_tokens}
    with LLM(tiny_llama, kv_cache_layout=layout, max_num_batched_tokens=48, **settings) as llm:
        assert llm.config.use_v2_model_runner == use_v2
        check_all(reference(tiny_llama), llm.generate(prompts(), GREEDY))
        again = llm.generate(prompts()[-1], GREEDY)
        assert again[0].num_cached_tokens == 128
        check_all(reference(tiny_llama), again)
        llm.check_integrity()


def test_alone_and_with_hits(tiny_llama, reference):
    with LLM(tiny_llama, max_num_batched_tokens=48) as llm:
        for _ in range(2):
            for prompt in prompts():
                output = llm.generate(prompt, GREEDY)
                check_all(reference(tiny_llama), output)
        assert output[0].num_cached_tokens == 128
        longer = llm.generate([prompts()[-1] + [3] * n for n in range(1, 4)], GREEDY)
        assert [o.num_cached_tokens for o in longer] == [128] * 3
        check_all(reference(tiny_llama), longer)


def test_query_blocks_longer_than_one(tiny_llama, reference):
    with LLM(tiny_llama, max_num_batched_tokens=400) as llm:
        check_all(reference(tiny_llama), llm.generate(prompts(seed=2, lengths=(129, 256, 390)), GREEDY))


def test_preempted(tiny_llama, reference):
    with LLM(tiny_llama, block_size=4, num_kv_blocks=42, enable_prefix_caching=False) as llm:
        check_all(reference(tiny_llama), llm.generate(prompts(seed=3, lengths=(30, 31, 32, 33)), GREEDY))
        assert llm.scheduler.num_preemptions > 0


def test_one_forward_per_step_for_all_requests(tiny_llama):
    with LLM(tiny_llama, max_num_batched_tokens=512) as llm:
        calls = []
        llm._model._model.register_forward_hook(lambda *args: calls.append(1))
        llm.generate(prompts(), GREEDY)
        assert len(calls) == llm.runner.num_forwards == 24  # one prefill of 250 tokens, then 23 decodes


def test_generate_of_transformers_is_not_called(tiny_llama, monkeypatch):
    from transformers import GenerationMixin

    monkeypatch.setattr(GenerationMixin, "generate", lambda *args, **kwargs: pytest.fail("generate was called"))
    with LLM(tiny_llama) as llm:
        llm.generate(prompts()[1], GREEDY)


def test_poisoned_block_changes_the_output(tiny_llama):
    with LLM(tiny_llama, block_size=4) as llm:
        right = llm.generate(prompts()[3], GREEDY)[0].outputs[0].token_ids
        hit = llm.generate(prompts()[3], GREEDY)[0]
        assert hit.num_cached_tokens == 32
        assert hit.outputs[0].token_ids == right
        pool = llm.scheduler.manager.block_pool
        cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
        next(iter(llm.kv_caches.values()))[cached] = 5.0
        assert llm.generate(prompts()[3], GREEDY)[0].outputs[0].token_ids != right


def test_registered_views_hold_the_kv_of_transformers_own_cache(tiny_llama, reference):
    prompt = prompts()[2]
    with LLM(tiny_llama, block_size=4) as llm, torch.inference_mode():
        request_id = llm.add_request(prompt, GREEDY)
        llm.step()
        table = llm.scheduler.manager.get_block_ids(request_id)[0]
        theirs = reference(tiny_llama).model(torch.tensor([prompt]), use_cache=True).past_key_values
        for layer, view in zip(theirs.layers, llm.kv_caches.values(), strict=True):
            ours = view[table].transpose(0, 1).reshape(2, -1, 16)[:, : len(prompt)]
            torch.testing.assert_close(ours, torch.cat((layer.keys[0], layer.values[0]), -1), atol=1e-5, rtol=1e-4)
        block = view[table[0]]
        assert block.untyped_storage().nbytes() == llm.config.cache_config.num_gpu_blocks * 3 * 4 * 2 * 16 * 4


def test_seeded_sampling_repeats_whatever_else_runs(tiny_llama):
    params = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, top_k=50, seed=7)
    with LLM(tiny_llama, seed=1) as llm:
        alone = llm.generate(prompts()[2], params)[0].outputs[0].token_ids
        among = llm.generate(prompts(), params)[2].outputs[0].token_ids
        unseeded = llm.generate([prompts()[2]] * 4, SamplingParams(max_tokens=12, temperature=5.0))
    assert alone == among
    assert len({tuple(o.outputs[0].token_ids) for o in unseeded}) == 4


def test_bfloat16_runs_and_reports(tiny_llama):
    with LLM(tiny_llama, dtype=torch.bfloat16) as llm:
        output = llm.generate(prompts()[1], GREEDY)[0]
        assert len(output.outputs[0].token_ids) == 24
        assert 0 < output.metrics.ttft_s <= output.metrics.e2e_s
        assert next(iter(llm.kv_caches.values())).dtype == torch.bfloat16


def test_prompts_that_cannot_run(tiny_llama):
    with LLM(tiny_llama, max_model_len=64) as llm:
        with pytest.raises(ConfigError, match="max_model_len=64"):
            llm.generate(prompts(lengths=(64,))[0], GREEDY)
        with pytest.raises(ConfigError, match="no tokenizer"):
            llm.generate("text", GREEDY)
        assert len(llm.generate(prompts(lengths=(63,))[0], GREEDY)[0].outputs[0].token_ids) == 1
