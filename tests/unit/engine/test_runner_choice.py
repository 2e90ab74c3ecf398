"""Every branch of the rule that chooses the model runner, and what engines make of it."""

from __future__ import annotations

import importlib.util
import json
import logging
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from kvferry import LLM, SamplingParams
from kvferry.cli.main import app
from kvferry.config import KVTransferConfig, transfer_config, v2_runner_environment
from kvferry.contract import KVConnectorFactory
from kvferry.contract.resolver import BUILT_INS
from kvferry.engine.config import EngineOptions
from kvferry.engine.model_facts import read_model_facts
from kvferry.engine.plan import plan_engine
from kvferry.engine.runner_choice import V2_ARCHITECTURES, V2Support, choose_model_runner, v2_support
from kvferry.errors import ConfigError
from kvferry.testing.faulty import FaultyConnector
from kvferry.testing.stub_model import StubModel

KVFERRY, VLLM = "KVFERRY_USE_V2_MODEL_RUNNER", "VLLM_USE_V2_MODEL_RUNNER"
READY = V2Support(frozenset({"LlamaForCausalLM"}))


def choose(
    environment: dict[str, bool] | None = None,
    setting: bool | None = None,
    unable_connectors: tuple[str, ...] = (),
    architecture: str = "LlamaForCausalLM",
    support: V2Support = READY,
) -> Any:
    return choose_model_runner(environment or {}, setting, unable_connectors, architecture, support)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_environment_comes_first(wanted):
    choice = choose({VLLM: wanted}, unable_connectors=("Silent",), architecture="Other")
    assert (choice.use_v2, choice.reason, choice.warnings) == (wanted, f"{VLLM}={wanted}", ())


@pytest.mark.parametrize("wanted", [True, False])
def test_then_the_setting(wanted):
    choice = choose(setting=wanted, unable_connectors=("Silent",), architecture="Other")
    assert (choice.use_v2, choice.reason, choice.warnings) == (wanted, f"use_v2_model_runner={wanted}", ())


def test_a_disagreement_is_told_and_the_environment_wins():
    choice = choose({KVFERRY: True}, setting=False)
    assert choice.use_v2
    assert len(choice.warnings) == 1
    for word in ("use_v2_model_runner=False", f"{KVFERRY}=True"):
        assert word in choice.warnings[0]
    assert choose({KVFERRY: True}, setting=True).warnings == ()
    ours_first = choose({KVFERRY: False, VLLM: True})
    assert not ours_first.use_v2
    assert f"{VLLM}=True is overruled by {KVFERRY}=False" in ours_first.warnings[0]


def test_a_connector_that_does_not_declare_it_means_v1():
    choice = choose(unable_connectors=("Silent",))
    assert (choice.use_v2, choice.warnings) == (False, ())
    assert "Silent does not declare supports_v2_model_runner" in choice.reason
    assert choose().use_v2


def test_a_model_off_the_list_means_v1_without_a_warning():
    choice = choose(architecture="NewForCausalLM")
    assert (choice.use_v2, choice.warnings) == (False, ())
    assert "NewForCausalLM" in choice.reason


@pytest.mark.parametrize("setting", [None, True])
def test_what_is_missing_or_unsupported_means_v1_with_a_warning_that_lists_it(setting):
    support = V2Support(READY.architectures, missing=("Triton",), unsupported=("pipeline parallelism", "LoRA"))
    choice = choose(setting=setting, support=support)
    assert not choice.use_v2
    assert len(choice.warnings) == 1
    for word in ("Triton", "pipeline parallelism", "LoRA"):
        assert word in choice.warnings[0]
    assert choose(setting=False, support=support).warnings == ()


def test_v2_by_rule():
    choice = choose()
    assert (choice.use_v2, choice.warnings) == (True, ())
    assert "LlamaForCausalLM" in choice.reason


