"""Every connector of vLLM in the embedded engine: a hit with the right answer, or the reason why there is none.

On the stub model, whose next token is a hash of every KV byte, so that a right answer means right bytes. The guide's
table (docs/guides/foreign.md) says the same.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_process import vllm_environment
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel

# vLLM's MooncakeConnector, refused in its constructor, raises in its destructor.
pytestmark = pytest.mark.filterwarnings("ignore:.*MooncakeConnectorWorker:pytest.PytestUnraisableExceptionWarning")

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "foreign.md"
PROMPT = [(i * i * 31 + i * 7) % 900 + 10 for i in range(600)]
EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Refused:
    """It does not start here: the words of its error, which stand in the guide as well."""

    words: str


@dataclass(frozen=True)
class Runs:
    """It takes over so many of the prompt's 600 tokens."""

    num_tokens: int
    is_handed_over: bool = False
    """True for a connector that takes KV from another engine."""
    invents: bool = False
    """True for a connector whose KV is no prompt's, so that there is no right answer."""


OUTCOMES: dict[str, Runs | Refused] = {
    "ExampleConnector": Runs(592),
    "ExampleHiddenStatesConnector": Refused("only works when using 'extract_hidden_states' speculative method"),
    "LMCacheConnectorV1": Refused("No module named 'lmcache'"),
    "LMCacheMPConnector": Refused("No module named 'lmcache'"),
    "NixlConnector": Runs(600, is_handed_over=True),
    "NixlPullConnector": Runs(600, is_handed_over=True),
    "NixlPushConnector": Runs(600, is_handed_over=True),
    "MultiConnector": Runs(592),
    "HiSparseConnector": Refused("requires a HiSparse host pool"),
    "MoRIIOConnector": Refused("MoRIIO is not available"),
    "OffloadingConnector": Refused("CPU Offloading is currently only supported on CUDA-alike and XPU GPUs"),
    "DecodeBenchConnector": Runs(599, invents=True),
    "MooncakeConnector": Refused("Mooncake is not available"),
    "MooncakeStoreConnector": Refused("Please install mooncake"),
    "FlexKVConnectorV1": Refused("FlexKV is not installed"),
    "SimpleCPUOffloadConnector": Refused("type object 'Stream' has no attribute 'priority_range'"),
    "HF3FSKVConnector": Refused("Failed to connect to metadata server"),
}
"""Every connector that vLLM 0.32 registers."""


def settings(name: str, folder: Path) -> dict[str, Any]:
    """`kv_connector_extra_config` for a connector of that name."""
    if name == "MultiConnector":
        stores = [{"shared_storage_path": str(folder / child)} for child in ("a", "b")]
        return {"connectors": [{**EXAMPLE, "kv_connector_extra_config": store} for store in stores]}
    return {
        "ExampleConnector": {"shared_storage_path": str(folder)},
        "OffloadingConnector": {"cpu_bytes_to_use": 1 << 24},
        "SimpleCPUOffloadConnector": {"cpu_bytes_to_use": 1 << 24},
        "HF3FSKVConnector": {"hf3fs_storage_path": str(folder), "hf3fs_file_size": 1 << 24},
    }.get(name, {})


def where(name: str) -> str:
    """Module and class, as a user names them; without an import, for that may be what fails."""
    load = KVConnectorFactory._registry[name]
    module, class_name = (cell.cell_contents for cell in reversed(load.__closure__))
    return f"{module}:{class_name}"


def start(name: str, folder: Path, **options: Any) -> tuple[LLM, StubModel]:
    model = StubModel(num_kv_heads=2, head_size=32)
    transfer = {
        "kv_connector": where(name),
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings(name, folder),
    }
    # Blocks of 32 tokens, since NixlConnector asks vLLM's attention for CPUs, which has no others.
    options = {"num_kv_blocks": 64, "max_num_batched_tokens": 1024, **options}
    return LLM(model, kv_transfer_config=transfer, **options), model


