"""The bench of transports runs to its end with tiny settings. `make test-native`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_bench_of_transports_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "p2p.py"), "--tiny", "--native-python", sys.executable],
        env={**os.environ, "KVFERRY_BENCH_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "machine" in json.loads((tmp_path / "p2p_transports.json").read_text())
    assert (tmp_path / "p2p_transports.png").stat().st_size > 0
