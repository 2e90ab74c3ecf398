"""What every benchmark writes beside its figures: versions, machine, load, all samples."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent / "results"
RESULTS = Path(os.environ.get("KVFERRY_BENCH_RESULTS") or COMMITTED)
"""Where results are written; a trial run sets KVFERRY_BENCH_RESULTS to another folder."""


def parser(module_doc: str | None) -> ArgumentParser:
    """A benchmark's command line: what it says of itself, and the option that all have. `parse` reads it."""
    made = ArgumentParser(description=(module_doc or "").splitlines()[0])
    made.add_argument(
        "--tiny",
        action="store_true",
        help="next to no work: shows that the script runs, measures nothing, and leaves the committed results alone",
    )
    return made


def parse(made: ArgumentParser, **tiny: Any) -> Namespace:
    """The settings of this run; with --tiny those in `tiny`, and results in a folder of their own."""
    global RESULTS
    options = made.parse_args()
    if options.tiny:
        vars(options).update(tiny)
        if RESULTS == COMMITTED:
            RESULTS = Path(tempfile.mkdtemp(prefix="kvferry-bench-"))
        print(f"tiny: the figures mean nothing; results are written to {RESULTS}")
    return options


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
    """Write NAME.json into the folder of results and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
