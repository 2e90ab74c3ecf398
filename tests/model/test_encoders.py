"""Models that are no decoder-only language models are refused by name, by the engine and by `kvferry doctor` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from kvferry import LLM
from kvferry.cli.main import app
from kvferry.engine.model_facts import read_model_facts
from kvferry.errors import ConfigError

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16,
}  # fmt: skip
T5 = {"vocab_size": 97, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32}
DISTIL = {"vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 16}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "BertModel": ("BertConfig", SIZES, "an encoder,"),
    "BertForMaskedLM": ("BertConfig", SIZES, "an encoder,"),
    "BertForSequenceClassification": ("BertConfig", SIZES, "an encoder,"),
    "RobertaForMaskedLM": ("RobertaConfig", SIZES, "an encoder,"),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTIL, "an encoder,"),
    "T5EncoderModel": ("T5Config", T5 | {"is_encoder_decoder": False}, "model_type 't5'"),
    "T5ForConditionalGeneration": ("T5Config", T5, "an encoder-decoder"),
}
"""Class -> configuration class, settings, what the error says."""
HEADLESS = ("LlamaModel", "LlamaForSequenceClassification")


def save(folder: Path, name: str, config: str, settings: dict[str, Any]) -> Path:
    torch.manual_seed(1)
    getattr(transformers, name)(getattr(transformers, config)(**settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_encoders_are_refused_by_name(tmp_path: Path, name: str) -> None:
    config, settings, words = REFUSED[name]
    folder = save(tmp_path, name, config, settings)
    with pytest.raises(ConfigError) as raised:
        LLM(folder, num_kv_blocks=32)
    for part in (name, words, "decoder-only", "docs/guides/models.md"):
        assert part in str(raised.value)
    doctor = CliRunner().invoke(app, ["doctor", "--model", str(folder)])
    assert isinstance(doctor.exception, ConfigError), doctor.output
    assert str(doctor.exception) == str(raised.value)
    assert read_model_facts(folder, any_architecture=True).hf_config.architectures == [name], "vLLM may run it"


@pytest.mark.parametrize("name", HEADLESS)
def test_a_checkpoint_without_the_language_models_head_is_refused(tmp_path: Path, name: str) -> None:
    """transformers makes up what is missing: every answer would be random."""
    folder = save(tmp_path, name, "LlamaConfig", SIZES | {"pad_token_id": 0})
    with pytest.raises(ConfigError, match=rf"{name}\) lacks 1 weights of a LlamaForCausalLM.*: lm_head\.weight"):
        LLM(folder, num_kv_blocks=32)


def test_a_decoder_that_cannot_run_the_check_is_refused(tmp_path: Path) -> None:
    settings = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8}
    folder = save(tmp_path, "GPT2LMHeadModel", "GPT2Config", settings)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel is not supported: its forward over 24 tokens fails"):
        LLM(folder, num_kv_blocks=32)
