"""The benchmark of the transports, which needs NIXL."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benches import run_tiny


def test_the_bench_of_the_transports_runs(tmp_path: Path) -> None:
    run_tiny(f"p2p.py --native-python {sys.executable}", tmp_path, name="p2p_transports")
