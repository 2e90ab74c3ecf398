"""The demo's ratios: runs `kvferry demo` several times and records every act of every run.

Writes bench/results/demo.json, and the picture and terminal text of the run with the median cold time to
docs/images/demo.png and into README.md, so that no figure there is made by hand.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "demo.png"
BEGIN, END = "<!-- bench/demo.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Run:
    """One run of the demo: its report, its terminal text, its picture."""

    report: dict[str, Any]
    output: str
    picture: bytes

    @property
    def cold_s(self) -> float:
        """Time to first token with nothing stored."""
        return float(self.report["acts"][0]["ttft_s"])


def run_demo(folder: Path, *options: str) -> Run:
    """Run it with these options. Ends this program when a proof failed."""
    figures, picture = folder / "demo.json", folder / "demo.png"
    kvferry = Path(sys.executable).parent / "kvferry"
    command = [str(kvferry), "demo", "--json", str(figures), "--plot", str(picture), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kvferry demo ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return Run(json.loads(figures.read_text()), done.stdout, picture.read_bytes())


def some_document(folder: Path) -> Path:
    """Half of the text that the demo ships: with less, a chunk that is not whole is too large a part of it."""
    text = (ROOT / "src" / "kvferry" / "cli" / "data" / "gpl-1.txt").read_text()
    document = folder / "document.txt"
    document.write_text(text[: len(text) // 2])
    return document


def ratios(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per act: how many times faster than cold (handed over: than recomputed there), and how many times its limit."""
    cold_s = report["acts"][0]["ttft_s"]
    handed = report["handover"]
    compared = {act["name"]: (cold_s, act) for act in report["acts"]}
    compared["handed over"] = handed["recompute_ttft_s"], handed
    return {
        name: {"gain": slow_s / act["ttft_s"], "times_limit": act["ttft_s"] / act["limit_s"]}
        for name, (slow_s, act) in compared.items()
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
    parser = record.parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    options = record.parse(parser, runs=1)
    with tempfile.TemporaryDirectory() as folder:
        document = ["--document", str(some_document(Path(folder)))] if options.tiny else []
        runs = [run_demo(Path(folder), *document) for _ in range(options.runs)]
    shown = sorted(runs, key=lambda run: run.cold_s)[len(runs) // 2]
    result = {
        "machine": record.machine(),
        "median_ratios": medians([ratios(run.report) for run in runs]),
        "terminal": picture_text(shown.output),
        "runs": [run.report for run in runs],
    }
    written = record.write("demo", result)
    if record.RESULTS == record.COMMITTED:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_bytes(shown.picture)
        put_into_readme(result["terminal"])
    else:
        written.with_suffix(".png").write_bytes(shown.picture)
    for act, kinds in result["median_ratios"].items():
        print(f"{act:>11}: {kinds['gain']:5.1f} x faster, {kinds['times_limit']:.2f} times its limit")


if __name__ == "__main__":
    main()
