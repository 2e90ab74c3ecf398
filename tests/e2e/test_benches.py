"""Benchmarks that need this environment alone run to their end with tiny settings, and leave committed results be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


@pytest.mark.parametrize(
    ("command", "missed_goal_status"),
    [
        (["host_tier.py", "--rounds", "1"], 0),
        (["hybrid.py"], 0),
        (["p2p_plan.py", "--rounds", "1"], 1),
        (["engine.py", "--tiny", "--without-vllm"], 0),
        (["runners.py", "--tiny"], 0),
    ],
    ids=lambda value: value[0].removesuffix(".py") if isinstance(value, list) else "",
)
def test_a_bench_runs(command: list[str], missed_goal_status: int, tmp_path: Path) -> None:
    """`missed_goal_status`: what it ends with when it has measured, and the figures of a busy machine miss its goal."""
    committed = {path: path.read_bytes() for path in (BENCH / "results").iterdir()}
    done = subprocess.run(
        [sys.executable, str(BENCH / command[0]), *command[1:]],
        env={**os.environ, "KVFERRY_BENCH_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, missed_goal_status), done.stdout + done.stderr
    name = command[0].removesuffix(".py")
    assert "machine" in json.loads((tmp_path / f"{name}.json").read_text()), done.stdout + done.stderr
    assert {path: path.read_bytes() for path in (BENCH / "results").iterdir()} == committed
