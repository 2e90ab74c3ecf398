"""What users get wrong, as they meet it: an error before any work starts, naming key, value and remedy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.settings_tables import (
    CASES,
    DOCUMENTED,
    FOR_VLLM,
    GOOD,
    arguments,
    as_shown,
    connector,
    disk,
    doctors_word,
    in_vllm,
    let_go,
    named,
    raw,
    transfer,
)
from typer.testing import CliRunner

from kvferry import LLM, SamplingParams
from kvferry.cli.main import app
from kvferry.cli.options import Host
from kvferry.errors import ConfigError
from kvferry.testing.stub_model import StubModel


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    let_go()


def own_segments() -> set[str]:
    """Shared memory that this process has mapped, with or without a name."""
    return set(re.findall(r"/kvferry-[^ /\n]*", Path("/proc/self/maps").read_text()))


@pytest.mark.parametrize(("settings", "texts"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_errors_name_key_value_and_remedy(settings: Any, texts: list[str], tmp_path: Path) -> None:
    segments, num_threads = own_segments(), threading.active_count()
    given = arguments(settings, tmp_path)
    with pytest.raises(ConfigError) as caught:
        LLM(StubModel(), **{"num_kv_blocks": 32, **given})
    for text in texts:
        assert text in str(caught.value)
    assert own_segments() <= segments, "memory was left behind"
    assert threading.active_count() == num_threads, "a thread was left behind"


@pytest.mark.parametrize(("settings", "texts"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_doctor_finds_what_ends_a_start(settings: Any, texts: list[str], tmp_path: Path) -> None:
    given = arguments(settings, tmp_path)
    files = set(tmp_path.rglob("*"))
    found = "\n".join(doctors_word(given))
    for text in texts:
        assert text in found
    assert set(tmp_path.rglob("*")) == files, "doctor has made something"


@pytest.mark.parametrize("name", ["NixlConnector", "NixlPullConnector", "NixlPushConnector", "P2PConnector"])
def test_a_transport_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)  # importing it is an ImportError, wherever the test runs
    given = named(name, weights_version="1", **({"transport": "nixl"} if name == "P2PConnector" else {}))
    with pytest.raises(ConfigError) as caught:
        LLM(StubModel(), num_kv_blocks=32, **given)
    for host in Host:
        (problem,) = [text for text in doctors_word(given if host is Host.EMBEDDED else in_vllm(given), host)
                      if "vLLM is not installed" not in text]  # fmt: skip
        for text in (problem, str(caught.value)):
            assert "NIXL transport cannot be used" in text
            assert "pip install" in text
            assert "'kvferry[" not in text


@pytest.mark.parametrize(("settings", "texts"), [c[1:] for c in FOR_VLLM], ids=[c[0] for c in FOR_VLLM])
def test_doctor_judges_the_same_settings_for_vllm(
    settings: Any, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    given = in_vllm(arguments(settings, tmp_path))
    if "hidden states" in request.node.name:
        return_value = doctors_word(given, Host.VLLM)  # vLLM's speculative_config says which, and doctor has none
        assert all("vLLM is not installed" in text for text in return_value)
        return
    found = "\n".join(doctors_word(given, Host.VLLM))
    for text in texts:
        assert text in found


def alarms(given: dict[str, Any], host: Host = Host.EMBEDDED) -> list[str]:
    """What doctor says, that vLLM is not installed here apart."""
    return [text for text in doctors_word(given, host) if "vLLM is not installed" not in text]


@pytest.mark.parametrize(("name", "settings"), GOOD, ids=[name for name, _ in GOOD])
def test_doctor_has_nothing_against_settings_that_start(name: str, settings: Any, tmp_path: Path) -> None:
    given = arguments(settings, tmp_path)
    assert alarms(given) == alarms(in_vllm(given), Host.VLLM) == []
    LLM(StubModel(), num_kv_blocks=32, **given).shutdown()


@pytest.mark.parametrize(("name", "text"), DOCUMENTED, ids=[name for name, _ in DOCUMENTED])
def test_documented_configurations_start(name: str, text: str, tmp_path: Path) -> None:
    given = as_shown(text, tmp_path)
    if "vllm.distributed" in text:  # a connector of vLLM's, which the embedded engine has where vLLM is installed
        assert any("no module 'vllm'" in word for word in doctors_word(given)) == (find_spec("vllm") is None)
        return
    assert alarms(given) == alarms(in_vllm(given), Host.VLLM) == []
    LLM(StubModel(), num_kv_blocks=32, **given).shutdown()


def test_the_documents_are_read() -> None:
    assert len(DOCUMENTED) >= 10


def test_what_vllm_alone_refuses() -> None:
    for given, word in (
        (transfer(kv_connector="kvferry.vllm:OffloadingConnector"), "kv_connector_module_path"),
        (transfer(on_shadow="error", kv_connector_module_path="kvferry.vllm"), "on_shadow"),
        (transfer(kv_connector="Plain", kv_connector_module_path="kvferry.testing.recorder"), "Plain"),
    ):
        assert any(word in text for text in doctors_word(raw(given), Host.VLLM)), given


@pytest.mark.parametrize("fields", [
    {"kv_connector": "FerryOffloadingConnector"}, {"kv_connector_module_path": "kvferry.vllm"},
    {"kv_connector": "FerryMultiConnector", "kv_connector_extra_config": {"connectors": [transfer()]}},
    {"kv_connector": "FerryMultiConnectorNoHMA", "kv_connector_module_path": "kvferry.vllm",
     "kv_connector_extra_config": {"connectors": [transfer(kv_connector_module_path="kvferry.vllm")]}},
], ids=str)  # fmt: skip
def test_a_configuration_written_for_vllm_starts_the_embedded_engine(fields: dict[str, Any]) -> None:
    given = connector(**fields)
    assert doctors_word(given) == []
    assert [text for text in doctors_word(given, Host.VLLM) if "vLLM is not installed" not in text] == []
    with LLM(StubModel(), num_kv_blocks=32, **given) as llm:
        tokens = list(range(100))
        greedy = SamplingParams(max_tokens=2, temperature=0)
        llm.generate(tokens, greedy)
        llm.reset_prefix_cache()
        assert llm.generate(tokens, greedy)[0].num_external_tokens == 64


SERVE_CASES: list[tuple[list[str], list[str]]] = [
    (["--kv-transfer-config", '{"kv_connector"'], ["kv_transfer_config", "not valid JSON"]),
    (["--kv-transfer-config", '{"kv_conector": "X"}'], ["kv_transfer_config.kv_conector", "'kv_connector'"]),
    (["--kv-offloading-size", "0"], ["kv_offloading_size=0.0", "above 0"]),
    (["--kv-offloading-size", "nan"], ["kv_offloading_size=nan", "above 0"]),
    (["--kv-offloading-size", "1", "--kv-offloading-backend", "disk"], ["kv_offloading_backend='disk'", "native"]),
    (["--kv-offloading-backend", "native"], ["kv_offloading_backend='native' needs kv_offloading_size"]),
    (
        ["--kv-offloading-size", "1", "--kv-transfer-config", '{"kv_connector": "A", "kv_role": "kv_both"}'],
        ["kv_transfer_config.kv_connector='A'", "kv_offloading_size=1.0"],
    ),
    (["--port", "-1"], ["port=-1 must be a number of at least 0"]),
    (["--port", "70000"], ["port=70000"]),
    (["--host", "no.such.host.invalid"], ["host='no.such.host.invalid'"]),
    (["--max-queued-requests", "-1"], ["max_queued_requests=-1"]),
    (["--max-body-bytes", "0"], ["max_body_bytes=0"]),
    (["--drain-timeout-s", "inf"], ["drain_timeout_s=inf"]),
    (["--port", "0", "--block-size", "0"], ["block_size=0"]),
    (["--port", "0", "--device", "tpu"], ["device='tpu'"]),
    (["--port", "0"], ["model='no-such-model'", "give a model folder"]),
]


@pytest.mark.parametrize(("arguments", "texts"), SERVE_CASES, ids=[" ".join(c[0])[:60] for c in SERVE_CASES])
def test_wrong_options_of_the_server_are_errors_before_a_model_is_loaded(arguments, texts):
    result = CliRunner().invoke(app, ["serve", "no-such-model", *arguments])
    assert isinstance(result.exception, ConfigError), result
    for text in texts:
        assert text in str(result.exception)


def test_the_table_is_long_enough() -> None:
    assert len(CASES) + len(SERVE_CASES) >= 40
    assert len({name for name, _, _ in CASES}) == len(CASES)


def test_a_folder_in_use_names_the_holder_and_is_free_after_its_end(tmp_path: Path) -> None:
    config = transfer(disk(path=str(tmp_path / "kv")))
    with LLM(StubModel(), num_kv_blocks=32, kv_transfer_config=config) as llm:
        llm.generate(list(range(100)), SamplingParams(max_tokens=2, temperature=0))
        code = (
            "from kvferry import LLM\nfrom kvferry.testing.stub_model import StubModel\n"
            f"LLM(StubModel(), num_kv_blocks=32, kv_transfer_config={config!r})"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert f"{os.getpid()}" in other.stderr
        assert "ConfigError" in other.stderr
    with LLM(StubModel(), num_kv_blocks=32, kv_transfer_config=config) as llm:
        output = llm.generate(list(range(100)), SamplingParams(max_tokens=2, temperature=0))[0]
        assert output.num_external_tokens == 64


def test_a_full_disk_costs_the_store_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transfer(disk(path=str(tmp_path / "kv")))
    tokens = list(range(300))

    def refuse(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with LLM(StubModel(), num_kv_blocks=64, kv_transfer_config=config) as llm:
        monkeypatch.setattr(os, "pwritev", refuse)
        monkeypatch.setattr(os, "writev", refuse)
        monkeypatch.setattr(os, "write", refuse)
        first = llm.generate(tokens, SamplingParams(max_tokens=4, temperature=0))[0]
        assert first.outputs[0].token_ids == StubModel().expected_tokens(tokens, 4)
        assert llm.reset_prefix_cache()
        assert llm.generate(tokens, SamplingParams(max_tokens=4, temperature=0))[0].num_external_tokens == 256
    monkeypatch.undo()  # after the end: a write that was still queued would find the disk mended
    assert list((tmp_path / "kv").rglob("*.kv")) == []
