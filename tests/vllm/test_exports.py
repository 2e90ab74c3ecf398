"""What kvferry.vllm offers: connectors by name, MultiConnector with children of any origin, the plugin."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from one_shot import ANSWERS, MAX_TOKENS, PROMPT
from vllm.config import KVTransferConfig
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

import kvferry.vllm
from kvferry.errors import ConfigError, HostError
from kvferry.vllm import compat, plugin

HERE = Path(__file__).parent
SRC = HERE.parents[1] / "src"
MULTI = "FerryMultiConnector"
SUPPORTS_HMA = {
    "OffloadingConnector": True,
    "LoadRecoveryExampleConnector": False,
    "ExampleConnector": False,
    "DecodeBenchConnector": True,
    "ExampleHiddenStatesConnector": True,
    "LMCacheMPConnector": False,
    "LMCacheMPConnectorUpstream": False,
    "NixlConnector": True,
    "NixlPullConnector": True,
    "NixlPushConnector": True,
    "P2PConnector": True,
    "MultiConnector": True,
    "FerryMultiConnector": True,
    "FerryMultiConnectorNoHMA": False,
}


def run_python(code: str, *argv: str, path: str = "", **env: str) -> str:
    paths = os.pathsep.join(filter(None, [path, str(SRC)]))
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "VLLM_LOGGING_LEVEL": "ERROR", **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def offloading(**extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28, "weights_version": "v", **extra},
    }


def example(folder: Path) -> dict[str, Any]:
    """vLLM's own connector of that name."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_connector_module_path": ExampleConnector.__module__,
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def multi(*children: dict[str, Any], name: str = MULTI, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": name,
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(children), **extra},
    }


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SUPPORTS_HMA))
def test_vllms_factory_takes_every_export(name: str) -> None:
    config = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_module_path="kvferry.vllm")
    found = KVConnectorFactory.get_connector_class(config)
    assert found is getattr(kvferry.vllm, name)
    assert issubclass(found, vllm_base.KVConnectorBase_V1)
    assert vllm_base.supports_hma(found) == SUPPORTS_HMA[name]
    assert not inspect.isabstract(found)


def test_the_table_of_exports_is_the_one_tested_here() -> None:
    assert set(kvferry.vllm.CONNECTOR_NAMES) == set(SUPPORTS_HMA)
    with pytest.raises(AttributeError, match="did you mean 'OffloadingConnector'"):
        _ = kvferry.vllm.OfloadingConnector


@pytest.mark.parametrize(
    ("name", "loaded"),
    [("LoadRecoveryExampleConnector", ["kvferry.examples.load_recovery"]), (MULTI, [])],
)
def test_naming_one_connector_imports_no_other(name: str, loaded: list[str]) -> None:
    code = (
        f"import sys, kvferry.vllm; kvferry.vllm.{name}; "
        "print(*sorted(m for m in sys.modules if m.startswith(tuple(f'kvferry.{home}.' for home in "
        "('examples', 'lmcache', 'offloading', 'p2p')))))"
    )
    assert run_python(code).splitlines()[-1:] == ([" ".join(loaded)] if loaded else [])


# ---- vLLM's own decisions and construction ------------------------------------------------------------------------


@pytest.fixture
def engine_config(model_folder: str) -> Callable[..., Any]:
    def build(transfer: dict[str, Any], **args: Any) -> Any:
        return EngineArgs(
            model=model_folder,
            max_model_len=256,
            block_size=32,
            kv_transfer_config=KVTransferConfig(**transfer),
            **args,
        ).create_engine_config()

    return build


def caches() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.float32)
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])


ROLES = [vllm_base.KVConnectorRole.WORKER, vllm_base.KVConnectorRole.SCHEDULER]


@pytest.mark.parametrize("role", ROLES)
def test_children_are_built_with_vllms_configuration(engine_config: Callable[..., Any], role: Any) -> None:
    config = engine_config(multi(offloading(), {**offloading(), "engine_id": "mine"}))
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager
    connector = KVConnectorFactory.create_connector(config, role, caches())
    assert [child.label for child in connector.children] == ["OffloadingConnector", "OffloadingConnector#2"]
    for child, engine_id in zip(connector.children, [config.kv_transfer_config.engine_id, "mine"], strict=True):
        assert type(child.connector) is kvferry.vllm.OffloadingConnector
        transfer = child.connector._kv_transfer_config
        assert isinstance(transfer, KVTransferConfig)
        assert (transfer.kv_role, transfer.engine_id) == ("kv_both", engine_id)
        assert child.connector._vllm_config.model_config is config.model_config
        assert child.connector.role is role
    connector.shutdown()


