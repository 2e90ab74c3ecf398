"""`kvferry doctor`: what it says must be what an engine then does, and it may touch nothing."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvferry import LLM
from kvferry.cli import diagnosis as diagnosis_module
from kvferry.cli.diagnosis import Diagnosis, diagnose
from kvferry.cli.main import app
from kvferry.config import transfer_config
from kvferry.contract import KVConnectorBase_V1
from kvferry.engine.config import EngineOptions
from kvferry.errors import ConfigError
from kvferry.kv.space import Space
from kvferry.testing.stub_model import StubModel

TOKEN_BYTES = 2 * 2 * (4 + 4) * 4
"""Of the stub: 2 layers, 2 heads, 4 + 4 elements of 4 bytes."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 256, "dtype": "bfloat16",
}  # fmt: skip


class WantsLayout(KVConnectorBase_V1):
    """Insists on vLLM's HND."""

    supports_v2_model_runner = True

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...
    def wait_for_save(self) -> None: ...
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]: ...
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...
    def build_connector_meta(self, scheduler_output: Any) -> Any: ...
    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        assert vllm_config.kv_transfer_config.kv_connector == cls.__name__
        return "LBHNC"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose file of weights holds none: reading any would fail."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"{}      ")
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def offloading(**settings: Any) -> dict[str, Any]:
    settings = {"cpu_bytes_to_use": 1 << 20, "weights_version": "1", **settings}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}


def wants_layout() -> dict[str, Any]:
    return {"kv_connector": "WantsLayout", "kv_role": "kv_both", "kv_connector_module_path": __name__}


def judge(transfer: Any = None, *, windows: Any = None, size: float | None = None, **settings: Any) -> Diagnosis:
    options = EngineOptions(**{"num_kv_blocks": 9, **settings})
    return diagnose(StubModel(windows=windows), options, transfer_config(transfer, size))


def finding(diagnosis: Diagnosis, topic: str) -> Any:
    (found,) = [finding for finding in diagnosis.findings if finding.topic == topic]
    return found


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_capacities_are_those_of_the_engine_that_is_then_started(tmp_path: Path) -> None:
    tiers = [
        {"type": "fs", "path": str(tmp_path / "kv"), "max_bytes": 1 << 20, "name": "quota"},
        {"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers"},
    ]
    transfer = offloading(secondary_tiers=tiers[:1])
    diagnosis = judge(offloading(secondary_tiers=tiers))
    assert diagnosis.problems == []
    assert not (tmp_path / "kv").exists()
    chunk_bytes = 64 * TOKEN_BYTES
    assert finding(diagnosis, "capacity of device").details["tokens"] == 8 * 16
    assert finding(diagnosis, "capacity of host").details["tokens"] == (1 << 20) // chunk_bytes * 64
    assert finding(diagnosis, "capacity of BlockingTier").value == "not known"
    on_disk = finding(diagnosis, "capacity of quota").details["tokens"]
    assert 0 < on_disk < (1 << 20) // chunk_bytes * 64  # headers and books count too
    with LLM(StubModel(), num_kv_blocks=9, kv_transfer_config=transfer) as llm:
        store: Any = llm.connector.side.store  # type: ignore[union-attr]
        assert store.stats().num_slots * 64 == finding(diagnosis, "capacity of host").details["tokens"]
        assert llm.config.cache_config.num_gpu_blocks == 9


