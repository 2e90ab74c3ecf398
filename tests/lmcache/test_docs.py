"""The program in docs/guides/lmcache.md runs as it stands, against a server as the page starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.lmcache.conftest import StartServer

ROOT = Path(__file__).parents[2]


def test_python_block_runs(start_server: StartServer, tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/guides/lmcache.md").read_text(), re.M | re.S)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LMCACHE_PORT": str(start_server().port)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "512 of 600 tokens came from the server"
