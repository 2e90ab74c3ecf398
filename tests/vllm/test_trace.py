"""The committed trace is what this vLLM does."""

from __future__ import annotations

import json

import pytest
from record_trace import DATA, record_in_child


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("model", "scenario"), [("single", "async_load"), ("hybrid", "warm_sync")])
def test_recorded_again_it_is_the_same(model: str, scenario: str) -> None:
    committed = json.loads(DATA.read_text())["traces"][model]
    recorded = record_in_child(model, scenario)
    assert recorded == {name: committed[name] for name in ("startup", scenario, "shutdown")}
