"""Chooses next tokens from logits. A draw depends on its request's seed and position only, never on the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvferry.engine.config import SamplingParams
from kvferry.engine.request import Request


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """One next token per row of `logits` [requests, vocabulary]."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, request in enumerate(requests):
        if request.sampling_params.temperature > 0:
            tokens[row] = _draw(logits[row : row + 1].float(), request)
    return tokens


def _draw(logits: torch.Tensor, request: Request) -> int:
    logits = _warpers(request.sampling_params)(torch.empty(1, 0, dtype=torch.int64), logits)
    # Seeded per (request, position): a token recomputed after preemption or a failed load comes out the same.
    label = f"{request.sampling_seed} {request.num_tokens}".encode()
    seed = int.from_bytes(hashlib.sha256(label).digest()[:8], "little", signed=True)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    return int(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator))


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers
