"""A model's shape from its configuration alone: what an engine would keep of it, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvferry.engine.kv_groups import LayerShape
from kvferry.engine.model_loader import max_tokens_of, read_model_config
from kvferry.errors import ConfigError


@dataclass(slots=True)
class ModelFacts:
    """A `ModelShape` read from config.json (or a GGUF's header). The engine itself learns the shape by running it."""

    path: str
    dtype: torch.dtype
    layers: Sequence[LayerShape]
    max_model_len: int
    hf_config: Any
    load_format: str = "auto"
    is_converted_at_start: bool = False
    """The embedded engine makes a folder of `path`, a GGUF, before it loads weights."""


def read_model_facts(source: str | Path, dtype: str = "auto", *, any_architecture: bool = False) -> ModelFacts:
    """`source` and `dtype` as for `LLM`. "auto" is the configuration's own, float32 when it names none.

    Raises ConfigError when there is no such model, or, unless `any_architecture` (another host runs it), the engine
    cannot run its architecture.
    """
    path, config = read_model_config(source, any_architecture=any_architecture)
    chosen = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    try:
        layers, max_tokens = _layers(config.get_text_config()), max_tokens_of(config)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as err:
        raise ConfigError(f"model={str(source)!r}: its config.json describes no model that can run: {err}") from err
    is_converted = path.is_file() and not any_architecture
    return ModelFacts(str(path), chosen, layers, max_tokens, config, is_converted_at_start=is_converted)


def _layers(config: Any) -> list[LayerShape]:
    num_layers = int(config.num_hidden_layers)
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_size = head_size_v = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    if (nope_size := getattr(config, "qk_nope_head_dim", None)) is not None:  # latent attention, kept expanded
        head_size, head_size_v = int(nope_size + config.qk_rope_head_dim), int(config.v_head_dim)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    return [
        LayerShape(num_kv_heads, head_size, head_size_v, window if kind == "sliding_attention" else None)
        for kind in kinds
    ]
