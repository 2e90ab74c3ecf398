"""A pooling model in real vLLM with kvferry's host memory: embeds one prompt three times, tells what it found.

argv: folder of the model, pooling type. What stands behind FOUND is JSON: embeddings and external hits after each.
"""

from __future__ import annotations

import json
import sys

PROMPT = [(i * i * 29 + i * 11) % 500 + 3 for i in range(330)]


def main() -> None:
    """Without vLLM's own prefix cache, so that every hit is an external one."""
    from vllm.config import PoolerConfig

    from vllm import LLM

    llm = LLM(
        model=sys.argv[1], runner="pooling", convert="embed", pooler_config=PoolerConfig(seq_pooling_type=sys.argv[2]),
        dtype="float32", enforce_eager=True, max_model_len=1024, max_num_batched_tokens=1024,
        enable_prefix_caching=False, disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector", "kv_connector_module_path": "kvferry.vllm", "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 26},
        },
    )  # fmt: skip
    found = []
    for _ in range(3):
        output = llm.embed([{"prompt_token_ids": PROMPT}], use_tqdm=False)[0]
        hits = sum(m.value for m in llm.get_metrics() if m.name == "vllm:external_prefix_cache_hits")
        found.append({"embedding": list(output.outputs.embedding), "external_hits": hits})
    print(f"\nFOUND {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
