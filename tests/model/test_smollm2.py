"""The real model of the demo, SmolLM2-135M-Instruct, dequantised from its wheel."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvferry import LLM, SamplingParams
from kvferry.cli.main import app

pytestmark = pytest.mark.slow
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
]


@pytest.fixture(scope="module")
def llm():
    with LLM("smollm2", dtype="float32", max_num_batched_tokens=96, kv_cache_bytes=64 << 20) as engine:
        yield engine


def test_greedy_output_equals_transformers(llm, reference):
    ref = reference(llm.config.model_config.model)
    rng = random.Random(5)
    prompts = [llm.tokenizer(text)["input_ids"] for text in TEXTS] + [[rng.randrange(5, 49000) for _ in range(150)]]
    for output in llm.generate(prompts, GREEDY):
        ref.check(output.prompt_token_ids, output.outputs[0].token_ids)
    hit = llm.generate(prompts[-1], GREEDY)[0]
    assert hit.num_cached_tokens == 144
    ref.check(prompts[-1], hit.outputs[0].token_ids)
    ref.check_near_ties()


def test_text_in_text_out_ends_at_eos(llm):
    chat = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    output = llm.generate(chat, SamplingParams(max_tokens=60, temperature=0))[0]
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.prompt == chat


def test_converted_folder_is_whole_and_plain(llm):
    folder = Path(llm.config.model_config.model)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert [p.name for p in folder.parent.glob(".converting-*")] == []
    assert next(iter(llm.kv_caches.values())).shape[1:] == (3, 16, 128)
    assert next(iter(llm.kv_caches.values())).dtype == torch.float32


def test_doctor_takes_the_model_that_it_is_shown_with() -> None:
    """The command of the README. The engine's start makes a folder of this GGUF; the doctor starts none."""
    done = CliRunner().invoke(app, ["doctor", "--model", "smollm2", "--kv-offloading-size", "1"])
    assert done.exit_code == 0, done.output
    assert "capacity of host" in done.output
    assert "no problems found" in done.output
