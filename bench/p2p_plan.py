"""Time to plan a transfer, over 256 to 16384 blocks of 32 layers: it must be linear, and 2048 blocks take under 5 ms.

    OMP_NUM_THREADS=1 .venv/bin/python bench/p2p_plan.py

Block ids are shuffled on both sides, so that next to nothing can be merged (the worst case), but for the case that says
so. A round measures every case and size in turn, so that what else the machine does hits all alike; all samples are
kept. The goal is judged by CPU time: the machine is shared. The first plan of a pair of engines also compares them and
makes templates; it is reported by itself. From some megabytes on, malloc gives memory back to the kernel after every
plan, so that each plan pays for fresh pages: a step in the curve, and the page faults show where. So a straight line is
what is judged: from 2048 blocks on, no size may take longer than its share of 5 ms per 2048.

Writes bench/results/p2p_plan.{json,png}.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import plots
import record

from kvferry.kv.layout import GroupLayout, KVLayout, LayerLayout
from kvferry.p2p.geometry import EngineGeometry, rank_geometry
from kvferry.p2p.plan import _planner, plan_transfer
from kvferry.types import AttentionKind, GroupInfo

NUM_LAYERS, KV_HEADS, HEAD_SIZE, ELEMENT_BYTES = 32, 8, 128, 2
POOL_TOKENS = 16400 * 16
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
GOAL_BLOCKS, GOAL_MS = 2048, 5.0
BLOCKS = 16
Readings = dict[str, float]
Case = tuple[EngineGeometry, EngineGeometry, int, int, bool]


def engine(order: str, block_tokens: int = BLOCKS, tp_size: int = 1) -> EngineGeometry:
    """An engine of one group whose tensors lie densely in a physical order."""
    sizes = {
        "L": NUM_LAYERS,
        "B": POOL_TOKENS // block_tokens,
        "H": KV_HEADS // tp_size,
        "N": block_tokens,
        "C": 2 * HEAD_SIZE,
    }
    strides, total = {}, ELEMENT_BYTES
    for dim in reversed(order):
        strides[dim], total = total, total * sizes[dim]
    page = (sizes["H"], sizes["N"], sizes["C"]), (strides["H"], strides["N"], strides["C"])
    layers = tuple(
        LayerLayout(f"layer{i}", "bfloat16", 0, i * strides["L"], strides["B"], 1, *page, ELEMENT_BYTES)
        for i in range(NUM_LAYERS)
    )
    layout = KVLayout(sizes["B"], (GroupLayout(0, block_tokens, layers),))
    group = GroupInfo(0, tuple(y.name for y in layers), block_tokens, AttentionKind.FULL)
    facts = {"total_kv_heads": KV_HEADS, "key_elements": HEAD_SIZE, "tp_size": tp_size}
    return EngineGeometry(tuple(rank_geometry(layout, [group], [total], **facts, tp_rank=r) for r in range(tp_size)))


def cases() -> dict[str, Case]:
    """Name -> source, destination, their block sizes, whether block ids are shuffled."""
    return {
        "layer-first, equal": (engine("LBNHC"), engine("LBNHC"), 16, 16, True),
        "layer-first, equal, consecutive blocks": (engine("LBNHC"), engine("LBNHC"), 16, 16, False),
        "block-first, equal": (engine("BLNHC"), engine("BLNHC"), 16, 16, True),
        "block-first to layer-first": (engine("BLNHC"), engine("LBNHC"), 16, 16, True),
        "layer-first to block-first": (engine("LBNHC"), engine("BLNHC"), 16, 16, True),
        "blocks of 32 to 16, token-major": (engine("LBNHC", 32), engine("LBNHC"), 32, 16, True),
        "TP 2 to 1, head-major": (engine("LBHNC", tp_size=2), engine("LBHNC"), 16, 16, True),
    }


def block_ids(num_tokens: int, block_tokens: int, rng: random.Random, is_shuffled: bool) -> list[list[int]]:
    """Ids of one request."""
    ids = list(range(1, POOL_TOKENS // block_tokens))
    if is_shuffled:
        rng.shuffle(ids)
    return [ids[: num_tokens // block_tokens]]


def readings() -> Readings:
    """This thread's clocks, and how many fresh pages the kernel gave it."""
    return {
        "wall_ms": time.perf_counter() * 1e3,
        "cpu_ms": time.thread_time() * 1e3,
        "page_faults": resource.getrusage(resource.RUSAGE_THREAD).ru_minflt,
    }


