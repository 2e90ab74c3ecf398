"""Hidden states of chosen decoder layers, for connectors that want them.

State `i` is what layer `i` is given: 0 is the embeddings, and with n layers, n is what the last one gives, before the
final norm (vLLM's numbering). After each forward the rows of all its tokens go through the layer hooks, as one more
layer named as vLLM names it, "cache_only_layers.<n>": `save_kv_layer(name, rows, batch)`, where row `i` of `rows`
[tokens, states, hidden] is that of token `i` of `batch`. They are not paged, so a connector keeps what it wants; and
since only computed tokens have rows, requests of such an engine do not read the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from kvferry.engine.attention import LayerHooks, PackedBatch
from kvferry.engine.kv_groups import KVBuffer
from kvferry.engine.model_loader import EngineModel
from kvferry.errors import ConfigError


def with_hidden_states(model: EngineModel, state_ids: Sequence[int]) -> EngineModel:
    """The model, made to hand on these hidden states; as it is when there are none.

    ConfigError for ids beyond the model's layers, and for a model whose layers cannot be told apart.
    """
    return cast("EngineModel", _TappedModel(model, state_ids)) if state_ids else model


class _TappedModel:
    """An EngineModel around another; hooks on its layers catch their input."""

    def __init__(self, model: EngineModel, state_ids: Sequence[int]) -> None:
        self._model = model
        layers = _decoder_layers(model)
        if max(state_ids) > len(layers):
            raise ConfigError(
                f"hidden_state_layers={list(state_ids)}: this model has the hidden states 0 (embeddings) to "
                f"{len(layers)} (given by its last layer)"
            )
        self._name = f"cache_only_layers.{len(layers)}"
        self._caught = dict.fromkeys(state_ids, torch.empty(0))
        for index in state_ids:
            if index < len(layers):
                layers[index].register_forward_pre_hook(partial(self._catch_input, index), with_kwargs=True)
            else:
                layers[-1].register_forward_hook(partial(self._catch_output, index))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, batch: PackedBatch, kv: KVBuffer, hooks: LayerHooks) -> torch.Tensor:
        """The model's forward, then the rows to the hooks."""
        logits = self._model.forward(batch, kv, hooks)
        hooks.before_layer(self._name)
        hooks.after_layer(self._name, torch.stack(list(self._caught.values()), dim=1), batch)
        return logits

    def _catch_input(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._caught[index] = (args[0] if args else kwargs["hidden_states"])[0].clone()

    def _catch_output(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._caught[index] = (output if isinstance(output, torch.Tensor) else output[0])[0].clone()


def _decoder_layers(model: EngineModel) -> Sequence[nn.Module]:
    """The layers in order, found by the number that each one's attention has."""
    root = getattr(model, "torch_model", None)
    for part in root.modules() if root is not None else ():
        if isinstance(part, nn.ModuleList) and len(part) == len(model.layers):
            numbers = [{getattr(m, "layer_idx", None) for m in layer.modules()} for layer in part]
            if all(index in seen for index, seen in enumerate(numbers)):
                return list(part)
    raise ConfigError(
        f"hidden_state_layers: no decoder layers can be found in a {type(root or model).__name__}; leave it empty"
    )
