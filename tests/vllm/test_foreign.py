"""Connectors written for vLLM's base class in the embedded engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from tests.embedded_trace import CASES, TRACES, embedded_trace, expected
from vllm.distributed import kv_events as vllm_events
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.v1 import kv_cache_interface as vllm_kv
from vllm.v1.request import RequestStatus

from kvferry import LLM, SamplingParams, kv_events
from kvferry.config import KVTransferConfig
from kvferry.contract import (
    KVConnectorBase_V1,
    KVConnectorFactory,
    SlidingWindowSpec,
    SupportsHMA,
    make_kv_cache_config,
)
from kvferry.engine.request import Request
from kvferry.errors import ConnectorNotFound
from kvferry.testing.stub_model import StubModel
from kvferry.vllm.foreign import adapt, show_kv_cache_config

EXAMPLE = f"{ExampleConnector.__module__}:ExampleConnector"
PROMPT = [(i * i * 31 + i * 7) % 40000 + 100 for i in range(300)]
STORED_TOKENS = 288  # whole blocks of 16 below the last token
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=2)


def complete(model_folder: str, store: Path | None, budget_tokens: int) -> tuple[Any, LLM]:
    """The prompt's completion by an engine of its own, and that engine, shut down."""
    transfer = store and {
        "kv_connector": EXAMPLE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }
    llm = LLM(
        model_folder,
        dtype="float32",
        num_kv_blocks=40,
        max_num_batched_tokens=budget_tokens,
        kv_transfer_config=transfer,
    )
    with llm:
        return llm.generate([PROMPT], PARAMS)[0], llm


def assert_same_tokens(got: Any, reference: Any) -> None:
    """Equal, except from the first position on where the reference's top-2 gap is below 1e-4 (DESIGN)."""
    pairs = zip(got.outputs[0].token_ids, reference.outputs[0].token_ids, strict=True)
    for position, (token, expected_token) in enumerate(pairs):
        first, second = sorted((p.logprob for p in reference.outputs[0].logprobs[position].values()), reverse=True)[:2]
        if first - second < 1e-4:
            print(f"near tie at position {position}: the rest is not compared")
            return
        assert token == expected_token, f"token {position}"


@pytest.fixture(scope="module")
def plain(model_folder: str) -> Any:
    return complete(model_folder, None, 512)[0]


@pytest.mark.parametrize("reload_budget_tokens", [512, 128])
def test_example_connector_stores_and_reloads(model_folder, plain, tmp_path, reload_budget_tokens: int) -> None:
    first, llm = complete(model_folder, tmp_path, 512)
    assert first.num_cached_tokens == 0
    second, llm_again = complete(model_folder, tmp_path, reload_budget_tokens)
    assert (second.num_external_tokens, second.num_cached_tokens) == (STORED_TOKENS, STORED_TOKENS)
    for output, engine in ((first, llm), (second, llm_again)):
        assert_same_tokens(output, plain)
        assert engine.counters.hook_errors == engine.counters.contract_errors == {}


def test_example_connector_with_a_prompt_in_chunks_never_hits_but_never_lies(model_folder, plain, tmp_path) -> None:
    """It stores the first chunk under the whole prompt's name; vLLM's engine ends when that is loaded."""
    first, llm = complete(model_folder, tmp_path, 128)
    assert llm.counters.hook_errors == {}
    second, llm_again = complete(model_folder, tmp_path, 128)
    assert llm_again.counters.hook_errors == {"start_load_kv": 1}
    assert second.num_external_tokens == 0
    assert_same_tokens(first, plain)
    assert_same_tokens(second, plain)


def test_the_guides_program_runs(model_folder: str) -> None:
    """`model_folder` makes the model first, which would take its time from the program's."""
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "foreign.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    cold, warm = [int(line.split()[0]) for line in done.stdout.splitlines() if line.endswith("tokens were loaded")]
    assert cold == 0
    assert warm > 100


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    return {model: embedded_trace(model, "trace_connector:HmaRecorder") for model in TRACES}


@pytest.mark.parametrize(("model", "scenario"), CASES)
def test_a_vllm_connector_hears_what_it_hears_in_vllm(traces, model: str, scenario: str) -> None:
    assert traces[model][scenario] == expected(model, scenario)


