"""A real vLLM engine in a process of its own, driven by JSON lines on stdin; for tests that kill it.

argv[1]: JSON {"llm": LLM arguments}. Commands: {"generate": token ids, "max_tokens": n}, {"digests": [block ids]},
{"connector": true}, {"stop": true}. Answers are JSON lines that begin with ANSWER.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

ANSWER = "kvferry-answer "


class WorkerProbe:
    """Mixed into vLLM's worker (worker_extension_cls): looks at the pool itself, past every connector."""

    model_runner: Any

    def block_digests(self, block_ids: list[int]) -> dict[str, str]:
        """SHA-256 of each block's bytes over all layers, read through the runner's own tensors."""
        digests = {}
        for block in block_ids:
            sha = hashlib.sha256()
            for tensor in self.model_runner.kv_caches:
                sha.update(tensor[block].contiguous().flatten().view(dtype=__import__("torch").uint8).numpy())
            digests[str(block)] = sha.hexdigest()
        return digests

    def connector_origin(self) -> str:
        """Module and class of the worker's connector."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        kind = type(get_kv_transfer_group())
        return f"{kind.__module__}:{kind.__qualname__}"


def _metric(llm: Any, name: str) -> float:
    values = [metric.value for metric in llm.get_metrics() if metric.name == name]
    assert values, f"vLLM has no metric {name}"
    return float(sum(values))


def _generate(llm: Any, command: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=command["max_tokens"], temperature=0, ignore_eos=True, logprobs=2)
    output = llm.generate([{"prompt_token_ids": command["generate"]}], params, use_tqdm=False)[0]
    steps = output.outputs[0].logprobs
    gaps = [sorted((p.logprob for p in step.values()), reverse=True) for step in steps]
    return {
        "token_ids": list(output.outputs[0].token_ids),
        "logit_gaps": [ordered[0] - ordered[1] for ordered in gaps],
        "num_cached_tokens": output.num_cached_tokens,
        "external_hits": _metric(llm, "vllm:external_prefix_cache_hits"),
        "local_hits": _metric(llm, "vllm:prefix_cache_hits"),
    }


def main() -> None:
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1])["llm"])
    print(ANSWER + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "generate" in command:
            answer = _generate(llm, command)
        elif "digests" in command:
            answer = llm.collective_rpc("block_digests", args=(command["digests"],))[0]
        elif "connector" in command:
            answer = {"origin": llm.collective_rpc("connector_origin")[0]}
        else:
            return
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
