"""The benchmarks against real vLLM, and those that are too long for `make test`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.benches import run_tiny


@pytest.mark.timeout(1300)
def test_the_bench_in_vllm_runs(tmp_path: Path) -> None:
    run_tiny(f"in_vllm.py --vllm-python {sys.executable}", tmp_path, name="vllm")


@pytest.mark.timeout(1300)
def test_the_bench_of_the_engine_beside_vllm_runs(tmp_path: Path) -> None:
    run_tiny(f"engine.py --vllm-python {sys.executable}", tmp_path)


@pytest.mark.timeout(1300)
def test_the_bench_of_the_demo_runs(tmp_path: Path) -> None:
    run_tiny("demo.py", tmp_path)


@pytest.mark.timeout(1300)
def test_the_bench_of_the_proof_runs(tmp_path: Path) -> None:
    run_tiny("proof.py", tmp_path)


@pytest.mark.timeout(1300)
def test_the_bench_of_hand_overs_runs(tmp_path: Path) -> None:
    run_tiny("p2p_handover.py", tmp_path, missed_goal_status=1)
