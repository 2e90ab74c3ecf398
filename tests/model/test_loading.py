"""Which models load, and what users are told about the others."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

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


def test_weights_that_are_exchanged_while_they_are_loaded_end_the_start(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "exchanged"
    shutil.copytree(tiny_llama, folder)
    load = AutoModelForCausalLM.from_pretrained

    def load_then_exchange(*args, **kwargs):
        model = load(*args, **kwargs)
        weights = next(folder.glob("*.safetensors"))
        weights.rename(tmp_path / "old")
        shutil.copy2(tmp_path / "old", weights)  # the same size and time of change; another file
        return model

    extra = {"cpu_bytes_to_use": 1 << 20}
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    LLM(folder, num_kv_blocks=64, kv_transfer_config=transfer).shutdown()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_then_exchange)
    with pytest.raises(ConfigError, match=r"changed while this engine loaded them.*start it again"):
        LLM(folder, num_kv_blocks=64, kv_transfer_config=transfer)
