"""The demo's ratios: runs `kvferry demo` several times and records every act of every run.

Writes bench/results/demo.json, the first run's picture to docs/images/demo.png and its terminal text into README.md,
so that no figure there is older than the code that made it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "demo.png"
BEGIN, END = "<!-- bench/demo.py writes from here -->", "<!-- to here -->"


def run_demo(folder: Path, picture: Path | None) -> tuple[dict[str, Any], str]:
    """One run: its report and its terminal text. Ends this program when a proof failed."""
    command = [str(Path(sys.executable).parent / "kvferry"), "demo", "--json", str(folder / "demo.json")]
    if picture is not None:
        command += ["--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kvferry demo ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads((folder / "demo.json").read_text()), done.stdout


def ratios(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per act: how many times faster than cold, and how many times its limit."""
    cold_s = report["acts"][0]["ttft_s"]
    return {
        act["name"]: {"gain": cold_s / act["ttft_s"], "times_limit": act["ttft_s"] / act["limit_s"]}
        for act in report["acts"]
    }


def medians(samples: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of each ratio over the runs."""
    return {
        act: {kind: statistics.median(sample[act][kind] for sample in samples) for kind in kinds}
        for act, kinds in samples[0].items()
    }


def picture_text(output: str) -> str:
    """Table and bars: what the demo prints after its proofs."""
    lines = [line.rstrip() for line in output.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["act", "seconds"])
    return "\n".join(line for line in lines[start:] if line)


def put_into_readme(text: str) -> None:
    """Replace what stands between the two marks in README.md."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n```text\n{text}\n```\n{END}{after}")


def main() -> None:
    """Run, print the medians, write results, picture and README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    runs: list[tuple[dict[str, Any], str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.runs):
            runs.append(run_demo(Path(folder), None if i else PICTURE))
    reports = [report for report, _ in runs]
    result = {
        "machine": record.machine(),
        "median_ratios": medians([ratios(report) for report in reports]),
        "terminal": picture_text(runs[0][1]),
        "runs": reports,
    }
    record.write("demo", result)
    put_into_readme(result["terminal"])
    for act, kinds in result["median_ratios"].items():
        print(f"{act:>8}: {kinds['gain']:5.1f} x faster than cold, {kinds['times_limit']:.2f} times its limit")


if __name__ == "__main__":
    main()
