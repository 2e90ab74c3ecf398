"""Requests to a real vLLM with our ExampleHiddenStatesConnector; argv: model folder, folder for files. Prints JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

LAYERS = [0, 2, 3]
MAX_MODEL_LEN = 256


def prompt(seed: int, num_tokens: int) -> list[int]:
    return [(seed * 31 + 7 * i) % 500 + 5 for i in range(num_tokens)]


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        enforce_eager=True,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": LAYERS}},
        },
        kv_transfer_config={
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_connector_module_path": "kvferry.vllm",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": sys.argv[2]},
        },
    )
    engine = llm.llm_engine

    def params(num_tokens: int) -> Any:
        return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)

    def run(*seeds_and_sizes: tuple[int, int]) -> list[dict[str, Any]]:
        requests = [{"prompt_token_ids": prompt(*of)} for of in seeds_and_sizes]
        return [
            {"path": output.kv_transfer_params["hidden_states_path"], "num_cached_tokens": output.num_cached_tokens,
             "token_ids": output.prompt_token_ids}
            for output in llm.generate(requests, params(4), use_tqdm=False)
        ]  # fmt: skip

    answers: dict[str, Any] = {"cold": run((1, 50), (2, 150), (3, 70)), "hit": run((2, 150))}

    engine.add_request("aborted", {"prompt_token_ids": prompt(4, 40)}, params(100))
    for _ in range(4):
        engine.step()
    engine.abort_request(["aborted"])
    engine.step()

    engine.add_request("long", {"prompt_token_ids": prompt(5, MAX_MODEL_LEN - 2)}, params(100))
    scheduler = engine.engine_core.engine_core.scheduler
    while not (scheduler.running and scheduler.running[0].num_output_tokens):
        engine.step()
    engine.add_request("beside", {"prompt_token_ids": prompt(6, 40)}, params(2))
    paths = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                paths[output.request_id] = output.kv_transfer_params["hidden_states_path"]
    paths = {name.partition("-")[0]: path for name, path in paths.items()}
    answers["limit"] = [
        {"path": paths["long"], "num_cached_tokens": 0, "token_ids": prompt(5, MAX_MODEL_LEN - 2)},
        {"path": paths["beside"], "num_cached_tokens": 0, "token_ids": prompt(6, 40)},
    ]
    engine.engine_core.shutdown()
    print("answers " + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
