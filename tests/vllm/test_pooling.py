"""Pooling models: those that need every token in one forward are given no hits, which ended vLLM's engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_process import vllm_environment

CHILD = Path(__file__).with_name("pooling_child.py")


@pytest.mark.parametrize("pooling", ["MEAN", "LAST"])
def test_embeddings_of_a_known_prompt(tiny_llama: str, model_folder: str, tmp_path: Path, pooling: str) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for file in Path(model_folder).glob("*token*"):  # vLLM's pooling asks for a tokenizer
        shutil.copy(file, folder)
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), pooling], env=vllm_environment(), capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cold, *warm = found = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    for each in warm:
        assert each["embedding"] == pytest.approx(cold["embedding"], rel=1e-4, abs=1e-5)
    assert any(cold["embedding"])
    assert external_hits(found) == ([0, 0, 0] if pooling != "LAST" else [0, 256, 512])  # blocks of 128 tokens


def external_hits(found: list[dict[str, Any]]) -> list[int]:
    return [int(each["external_hits"]) for each in found]
