"""Many architectures with tiny random weights against transformers' `generate()`; makes docs/guides/models.md.

.venv/bin/python tests/model/test_families.py     # writes the page anew
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvferry import LLM, SamplingParams
from kvferry.engine.model_facts import read_model_facts
from kvferry.engine.runner_choice import V2_ARCHITECTURES
from kvferry.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "models.md"
GREEDY = SamplingParams(max_tokens=10, temperature=0)

VOCAB_SIZE = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = BASE | {"num_key_value_heads": 2}
LOCAL = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} | {
    key: BASE[key] for key in ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
}
LATENT = BASE | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "head_dim": 8,
} | EXPERTS  # fmt: skip

SUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama, SmolLM2": ("Llama", GROUPED, ""),
    "Qwen2, Qwen2.5": ("Qwen2", GROUPED, ""),
    "Qwen2 with sliding window": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "max_window_layers": 1} | LOCAL,
        "sliding window",
    ),
    "Qwen3": ("Qwen3", GROUPED | {"head_dim": 12}, ""),
    "Qwen2 MoE": (
        "Qwen2Moe",
        GROUPED | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
        "experts",
    ),
    "Qwen3 MoE": ("Qwen3Moe", GROUPED | EXPERTS | {"head_dim": 8, "num_experts": 4}, "experts"),
    "Mistral": ("Mistral", GROUPED | {"sliding_window": 16}, "sliding window"),
    "Ministral": ("Ministral", GROUPED | LOCAL | {"head_dim": 8}, "sliding window"),
    "Mixtral": (
        "Mixtral",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        "experts",
    ),
    "Phi": ("Phi", BASE, ""),
    "Phi-3, Phi-4": ("Phi3", GROUPED | {"sliding_window": 16}, "sliding window"),
    "OLMo": ("Olmo", GROUPED, ""),
    "OLMo 2": ("Olmo2", GROUPED, ""),
    "OLMo 3": ("Olmo3", GROUPED | LOCAL, "sliding window"),
    "Gemma": ("Gemma", GROUPED | {"head_dim": 8}, ""),
    "Gemma 2": ("Gemma2", GROUPED | LOCAL | {"head_dim": 8, "query_pre_attn_scalar": 8}, "sliding window, soft cap"),
    "Gemma 3 (text)": ("Gemma3", GROUPED | LOCAL | {"head_dim": 8, "query_pre_attn_scalar": 8}, "sliding window"),
    "GPT-OSS": (
        "GptOss",
        GROUPED
        | LOCAL
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "sliding window, sinks, experts",
    ),
    "Granite": ("Granite", GROUPED, ""),
    "SmolLM3": ("SmolLM3", GROUPED, ""),
    "StarCoder2": ("Starcoder2", GROUPED | {"sliding_window": 16}, "sliding window"),
    "Cohere (Command R)": ("Cohere", GROUPED, ""),
    "Cohere2 (Command R7B)": ("Cohere2", GROUPED | LOCAL, "sliding window"),
    "GLM": ("Glm", GROUPED | {"head_dim": 8}, ""),
    "GLM-4": ("Glm4", GROUPED | {"head_dim": 8}, ""),
    "Nemotron": ("Nemotron", GROUPED, ""),
    "Seed-OSS": ("SeedOss", GROUPED | {"head_dim": 8}, ""),
    "ERNIE 4.5": ("Ernie4_5", GROUPED | {"head_dim": 8}, ""),
    "DeepSeek-V2": ("DeepseekV2", LATENT, "expanded latent KV, experts"),
    "DeepSeek-V3": ("DeepseekV3", LATENT, "expanded latent KV, experts"),
    "GPT-NeoX (Pythia)": ("GPTNeoX", BASE, ""),
    "GPT-2": ("GPT2", GPT2, ""),
    "GPT-BigCode": ("GPTBigCode", GPT2, ""),
    "OPT": (
        "OPT",
        {k: v for k, v in BASE.items() if k not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
        "",
    ),
    "StableLM": ("StableLm", GROUPED, ""),
}
"""Name -> class prefix, settings, what it needs beyond plain attention."""

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "BLOOM": (
        "Bloom",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "attention of its own (ALiBi)",
    ),
    "Falcon": ("Falcon", BASE | {"alibi": True}, "attention of its own"),
    "GPT-J": ("GPTJ", GPT2 | {"rotary_dim": 8}, "attention of its own"),
    "MPT": (
        "Mpt",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 4},
        "attention of its own (ALiBi)",
    ),
    "Mamba": (
        "Mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "recurrent state",
    ),
    "Mamba 2": (
        "Mamba2",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
        },
        "recurrent state",
    ),
    "LFM2": ("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, "recurrent state"),
    "Qwen3-Next": (
        "Qwen3Next",
        GROUPED
        | EXPERTS
        | {
            "num_experts": 4,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "recurrent state",
    ),
    "Llama with dynamic RoPE": (
        "Llama",
        GROUPED | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "a token's KV would depend on its batch",
    ),
    "Phi-3.5 MoE with a window": (
        "Phimoe",
        GROUPED | {"sliding_window": 16, "num_local_experts": 4},
        "its attention is not told its window",
    ),
    "Llama 4 (text)": (
        "Llama4",
        GROUPED
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16}
        | {"interleave_moe_layer_step": 2, "layer_types": ["chunked_attention", "full_attention"]},
        "its attention is not told its chunk",
    ),
    "T5 (encoder-decoder)": (
        "T5",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        "two towers",
    ),
}
"""Name -> class prefix, settings, what it would need."""


REFUSAL_WORDS = {
    "attention of its own": "0 use exchangeable attention; the others have one of their own",
    "recurrent state": r"\d use exchangeable attention; the others .* keep state",
    "a token's KV would": "makes a token's KV depend on its batch",
    "its attention is not told": r"its layer \d is '\w+' and does not hand the attention its window",
    "two towers": "encoder-decoder",
}
"""How a reason on the page begins -> what the error says."""


def class_name(prefix: str) -> str:
    """transformers' name of the model class."""
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return next(prefix + ending for ending in endings if hasattr(transformers, prefix + ending))


