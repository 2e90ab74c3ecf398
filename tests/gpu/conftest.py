"""GPU tests run only by `make test-gpu`; without a GPU they fail, so that nothing is skipped in silence."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.fail("make test-gpu needs a CUDA device; torch sees none")