def test_record_of_a_foreign_connector() -> None:
    record = KVConnectorFactory.resolve(KVTransferConfig(kv_connector=EXAMPLE, kv_role="kv_both"))
    assert issubclass(record.connector_class, KVConnectorBase_V1)
    assert record.connector_class is adapt(ExampleConnector)
    assert record.module == ExampleConnector.__module__
    assert Path(str(record.file)).name == "example_connector.py"
    assert record.version == "0.32.0"
    assert not record.capabilities.supports_hma


@pytest.mark.parametrize(
    ("name", "words"),
    [("Abstract", "does not implement: .*wait_for_save"), ("TwoArguments", "neither kv_cache_config")],
)
def test_a_foreign_class_that_cannot_be_built_is_refused(name: str, words: str) -> None:
    transfer = KVTransferConfig(kv_connector=f"{__name__}:{name}", kv_role="kv_both")
    with pytest.raises(ConnectorNotFound, match=words):
        KVConnectorFactory.get_connector_class(transfer)


class Abstract(vllm_base.KVConnectorBase_V1):
    pass


class TwoArguments(ExampleConnector):
    def __init__(self, vllm_config: Any, role: Any) -> None:
        raise NotImplementedError


class Looking(ExampleConnector, vllm_base.SupportsHMA):
    """Keeps what it is given."""

    seen: list[Any] = []  # noqa: RUF012

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        Looking.seen.append(self)

    def on_new_request(self, request: Any) -> None:
        self.request, self.first_status = request, request.status

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        assert request is self.request
        self.last_status = request.status
        return False, None

    def take_events(self) -> list[Any]:
        return [vllm_events.BlockRemoved([b"1"], "CPU", 0), object()]


def test_types_are_vllms(tmp_path) -> None:
    transfer = {
        "kv_connector": f"{__name__}:Looking",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with LLM(StubModel(), num_kv_blocks=9, max_model_len=64, kv_transfer_config=transfer) as llm:
        assert isinstance(llm.connector, SupportsHMA)
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0))
        worker, scheduler = Looking.seen
        assert (worker.role, scheduler.role) == (vllm_base.KVConnectorRole.WORKER, vllm_base.KVConnectorRole.SCHEDULER)
        assert scheduler.first_status is RequestStatus.WAITING
        assert scheduler.last_status is RequestStatus.FINISHED_LENGTH_CAPPED
        assert scheduler.request._all_token_ids[:3] == [1, 2, 3]
        config = scheduler._vllm_config
        assert (config.cache_config.block_size, config.cache_config.num_gpu_blocks) == (16, 9)
        assert config.model_config.get_num_layers(config.parallel_config) == 2
        assert (config.model_config.max_model_len, config.scheduler_config.max_num_seqs) == (64, 64)
        with pytest.raises(AttributeError, match=r"vllm_config.model_config.hf_text_config is not offered by kvferry"):
            _ = config.model_config.hf_text_config
        assert llm.connector.take_events() == [kv_events.BlockRemoved([b"1"], "CPU", 0)]
        assert llm.counters.hook_errors == llm.counters.contract_errors == {}


def test_kv_cache_config_is_vllms() -> None:
    import torch

    own = SlidingWindowSpec(block_size=8, num_kv_heads=3, head_size=4, dtype=torch.float16, sliding_window=5)
    shown = show_kv_cache_config(make_kv_cache_config(7, {"a": own, "b": own}))
    spec = shown.kv_cache_groups[0].kv_cache_spec
    assert isinstance(spec, vllm_kv.SlidingWindowSpec)
    assert (spec.sliding_window, spec.page_size_bytes) == (5, 8 * 3 * 8 * 2)
    assert shown.num_blocks == 7
    assert shown.transfer_group_index_by_layer == {"a": 0, "b": 0}
    assert shown.kv_cache_tensors[0].layer_stride == spec.page_size_bytes


def test_a_request_has_one_view() -> None:
    connector = object.__new__(adapt(ExampleConnector))
    connector._requests = WeakKeyDictionary()
    request = Request("r", [1, 2], SamplingParams(), block_size=16)
    view = connector.show_request(request)
    view.note = "mine"
    assert connector.show_request(request) is view
    assert not hasattr(request, "note")
    assert view.num_tokens == 2
