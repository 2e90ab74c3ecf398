"""What one request asks for, or what the model makes of it, ends at most that request."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

SPOILT = 999
"""A token after which this test's model has no finite output."""


class SpoiltModel(StubModel):
    """The stub model, but for sequences that hold the token SPOILT."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, batch: Any, kv: Any, hooks: Any) -> torch.Tensor:
        logits = super().forward(batch, kv, hooks)
        tokens = batch.input_ids.tolist()
        for i, row in enumerate(batch.logits_rows.tolist()):
            (seq,) = (seq for seq in batch.sequences if seq.end - 1 == row)
            if SPOILT in tokens[seq.start : seq.end]:
                logits[i, ::7] = self.value
                if self.value == -torch.inf:
                    logits[i] = self.value
        return logits


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_model_output_that_is_not_finite_ends_its_request_alone(value: float, temperature: float, tokens: Any) -> None:
    model = SpoiltModel(value)
    with LLM(model, num_kv_blocks=65, block_size=16) as llm:
        good, bad = tokens(40, 1), [*tokens(39, 2), SPOILT]
        params = SamplingParams(max_tokens=6, temperature=temperature)
        greedy = SamplingParams(max_tokens=6, temperature=0)
        first, spoilt, last = llm.generate([good, bad, good[:30]], [greedy, params, greedy])
        assert first.outputs[0].token_ids == model.expected_tokens(good, 6)
        assert last.outputs[0].token_ids == model.expected_tokens(good[:30], 6)
        assert spoilt.outputs[0].finish_reason == "error"
        assert "no token can be chosen" in spoilt.error
        other = [token for token in tokens(40, 3) if token != SPOILT]
        after = llm.generate(other, greedy)[0]
        assert after.outputs[0].token_ids == model.expected_tokens(other, 6)
        llm.check_integrity()


@pytest.mark.parametrize("params", [{"top_p": 5e-324}, {"min_p": 1.0}, {"temperature": 1e308, "top_k": 1}], ids=str)
def test_the_narrowest_choice_is_the_likeliest_token(params: dict[str, Any], tokens: Any) -> None:
    model = StubModel()
    with LLM(model, num_kv_blocks=65, block_size=16) as llm:
        prompt = tokens(20, 4)
        output = llm.generate(prompt, SamplingParams(max_tokens=8, **params))[0]
        assert output.outputs[0].token_ids == model.expected_tokens(prompt, 8)
