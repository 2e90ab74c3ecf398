"""Model folders that cannot run: doctor and the start refuse the same ones, by ConfigError, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from kvferry import LLM, ConfigError
from kvferry.cli.diagnosis import diagnose
from kvferry.config import KVTransferConfig
from kvferry.engine.config import EngineOptions
from kvferry.engine.model_facts import read_model_facts

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def write(name: str, content: str | bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def cut(num_bytes: int) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:num_bytes])

    return spoil


def doctor_says(folder: Path) -> str:
    options = EngineOptions(num_kv_blocks=8)
    try:
        return "; ".join(diagnose(read_model_facts(folder), options, KVTransferConfig()).problems)
    except ConfigError as err:
        return str(err)


FAULTS: dict[str, Spoil] = {
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "not JSON": write("config.json", "{"),
    "JSON of another kind": write("config.json", "[1]"),
    "no model_type": write("config.json", "{}"),
    "unknown model_type": config(model_type="nobody"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": cut(0),
    "a header that is cut": cut(40),
    "weights that are cut": cut(2000),
    "a header too large": write("model.safetensors", b"\xff" * 64),
    "no heads": config(num_attention_heads=0),
    "heads that are text": config(num_attention_heads="x"),
    "layers below none": config(num_hidden_layers=-1),
    "no layers": config(num_hidden_layers=0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_doctor_and_start_refuse_the_same_folders(sound: Path, tmp_path: Path, name: str) -> None:
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert doctor_says(tmp_path) == ""
    FAULTS[name](tmp_path)
    assert "model" in doctor_says(tmp_path)
    with pytest.raises(ConfigError, match="model"):
        LLM(tmp_path, num_kv_blocks=8)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "~nobody-has-this-name/m", "x" * 5000, "a\0b", "", "\ud800"])
def test_what_is_no_path_of_a_model_is_refused(source: str) -> None:
    for start in (read_model_facts, LLM):
        with pytest.raises(ConfigError, match="give a model folder"):
            start(source)


def test_a_tokenizer_that_cannot_be_loaded_is_refused_by_name(sound: Path, tmp_path: Path) -> None:
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(tmp_path, num_kv_blocks=8)
