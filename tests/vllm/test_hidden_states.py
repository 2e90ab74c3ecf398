"""ExampleHiddenStatesConnector in real vLLM (`extract_hidden_states`): its files hold what transformers computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_process import HERE, vllm_environment
from hidden_states_child import LAYERS
from transformers import AutoModelForCausalLM

from kvferry.connectors.hidden_states import load_hidden_states


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
