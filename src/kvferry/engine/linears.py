"""Linear layers whose bfloat16 weights are kept in the order oneDNN computes in: half the time for small batches.

The operators are private to torch, so they are looked for and tried; without them the model stays as it is. Float32
is left alone, so that its results are those of transformers to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def pack_linears(model: nn.Module) -> int:
    """Replace the model's CPU bfloat16 `nn.Linear` layers in place; the number replaced, 0 where torch cannot.

    A packed layer drops its plain weight; only a weight shared with another module (tied embeddings) is there twice.
    """
    if not _can_pack():
        return 0
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
                num_packed += 1
    return num_packed


class PackedLinear(nn.Module):
    """Stands in for one `nn.Linear`; its `weight` is an empty tensor that still tells dtype and device."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        self.bias = linear.bias
        self._packed = _pack(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`nn.Linear`'s."""
        return _apply(x, self._packed, self.bias)


def _pack(weight: torch.Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _apply(x: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@torch.inference_mode()
def _can_pack() -> bool:
    """Try the operators on a small product whose result is known."""
    weight = torch.eye(32, dtype=torch.bfloat16)
    x = torch.arange(32, dtype=torch.bfloat16)[None]
    try:
        return bool(torch.equal(_apply(x, _pack(weight), None), x))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
