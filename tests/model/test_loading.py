"""Which models load, and what users are told about the others."""

from __future__ import annotations

import json
import shutil

import pytest

from kvferry import LLM
from kvferry.errors import ConfigError


def test_a_local_layer_that_hides_its_window_is_refused(tiny_llama, tmp_path):
    folder = tmp_path / "local"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention", "chunked_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not supported: its layer 1 is 'chunked_attention'"):
        LLM(folder)


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
