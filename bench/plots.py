"""The pictures in bench/results and docs/images, drawn from the committed results: nothing is measured here.

    .venv/bin/python bench/plots.py              # all pictures anew
    .venv/bin/python bench/plots.py vllm engine  # these

Every benchmark draws its own picture with `save` when it has written its results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
DEMO_PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
GREEN, GREY, RED, BLUE, ORANGE = "#4a9a5b", "#b0b0b0", "#b5483a", "#3d6fb4", "#d08a3c"


def save(result: Path, kind: str | None = None) -> None:
    """Draw the picture of a result file beside it; `kind` says what it is a picture of, unless the name does."""
    FIGURES[kind or result.stem](json.loads(result.read_text())).savefig(result.with_suffix(".png"), dpi=120)


def _figure(inches: tuple[float, float], title: str) -> Figure:
    figure = Figure(figsize=inches, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def vllm(content: dict[str, Any]) -> Figure:
    """Time to first token of a known prefix, all hits and first hits. Dots: a bar has no length on a log axis."""
    summary = content["summary"]
    names = {
        "recompute": "computed, nothing is known",
        "local": "vLLM's own prefix cache",
        "host": "kvferry, host memory",
        "host sync": "kvferry, host memory,\nloaded within the step",
        "disk": "kvferry, disk (page cache warm)",
        "example": "vLLM's ExampleConnector (page cache warm)",
        "disk cold": "kvferry, disk (page cache dropped)",
        "example cold": "vLLM's ExampleConnector (page cache dropped)",
    }
    figure = _figure((12, 4.4), "Time to the first token of a known prompt, vLLM 0.32 on CPU, SmolLM2-135M bfloat16")
    sizes = list(summary["median_s"]["recompute"])
    for axis, size in zip(figure.subplots(1, len(sizes), sharey=True), sizes, strict=True):
        for row, case in enumerate(names):
            median_ms = 1000 * summary["median_s"][case][size]
            dot = axis.plot(median_ms, row, "o", color=GREY if case == "recompute" else BLUE)
            axis.annotate(f"{median_ms:.0f}", (median_ms, row), (0, 6), textcoords="offset points", ha="center", size=8)
            if row == 1:
                dot[0].set_label("all hits (median)")
            if case in summary["first_hits_median_s"]:
                first_ms = 1000 * summary["first_hits_median_s"][case][size]
                label = "first hit of each prompt (median)" if row == 1 else None
                axis.plot(first_ms, row, "o", markerfacecolor="none", color=ORANGE, markersize=9, label=label)
        axis.set_xscale("log")
        axis.set_yticks(range(len(names)), list(names.values()))
        axis.set_xlim(40, 2 * 1000 * summary["median_s"]["recompute"][size])
        ticks_ms = [tick for tick in (50, 100, 200, 500, 1000, 2000, 5000, 10000) if tick < axis.get_xlim()[1]]
        axis.set_xticks(ticks_ms, [str(tick) for tick in ticks_ms])
        axis.minorticks_off()
        axis.margins(y=0.12)
        axis.grid(axis="x", which="both", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.set_title(f"prompt of {size} tokens", fontsize=10)
        axis.set_xlabel("milliseconds (logarithmic)")
    figure.axes[0].invert_yaxis()
    figure.axes[-1].legend(fontsize=8, loc="center right")
    return figure


def engine(content: dict[str, Any]) -> Figure:
    """Ratios as bars; 1.0 is the peer."""
    summary, settings = content["summary"], content["settings"]
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    figure = _figure((11, 4.2), f"The embedded engine against its peers: SmolLM2-135M bfloat16, CPU, {threads}")
    axis = figure.subplots()
    peers = list(next(iter(summary.values()))["ratio"])
    for i, peer in enumerate(peers):
        places = [x + 0.8 * i / len(peers) for x in range(len(summary))]
        ratios = [each["ratio"][peer] for each in summary.values()]
        bars = axis.bar(places, ratios, 0.76 / len(peers), label=f"{peer} = 1", color=(BLUE, ORANGE, GREEN)[i % 3])
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axis.axhline(1.0, color="black", linewidth=0.8)
    what = {"prefill": "prefill of\n{} tokens", "decode": "decoding of\n{} requests"}
    labels = [what[job.split()[0]].format(job.split()[1]) for job in summary]
    labels = [label.replace("\n1 requests", "\n1 request") for label in labels]
    axis.set_xticks([x + 0.4 * (len(peers) - 1) / len(peers) for x in range(len(summary))], labels)
    clock = {"cpu": "CPU", "wall": "wall"}[settings["clock"]]
    axis.set_ylabel(f"kvferry's tokens per second over the peer's\n({clock} time; above 1: kvferry is faster)")
    axis.legend()
    return figure


def host_tier(content: dict[str, Any]) -> Figure:
    """Connector beside bound, per shape and direction."""
    figure = _figure((9, 3.8), "KV to host memory and back, one thread")
    axes = figure.subplots()
    results = content["results"]
    labels = [f"{result['shape']}\n{kind}" for result in results for kind in ("store", "load")]
    pairs = [
        ("kvferry: copy, digest and bookkeeping", ("store", "load"), GREEN),
        ("bound: copy and digest, nothing else", ("hashed", "hashed"), "#a4d4ae"),
        ("bound: numpy copies the same blocks, without a digest", ("gather", "scatter"), GREY),
    ]
    for i, (label, kinds, colour) in enumerate(pairs):
        rates = [result["median_gb_per_s"][kind] for result in results for kind in kinds]
        bars = axes.bar([x + 0.27 * i for x in range(len(labels))], rates, width=0.25, label=label, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks([x + 0.27 for x in range(len(labels))], labels, fontsize=8)
    axes.set_ylabel("GB/s, median")
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def p2p_transports(content: dict[str, Any]) -> Figure:
    """Rates by piece size."""
    names = {
        "gather bound": ("bound: torch gathers, in one process", "#b0b0b0"),
        "shm, gather": ("shared memory, gather", "#2f7a40"),
        "shm, scatter": ("shared memory, scatter", "#6fb57e"),
        "shm, both": ("shared memory, gather and scatter", "#a4d4ae"),
        "shm, busy host": ("shared memory, gather, beside a thread that spins", "#d5ebd9"),
        "raw nixl": ("NIXL without kvferry, gather", "#d08a3c"),
        "nixl": ("NIXL, gather", "#3d6fb4"),
        "nixl, merged": ("NIXL, pieces that the planner joined", "#8fb1de"),
    }
    medians = content["median_gb_per_s"]
    sizes = sorted({int(size) for by_size in medians.values() for size in by_size})
    figure = _figure((12, 4.4), "Transports between two processes on one machine, by the size of adjacent pieces")
    axes = figure.subplots()
    for x, size in enumerate(sizes):
        present = [name for name in names if str(size) in medians[name]]
        for i, name in enumerate(present):
            place = x + 0.11 * (i - (len(present) - 1) / 2)
            bar = axes.bar(place, medians[name][str(size)], 0.1, color=names[name][1])
            axes.bar_label(bar, fmt="%.1f", fontsize=7)
    for label, colour in names.values():
        axes.bar(0, 0, color=colour, label=label)
    axes.set_xticks(range(len(sizes)), [_size(size) for size in sizes])
    axes.set_xlabel("size of a piece")
    axes.set_ylabel("GB/s, median")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    return figure


def _size(size: int) -> str:
    return f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


def p2p_handover(content: dict[str, Any]) -> Figure:
    """Where the time to the first decode token goes, by case; the engines' first meeting too."""
    cases = {_handover_case(name): each for name, each in content["median_ms"].items()}
    for mode, first in content["first_hand_overs"].items():
        in_ms = {f"{key[:-2]}_ms": 1000 * value for key, value in first.items() if isinstance(value, float)}
        cases[f"{mode}, the engines' first hand-over (once)"] = in_ms
    parts = {
        "transfer_ms": ("transfer of the KV", GREEN),
        "decode_step_ms": ("one decode step", GREY),
        "overhead_ms": ("overhead: all else (beside others: waiting for their steps)", RED),
    }
    title = "From the end of prefill to the first token that the decode engine computes, by tokens of the prompt"
    figure = _figure((10, 1.3 + 0.3 * len(cases)), title)
    axes = figure.subplots()
    left = [0.0] * len(cases)
    for part, (label, colour) in parts.items():
        values = [max(0.0, each[part]) for each in cases.values()]
        axes.barh(list(cases), values, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.0f}", verticalalignment="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlabel("milliseconds, medians; SmolLM2-135M float32, shared memory, one thread per engine")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _handover_case(name: str) -> str:
    kind, tokens, *rest = name.split()
    text = f"{'through the proxy' if kind == 'proxy' else kind}, {tokens}"
    return f"{text}, beside {rest[1]} other requests" if rest else text


