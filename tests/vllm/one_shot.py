"""A real vLLM engine that runs one list of orders and ends.

argv[1]: JSON {"llm": LLM arguments, "orders": [...]}. The line of stdout that begins with ANSWERS: JSON. Orders:

generate  the prompt
drawn     the prompt, at random with a seed
reset     vLLM's prefix cache; how often it refused
written   wait until the prompt's chunks are on disk
metrics   ours, as /metrics would say
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

ANSWERS = "kvferry-answers "
PROMPT = [(i * i * 29 + i * 11) % 40000 + 100 for i in range(330)]
CHUNKS = len(PROMPT) // 64
MAX_TOKENS = 8
WAIT_S = 300


def generate(llm: Any) -> dict[str, Any]:
    """The prompt's continuation, and the external hits of all prompts so far."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, logprobs=2)
    output = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0].outputs[0]
    gaps = [sorted((p.logprob for p in step.values()), reverse=True) for step in output.logprobs]
    hits = sum(m.value for m in llm.get_metrics() if m.name == "vllm:external_prefix_cache_hits")
    gaps = [best - second for best, second, *_ in gaps]
    return {"token_ids": list(output.token_ids), "logit_gaps": gaps, "external_hits": hits}


def drawn(llm: Any) -> dict[str, Any]:
    """The tokens of a seeded request."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1, seed=5, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0].outputs[0]
    return {"token_ids": list(output.token_ids)}


def reset(llm: Any) -> dict[str, int]:
    """Until vLLM has done it. An engine core in a process of its own steps by itself, one in this must be made to."""
    num_refused, deadline = 0, time.monotonic() + WAIT_S
    while not llm.reset_prefix_cache():
        assert time.monotonic() < deadline, f"blocks are still held after {WAIT_S} s"
        num_refused += 1
        if hasattr(llm.llm_engine.engine_core, "engine_core"):
            llm.llm_engine.step()
        time.sleep(0.01)
    return {"num_refused": num_refused}


def metrics(_: Any) -> dict[str, float]:
    """Name and own labels of each series -> value."""
    from prometheus_client import REGISTRY

    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return {
        " ".join(
            [sample.name, *(v for k, v in sample.labels.items() if k not in ("engine", "model_name"))]
        ): sample.value
        for sample in samples
        if sample.name.startswith("kvferry:") and not sample.name.endswith("_created")
    }


def written(llm: Any) -> dict[str, float]:
    """Step until every chunk of the prompt is in a tier below host memory: its writes are heard of only in steps."""
    from vllm import SamplingParams

    deadline = time.monotonic() + WAIT_S
    while (
        sum(v for k, v in metrics(llm).items() if k.split()[::2] == ["kvferry:connector_stores_total", "fs"]) < CHUNKS
    ):
        assert time.monotonic() < deadline, f"not all chunks were written in {WAIT_S} s"
        llm.generate([{"prompt_token_ids": PROMPT[:2]}], SamplingParams(max_tokens=1), use_tqdm=False)
    return {}


def main() -> None:
    from vllm import LLM

    task = json.loads(sys.argv[1])
    llm = LLM(**task["llm"])
    answers = [globals()[order](llm) for order in task["orders"]]
    print(f"\n{ANSWERS}{json.dumps(answers)}", flush=True)


if __name__ == "__main__":
    main()
