"""Chooses next tokens from logits. A draw depends on its request's seed and position only, never on the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvferry.engine.config import SamplingParams
from kvferry.engine.request import Logprob, Request, SampledToken


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """One next token per row of `logits` [requests, vocabulary]; `logits` stay as they are."""
    likeliest: list[int] = logits.argmax(dim=-1).tolist()
    chosen = []
    for row, request in enumerate(requests):
        params = request.sampling_params
        token = likeliest[row]
        if not params.is_greedy or _has_penalties(params):
            token = _choose(logits[row : row + 1].float(), request)
        logprobs = None if params.logprobs is None else _logprobs(logits[row].float(), token, params.logprobs)
        chosen.append(SampledToken(token, logprobs))
    return chosen


def _choose(logits: torch.Tensor, request: Request) -> int:
    logits = _penalised(logits, request)
    if request.sampling_params.is_greedy:
        return int(logits.argmax())
    logits = _warpers(request.sampling_params)(torch.empty(1, 0, dtype=torch.int64), logits)
    # Seeded per (request, position): a token recomputed after preemption or a failed load comes out the same.
    label = f"{request.sampling_seed} {request.num_tokens}".encode()
    seed = int.from_bytes(hashlib.sha256(label).digest()[:8], "little", signed=True)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    return int(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator))


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _penalised(logits: torch.Tensor, request: Request) -> torch.Tensor:
    params = request.sampling_params
    if params.repetition_penalty != 1:
        seen = torch.tensor([request.all_token_ids], device=logits.device)
        logits = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))(seen, logits)
    if params.presence_penalty or params.frequency_penalty:
        generated = torch.tensor(request.output_token_ids, dtype=torch.int64, device=logits.device)
        counts = torch.bincount(generated, minlength=logits.shape[-1])
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(float(params.min_p)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(float(params.top_p)))
    return warpers


def _logprobs(logits: torch.Tensor, token: int, num_top: int) -> dict[int, Logprob]:
    """The chosen token first, then the `num_top` likeliest, likeliest first."""
    logprobs = torch.log_softmax(logits, dim=-1)
    rank = int((logprobs > logprobs[token]).sum()) + 1
    found = {token: Logprob(float(logprobs[token]), rank)}
    top = logprobs.topk(min(num_top, len(logprobs)))
    for i, (value, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
        found.setdefault(index, Logprob(value, i + 1))
    return found
