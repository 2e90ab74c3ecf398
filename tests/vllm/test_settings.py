"""Settings in real vLLM: what `kvferry doctor --host vllm` refuses ends the start, and what it takes starts.

Each case runs vLLM's own parsers, its engine configuration, its factory, and the calls of a start up to where both
sides of the connector have their memory, folders and ports: without the engine around them, which takes 15 s. A few
cases start a whole engine, which shows that its start makes these calls and passes their errors on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_process import HERE, vllm_environment
from tests.settings_tables import DOCUMENTED, FOR_VLLM, GOOD, arguments, as_shown, doctors_word, in_vllm, let_go
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from kvferry.cli.options import Host
from kvferry.errors import KVFerryError
from kvferry.vllm import plugin

NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE = 32, 16, 2, 32
LAYER_BYTES = NUM_BLOCKS * NUM_HEADS * BLOCK_SIZE * 2 * HEAD_SIZE * 4
LAYERS = ["layer0", "layer1", "layer2"]
STRICTER = {
    "port true": "vLLM reads it as 1, and no connector of kvferry's reads kv_port",
    "port below": "vLLM sets no limits, and no connector of kvferry's reads kv_port",
    "port above": "as that",
    "flag as text": "vLLM reads 'no' as False, and no connector of kvferry's reads enable_permute_local_kv",
}
"""Cases that doctor refuses, as the embedded engine does, though vLLM starts with them."""
UNSEEN = {"hidden states": "vLLM's speculative_config says which, and doctor has no such option"}
"""Cases that end vLLM's start for a setting that doctor is not given."""
WHOLE = ("unknown setting", "path is a file", "no such form")
"""Cases that start an engine: refused by a constructor, when the folder is opened, and when the class is looked up."""


@pytest.fixture(autouse=True)
def _let_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    plugin.register()
    yield
    let_go()


def start(model: str, given: dict[str, Any], **options: Any) -> None:
    """Start both sides of the connector as vLLM's engine core and its only worker do, and shut them down."""
    config = EngineArgs(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        block_size=BLOCK_SIZE,
        kv_transfer_config=KVTransferConfig(**given["kv_transfer_config"]),
        **options,
    ).create_engine_config()
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=NUM_HEADS, head_size=HEAD_SIZE, dtype=torch.float32)
    caches = KVCacheConfig(NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(LAYERS, spec)])
    made: list[Any] = []
    try:
        made.append(worker := KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, caches))
        with worker.get_mem_pool_context() or nullcontext():
            memory = torch.zeros(len(LAYERS) * LAYER_BYTES, dtype=torch.int8)  # as vLLM allocates it
        layers = memory.view(torch.float32).view(len(LAYERS), NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        worker.register_kv_caches(dict(zip(LAYERS, layers, strict=True)))
        made.append(scheduler := KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, caches))
        handshake = worker.get_handshake_metadata()
        if handshake is not None:
            scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): handshake})
    finally:
        for connector in reversed(made):
            connector.shutdown()


def refusal(call: Callable[[], None]) -> BaseException | None:
    """What it raises, if anything."""
    try:
        call()
    except Exception as error:
        return error
    return None


def words(error: BaseException | None) -> str:
    """Of an error and of what it came from, as a traceback shows them."""
    return "" if error is None else f"{error}\n{words(error.__cause__ or error.__context__)}"


@pytest.mark.parametrize(("name", "settings", "texts"), FOR_VLLM, ids=[case[0] for case in FOR_VLLM])
def test_doctor_and_start_agree(name: str, settings: Any, texts: list[str], tiny_llama: str, tmp_path: Path) -> None:
    """What kvferry refuses says the same in both; what vLLM's own parsers refuse, they say in their words."""
    given = in_vllm(arguments(settings, tmp_path))
    by_doctor = doctors_word(given, Host.VLLM)
    by_start = refusal(lambda: start(tiny_llama, given))
    assert bool(by_doctor) == (name not in UNSEEN), by_doctor
    assert (by_start is not None) == (name not in STRICTER), by_start
    if isinstance(by_start, KVFerryError):
        for text in texts:
            assert text in words(by_start)


@pytest.mark.parametrize(("name", "settings"), GOOD, ids=[name for name, _ in GOOD])
def test_settings_that_are_right(name: str, settings: Any, tiny_llama: str, tmp_path: Path) -> None:
    given = in_vllm(arguments(settings, tmp_path))
    assert doctors_word(given, Host.VLLM) == []
    start(tiny_llama, given)


@pytest.mark.parametrize(("name", "text"), DOCUMENTED, ids=[name for name, _ in DOCUMENTED])
def test_documented_configurations(name: str, text: str, tiny_llama: str, tmp_path: Path) -> None:
    given = in_vllm(as_shown(text, tmp_path))
    assert doctors_word(given, Host.VLLM) == []
    start(tiny_llama, given)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_engine_ends_with_the_same_words(name: str, tiny_llama: str, tmp_path: Path) -> None:
    (settings, texts) = next(case[1:] for case in FOR_VLLM if case[0] == name)
    given = in_vllm(arguments(settings, tmp_path))
    llm = {"model": tiny_llama, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, **given}
    done = subprocess.run(
        [sys.executable, str(HERE / "one_shot.py"), json.dumps({"llm": llm, "orders": []})],
        capture_output=True,
        text=True,
        env=vllm_environment(),
        check=False,
    )
    assert done.returncode != 0
    for text in texts:
        assert text in done.stdout + done.stderr
