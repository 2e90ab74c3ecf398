"""Packed linear layers: same results, no second copy of the weights, and a way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvferry.engine import linears
from kvferry.engine.linears import PackedLinear, pack_linears


def model(dtype=torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.Sequential(nn.Linear(80, 24, bias=False))).to(dtype)


CAN_PACK = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # oneDNN computes in bfloat16 on CPUs with AVX-512


@pytest.mark.skipif(not CAN_PACK, reason="oneDNN does not compute in bfloat16 on this CPU (it has no AVX-512)")
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_results_are_those_of_the_plain_layers(num_tokens):
    plain, packed = model(), model()
    x = torch.randn(1, num_tokens, 48).bfloat16()
    with torch.inference_mode():
        assert pack_linears(packed) == 2, "this torch has no packed linear layers: bfloat16 decode is slow"
        torch.testing.assert_close(packed(x), plain(x), rtol=2e-2, atol=2e-2)
    assert isinstance(packed[0], PackedLinear)
    assert sum(p.numel() for p in packed.parameters()) == 80, "only the bias stays plain"


@pytest.mark.skipif(CAN_PACK, reason="oneDNN computes in bfloat16 on this CPU")
def test_where_the_cpu_cannot_the_model_stays_as_it_is():
    plain = model()
    assert pack_linears(plain) == 0
    assert type(plain[0]) is nn.Linear


def test_float32_stays_as_it_is():
    plain = model(torch.float32)
    assert pack_linears(plain) == 0
    assert type(plain[0]) is nn.Linear


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_without_the_operators_nothing_changes(monkeypatch, error):
    def fail(weight):
        raise error("no such operator")

    monkeypatch.setattr(linears, "_pack", fail)
    assert pack_linears(model()) == 0
