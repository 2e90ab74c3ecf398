"""Records the hook calls of real vLLM as data: `.venv-vllm/bin/python tests/vllm/record_trace.py` (about a minute).

Writes tests/data/vllm_0_32_trace.json, which tests/flow/test_host_truth.py compares the embedded engine with. With
`--only single:cold` one scenario is recorded and printed as JSON instead. The models are tiny and random; engines run
in this process, so that both instances of the connector write to one record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "vllm_0_32_trace.json"
ANSWER = "kvferry-trace "
_SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "single": {
        **_SHAPE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
    },
    "hybrid": {
        **_SHAPE,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 32,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


class VllmHost:
    """Real vLLM as the scenarios drive it."""

    def __init__(self, model: str, folder: str) -> None:
        from tests import host_trace
        from vllm.v1.engine.llm_engine import LLMEngine

        from vllm import EngineArgs

        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        args = EngineArgs(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            block_size=host_trace.BLOCK_SIZE,
            max_model_len=host_trace.MAX_MODEL_LEN,
            max_num_batched_tokens=host_trace.BUDGET_TOKENS,
            max_num_seqs=4,
            num_gpu_blocks_override=host_trace.NUM_BLOCKS[model],
            kv_transfer_config={
                "kv_connector": "HmaRecorder",
                "kv_connector_module_path": "trace_connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
            },
        )
        self._engine = LLMEngine.from_engine_args(args)
        self._core = self._engine.engine_core.engine_core
        num_groups = len(self._core.scheduler.kv_cache_config.kv_cache_groups)
        assert num_groups == {"single": 1, "hybrid": 3}[model]

    def add(self, key: str, token_ids: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
        self._engine.add_request(key, {"prompt_token_ids": token_ids}, params)

    def abort(self, key: str) -> None:
        self._engine.abort_request([key])

    def step(self) -> None:
        self._engine.step()

    def has_requests(self) -> bool:
        return bool(self._core.scheduler.has_requests())

    def reset_prefix_cache(self) -> bool:
        return bool(self._engine.reset_prefix_cache())

    def shutdown(self) -> None:
        self._engine.engine_core.shutdown()


def record(model: str, only: str | None) -> dict[str, Any]:
    """Every scenario (or one) of one model, with the engine's start and end."""
    from tests.host_trace import NOT_HYBRID, SCENARIOS, run_scenario

    from kvferry.testing.recorder import new_record

    log = new_record()
    with tempfile.TemporaryDirectory() as folder:
        host = VllmHost(model, folder)
        trace = {"startup": [{"do": "start", "calls": log.lines()}]}
        log.forget()
        for name in SCENARIOS if only is None else [only]:
            if model == "single" or name not in NOT_HYBRID:
                trace[name] = run_scenario(name, host, log)
        log.forget()
        host.shutdown()
        trace["shutdown"] = [{"do": "shutdown", "calls": log.lines()}]
    return trace


def record_in_child(model: str, only: str | None = None) -> dict[str, Any]:
    """As `record`, in a process of its own."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, Path(__file__).parent))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, __file__, "--child", f"{model}:{only or ''}"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=500)
    for line in done.stdout.splitlines():
        if line.startswith(ANSWER):
            trace: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
            return trace
    raise RuntimeError(f"no trace of {model}; the end of its log:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="MODEL:SCENARIO")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, _, only = options.child.partition(":")
        print(ANSWER + json.dumps(record(model, only or None)), flush=True)
    elif options.only:
        model, _, only = options.only.partition(":")
        print(json.dumps(record_in_child(model, only), indent=1))
    else:
        from importlib.metadata import version

        traces = {model: record_in_child(model) for model in MODELS}
        DATA.parent.mkdir(exist_ok=True)
        DATA.write_text(json.dumps({"vllm": version("vllm-cpu"), "traces": traces}, indent=1) + "\n")


if __name__ == "__main__":
    main()