def sample(case: Case, num_blocks: int, rng: random.Random) -> tuple[Readings, int]:
    """Time of one plan, and its pieces."""
    source, destination, source_tokens, destination_tokens, is_shuffled = case
    num_tokens = num_blocks * BLOCKS
    blocks = [block_ids(num_tokens, n, rng, is_shuffled) for n in (source_tokens, destination_tokens)]
    start = readings()
    transfers = plan_transfer(source, destination, *blocks, (0, num_tokens))
    spent = {name: end - start[name] for name, end in readings().items()}
    expected = NUM_LAYERS * num_tokens * KV_HEADS * 2 * HEAD_SIZE * ELEMENT_BYTES
    if sum(t.num_bytes for t in transfers) != expected:
        sys.exit(f"a plan moves {sum(t.num_bytes for t in transfers)} bytes instead of {expected}")
    return spent, sum(len(t.pieces.length) for t in transfers)


def measure(rounds: int, seed: int) -> dict[str, Any]:
    """Case -> first plan, and per size pieces, median, best and all samples."""
    rng = random.Random(seed)
    todo = cases()
    out: dict[str, Any] = {}
    for name, case in todo.items():
        _planner.cache_clear()
        out[name] = {"first_plan": sample(case, SIZES[0], rng)[0], "sizes": {n: {"samples": []} for n in SIZES}}
    for case in todo.values():
        sample(case, SIZES[0], rng)  # fills the cache again
    for _ in range(rounds):
        for name, case in todo.items():
            for num_blocks, entry in out[name]["sizes"].items():
                spent, entry["pieces"] = sample(case, num_blocks, rng)
                entry["samples"].append(spent)
    return out


def summarise(cases_out: dict[str, Any]) -> bool:
    """Add medians and growth per doubling, print them; True when every case keeps the goal."""
    met = True
    for name, case in cases_out.items():
        for entry in case["sizes"].values():
            for name_of in ("wall_ms", "cpu_ms", "page_faults"):
                entry[f"median_{name_of}"] = statistics.median(sample[name_of] for sample in entry["samples"])
        medians = [entry["median_cpu_ms"] for entry in case["sizes"].values()]
        case["cpu_growth_per_doubling"] = [b / a for a, b in pairwise(medians)]
        case["goal_met"] = all(
            entry["median_cpu_ms"] < line_ms(size) for size, entry in case["sizes"].items() if size >= GOAL_BLOCKS
        )
        met &= case["goal_met"]
        print(f"{name}: first plan {case['first_plan']['cpu_ms']:.2f} ms CPU")
        for num_blocks, entry in case["sizes"].items():
            print(
                f"  {num_blocks:5} blocks {entry['pieces']:7} pieces  {entry['median_cpu_ms']:6.2f} ms CPU  "
                f"{entry['median_wall_ms']:6.2f} ms wall  {entry['median_page_faults']:6.0f} page faults"
            )
    return met


def line_ms(num_blocks: int) -> float:
    """What a plan of so many blocks may take."""
    return GOAL_MS * num_blocks / GOAL_BLOCKS


def main() -> None:
    """Measure, print, write the results. Exit status 1 when the goal is missed."""
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = record.parse(parser, rounds=1)
    machine = record.machine()
    machine["versions"]["msgspec"] = version("msgspec")
    result = measure(args.rounds, args.seed)
    met = summarise(result)
    machine["load_average_at_end"] = list(os.getloadavg())
    goal = {
        "blocks": GOAL_BLOCKS,
        "layers": NUM_LAYERS,
        "median_cpu_ms_below": GOAL_MS,
        "and_its_share_from_there_on": True,
    }
    content = {"machine": machine, "settings": vars(args), "goal": goal | {"met": met}, "cases": result}
    plots.save(record.write("p2p_plan", content))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