def save(folder: Path, prefix: str, settings: dict[str, Any]) -> Path:
    """A folder with random weights, large enough that attention matters."""
    torch.manual_seed(1)
    config_class = getattr(transformers, f"{prefix}Config", None) or getattr(transformers, f"{prefix}TextConfig")
    if prefix in ("Gemma3", "Llama4"):
        config_class = getattr(transformers, f"{prefix}TextConfig")
    model = getattr(transformers, class_name(prefix))(config_class(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    """Some within, some beyond the windows of 16; block sizes and chunks divide none of them."""
    rng = random.Random(3)
    return [[rng.randrange(1, VOCAB_SIZE) for _ in range(n)] for n in (1, 9, 30, 71)]


RUNS = [(name, None) for name in SUPPORTED]
RUNS += [(name, False) for name, (prefix, *_) in SUPPORTED.items() if f"{prefix}ForCausalLM" in V2_ARCHITECTURES]
"""Family and `use_v2_model_runner`: models that get V2 by default are tried on V1 too."""


@pytest.mark.parametrize(("name", "use_v2"), RUNS)
def test_family_answers_as_transformers_does(tmp_path, reference, name, use_v2):
    prefix, settings, _ = SUPPORTED[name]
    folder = save(tmp_path, prefix, settings)
    ref = reference(folder)
    facts = read_model_facts(folder)
    sizes = {"block_size": 4, "num_kv_blocks": 200, "max_num_batched_tokens": 24}
    with LLM(folder, use_v2_model_runner=use_v2, **sizes) as llm:
        is_listed = class_name(prefix) in V2_ARCHITECTURES
        assert llm.config.use_v2_model_runner is (is_listed if use_v2 is None else use_v2)
        assert (facts.path, facts.dtype, facts.max_model_len) == (
            llm._model.path,
            llm._model.dtype,
            llm._model.max_model_len,
        )
        assert facts.layers == llm._model.layers, "what config.json tells is not what the model does"
        for prompt in prompts():  # alone; in chunks when longer than 24 tokens
            ref.check(prompt, llm.generate(prompt, GREEDY)[0].outputs[0].token_ids)
        assert llm.scheduler.manager.reset_prefix_cache()
        for is_hit in (False, True):
            for output in llm.generate(prompts(), GREEDY):
                ref.check(output.prompt_token_ids, output.outputs[0].token_ids)
                expected_hit = (len(output.prompt_token_ids) - 1) // 4 * 4 if is_hit else 0
                assert output.num_cached_tokens == expected_hit
    ref.check_near_ties()


@pytest.mark.parametrize("name", REFUSED)
def test_family_is_refused_at_load_by_name_and_reason(tmp_path, name):
    prefix, settings, reason = REFUSED[name]
    words = next(words for start, words in REFUSAL_WORDS.items() if reason.startswith(start))
    with pytest.raises(ConfigError, match=rf"{class_name(prefix)} is not supported: .*{words}"):
        LLM(save(tmp_path, prefix, settings))


def test_page_lists_what_was_tested():
    assert PAGE.read_text() == page(), f"run {Path(__file__).name} to write the page anew"


PAGE_TEXT = """\
# Models

The embedded engine runs transformers' own model code, with the attention replaced by one that reads a paged KV cache.
Written by `tests/model/test_families.py`, which runs each of these with tiny random weights in float32: alone, batched,
with prefill in chunks, with and without prefix hits. The tokens must be those of `generate()`.

| family | transformers class | beyond plain attention |
|---|---|---|
{supported}

SmolLM2-135M-Instruct is tested with its real weights as well. Layers with a sliding window keep no more KV than it
reaches ([hybrid KV caches](hybrid.md)). DeepSeek's KV is kept expanded, per head, not as the latent. A model that is
not listed loads if its paged forward equals its plain one on a few tokens, which is checked at every load.

## Refused at load, with the reason

| family | transformers class | because |
|---|---|---|
{refused}

## Speed and memory on a CPU

Linear layers in bfloat16 are kept in oneDNN's own weight order where torch has the operators for it; the plain weights
are dropped, except those tied to the embeddings, which are there twice. Float32 weights stay as they are.
"""


def page() -> str:
    """What docs/guides/models.md must hold."""

    def rows(table: dict[str, tuple[str, dict[str, Any], str]]) -> str:
        return "\n".join(f"| {name} | `{class_name(prefix)}` | {text} |" for name, (prefix, _, text) in table.items())

    return PAGE_TEXT.format(supported=rows(SUPPORTED), refused=rows(REFUSED))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
