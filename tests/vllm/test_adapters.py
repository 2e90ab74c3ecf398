"""LoRA adapters in real vLLM: KV is stored under the name of the weights that were loaded, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, StartEngines
from engine_process import random_prompt
from safetensors.torch import save_file

LAYERS, RANK = 3, 8  # of tiny_llama, and of the adapters


def save_adapter(folder: Path, model: str, seed: int) -> None:
    """Random weights for the projections whose outcome the KV cache holds."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    hidden, out = TINY["hidden_size"], TINY["num_key_value_heads"] * TINY["head_dim"]
    for layer in range(LAYERS):
        for name in ("k_proj", "v_proj"):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}."
            tensors[key + "lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * 0.3
            tensors[key + "lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["k_proj", "v_proj"], "bias": "none",
        "base_model_name_or_path": model, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def rename_folders(adapters: Path) -> None:
    (adapters / "current").rename(adapters / "kept")
    (adapters / "next").rename(adapters / "current")


def switch_link(adapters: Path) -> None:
    (adapters / "made").symlink_to("next")
    (adapters / "made").rename(adapters / "link")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "exchange"), [("current", rename_folders), ("link", switch_link)])
def test_an_adapter_exchanged_after_it_was_loaded_does_not_give_its_name_to_the_kv_of_the_old_one(
    start_engines: StartEngines, tiny_llama: str, tmp_path: Path, name: str, exchange: Callable[[Path], None]
) -> None:
    adapters = tmp_path / "adapters"
    save_adapter(adapters / "current", tiny_llama, 1)
    save_adapter(adapters / "next", tiny_llama, 2)
    (adapters / "link").symlink_to("current")
    path, prompt = str(adapters / name), random_prompt(7, 200)

    def start(folder: str | None) -> Any:
        transfer = {
            "kv_connector": "ExampleConnector", "kv_connector_module_path": "kvferry.vllm", "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"shared_storage_path": folder},
        }  # fmt: skip
        args = {
            "model": tiny_llama, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
            "block_size": 32, "num_gpu_blocks_override": 64, "max_model_len": 512, "disable_log_stats": False,
            "enable_lora": True, "max_lora_rank": RANK, **({"kv_transfer_config": transfer} if folder else {}),
        }  # fmt: skip
        (engine,) = start_engines(args)
        assert engine.ask(load_adapter=path)["is_loaded"]
        return engine

    def ask(folder: str | None, exchange: Callable[[Path], None] | None = None) -> tuple[float, list[int]]:
        engine = start(folder)
        if exchange is not None:
            exchange(adapters)
        got = engine.ask(generate=prompt, max_tokens=8)
        engine.stop()
        return got["external_hits"], got["token_ids"]

    store = str(tmp_path / "kv")
    _, old = ask(store, exchange)
    hits, new = ask(store)
    assert hits == 0, "only the old adapter's KV can be there"
    assert new == ask(None)[1] != old
    assert ask(store) == (192, new), "an adapter that nobody touches is cached"
