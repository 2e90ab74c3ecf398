"""Python blocks of README and docs, each run as a program of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LAST_LINE = {
    "README.md": r"\d{3} of \d{3} tokens were loaded",
    "quickstart.md": r"\d{3} tokens came from the disk",
    "example.md": r"80 tokens came from 5 folders",
    "hidden_states.md": r"\(\d+, 2, 576\) torch\.bfloat16",
}


@pytest.mark.parametrize(
    "page", ["README.md", "docs/quickstart.md", "docs/guides/example.md", "docs/guides/hidden_states.md"]
)
def test_python_block_runs(page: str, tmp_path: Path) -> None:
    programs = FENCE.findall((ROOT / page).read_text())
    assert len(programs) == 1
    done = subprocess.run(
        [sys.executable, "-c", programs[0]], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(LAST_LINE[Path(page).name], done.stdout.splitlines()[-1]), done.stdout
