"""The vLLM side of bench/engine.py, run by .venv-vllm: one job per line in, its seconds per line out."""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Answer jobs `{"prompts": [[token ids]], "num_tokens": n}` until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    folder, num_threads, is_eager = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "eager"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    import torch

    from vllm import LLM, SamplingParams, __version__

    torch.set_num_threads(num_threads)
    llm = LLM(folder, dtype="bfloat16", enforce_eager=is_eager, enable_prefix_caching=False, max_model_len=8192)
    torch.set_num_threads(num_threads)
    print(json.dumps({"version": __version__}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(max_tokens=job["num_tokens"], temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        start = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        print(json.dumps({"wall_s": seconds[0], "cpu_s": seconds[1]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
