"""Benchmarks that need this environment alone. tests/native and tests/vllm have the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benches import ROOT, run_tiny

ELSEWHERE = {
    "p2p.py": "tests/native/test_bench.py",
    "in_vllm.py": "tests/vllm/test_benches.py",
    "engine.py": "tests/vllm/test_benches.py",
    "proof.py": "tests/vllm/test_benches.py",  # this and the next two need no vLLM, but more time than `make test` has
    "demo.py": "tests/vllm/test_benches.py",
    "p2p_handover.py": "tests/vllm/test_benches.py",
}
NO_BENCH = {"plots.py", "record.py", "in_vllm_engine.py", "engine_vllm.py"}
HERE = ("host_tier.py", "hybrid.py", "p2p_plan.py", "runners.py")


@pytest.mark.parametrize("script", HERE)
def test_a_bench_runs(script: str, tmp_path: Path) -> None:
    run_tiny(script, tmp_path, missed_goal_status=int(script == "p2p_plan.py"))


def test_no_bench_is_forgotten() -> None:
    """Here or elsewhere, each is run; a helper of others is none."""
    assert {path.name for path in (ROOT / "bench").glob("*.py")} == {*HERE, *ELSEWHERE, *NO_BENCH}
    for script, test in ELSEWHERE.items():
        assert script in (ROOT / test).read_text()
