"""ExampleHiddenStatesConnector in real vLLM (`extract_hidden_states`): its files hold what transformers computes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import StartEngines
from engine_process import HERE, random_prompt, vllm_environment
from hidden_states_child import LAYERS
from transformers import AutoModelForCausalLM

from kvferry.examples.hidden_states import load_hidden_states


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "hs"


@pytest.fixture(scope="module")
def answers(tiny_llama: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "hidden_states_child.py"), tiny_llama, str(folder)],
        env=vllm_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("answers ")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("answers "))
    return found


def expected(model: str, token_ids: list[int]) -> torch.Tensor:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    last: list[torch.Tensor] = []
    reference.model.layers[-1].register_forward_hook(lambda layer, args, out: last.append(out))
    with torch.inference_mode():
        states = reference(torch.tensor([token_ids]), output_hidden_states=True, use_cache=False).hidden_states
    assert LAYERS == [0, 2, 3]
    return torch.stack([states[0][0], states[2][0], last[0][0]], dim=1)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("which", ["cold", "hit", "limit"])
def test_files_hold_the_states(answers: dict[str, Any], tiny_llama: str, which: str) -> None:
    """Prompts of several chunks, side by side; one of vLLM's prefix cache; one beside a request at max_model_len."""
    for answer in answers[which]:
        assert (answer["num_cached_tokens"] > 0) == (which == "hit")
        found = load_hidden_states(answer["path"])
        assert found["token_ids"].tolist() == answer["token_ids"]
        torch.testing.assert_close(
            found["hidden_states"], expected(tiny_llama, answer["token_ids"]), rtol=1e-4, atol=1e-3
        )


def test_an_aborted_request_leaves_no_file(answers: dict[str, Any], folder: Path) -> None:
    assert not [path.name for path in folder.iterdir() if path.name.startswith("aborted")]
    assert len([path.name for path in folder.iterdir() if path.name.startswith("long")]) == 1


@pytest.mark.timeout(900)
def test_states_of_other_layers_are_not_loaded(start_engines: StartEngines, tiny_llama: str, tmp_path: Path) -> None:
    """vLLM pages them as KV, and whoever stores KV stores them too."""
    prompt, stored = random_prompt(7, 200), set[tuple[int, ...]]()

    def num_chunks() -> int:
        return len([*(tmp_path / "kv").glob("*/??/*")])

    def ask(layers: list[int], has_store: bool) -> tuple[float, torch.Tensor]:
        module = {"kv_connector_module_path": "kvferry.vllm"}
        tiers = [{"type": "fs", "path": str(tmp_path / "kv")}]
        offloading = {"cpu_bytes_to_use": 1 << 24, "secondary_tiers": tiers}
        children = [
            {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", **module,
             "kv_connector_extra_config": offloading},
            {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer", **module,
             "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "files")}},
        ]  # fmt: skip
        speculative = {
            "method": "extract_hidden_states", "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        }  # fmt: skip
        stored.add(tuple(layers))
        (engine,) = start_engines({
            "model": tiny_llama, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
            "block_size": 32, "num_gpu_blocks_override": 64, "max_model_len": 512, "disable_log_stats": False,
            "speculative_config": speculative,
            "kv_transfer_config": {
                "kv_connector": "MultiConnector", **module, "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"connectors": children[not has_store :]},
            },
        })  # fmt: skip
        got = engine.ask(generate=prompt, max_tokens=4)
        deadline_s = time.monotonic() + 60
        while has_store and not got["external_hits"] and num_chunks() < 3 * len(stored):
            assert time.monotonic() < deadline_s, "the chunks are not written"
            engine.ask(generate=[3, 4], max_tokens=2)
        engine.stop()
        path = got["kv_transfer_params"]["hidden_states_path"]
        return got["external_hits"], load_hidden_states(path, layers=layers)["hidden_states"]

    assert ask([0, 2], True)[0] == 0
    hits, states = ask([1, 2], True)
    assert hits == 0
    _, cold = ask([1, 2], False)
    torch.testing.assert_close(states, cold, rtol=1e-4, atol=1e-3)
    hits, states = ask([1, 2], True)
    assert hits == 192
    torch.testing.assert_close(states, cold, rtol=1e-4, atol=1e-3)
