"""What every benchmark writes beside its figures: versions, machine, load, all samples."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("KVFERRY_BENCH_RESULTS") or Path(__file__).parent / "results")
"""Where results are written; a trial run sets KVFERRY_BENCH_RESULTS to another folder."""


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "? : unknown"
    )
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": model.partition(":")[2].strip(),
        "num_cpus": os.cpu_count(),
        "kernel": platform.release(),
        "load_average": list(os.getloadavg()),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvferry", "torch", "numpy", "transformers", "xxhash")},
        },
        "commit": _commit(),
    }


def write(name: str, content: dict[str, Any]) -> Path:
    """Write bench/results/NAME.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
