"""Runs a benchmark with `--tiny`: to its end, and without a change to the committed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COMMITTED = (ROOT / "bench" / "results", ROOT / "docs" / "images", ROOT / "README.md")


def run_tiny(command: str, results: Path, name: str | None = None, missed_goal_status: int = 0) -> None:
    """`command`: a script in bench/ and its options; `name`: what it calls its results, where not after itself.

    `missed_goal_status`: what it ends with when it has measured, and the figures of a busy machine miss its goal.
    """
    before = _committed()
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), "--tiny", *options],
        env={**os.environ, "KVFERRY_BENCH_RESULTS": str(results), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=1200,  # a deadline against hanging: beside other engines one bench took more than 600 s
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode in (0, missed_goal_status), said
    written = results / f"{name or script.removesuffix('.py')}.json"
    assert written.exists(), said
    assert "machine" in json.loads(written.read_text())
    assert _committed() == before


def _committed() -> dict[Path, bytes]:
    files = [file for path in _COMMITTED for file in (path.rglob("*") if path.is_dir() else [path])]
    return {file: file.read_bytes() for file in files if file.is_file()}