@pytest.mark.parametrize("role", ROLES)
def test_multi_without_hma_takes_vllms_own_children(
    engine_config: Callable[..., Any], tmp_path: Path, role: Any
) -> None:
    config = engine_config(multi(example(tmp_path), offloading(), name="FerryMultiConnectorNoHMA"))
    assert config.scheduler_config.disable_hybrid_kv_cache_manager
    connector = KVConnectorFactory.create_connector(config, role, caches())
    assert [type(child.connector) for child in connector.children] == [
        ExampleConnector,
        kvferry.vllm.OffloadingConnector,
    ]
    connector.shutdown()


def test_a_child_without_hma_switches_hybrid_kv_caches_off(engine_config: Callable[..., Any], tmp_path: Path) -> None:
    """As vLLM does for its own MultiConnector; whoever insists on them gets an error, from vLLM or from us."""
    transfer = multi(offloading(), example(tmp_path))
    for settings in ({}, {"disable_hybrid_kv_cache_manager": True}):
        config = engine_config(transfer, **settings)
        assert config.scheduler_config.disable_hybrid_kv_cache_manager
        KVConnectorFactory.create_connector(config, ROLES[0], caches()).shutdown()
    config = engine_config(transfer, disable_hybrid_kv_cache_manager=False)
    with pytest.raises(ValueError, match="FerryMultiConnector"):
        KVConnectorFactory.create_connector(config, ROLES[0], caches())
    with pytest.raises(ConfigError, match=r"connectors\[1\] \(ExampleConnector\).*FerryMultiConnectorNoHMA"):
        kvferry.vllm.FerryMultiConnector(config, ROLES[0], caches())


def test_nested_children_count(engine_config: Callable[..., Any]) -> None:
    inner = multi(offloading(), name="FerryMultiConnectorNoHMA")
    for transfer, disables in ((multi(inner), True), (multi(multi(offloading())), False)):
        config = engine_config(transfer)
        assert config.scheduler_config.disable_hybrid_kv_cache_manager == disables
        KVConnectorFactory.create_connector(config, ROLES[0], caches()).shutdown()


@pytest.mark.parametrize(("is_example", "disables"), [(False, False), (True, True)])
@pytest.mark.parametrize("is_explicit", [False, True])
def test_literal_name_is_judged_by_the_children(
    engine_config: Callable[..., Any], tmp_path: Path, is_example: bool, disables: bool, is_explicit: bool
) -> None:
    """Also where they inherit their role and ours is named without its module, which vLLM's own lookup would refuse."""
    more = {"kv_role": "kv_both", "kv_connector_module_path": "kvferry.vllm"} if is_explicit else {}
    ours, theirs = {**offloading(), **more}, {**example(tmp_path), "kv_role": "kv_both"}
    config = engine_config(multi(ours, theirs if is_example else ours, name="MultiConnector"))
    assert config.scheduler_config.disable_hybrid_kv_cache_manager == disables
    connector = KVConnectorFactory.create_connector(config, ROLES[0], caches())
    assert type(connector) is kvferry.vllm.MultiConnector
    assert type(connector.children[0].connector) is kvferry.vllm.OffloadingConnector
    connector.shutdown()


@pytest.mark.parametrize(
    ("child", "says"),
    [
        ({"kv_connectr": "X"}, r"connectors\[0\].kv_connectr is not a known key.*kv_connector"),
        ({"kv_connector": "Nowhere"}, r"connectors\[0\]: Nowhere: Unsupported connector type"),
        ({"kv_connector": "X", "kv_connector_module_path": "no.such"}, r"connectors\[0\]: X: No module named 'no'"),
        ({"kv_connector": "Namespace", "kv_connector_module_path": "argparse"}, "Namespace does not subclass vLLM's"),
        ({**offloading(), "kv_role": "both"}, r"connectors\[0\].kv_role='both': Input should be"),
        (offloading(cpu_bytes=1), r"connectors\[0\] \(OffloadingConnector\): .*cpu_bytes is unknown"),
    ],
)
def test_a_wrong_child_is_named_by_its_path(engine_config: Callable[..., Any], child: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KVConnectorFactory.create_connector(engine_config(multi(child)), ROLES[1], caches())


def test_an_unsupported_vllm_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.12.3")
    with pytest.raises(HostError, match=rf"vLLM 0\.12\.3; .*{compat.supported_versions()}"):
        compat.check_vllm()


# ---- the plugin ---------------------------------------------------------------------------------------------------


def test_vllm_loads_the_plugin_of_an_installed_package(tmp_path: Path) -> None:
    folder = tmp_path / "kvferry_plugin-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kvferry-plugin\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[vllm.general_plugins]\nkvferry_test = kvferry.vllm.plugin:register\n")
    code = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as factory