def params(max_tokens: int, **transfer: Any) -> SamplingParams:
    extra = {"kv_transfer_params": transfer} if transfer else None
    return SamplingParams(max_tokens=max_tokens, temperature=0, extra_args=extra)


def assert_runs(name: str, outcome: Runs, llm: LLM, model: StubModel, output: Any) -> None:
    assert output.num_external_tokens == outcome.num_tokens
    assert outcome.invents or output.outputs[0].token_ids == model.expected_tokens(PROMPT, 8)
    assert llm.counters.hook_errors == llm.counters.contract_errors == {}, name


def test_every_connector_of_vllm_is_here() -> None:
    ours = {name for name in KVConnectorFactory._registry if name.startswith("Ferry")}  # where the plugin was loaded
    assert OUTCOMES.keys() == KVConnectorFactory._registry.keys() - ours


@pytest.mark.parametrize("name", [name for name, outcome in OUTCOMES.items() if isinstance(outcome, Refused)])
def test_refused(name: str, tmp_path: Path) -> None:
    outcome = OUTCOMES[name]
    assert isinstance(outcome, Refused)
    with pytest.raises(Exception, match=re.escape(outcome.words)):
        start(name, tmp_path)


ALONE = [name for name, outcome in OUTCOMES.items() if isinstance(outcome, Runs) and not outcome.is_handed_over]


@pytest.mark.parametrize("name", ALONE)
def test_runs(name: str, tmp_path: Path) -> None:
    """One engine stores, and a new one finds; what invents KV has it at once."""
    outcome = OUTCOMES[name]
    assert isinstance(outcome, Runs)
    for num_tokens in (outcome.num_tokens if outcome.invents else 0, outcome.num_tokens):
        llm, model = start(name, tmp_path, num_kv_blocks=128)
        with llm:
            output = llm.generate([PROMPT], params(8))[0]
            assert_runs(name, Runs(num_tokens, invents=outcome.invents), llm, model, output)


@pytest.mark.parametrize("name", [name for name in OUTCOMES if name.startswith("Nixl")])
def test_hands_over(name: str, tmp_path: Path) -> None:
    """In a process of its own: what NIXL leaves running would take a core from all tests after it."""
    command = [sys.executable, __file__, name, str(tmp_path)]
    done = subprocess.run(command, env=vllm_environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def hand_over(name: str, folder: Path) -> None:
    """One engine prefills, another loads from it and decodes."""
    outcome = OUTCOMES[name]
    assert isinstance(outcome, Runs)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [place.getsockname()[1] for place in (one, other)]
    engines = []
    for port in ports:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
        engines.append(start(name, folder, block_size=32))
    (prefill, _), (decode, model) = engines
    with prefill, decode:
        prefill.add_request(PROMPT, params(1, do_remote_decode=True, do_remote_prefill=False))
        handed = finish(prefill).kv_transfer_params
        assert handed is not None
        decode.add_request(PROMPT, params(8, **handed))
        output = finish(decode, prefill)
        assert_runs(name, outcome, decode, model, output)
        assert prefill.counters.hook_errors == prefill.counters.contract_errors == {}


def finish(engine: LLM, *others: LLM) -> Any:
    """Step until the engine's only request has ended; other engines step beside it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        for other in others:
            other.step()
        for output in engine.step():
            if output.finished:
                return output
    raise AssertionError(f"not finished after {DEADLINE_S:.0f} s")


def test_the_guide_has_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", GUIDE.read_text(), re.MULTILINE)
    table = {name: (verdict.strip(), text) for name, verdict, text in rows if name in OUTCOMES}
    assert table.keys() == OUTCOMES.keys()
    for name, outcome in OUTCOMES.items():
        verdict, text = table[name]
        if isinstance(outcome, Refused):
            assert verdict == "does not start"
            assert f"`{outcome.words}`" in text
        else:
            assert verdict == "runs"
            assert f"{outcome.num_tokens} of 600 tokens" in text


if __name__ == "__main__":
    hand_over(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # whatever still runs
