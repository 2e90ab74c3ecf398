"""Models with windows: in KV groups, offloaded, restarted and loaded again; tokens as transformers'."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.test_families import GROUPED, save

from kvferry import LLM, SamplingParams
from kvferry.engine.outputs import RequestOutput

BLOCK = 16
WINDOW = 40
SIX_LAYERS = GROUPED | {
    "num_hidden_layers": 6,
    "sliding_window": WINDOW,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
MODELS: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "Gemma3": ("Gemma3", SIX_LAYERS | {"query_pre_attn_scalar": 8}, [WINDOW, WINDOW, None]),
    "GPT-OSS": (
        "GptOss",
        SIX_LAYERS
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        [WINDOW, None],
    ),
    "Mistral": (
        "Mistral",
        GROUPED | {"num_hidden_layers": 3, "sliding_window": WINDOW, "max_position_embeddings": 512},
        [WINDOW],
    ),
}
"""Name -> class prefix, settings, the window of each group."""


def prompts() -> list[list[int]]:
    """Several windows long, some with a common beginning, cut at and beside block boundaries."""
    rng = random.Random(5)
    document, other = ([rng.randrange(1, 97) for _ in range(330)] for _ in range(2))
    return [document, other[:200], [*document[:160], 5, 6, 7], document[:161], document[:159], other[:65]]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int | None]]:
    """A folder with random weights, and the windows of its groups."""
    prefix, settings, windows = MODELS[request.param]
    return save(tmp_path_factory.mktemp(prefix), prefix, settings), windows


def engine(folder: Path, extra: dict[str, Any] | None = None, **options: Any) -> LLM:
    transfer = None if extra is None else {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 64 << 20, **extra},
    }  # fmt: skip
    settings = {"block_size": BLOCK, "num_kv_blocks": 200, "max_num_batched_tokens": 128, "dtype": "float32", **options}
    return LLM(folder, kv_transfer_config=transfer, **settings)


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def spoil(llm: LLM) -> None:
    """Forget what is cached; from now on all but the null block holds what must not be read."""
    assert llm.reset_prefix_cache()
    storage = llm._hosted.kv.storage
    storage[storage.numel() // llm.kv_cache_config.num_blocks :].view(torch.float32).fill_(float("nan"))


def test_groups_follow_the_layers(model: Any) -> None:
    folder, windows = model
    with engine(folder) as llm:
        specs = [group.kv_cache_spec for group in llm.kv_cache_config.kv_cache_groups]
        assert [getattr(spec, "sliding_window", None) for spec in specs] == windows
        assert len({len(group.layer_names) for group in llm.kv_cache_config.kv_cache_groups}) == 1


def test_tokens_are_those_of_transformers(model: Any, reference: Any) -> None:
    """Alone, in a batch, in chunks, preempted, with hits at block boundaries; in groups and in one."""
    folder, _ = model
    ref = reference(folder)
    num_preemptions = 0
    for options in (
        {},
        {"max_num_batched_tokens": 48},
        {"max_num_batched_tokens": 48, "num_kv_blocks": 36},
        {"disable_hybrid_kv_cache_manager": True},
    ):
        with engine(folder, **options) as llm:
            spoil(llm)
            for params in (greedy(), greedy(24)):  # the second time there are hits
                for output in llm.generate([p[:220] for p in prompts()], params):
                    ref.check(output.prompt_token_ids, output.outputs[0].token_ids)
            num_preemptions += llm.scheduler.num_preemptions
            llm.scheduler.check_integrity()
    ref.check_near_ties()
    print(f"{num_preemptions} preemptions")


def kept_pages(llm: LLM, prompt: list[int]) -> tuple[RequestOutput, dict[tuple[str, int], bytes]]:
    """Run a request. (layer, position) -> the bytes of its full blocks when they were first seen after a step."""
    llm.add_request(prompt, greedy())
    pages: dict[tuple[str, int], bytes] = {}
    outputs: list[RequestOutput] = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
        for live in llm.live_requests():
            request = llm.scheduler._requests[live["request_id"]]
            num_full = min(request.num_computed_tokens, len(prompt)) // BLOCK
            if request in llm.scheduler.running:
                tables = llm.scheduler.manager.get_block_ids(request.request_id)
                for group, table in zip(llm.kv_cache_config.kv_cache_groups, tables, strict=True):
                    for name in group.layer_names:
                        view = llm.kv_caches[name]
                        found = {(name, i): bytes(view[b].contiguous().view(torch.uint8).numpy().tobytes())
                                 for i, b in enumerate(table[:num_full]) if b}  # fmt: skip
                        pages = found | pages
    return outputs[-1], pages


@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_offload_restart_reload_gives_equal_bytes_and_tokens(
    model: Any, reference: Any, tmp_path: Path, load_async: bool
) -> None:
    folder, windows = model
    ref = reference(folder)
    extra = {"load_async": load_async, "secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}]}
    prompt = prompts()[0]
    with engine(folder, extra) as llm:
        cold, computed = kept_pages(llm, prompt)
        assert cold.num_external_tokens == 0
        ref.check(prompt, cold.outputs[0].token_ids)
        spoil(llm)
        check_reload(llm, ref, prompt, computed, windows)
    with engine(folder, extra) as llm:  # a new engine over the same folder
        spoil(llm)
        check_reload(llm, ref, prompt, computed, windows)
        assert llm.counters.load_failures == 0
    ref.check_near_ties()


def check_reload(
    llm: LLM, ref: Any, prompt: list[int], computed: dict[tuple[str, int], bytes], windows: list[int | None]
) -> None:
    warm, loaded = kept_pages(llm, prompt)
    assert warm.num_external_tokens == 320
    ref.check(prompt, warm.outputs[0].token_ids)
    for group, window in zip(llm.kv_cache_config.kv_cache_groups, windows, strict=True):
        for name in group.layer_names:
            positions = sorted(i for layer, i in loaded if layer == name)
            # After the step that goes from 320 to 330 tokens, those from 330 - 39 on are in reach: blocks 18 and 19.
            assert positions == (list(range(20)) if window is None else [18, 19])
            for i in positions:
                assert loaded[name, i] == computed[name, i], f"{name}: block {i} differs"
