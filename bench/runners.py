"""The two model runners, block sizes and KV layouts of the embedded engine: CPU time of a decode step, interleaved.

    .venv/bin/python bench/runners.py

All engines share one model and one process. After the prompts they take turns, one step each, so that what else the
machine does hits all alike; the figure of an engine is the median, over steps, of the baseline's time over its own in
the same turn (above 1: faster than the baseline, which is V1 with blocks of 16, BLNHC).
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import record
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvferry import LLM, SamplingParams
from kvferry.engine.model_loader import HFModel, find_model_folder, load_model

CONTEXT_TOKENS = 128
BATCHES = (1, 8, 32)
ENGINES: dict[str, dict[str, Any]] = {
    "V1": {},
    "V2": {"use_v2_model_runner": True},
    "V1, block 128": {"block_size": 128},
    "V2, block 128 of 32": {"use_v2_model_runner": True, "block_size": 128, "kernel_block_size": 32},
    "V1, LBNHC": {"kv_cache_layout": "LBNHC"},
    "V1, BLHNC": {"kv_cache_layout": "BLHNC"},
    "V1, LBHNC": {"kv_cache_layout": "LBHNC"},
}


def tiny_model(folder: str) -> HFModel:
    """Two small layers of random weights: little forward, so that the runner's own work shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(folder, "float32", "cpu")


def measure(model: HFModel, batch: int, steps: int, seed: int) -> dict[str, list[float]]:
    """Engine -> CPU seconds of each of its decode steps; entry i of all engines is of the same turn."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(5, 500) for _ in range(CONTEXT_TOKENS)] for _ in range(batch)]
    params = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True)
    with ExitStack() as stack:
        engines = {}
        for name, settings in ENGINES.items():
            shared = {"enable_prefix_caching": False, "max_num_seqs": 32, "max_model_len": 512, **settings}
            engines[name] = stack.enter_context(LLM(model, **{"use_v2_model_runner": False, **shared}))
            for prompt in prompts:
                engines[name].add_request(prompt, params)
            while len(engines[name].step()) < batch:  # until all decode
                pass
        samples: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(steps):
            order = list(engines)
            rng.shuffle(order)
            for name in order:
                start = time.process_time()
                engines[name].step()
                samples[name].append(round(time.process_time() - start, 6))
        return samples


def summarise(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per engine: median milliseconds of a step, median and quartiles of the baseline's time over its own."""
    baseline = samples["V1"]
    out = {}
    for name, times_s in samples.items():
        ratios = [ours / theirs for ours, theirs in zip(baseline, times_s, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures = {"ms": statistics.median(times_s) * 1e3, "ratio": middle, "ratio_q1": low, "ratio_q3": high}
        out[name] = {key: round(value, 4) for key, value in figures.items()}
        print(f"  {name:20} {figures['ms']:8.2f} ms  {middle:.3f} ({low:.3f} to {high:.3f})")
    return out


def main() -> None:
    """Measure, print, write bench/results/runners.json."""
    parser = record.parser(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="decode steps per engine and batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = record.parse(parser, steps=2)
    torch.set_num_threads(args.threads)
    machine = record.machine()
    print(f"seed {args.seed}")
    summary: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"tiny": tiny_model(folder)}
        if not args.tiny:
            models["smollm2"] = load_model(find_model_folder("smollm2"), "bfloat16", "cpu")
        for name, model in models.items():
            for batch in BATCHES:
                job = f"{name}, decode {batch}"
                print(job)
                samples[job] = measure(model, batch, args.steps, args.seed)
                summary[job] = summarise(samples[job])
    machine["load_average_at_end"] = list(os.getloadavg())
    record.write("runners", {"machine": machine, "settings": vars(args), "summary": summary, "samples_s": samples})


if __name__ == "__main__":
    main()