def test_cuda_devices_need_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert v2_support("cpu").missing == ()
    assert v2_support("cuda:0").missing == ("Triton (pip install triton)",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert v2_support("cuda:0").missing == ()


def test_the_list_by_default():
    """Each is run on both runners by tests/model/test_families.py."""
    assert v2_support("cpu").architectures == V2_ARCHITECTURES == {"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}
    assert v2_support("cpu", ()).architectures == frozenset()


@pytest.mark.parametrize(
    ("transfer", "use_v2", "because"),
    [
        (None, True, "Qwen3ForCausalLM is on the list"),
        ("OFFLOADING", True, "Qwen3ForCausalLM is on the list"),
        ("SILENT", False, "Silent does not declare supports_v2_model_runner"),
        ("MULTI", False, "Silent does not declare supports_v2_model_runner"),
    ],
)
def test_by_default_the_connector_decides_for_a_listed_model(tmp_path, transfer, use_v2, because):
    """No setting at all: the model asks for V2, a connector that does not declare it says no."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    silent = SILENT["kv_transfer_config"]
    offloading = HOST | {"kv_role": "kv_both"}
    config = {None: None, "OFFLOADING": offloading, "SILENT": silent, "MULTI": multi(HOST, silent)}[transfer]
    with LLM(tmp_path, num_kv_blocks=32, kv_transfer_config=config) as llm:
        assert llm.config.use_v2_model_runner is use_v2
        assert llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
    told = plan_engine(read_model_facts(tmp_path), EngineOptions(num_kv_blocks=32), transfer_config(config, None, None))
    assert because in told.runner.reason
    options = [] if config is None else ["--kv-transfer-config", json.dumps(config)]
    shown = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path), "--num-kv-blocks", "32", *options])
    assert f"model runner: {'V2' if use_v2 else 'V1'}" in shown.output


@pytest.mark.parametrize("name", [KVFERRY, VLLM])
def test_the_environment_is_read_strictly(name, monkeypatch):
    for text, value in (("0", False), ("1", True), ("false", False), ("true", True), ("True", True)):
        monkeypatch.setenv(name, text)
        assert v2_runner_environment() == {name: value}
    for text in ("", "yes", "2", "on", " 1"):
        monkeypatch.setenv(name, text)
        with pytest.raises(ConfigError, match=f"{name}={text!r} is not one of 0, 1, false, true"):
            v2_runner_environment()


def test_ours_goes_before_vllms(monkeypatch):
    monkeypatch.setenv(VLLM, "1")
    monkeypatch.setenv(KVFERRY, "0")
    assert list(v2_runner_environment().items()) == [(KVFERRY, False), (VLLM, True)]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, "kvferry.engine.plan")
    return lambda level: [r.getMessage() for r in caplog.records if r.levelno == level and "model runner" in r.message]


class Silent(FaultyConnector):
    """As connectors are that were written for the first runner."""

    supports_v2_model_runner = False


SILENT = {"kv_transfer_config": {"kv_connector": "Silent", "kv_connector_module_path": __name__, "kv_role": "kv_both"}}
IMPLICIT = {"kv_offloading_size": 0.01, "kv_transfer_config": {"kv_connector_extra_config": {"weights_version": "1"}}}


@pytest.mark.parametrize(
    ("settings", "because"),
    [
        ({}, "StubModel is not on the list"),
        ({"kv_transfer_config": {}}, "StubModel is not on the list"),
        (IMPLICIT, "StubModel is not on the list"),
        (SILENT, "Silent does not declare"),
    ],
    ids=["no connector", "empty transfer config", "implicit connector", "connector that does not declare it"],
)
def test_an_engine_tells_its_reason_once_and_warns_of_nothing(settings, because, said):
    with LLM(StubModel(), num_kv_blocks=32, **settings) as llm:
        assert llm.config.use_v2_model_runner is False
    assert len(said(logging.INFO)) == 1
    assert because in said(logging.INFO)[0]
    assert said(logging.WARNING) == []


def test_asking_for_v2_gets_it_unless_the_environment_says_no(said, monkeypatch):
    for settings in ({}, SILENT):
        with LLM(StubModel(), num_kv_blocks=32, use_v2_model_runner=True, **settings) as llm:
            assert llm.config.use_v2_model_runner is True
    assert said(logging.WARNING) == []
    monkeypatch.setenv(KVFERRY, "0")
    with LLM(StubModel(), num_kv_blocks=32, use_v2_model_runner=True) as llm:
        assert llm.config.use_v2_model_runner is False
    assert len(said(logging.WARNING)) == 1
    assert "overruled" in said(logging.WARNING)[0]


def test_asking_for_v2_where_something_is_missing_is_answered_by_v1_and_a_warning(said, monkeypatch):
    support = V2Support(missing=("Triton (pip install triton)",))
    monkeypatch.setattr("kvferry.engine.plan.v2_support", lambda device, architectures: support)
    with LLM(StubModel(), num_kv_blocks=32, use_v2_model_runner=True) as llm:
        assert llm.config.use_v2_model_runner is False
        assert llm.generate([1, 2, 3])
    assert len(said(logging.WARNING)) == 1
    assert "pip install triton" in said(logging.WARNING)[0]


@pytest.mark.parametrize("name", [target.name for target in BUILT_INS if target.name != "MultiConnector"])
def test_built_in_connectors_declare_v2(name):
    """MultiConnector's parts decide. That each works with it: tests/flow/test_runner_matrix.py."""
    assert KVConnectorFactory.get_connector_class_by_name(name).supports_v2_model_runner


def multi(*parts):
    settings = {"kv_connector_extra_config": {"connectors": list(parts)}}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both"} | settings


LISTED = {"v2_model_architectures": ["Other", "StubModel"]}
HOST = {
    "kv_connector": "OffloadingConnector",
    "kv_connector_extra_config": {"weights_version": "1", "cpu_bytes_to_use": 1 << 20},
}


@pytest.mark.parametrize(
    ("settings", "use_v2", "because"),
    [
        (LISTED, True, "StubModel is on the list"),
        (LISTED | {"kv_transfer_config": HOST | {"kv_role": "kv_both"}}, True, "StubModel is on the list"),
        (LISTED | SILENT, False, "Silent does not declare"),
        (LISTED | {"kv_transfer_config": multi(HOST, HOST)}, True, "StubModel is on the list"),
        (LISTED | {"kv_transfer_config": multi(HOST, SILENT["kv_transfer_config"])}, False, "Silent does not declare"),
        (
            LISTED | {"kv_transfer_config": multi(HOST, multi(SILENT["kv_transfer_config"]))},
            False,
            "V1: Silent does not declare",
        ),
        (LISTED | {"use_v2_model_runner": False}, False, "use_v2_model_runner=False"),
        ({"v2_model_architectures": ["Other"]}, False, "StubModel is not on the list"),
    ],
)
def test_a_list_of_models_is_settable_and_the_connector_then_decides(settings, use_v2, because):
    """The child that decides is named, not the MultiConnector around it."""
    model = StubModel()
    options = {name: value for name, value in settings.items() if name != "kv_transfer_config"}
    plan = plan_engine(
        model,
        EngineOptions(num_kv_blocks=32, **options),
        transfer_config(settings.get("kv_transfer_config"), None, None),
    )
    assert plan.config.use_v2_model_runner is plan.runner.use_v2 is use_v2
    assert because in f"{'V2' if use_v2 else 'V1'}: {plan.runner.reason}"


@pytest.mark.parametrize("wrong", ["LlamaForCausalLM", [""], [1]])
def test_the_list_is_checked(wrong):
    with pytest.raises(ConfigError, match="v2_model_architectures"):
        EngineOptions(v2_model_architectures=wrong)


@pytest.mark.parametrize("names", [None, ["LlamaForCausalLM"]])
def test_doctor_and_engine_judge_by_one_name(tmp_path, names):
    """Also where config.json names no class."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text()) | {"architectures": names}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in stored.items() if value}))
    options = EngineOptions(num_kv_blocks=32, v2_model_architectures=("LlamaForCausalLM",))
    told = plan_engine(read_model_facts(tmp_path), options, KVTransferConfig()).runner
    with LLM(tmp_path, num_kv_blocks=32, v2_model_architectures=["LlamaForCausalLM"]) as llm:
        assert llm.config.use_v2_model_runner is told.use_v2 is True
    assert told.reason.startswith("LlamaForCausalLM is on the list")
