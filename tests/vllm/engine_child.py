"""A real vLLM engine in a process of its own, driven by JSON lines on stdin; for tests that kill it.

argv[1]: JSON {"llm": LLM arguments}. A command is a JSON object whose first key is a method of `Driver`, with that
key's value as first argument and the other keys by name. Answers are JSON lines that begin with ANSWER.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

ANSWER = "kvferry-answer "
WAIT_S = 300
METRICS = {
    "external_hits": "vllm:external_prefix_cache_hits",
    "local_hits": "vllm:prefix_cache_hits",
    "num_preemptions": "vllm:num_preemptions",
}


class WorkerProbe:
    """Mixed into vLLM's worker (worker_extension_cls): sees the pool itself, past every connector, and makes faults."""

    model_runner: Any
    _gate: threading.Event
    _num_held = 0
    _jobs: list[Any]
    _num_computed: list[int]

    def block_digests(self, block_ids: list[int]) -> dict[str, str]:
        """SHA-256 of each block's bytes over all layers, read through the runner's own tensors."""
        import torch

        digests = {}
        for block in block_ids:
            sha = hashlib.sha256()
            for tensor in self.model_runner.kv_caches:
                sha.update(tensor[block].contiguous().flatten().view(dtype=torch.uint8).numpy())
            digests[str(block)] = sha.hexdigest()
        return digests

    def connector_origin(self) -> str:
        """Module and class of the worker's connector."""
        kind = type(_worker_connector())
        return f"{kind.__module__}:{kind.__qualname__}"

    def save_kv(self, folder: str, block_ids: list[int], group: int) -> None:
        """Write `rank<n>.npy` there, of one KV cache group: float32 [layers, blocks x tokens, heads, K then V].

        As vLLM's attention on CPU keeps them (measured with its own store op): per block and head all of K as
        [elements, tokens], then all of V as [tokens, elements], whatever the tensor's shape says.
        """
        import numpy as np

        layers = self.model_runner.compilation_config.static_forward_context
        kept = []
        for name in sorted(_worker_connector()._kv_cache_config.kv_cache_groups[group].layer_names):
            blocks = layers[name].kv_cache.numpy()[block_ids]
            num, heads, tokens, content = blocks.shape
            k, v = np.split(blocks.reshape(num, heads, -1), 2, axis=2)
            k = k.reshape(num, heads, content // 2, tokens).transpose(0, 3, 1, 2)
            v = v.reshape(num, heads, tokens, content // 2).transpose(0, 2, 1, 3)
            kept.append(np.concatenate([k, v], axis=3).reshape(num * tokens, heads, content))
        np.save(Path(folder) / f"rank{_worker_connector().side.host.rank}.npy", np.stack(kept))

    def watch_jobs(self) -> None:
        """From now on note what this worker is told to transfer, and how many tokens each step computes."""
        links = _worker_connector().side._links
        start, self._jobs = links.start, []

        def noted(job: Any) -> None:
            self._jobs.append(job)
            start(job)

        links.start = noted
        self.watch_steps()

    def watch_steps(self) -> None:
        """From now on note how many tokens each step computes."""
        runner = self.model_runner
        execute, self._num_computed = runner.execute_model, []

        def counted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._num_computed.append(scheduler_output.total_num_scheduled_tokens)
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = counted

    def num_computed(self) -> list[int]:
        """Of each step since it is watched, or since this was asked, that computed any tokens."""
        counts, self._num_computed[:] = [num for num in self._num_computed if num], []
        return counts

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs since `watch_jobs`, oldest first."""
        return [
            {"op": job.op.value, "blocks": job.local_blocks, "tokens": job.token_range, "to": job.remote_blocks}
            for job in self._jobs
        ]

    def moved_bytes(self) -> dict[str, dict[str, int]]:
        """Transport -> operation -> bytes that it has seen land."""
        transports = _worker_connector().side.transports
        return {name: {op.value: num for op, num in t.bytes_moved.items()} for name, t in transports.items()}

    def kv_files(self) -> list[str]:
        """Files mapped into this worker in which its KV tensors lie."""
        pools = {tensor.untyped_storage().data_ptr() for tensor in self.model_runner.kv_caches}
        found = set()
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, _, rest = line.partition("-")
            end, *others = rest.split()
            if any(int(first, 16) <= address < int(end, 16) for address in pools):
                found.add(others[4] if len(others) > 4 else "")
        return sorted(found)

    def affinities(self) -> list[tuple[int, ...]]:
        """Cores that the worker's threads may run on, without repetitions."""
        return sorted({tuple(sorted(os.sched_getaffinity(int(thread)))) for thread in os.listdir("/proc/self/task")})

    def process_id(self) -> int:
        """Of the worker."""
        return os.getpid()

    def num_compiled_graphs(self) -> int:
        """Graphs that torch has compiled in this process."""
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def layers_by_group(self) -> list[list[int]]:
        """Per KV cache group the address of each layer's first block."""
        groups = _worker_connector()._kv_cache_config.kv_cache_groups
        layers = self.model_runner.compilation_config.static_forward_context
        return [[layers[name].kv_cache.data_ptr() for name in group.layer_names] for group in groups]

    def shift_generations(self, by: int) -> None:
        """Every slot of the host arena looks as if it had been given to other chunks since it was claimed."""
        generations = _worker_connector().side._arena._generations
        for slot in range(len(generations)):
            generations[slot] += by

    def hold_loads(self) -> None:
        """From now on loads stand still before their first byte, until `release_loads`."""
        copier = _worker_connector().side._copier
        scatter = copier.scatter
        self._gate = threading.Event()

        def held(*args: Any) -> None:
            self._num_held += 1
            assert self._gate.wait(WAIT_S)
            scatter(*args)

        copier.scatter = held

    def num_held_loads(self) -> int:
        """Loads that have come to the gate."""
        return self._num_held

    def release_loads(self) -> None:
        """Loads go on."""
        self._gate.set()
        del _worker_connector().side._copier.scatter

    def refused_weights(self, model: str) -> list[str]:
        """What the worker says to each way of giving it other weights; empty where it takes them."""
        worker: Any = self
        ways = (
            lambda: worker.reload_weights(weights_path=model),
            lambda: worker.reload_weights(weights_iterator=iter(())),
            lambda: worker.update_config({"model_config": {"model": model}}),
            lambda: worker.start_weight_update(),
            lambda: worker.start_draft_weight_update(),
            lambda: worker.model_runner.model.load_weights(weights=iter(())),
            lambda: worker.reload_weights(),
        )
        said = []
        for way in ways:
            try:
                way()
                said.append("")
            except Exception as err:
                said.append(str(err))
        return said


def _worker_connector() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


class Driver:
    """The commands."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._seen = self._metrics()
        self._adapter: Any = None
        self._undo_steps: list[tuple[Any, str, Any]] = []
        self._raised = [0]

    def _metrics(self) -> dict[str, float]:
        found = dict.fromkeys(METRICS, 0.0)
        for metric in self._llm.get_metrics():
            for name, theirs in METRICS.items():
                if metric.name == theirs:
                    found[name] += metric.value
        return found

    def _news(self) -> dict[str, float]:
        before, self._seen = self._seen, self._metrics()
        return {name: value - before[name] for name, value in self._seen.items()}

    @staticmethod
    def _params(max_tokens: int, transfer: dict[str, Any] | None = None) -> Any:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": transfer} if transfer else None
        return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=2, extra_args=extra)

    def generate_all(
        self, prompts: list[list[int]], max_tokens: int, transfer: dict[str, Any] | list[Any] | None = None
    ) -> dict[str, Any]:
        """All prompts at once, perhaps a `transfer` for each: {"outputs": one per prompt, how much METRICS grew}."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        started_s = time.monotonic()
        transfers, lora = transfer if isinstance(transfer, list) else [transfer] * len(prompts), self._adapter
        params = [self._params(max_tokens, each) for each in transfers]
        outputs = self._llm.generate(requests, params, use_tqdm=False, lora_request=lora)
        seconds = time.monotonic() - started_s
        return {"outputs": [_output(output) for output in outputs], "seconds": seconds, **self._news()}

    def load_adapter(self, path: str) -> dict[str, Any]:
        """As `vllm serve --lora-modules` does at its start; all requests from now on are of this adapter."""
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest("adapter", 1, path)
        return {"is_loaded": self._llm.llm_engine.add_lora(self._adapter)}

    def generate(self, prompt: list[int], max_tokens: int, transfer: dict[str, Any] | None = None) -> dict[str, Any]:
        """One prompt (with these kv_transfer_params): tokens, top-2 gaps, and how much each of METRICS grew."""
        answer = self.generate_all([prompt], max_tokens, transfer)
        return {**answer.pop("outputs")[0], **answer}

    def watched(self, prompt: list[int], max_tokens: int, transfer: dict[str, Any]) -> dict[str, Any]:
        """Like `generate`, in an engine core of this process; `as_seen`: the scheduler's parameters at the end."""
        engine = self._llm.llm_engine
        engine.add_request("watched", {"prompt_token_ids": prompt}, self._params(max_tokens, transfer))
        (request,) = engine.engine_core.engine_core.scheduler.requests.values()
        outputs: list[Any] = []
        while not (outputs and outputs[-1].finished):
            outputs += engine.step()
            time.sleep(0.001)
        return {**_output(outputs[-1]), "as_seen": request.kv_transfer_params, **self._news()}

    def reset(self, reset_connector: bool) -> dict[str, Any]:
        """Forget vLLM's own prefix cache, which vLLM refuses while any block is held: bounded wait for that."""
        deadline = time.monotonic() + WAIT_S
        while not self._llm.reset_prefix_cache(reset_connector=reset_connector):
            assert time.monotonic() < deadline, f"blocks are still held after {WAIT_S} s"
            if hasattr(self._llm.llm_engine.engine_core, "engine_core"):
                self._llm.llm_engine.step()  # an engine core in this process does nothing by itself
            time.sleep(0.01)
        return {"reset": True}

    def abort_running(self, prompt: list[int], after_tokens: int) -> dict[str, Any]:
        """Abort a request that has generated `after_tokens` tokens."""
        engine = self._llm.llm_engine
        engine.add_request("running", {"prompt_token_ids": prompt}, self._params(1000))
        num_tokens = 0
        while num_tokens < after_tokens:
            for output in engine.step():
                num_tokens = len(output.outputs[0].token_ids)
        engine.abort_request(["running"])
        return {"num_tokens": num_tokens, "is_unfinished": engine.has_unfinished_requests(), **self._news()}

    def abort_loading(self, prompt: list[int]) -> dict[str, Any]:
        """Abort a request whose load has begun and is held; then let the load go on."""
        engine = self._llm.llm_engine
        self._llm.collective_rpc("hold_loads")
        engine.add_request("loading", {"prompt_token_ids": prompt}, self._params(4))
        deadline = time.monotonic() + WAIT_S
        while not self._llm.collective_rpc("num_held_loads")[0]:
            assert time.monotonic() < deadline, "no load has begun"
            time.sleep(0.01)
        engine.abort_request(["loading"])
        is_free_while_loading = self._llm.reset_prefix_cache()
        self._llm.collective_rpc("release_loads")
        self.reset(False)  # the engine is given all its blocks back
        return {"is_free_while_loading": is_free_while_loading, **self._news()}

    def rpc(self, method: str, args: list[Any] | None = None) -> dict[str, Any]:
        """Call a method of WorkerProbe on all workers."""
        return {"answers": self._llm.collective_rpc(method, args=tuple(args or ()))}

    def digests(self, block_ids: list[int]) -> dict[str, Any]:
        """See WorkerProbe.block_digests."""
        digests: dict[str, Any] = self._llm.collective_rpc("block_digests", args=(block_ids,))[0]
        return digests

    def facts(self, _: bool) -> dict[str, Any]:
        """Where and how this engine runs."""
        config = self._llm.llm_engine.vllm_config
        return {
            "is_in_process": self._llm.collective_rpc("process_id")[0] == os.getpid(),
            "num_compiled_graphs": self._llm.collective_rpc("num_compiled_graphs")[0],
            "block_size": config.cache_config.block_size,
            "has_prefix_caching": config.cache_config.enable_prefix_caching,
            "layers_by_group": self._llm.collective_rpc("layers_by_group")[0],
        }

    def raise_in(self, hook: str, times: int) -> dict[str, Any]:
        """This hook raises the next so many times (-1: always), on both sides, and no other. Needs the core here."""
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

        self._undo()
        sides = [connector.side for connector in self._connectors()]
        left = [times]
        self._raised = left
        # Hooks of metadata have no side: vLLM's base class has them.
        owners = [side for side in sides if hasattr(side, hook)] if hook != "has_connector_metadata" else []
        for owner in owners or [KVConnectorBase_V1]:
            self._undo_steps.append((owner, hook, vars(owner).get(hook)))
            setattr(owner, hook, _raising(getattr(owner, hook), left))
        return {"raise_in": hook}

    def _connectors(self) -> list[Any]:
        return [self._llm.llm_engine.engine_core.engine_core.scheduler.connector, _worker_connector()]

    def _undo(self) -> None:
        for owner, hook, own in self._undo_steps:
            delattr(owner, hook) if own is None else setattr(owner, hook, own)
        self._undo_steps.clear()

    def left_to_raise(self, _: bool) -> dict[str, Any]:
        """How often the hook of `raise_in` is still to raise; from now on none does."""
        self._undo()
        return {"left": self._raised[0]}

    def guards(self, _: bool) -> dict[str, Any]:
        """What both guards have seen, and how many blocks of the pool are free."""
        scheduler, worker = (connector._own_guard for connector in self._connectors())
        pool = self._llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        return {
            "num_errors": scheduler.num_errors,
            "is_off": [scheduler.is_off, worker.is_off],
            "is_shut_down": [scheduler.is_shut_down, worker.is_shut_down],
            "num_aside": sum(map(len, scheduler._aside.values())),
            "num_free_blocks": pool.get_num_free_blocks(),
        }

    def connector(self, _: bool) -> dict[str, Any]:
        """See WorkerProbe.connector_origin."""
        return {"origin": self._llm.collective_rpc("connector_origin")[0]}


def _raising(ask: Any, left: list[int]) -> Any:
    """The hook, raising as long as `left[0]` is not 0, which is counted down."""

    @functools.wraps(ask)
    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise TypeError("told to raise")
        return ask(*args, **kwargs)

    return call


def _output(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    gaps = [sorted((p.logprob for p in step.values()), reverse=True) for step in completion.logprobs or ()]
    return {
        "token_ids": list(completion.token_ids),
        "logit_gaps": [ordered[0] - ordered[1] for ordered in gaps],
        "finish_reason": completion.finish_reason,
        "num_cached_tokens": output.num_cached_tokens,
        "kv_transfer_params": output.kv_transfer_params,
    }


def main() -> None:
    from vllm import LLM

    driver = Driver(LLM(**json.loads(sys.argv[1])["llm"]))
    print(ANSWER + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name = next(iter(command))
        if name == "stop":
            driver._llm.llm_engine.engine_core.shutdown(timeout=command["stop"])
            return
        answer = getattr(driver, name)(command.pop(name), **command)
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
