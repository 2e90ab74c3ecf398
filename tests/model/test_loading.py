"""Which models load, and what users are told about the others."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvferry import LLM, SamplingParams
from kvferry.errors import ConfigError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def save(folder, family, **settings):
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**settings)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_families_answer_as_transformers_does(tmp_path, reference, family):
    extra = {"sliding_window": None} if family == "Mistral" else {}
    folder = save(tmp_path / family, family, **SMALL, **extra)
    prompts = [[5, 6, 7], list(range(1, 60))]
    with LLM(folder, block_size=4, max_num_batched_tokens=20) as llm:
        for output in llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0)):
            reference(folder).check(output.prompt_token_ids, output.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("Mistral", SMALL | {"sliding_window": 16}, "MistralForCausalLM is not supported.*sliding window"),
        ("Gemma2", SMALL | {"head_dim": 8}, "Gemma2ForCausalLM is not supported"),
        (
            "Bloom",
            {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
            "BloomForCausalLM is not supported",
        ),
        (
            "Mamba",
            {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            "Mamba.* is not supported",
        ),
        (
            "Llama",
            SMALL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "LlamaForCausalLM is not supported.*dynamic",
        ),
    ],
    ids=["sliding-window", "softcap", "alibi", "recurrent", "dynamic-rope"],
)
def test_unsupported_architectures_are_refused_by_name(tmp_path, family, settings, message):
    with pytest.raises(ConfigError, match=message):
        LLM(save(tmp_path / family, family, **settings))


def test_self_check_refuses_a_model_that_would_answer_wrongly(tiny_llama, monkeypatch):
    from kvferry.engine import attention

    monkeypatch.setattr(attention, "_mask_future", lambda scores: None)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM is not supported: .* logits differ"):
        LLM(tiny_llama)


def test_wrong_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "no-such-type"}')
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    (tmp_path / "empty").mkdir()
    for path in ("/no/such/folder", "meta-llama/Llama-3", tmp_path / "empty", tmp_path / "bad", tmp_path / "x.gguf"):
        with pytest.raises(ConfigError, match="model="):
            LLM(path)
    assert list((tmp_path / "cache" / "kvferry" / "models").iterdir()) == [], "nothing half-made stays"


def test_kv_space_too_small(tiny_llama):
    with pytest.raises(ConfigError, match="num_kv_blocks=33"):
        LLM(tiny_llama, num_kv_blocks=10, max_model_len=512)
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        LLM(tiny_llama, kv_cache_bytes=1000)
    with pytest.raises(ConfigError, match="cannot be allocated"):
        LLM(tiny_llama, kv_cache_bytes=1 << 60)
    with pytest.raises(ConfigError, match="own limit of 512"):
        LLM(tiny_llama, max_model_len=513)
    with LLM(tiny_llama, num_kv_blocks=10) as llm:
        assert llm.config.model_config.max_model_len == 9 * 16
