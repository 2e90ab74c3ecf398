"""Every connector on both model runners, in every layout and size of block: the cells, and what one cell must do.

`tests/flow/test_runner_matrix.py` runs all of them, `tests/native/test_nixl_runners.py` the P2P ones over real NIXL.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.fake_lmcache import FakeServer

from kvferry import LLM, SamplingParams
from kvferry.engine.layout_choice import LAYOUTS
from kvferry.engine.outputs import RequestOutput
from kvferry.testing.stub_model import StubModel

SHAPES = (
    ("V1", 16, 16), ("V1", 128, 128), ("V2", 16, 16), ("V2", 128, 16), ("V2", 128, 32), ("V2", 128, 128),
)  # fmt: skip
"""Model runner, block size and kernel block size (tokens). V1 has no kernel blocks."""
LOADS = {
    "OffloadingConnector": ("sync", "async"),
    "LoadRecoveryExampleConnector": ("sync", "async"),
    "MultiConnector": ("sync", "async"),
    "ExampleConnector": ("sync",),
    "LMCacheMPConnector": ("async",),
    "P2PConnector": ("pull", "push"),
}
"""How each connector can load; `pull` and `push` are both asynchronous."""
ABSENT = {
    ("ExampleConnector", "async"): "it reads its files before the layer that needs them, in the step itself",
    ("LMCacheMPConnector", "sync"): "the server answers when it has copied; no step waits for it",
    ("P2PConnector", "sync"): "the other engine's time is not known; no step waits for it",
    ("LMCacheMPConnectorUpstream", "async"): "the same class as LMCacheMPConnector in the embedded engine",
    ("NixlConnector", "pull"): "P2PConnector's sides over NIXL: tests/native/test_nixl_runners.py",
    ("NixlPullConnector", "pull"): "P2PConnector's sides over NIXL: tests/native/test_nixl_runners.py",
    ("NixlPushConnector", "push"): "P2PConnector's sides over NIXL: tests/native/test_nixl_runners.py",
    ("DecodeBenchConnector", "async"): "its answers mean nothing: tests/flow/test_decode_bench.py runs on both runners",
    ("ExampleHiddenStatesConnector", "sync"): "loads nothing: tests/model/test_hidden_states.py",
}
"""What has no cell, and why or where else it is tried."""
QUICK = {"quarantine_s": 0.2, "retry_s": 0.05, "handshake_s": 60.0, "liveness_s": 60.0, "claim_s": 60.0}
NUM_BLOCKS = {16: 64, 128: 12}


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    connector: str
    load: str
    runner: str
    layout: str
    block_size: int
    kernel_block_size: int

    def __str__(self) -> str:
        name = self.connector.removesuffix("Connector")
        return f"{name}-{self.load}-{self.runner}-{self.layout}-{self.block_size}/{self.kernel_block_size}"

    def engine(self, connector: str, extra: dict[str, Any]) -> LLM:
        """An engine of this cell with this connector."""
        transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}
        is_v2 = self.runner == "V2"
        return LLM(
            StubModel(), kv_transfer_config=transfer, use_v2_model_runner=is_v2, kv_cache_layout=self.layout,
            block_size=self.block_size, kernel_block_size=self.kernel_block_size if is_v2 else None,
            num_kv_blocks=NUM_BLOCKS[self.block_size], max_num_batched_tokens=512,
        )  # fmt: skip


def cells(connector: str) -> list[Cell]:
    """All cells of a connector."""
    return [
        Cell(connector, load, runner, layout, block_size, kernel)
        for load in LOADS[connector]
        for runner, block_size, kernel in SHAPES
        for layout in LAYOUTS
    ]


def run_cache_cell(cell: Cell, folder: Path) -> None:
    """A prompt is stored, forgotten by the engine, and loaded beside one that is computed. Right tokens only."""
    stored, other = _prompt(300, 0), _prompt(150, 1)
    with _cache_settings(cell, folder) as extra, cell.engine(cell.connector, extra) as llm:
        assert llm.config.use_v2_model_runner is (cell.runner == "V2")
        rows = next(iter(llm.kv_caches.values())).shape[0]
        assert rows == NUM_BLOCKS[cell.block_size] * cell.block_size // cell.kernel_block_size
        _finish(llm, {"cold": stored})
        until(lambda: not llm.has_requests(), llm)
        assert llm.reset_prefix_cache()
        _spoil(llm)
        outputs = _finish(llm, {"other": other, "warm": stored, "third": other[::-1]})
        assert outputs["warm"].num_external_tokens >= 256
        assert outputs["other"].num_external_tokens == 0
        until(lambda: not llm.has_requests(), llm)
        assert llm.counters.hook_errors == llm.counters.contract_errors == {}
        assert llm.counters.load_failures == 0


def run_p2p_cell(cell: Cell, *, connector: str = "P2PConnector", transport: str = "shm") -> None:
    """Prefill on one engine, decode on the other beside a request of its own. Right tokens only, nothing left held."""
    handed, other = _prompt(300, 0), _prompt(150, 1)
    extra = {"transport": transport, "mode": cell.load} | QUICK
    with cell.engine(connector, extra) as prefill, cell.engine(connector, extra) as decode:
        assert decode.config.use_v2_model_runner is (cell.runner == "V2")
        asked = {"kv_transfer_params": {"do_remote_decode": True}}
        prefill.add_request(handed, SamplingParams(max_tokens=1, temperature=0, extra_args=asked), request_id="p")
        done: dict[str, RequestOutput] = {}
        until(lambda: "p" in done and done["p"].finished, prefill, done=done)
        _spoil(decode)
        params = {"kv_transfer_params": done["p"].kv_transfer_params}
        decode.add_request(other, SamplingParams(max_tokens=6, temperature=0), request_id="other")
        decode.add_request(handed, SamplingParams(max_tokens=4, temperature=0, extra_args=params), request_id="d")
        until(lambda: all(name in done and done[name].finished for name in ("other", "d")), prefill, decode, done=done)
        for name, num_tokens in (("other", 6), ("d", 4)):
            prompt = done[name].prompt_token_ids
            assert done[name].outputs[0].token_ids == StubModel().expected_tokens(prompt, num_tokens), name
        assert done["d"].num_external_tokens == len(handed)
        until(lambda: not (prefill.has_requests() or decode.has_requests()), prefill, decode)
        for llm in (prefill, decode):
            llm.check_integrity()
            assert llm.counters.hook_errors == llm.counters.contract_errors == {}
            assert llm.counters.load_failures == 0


def until(holds: Any, *engines: LLM, done: dict[str, RequestOutput] | None = None) -> None:
    """Step these engines until something holds; the outputs go to `done`."""
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        for llm in engines:
            for output in llm.step():
                (done if done is not None else {})[output.request_id] = output
        time.sleep(0.0002)


def _prompt(num_tokens: int, seed: int) -> list[int]:
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


def _finish(llm: LLM, prompts: dict[str, list[int]]) -> dict[str, RequestOutput]:
    done: dict[str, RequestOutput] = {}
    for name, prompt in prompts.items():
        llm.add_request(prompt, SamplingParams(max_tokens=3, temperature=0), request_id=name)
    until(lambda: all(name in done and done[name].finished for name in prompts), llm, done=done)
    for name, prompt in prompts.items():
        assert done[name].outputs[0].token_ids == StubModel().expected_tokens(prompt, 3), name
    llm.check_integrity()
    return done


def _spoil(llm: LLM) -> None:
    """Every byte of the KV cache is wrong from now on."""
    for view in llm.kv_caches.values():
        view.copy_(torch.full_like(view, 7.5))


@contextmanager
def _cache_settings(cell: Cell, folder: Path) -> Iterator[dict[str, Any]]:
    host = {"weights_version": "1", "cpu_bytes_to_use": 1 << 20, "load_async": cell.load == "async"}
    files = {"shared_storage_path": str(folder), "weights_version": "1"}
    if cell.connector == "LMCacheMPConnector":
        with closing(FakeServer(chunk_tokens=128)) as server:
            yield {"server_urls": [server.url], "weights_version": "1", "lookup_timeout_s": 60.0}
    elif cell.connector == "MultiConnector":
        parts = (("OffloadingConnector", host), ("ExampleConnector", files))
        yield {
            "connectors": [
                {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}
                for name, extra in parts
            ]
        }
    elif cell.connector == "ExampleConnector":
        yield files
    elif cell.connector == "LoadRecoveryExampleConnector":
        yield {"load_async": cell.load == "async"}
    else:
        assert cell.connector == "OffloadingConnector"
        yield host