def test_the_disk_takes_as_many_chunks_as_were_told(tmp_path: Path) -> None:
    quota_bytes, chunk_bytes = 300_000, 64 * TOKEN_BYTES
    tier = {"type": "fs", "path": str(tmp_path / "kv"), "max_bytes": quota_bytes}
    told = finding(judge(offloading(secondary_tiers=[tier])), "capacity of fs").details["tokens"] // 64
    with LLM(StubModel(), num_kv_blocks=80, kv_transfer_config=offloading(secondary_tiers=[tier])) as llm:
        for i in range(2 * quota_bytes // chunk_bytes // 16 + 1):
            llm.generate([(i * 17 + j * 7) % 1000 for j in range(1030)])
    assert len(list((tmp_path / "kv").rglob("*.kv"))) == told


def test_decisions_and_their_reasons() -> None:
    diagnosis = judge(size=0.001, transfer={"kv_connector_extra_config": {"weights_version": "1"}})
    connector = finding(diagnosis, "connector")
    assert connector.value == "kvferry.offloading.connector:OffloadingConnector"
    assert connector.details["file"].endswith("kvferry/offloading/connector.py")
    assert connector.details["supports_hma"] is True
    assert finding(diagnosis, "model runner").value == "V1"
    assert "StubModel is not on the list" in finding(diagnosis, "model runner").reason
    assert finding(judge(use_v2_model_runner=True), "model runner").value == "V2"
    assert "not needed" in finding(diagnosis, "hybrid KV cache").reason
    assert finding(judge(offloading(), windows=(None, 32)), "hybrid KV cache").value == "on"
    assert finding(judge(), "connector").value == "none"
    assert finding(judge(), "KV layout").value == "BLNHC"
    obeyed = judge(wants_layout())
    assert finding(obeyed, "KV layout").value == "LBHNC"
    assert "WantsLayout requires LBHNC" in finding(obeyed, "KV layout").reason
    assert obeyed.problems == []
    kernel = finding(judge(use_v2_model_runner=True, block_size=128), "kernel blocks")
    assert kernel.value == "4 to a block"
    assert "32 tokens" in kernel.reason


def test_groups_are_told_as_the_engine_makes_them() -> None:
    windows = (None, 32, 32)
    diagnosis = judge(offloading(), windows=windows, num_kv_blocks=200, max_model_len=512, max_num_batched_tokens=64)
    assert [finding(diagnosis, f"KV group {i}").details["kind"] for i in range(3)] == ["full"] + ["sliding_window"] * 2
    assert [finding(diagnosis, f"KV group {i}").details["window_tokens"] for i in range(3)] == [None, 32, 32]
    # 512 tokens are 32 blocks; 31 tokens before a step of 64 touch 7 blocks at the worst place.
    assert [finding(diagnosis, f"KV group {i}").details["blocks_per_request"] for i in range(3)] == [32, 7, 7]
    assert "at most 7 blocks" in finding(diagnosis, "KV group 1").reason
    assert finding(diagnosis, "capacity of device").details["tokens"] == 199 // 3 * 16
    options = {"num_kv_blocks": 200, "max_model_len": 512, "max_num_batched_tokens": 64}
    with LLM(StubModel(windows=windows), kv_transfer_config=offloading(), **options) as llm:
        told = [finding(diagnosis, f"KV group {i}").details["layers"] for i in range(3)]
        assert told == [group.layer_names for group in llm.kv_cache_config.kv_cache_groups]
    assert finding(judge(windows=(64, 64)), "KV group 0").details["window_tokens"] == 64
    assert finding(judge(), "KV group 0").value == "2 layers, full attention"


def test_what_costs_or_fails_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tier = {"type": "fs", "path": str(tmp_path / "file")}
    for diagnosis, words in (
        (judge(offloading(cpu_bytes_to_use=1 << 50)), ["no room", "lower cpu_bytes_to_use", "--shm-size"]),
        (judge(offloading(arena_dir=str(tmp_path / "file"))), ["arena", "set arena_dir"]),
        (judge(offloading(secondary_tiers=[tier])), ["secondary_tiers[0].path", "no writable folder"]),
        (judge(offloading(secondary_tiers=[tier | {"path": str(tmp_path), "max_bytes": 1 << 60}])), ["lower it"]),
    ):
        (problem,) = diagnosis.problems
        assert all(word in problem for word in words), problem
    layout, hybrid = sorted(judge(wants_layout(), windows=(None, 32), kv_cache_layout="NHD").problems)
    assert all(word in layout for word in ("WantsLayout", "LBHNC", "LBNHC", "leave that out")), layout
    assert all(word in hybrid for word in ("WantsLayout", "times as much")), hybrid


def test_parts_of_a_composite_are_judged_one_by_one() -> None:
    composite = {**wants_layout(), "kv_connector_extra_config": {"connectors": [offloading(), wants_layout()]}}
    diagnosis = judge(composite, kv_cache_layout="BLNHC")
    topics = [found.topic for found in diagnosis.findings]
    assert topics[:3] == ["connector", "connector[0]", "connector[1]"]
    assert finding(diagnosis, "capacity of host of connector[0]").details["tokens"] == (1 << 20) // TOKEN_BYTES
    assert sum("requires the KV layout" in problem for problem in diagnosis.problems) == 1


@pytest.mark.parametrize(
    "extra", [{"cpu_byte": 1}, {"chunk_tokens": 40}, {"secondary_tiers": [{"type": "fs", "path": "x", "max_bytes": 1}]},
              {"secondary_tiers": [{"type": "fs", "path": n} for n in "ab"]}], ids=str
)  # fmt: skip
def test_settings_wrong_on_any_machine_are_errors(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        judge(offloading(**extra))


def test_the_command_reads_a_configuration_and_no_weights(folder: Path) -> None:
    result = run("--model", str(folder), "--kv-offloading-size", "0.5", "--num-kv-blocks", "20", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    tokens = {found["topic"]: found["details"].get("tokens") for found in report["findings"]}
    chunk_bytes = 64 * 3 * 2 * (8 + 8) * 2  # 3 layers, 2 heads of 8 for K and V, bfloat16
    assert tokens["capacity of device"] == 19 * 16
    assert tokens["capacity of host"] == (1 << 29) // chunk_bytes * 64
    assert report["problems"] == []
    assert report["environment"]["torch"] == torch.__version__
    text = run("--model", str(folder), "--kv-offloading-size", "0.5")
    assert text.exit_code == 0
    for words in ("OffloadingConnector", "hybrid KV cache: off", "model runner: V1", "KV layout: BLNHC", "no problems"):
        assert words in text.stdout
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_parts_that_fit_one_by_one_but_not_together(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(free_bytes=5 << 20, total_bytes=64 << 20, is_writable=True)
    monkeypatch.setattr("kvferry.offloading.capacity.space_at", lambda folder: space)
    monkeypatch.setattr(diagnosis_module, "space_at", lambda folder: space)
    parts = [offloading(cpu_bytes_to_use=2 << 20)] * 2
    multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": parts}}
    problems = judge(multi).problems
    assert len(problems) == 1, problems
    problem = problems[0]
    assert all(word in problem for word in ("together", "host of connector[0]", "host of connector[1]", "arena_dir"))
    assert judge(offloading(cpu_bytes_to_use=2 << 20)).problems == []


OF_SERVERS = {
    "--host": "where serve listens; of doctor it says whose start is judged", "--port": "as --host",
    "--served-model-name": "a name for clients", "--enable-prefix-caching": "changes no need", "--seed": "as that",
    "--kv-events-config": "its endpoints are bound at the start alone", "--explain-requests": "changes no need",
    "--num-threads": "changes no need", "--max-queued-requests": "HTTP", "--max-body-bytes": "HTTP",
    "--max-stops": "a limit of requests", "--api-key": "HTTP", "--allowed-origins": "HTTP", "--allowed-hosts": "HTTP",
    "--max-connections": "HTTP", "--header-timeout-s": "HTTP", "--body-timeout-s": "HTTP",
    "--access-log": "HTTP", "--log-interval-s": "HTTP", "--drain-timeout-s": "HTTP",
}  # fmt: skip
"""Options of `kvferry serve` that doctor has no use for, and why."""


def test_doctor_has_every_option_of_serve_that_a_start_depends_on() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {text for parameter in commands[name].params for text in parameter.opts if text.startswith("--")}
        for name in ("serve", "doctor")
    }
    assert options["serve"] - options["doctor"] == set(OF_SERVERS) - {"--host"}


def test_hidden_states_for_nobody_are_refused_as_the_server_refuses_them(folder: Path) -> None:
    result = run("--model", str(folder), "--hidden-state-layer", "1")
    assert isinstance(result.exception, ConfigError)
    assert "hidden_state_layers is set but there is no connector" in str(result.exception)


def test_exit_status(folder: Path) -> None:
    result = run("--model", str(folder), "--kv-offloading-size", "500000")
    assert result.exit_code == 1
    assert "problem: no room for the host arena" in result.stdout
    for wrong in (("--block-size", "0"), ("--kv-transfer-config", "{"), ("--device", "tpu"), ("--model", "nothing")):
        result = run("--model", str(folder), *wrong)
        assert isinstance(result.exception, ConfigError), wrong  # `main` makes it exit status 2


def test_little_shared_memory_is_what_the_engine_runs_into(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(free_bytes=2 << 20, total_bytes=64 << 20, is_writable=True)
    monkeypatch.setattr("kvferry.offloading.capacity.space_at", lambda folder: space)
    monkeypatch.setattr("kvferry.kv.segment.space_at", lambda folder: space)
    (problem,) = judge(offloading()).problems
    with pytest.raises(ConfigError) as caught:
        LLM(StubModel(), num_kv_blocks=9, kv_transfer_config=offloading())
    assert str(caught.value) == problem


@pytest.fixture
def set_free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes every folder has free, as doctor and start see it."""

    def set_(free_bytes: int) -> None:
        space = Space(free_bytes, total_bytes=64 << 20, is_writable=True)
        for module in ("kv.segment", "p2p.transports.shm", "offloading.capacity", "cli.diagnosis"):
            monkeypatch.setattr(f"kvferry.{module}.space_at", lambda folder: space)

    return set_


@pytest.mark.parametrize("settings", [{"transport": "shm"}, {"transport": "shm", "shm_dir": "/tmp"}, {}], ids=str)
def test_a_shared_kv_pool_that_does_not_fit(
    settings: dict[str, Any], set_free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)  # cannot be imported, wherever the test runs
    transfer = {
        "kv_connector": "P2PConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"weights_version": "1", **settings},
    }
    assert judge(transfer, num_kv_blocks=32).problems == []
    set_free(32 * 16 * TOKEN_BYTES)  # the pool's header is on top
    (problem,) = judge(transfer, num_kv_blocks=32).problems
    assert all(word in problem for word in ("shared KV pool", "65536 bytes are free", "shm_dir", "--shm-size"))
    with pytest.raises(ConfigError) as caught:
        LLM(StubModel(), num_kv_blocks=32, kv_transfer_config=transfer)
    assert problem[problem.index("no room") :] in str(caught.value)


def test_a_shared_kv_pool_and_an_arena_that_do_not_fit_together(set_free: Callable[[int], None]) -> None:
    """The pool takes 3,072,000 bytes and the arena, rounded, 2 MiB and more: each alone fits in 4,000,000."""
    parts = [
        {"kv_connector": "P2PConnector", "kv_connector_extra_config": {"weights_version": "1", "transport": "shm"}},
        offloading(cpu_bytes_to_use=20_000),
    ]
    multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": parts}}
    set_free(4_000_000)
    (problem,) = judge(multi, num_kv_blocks=1500).problems
    assert all(word in problem for word in ("the KV memory of P2PConnector", "host of connector[1]", "together"))
    set_free(6_000_000)
    assert judge(multi, num_kv_blocks=1500).problems == []
