"""Real vLLM engines as child processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineChild


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., EngineChild]]:
    """Start engines; what is left of them is killed when the test ends."""
    children: list[EngineChild] = []

    def start(**llm: Any) -> EngineChild:
        children.append(EngineChild(llm, tmp_path / f"engine{len(children)}.log"))
        return children[-1]

    yield start
    for child in children:
        child.kill()


@pytest.fixture(scope="session")
def model_folder() -> str:
    """SmolLM2-135M-Instruct as a safetensors folder, made once from the wheel's GGUF."""
    from kvferry.engine.model_loader import find_model_folder

    return str(find_model_folder("smollm2"))
