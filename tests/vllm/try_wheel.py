"""Tries a third party's connector for vLLM in the embedded engine; the rows of docs/guides/foreign.md are from runs.

    pip install --no-deps --target FOLDER vllm_kvblockd==0.1.0 kvblockd==0.1.0 blake3
    PYTHONHASHSEED=0 python tests/vllm/try_wheel.py FOLDER vllm_kvblockd.connector:KvblockdConnector

On the stub model, whose next token is a hash of all KV bytes: one prompt, then the same with the engine's own cache
emptied, then the same in a new engine; each with the tokens that came from the connector. `--budget` below 600 cuts
the prompt into chunks. Ends with 1 when a token is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from typing import Any

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel

PROMPT = [(i * i * 31 + i * 7) % 900 + 10 for i in range(600)]
_BACKGROUND_S = 0.5


class KvblockdStandIn:
    """In place of kvblockd's client, whose server is a program of its own: the same calls on a dict."""

    blobs: dict[bytes, bytes] = {}  # noqa: RUF012

    def __init__(self, *_: Any, **__: Any) -> None:
        self.status = importlib.import_module("kvblockd.protocol").Status

    def batch_exists(self, keys: list[bytes], deadline: float | None = None) -> tuple[int, list[bool]]:
        found = [key in self.blobs for key in keys]
        return (found.index(False) if False in found else len(found)), found

    def put(self, key: bytes, bufs: list[Any], ttl_ms: int = 0) -> None:
        self.blobs[bytes(key)] = b"".join(bytes(buf) for buf in bufs)

    def batch_get_scatter(self, keys: list[bytes], prefix_len: int, alloc: Any, deadline: float | None = None) -> Any:
        statuses = []
        for index, key in enumerate(keys):
            blob = self.blobs.get(bytes(key))
            statuses.append(self.status.NOT_FOUND if blob is None else self.status.OK)
            target = None if blob is None else alloc(index, blob[:prefix_len], len(blob) - prefix_len)
            if target is not None:
                memoryview(target).cast("B")[:] = blob[prefix_len:]
        return statuses

    def close(self) -> None:
        pass


def run(transfer: dict[str, Any], budget_tokens: int, times: int) -> list[str]:
    """Complete the prompt `times` times in one engine; a line for each."""
    model, lines = StubModel(), []
    with LLM(model, num_kv_blocks=128, max_num_batched_tokens=budget_tokens, kv_transfer_config=transfer) as llm:
        for _ in range(times):
            output = llm.generate([PROMPT], SamplingParams(max_tokens=8, temperature=0))[0]
            is_right = output.outputs[0].token_ids == model.expected_tokens(PROMPT, 8)
            lines.append(f"{output.num_external_tokens} tokens loaded, {'right' if is_right else 'WRONG'} answer")
            time.sleep(_BACKGROUND_S)  # connectors store in threads of their own
            assert llm.reset_prefix_cache(), "blocks are still held"
        lines.append(f"errors: {llm.counters.hook_errors | llm.counters.contract_errors}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("connector", metavar="module:Class")
    parser.add_argument("extra", nargs="?", default="{}", help="kv_connector_extra_config as JSON")
    parser.add_argument("--budget", type=int, default=1024)
    options = parser.parse_args()
    sys.path.insert(0, options.folder)
    if options.connector.startswith("vllm_kvblockd."):
        importlib.import_module("vllm_kvblockd.connector").Client = KvblockdStandIn
    transfer = {"kv_connector": options.connector, "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    transfer["kv_connector_extra_config"] = json.loads(options.extra)
    lines = [*run(transfer, options.budget, 2), "a new engine:", *run(transfer, options.budget, 1)]
    print("\n".join(lines))
    return int(any("WRONG" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