def p2p_plan(content: dict[str, Any]) -> Figure:
    """CPU time over blocks, and the line through the goal."""
    names = {
        "layer-first, equal": "layers outermost in both engines",
        "layer-first, equal, consecutive blocks": "the same, adjacent blocks",
        "block-first, equal": "blocks outermost in both engines",
        "block-first to layer-first": "blocks outermost to layers outermost",
        "layer-first to block-first": "layers outermost to blocks outermost",
        "blocks of 32 to 16, token-major": "blocks of 32 tokens to blocks of 16",
        "TP 2 to 1, head-major": "two tensor-parallel ranks to one",
    }
    goal, cases = content["goal"], content["cases"]
    title = f"Planning of a hand-over: which bytes go where, {goal['layers']} layers, by layout of the two engines"
    figure = _figure((9, 4.8), title)
    axes = figure.subplots()
    for name, case in cases.items():
        sizes = [int(size) for size in case["sizes"]]
        times_ms = [entry["median_cpu_ms"] for entry in case["sizes"].values()]
        axes.plot(sizes, times_ms, marker="o", markersize=3, label=names.get(name, name))
    limit_ms = [goal["median_cpu_ms_below"] * size / goal["blocks"] for size in sizes]
    label = f"goal: below {goal['median_cpu_ms_below']:.0f} ms at {goal['blocks']} blocks, and its share"
    axes.plot(sizes, limit_ms, color="black", linestyle="--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="blocks (logarithmic)", ylabel="ms of CPU, medians (logarithmic)")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def demo(content: dict[str, Any]) -> Figure:
    """The demo's own picture, of the run that README shows."""
    from kvferry.cli.demo_report import Act, DemoReport, HandoverResult

    runs = sorted(content["runs"], key=lambda run: float(run["acts"][0]["ttft_s"]))
    shown = runs[len(runs) // 2]
    acts = [Act(**act) for act in shown["acts"]]
    figure: Figure = DemoReport(acts, HandoverResult(**shown["handover"]), [], shown["context"]).figure()
    return figure


FIGURES = {
    "demo": demo,
    "engine": engine,
    "host_tier": host_tier,
    "p2p_handover": p2p_handover,
    "p2p_plan": p2p_plan,
    "p2p_transports": p2p_transports,
    "vllm": vllm,
}
"""By the name of the result file; the demo's picture lies in docs/images."""


def main() -> None:
    """Draw the pictures of the results that are named, or all."""
    for name in sys.argv[1:] or FIGURES:
        picture = DEMO_PICTURE if name == "demo" else RESULTS / f"{name}.png"
        FIGURES[name](json.loads((RESULTS / f"{name}.json").read_text())).savefig(picture, dpi=120)
        print(picture)


if __name__ == "__main__":
    main()