from kvferry.vllm.plugin import register
register()
ours = ("kvferry.examples", "kvferry.offloading", "kvferry.p2p", "kvferry.vllm.facade")
assert not [m for m in sys.modules if m.startswith(ours)]
names = sorted(name for name in factory._registry if name.startswith("Ferry"))
import kvferry.vllm
print(*names, factory.get_connector_class_by_name("FerryOffloadingConnector") is kvferry.vllm.OffloadingConnector)
"""
    ours = {f"Ferry{name}" for name in SUPPORTS_HMA if not name.endswith(("MultiConnector", "NoHMA"))}
    names = sorted(ours | {"FerryMultiConnector", "FerryMultiConnectorNoHMA"})
    last = run_python(code, path=str(tmp_path), VLLM_PLUGINS="kvferry_test").splitlines()[-1]
    assert last == " ".join([*names, "True"])


# ---- in the real engine -------------------------------------------------------------------------------------------


def one_shot(
    model_folder: str,
    transfer: dict[str, Any] | None,
    *orders: str,
    events: dict[str, Any] | None = None,
    **env: str,
) -> list[Any]:
    llm = {
        "kv_events_config": events,
        "model": model_folder,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "disable_log_stats": False,
        "kv_transfer_config": transfer,
    }
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import one_shot; one_shot.main()"
    code = f"if __name__ == '__main__':\n    {code}"
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", **env}
    lines = run_python(code, json.dumps({"llm": llm, "orders": orders}), **settings).splitlines()
    answers: list[Any] = json.loads(next(line for line in lines if line.startswith(ANSWERS)).removeprefix(ANSWERS))
    return answers


def assert_same_tokens(got: dict[str, Any], reference: dict[str, Any]) -> None:
    """Up to the first position whose top-2 gap in the reference is below 1e-4 (DESIGN)."""
    assert len(reference["token_ids"]) == MAX_TOKENS
    near = next((i for i, gap in enumerate(reference["logit_gaps"]) if gap < 1e-4), MAX_TOKENS)
    assert near > 0
    assert got["token_ids"][:near] == reference["token_ids"][:near]


def stored_by_medium(subscriber: zmq.Socket[bytes]) -> Counter[tuple[str | None, str | None]]:
    """Blocks stored, by medium and owner, in the messages that have arrived."""
    found: Counter[tuple[str | None, str | None]] = Counter()
    while subscriber.poll(1000):
        payload = subscriber.recv_multipart()[2]
        for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
            if isinstance(event, BlockStored):
                found[event.medium, event.ownership] += len(event.block_hashes)
    return found


@pytest.mark.timeout(1500)
def test_multi_of_two_offloading_connectors_in_the_engine(model_folder: str, tmp_path: Path) -> None:
    """The first child has room for little: the second is asked for the hit, from memory and, after a restart, disk."""
    big = offloading(secondary_tiers=[{"type": "fs", "path": str(tmp_path), "max_bytes": 1 << 30}])
    transfer = multi(offloading(cpu_bytes_to_use=8 << 20), big, load_policy="longest")
    endpoint = f"ipc://{tmp_path}/events"
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(endpoint)
        orders = ["generate", "reset", "generate", "written", "metrics"]
        cold, _, again, _, metrics = one_shot(model_folder, transfer, *orders, events=events)
        stored = stored_by_medium(subscriber)
    assert stored["STORAGE", "fs"] == len(PROMPT) // 64, "of the second child"
    assert stored["CPU", None] > len(PROMPT) // 64, "of both children"
    assert stored["GPU", None] > 0, "vLLM's own"
    hit = len(PROMPT) // 64 * 64
    assert (cold["external_hits"], again["external_hits"]) == (0, hit)
    assert_same_tokens(again, cold)
    row, second = "kvferry:connector_", f"{MULTI}/OffloadingConnector#2"
    assert metrics[f"{row}hit_tokens_total {second} host"] == hit
    assert metrics[f"{row}loads_total {second} host"] == hit // 64
    assert metrics[f"{row}capacity_bytes {MULTI}/OffloadingConnector host"] <= 8 << 20
    assert metrics[f"{row}dropped_stores_total {MULTI}/OffloadingConnector host"] > 0

    warm, metrics = one_shot(model_folder, transfer, "generate", "metrics")
    assert warm["external_hits"] == hit
    assert_same_tokens(warm, cold)
    assert metrics[f"{row}hit_tokens_total {second} fs"] == hit


@pytest.mark.timeout(1500)
def test_vllms_example_connector_beside_ours_in_one_process(model_folder: str, tmp_path: Path) -> None:
    """Its own child comes first and has the hit; blocks held by ours, whose reports are out, come free by steps."""
    transfer = multi(example(tmp_path), offloading(), name="FerryMultiConnectorNoHMA")
    orders = ["generate", "reset", "generate", "metrics"]
    cold, _, again, metrics = one_shot(model_folder, transfer, *orders, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert list(tmp_path.rglob("*.safetensors")), "vLLM's connector has stored nothing"
    assert again["external_hits"] == (len(PROMPT) - 1) // 32 * 32
    assert_same_tokens(again, cold)
    assert (
        metrics["kvferry:connector_stores_total FerryMultiConnectorNoHMA/OffloadingConnector host"] == len(PROMPT) // 64
    )
    assert metrics["kvferry:connector_hit_tokens_total FerryMultiConnectorNoHMA/OffloadingConnector host"] == 0


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("load_async", [False, True])
def test_dropped_blocks_are_computed_again(model_folder: str, load_async: bool) -> None:
    report_by = "positions" if load_async else "block_ids"  # positions are told to vLLM as a failed request
    transfer = {
        "kv_connector": "LoadRecoveryExampleConnector",
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "fail_block_indexes": [4],
            "load_async": load_async,
            "report_by": report_by,
        },
    }
    orders = "generate", "reset", "generate", "reset", "drawn", "reset", "drawn"
    cold, _, again, _, drawn, _, redrawn = one_shot(model_folder, transfer, *orders)
    assert again["external_hits"] > cold["external_hits"] == 0
    assert_same_tokens(again, cold)
    (plain,) = one_shot(model_folder, None, "drawn")
    assert drawn == redrawn == plain


@pytest.mark.timeout(1500)
def test_our_example_connector_hits_after_a_restart(model_folder: str, tmp_path: Path) -> None:
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path), "weights_version": "v"},
    }
    (cold,) = one_shot(model_folder, transfer, "generate")
    (warm,) = one_shot(model_folder, transfer, "generate")
    assert warm["external_hits"] == (len(PROMPT) - 1) // 32 * 32
    assert_same_tokens(warm, cold)


@pytest.mark.timeout(1500)
def test_decode_bench_leaves_only_the_last_token_to_compute(model_folder: str) -> None:
    transfer = {
        "kv_connector": "DecodeBenchConnector",
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": "kv_both",
    }
    (made_up,) = one_shot(model_folder, transfer, "generate")
    assert made_up["external_hits"] == len(PROMPT) - 1


# ---- the guide ----------------------------------------------------------------------------------------------------

GUIDE = (HERE.parents[1] / "docs" / "guides" / "vllm.md").read_text()


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", fenced("json"))
def test_configurations_of_the_guide_start(engine_config: Callable[..., Any], text: str, tmp_path: Path) -> None:
    plugin.register()
    transfer = json.loads(text.replace("/var/cache/kv", str(tmp_path)))
    config = engine_config(transfer)
    for role in ROLES:
        KVConnectorFactory.create_connector(config, role, caches()).shutdown()


@pytest.mark.timeout(1500)
def test_program_of_the_guide_runs(model_folder: str) -> None:
    (program,) = fenced("python")
    assert '"MODEL"' in program
    program = program.replace('"MODEL"', repr(model_folder))
    last = run_python(program, VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1").splitlines()
    assert any(re.fullmatch(r"1\d\d of 2\d\d tokens were loaded", line) for line in last), last[-3:]


def test_the_guide_names_versions_and_connectors() -> None:
    assert f"vLLM {compat.supported_versions().replace(' to ', ' and ')};" in GUIDE
    assert all(name in GUIDE for name in kvferry.vllm.FERRY_NAMES)
    assert all(f"`{name}" in GUIDE or f"**{name}" in GUIDE for name in kvferry.vllm.CONNECTOR_NAMES)
