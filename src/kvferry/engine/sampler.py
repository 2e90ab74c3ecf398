"""Chooses next tokens from logits. A draw depends on its request's seed and position only, never on the batch."""

from __future__ import annotations

import hashlib
import math
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
from kvferry.engine.request import Logprob, NoToken, Request, Sampled, SampledToken

_NO_IDS = torch.empty(1, 0, dtype=torch.int64)  # what warpers that look at logits alone are given
NO_TOKEN = "no token can be chosen"
"""How the errors of requests begin whose logits name no token."""
_HOTTEST = 1e30  # as good as any more, and a float32
_LEAST_LOGPROB = -9999.0  # for tokens that cannot be: JSON knows no infinity
_NUCLEUS_TOKENS = (256, 4096)  # finding these takes a thirtieth and a quarter of the time of sorting 50,000


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[Sampled]:
    """One next token per row of `logits` [requests, vocabulary]; `logits` stay as they are.

    A row with NaN, with +inf, or with nothing but -inf gives `NoToken`: of that request alone.
    """
    likeliest = _likeliest(logits)
    chosen: list[Sampled] = []
    for row, request in enumerate(requests):
        params = request.sampling_params
        token: int | None = likeliest[row]
        highest = float(logits[row, likeliest[row]])  # NaN counts as the highest
        if math.isfinite(highest) and (not params.is_greedy or _has_penalties(params)):
            token = _choose(logits[row : row + 1].float(), request)
        if token is None or not math.isfinite(highest):
            chosen.append(NoToken(f"{NO_TOKEN}: the highest of the model's logits is {highest}"))
            continue
        logprobs = None if params.logprobs is None else _logprobs(logits[row].float(), token, params.logprobs)
        chosen.append(SampledToken(token, logprobs))
    return chosen


def _likeliest(logits: torch.Tensor) -> list[int]:
    if logits.device.type == "cpu":  # numpy takes 0.2 ms where torch takes 5.7 (32 rows of 49,152 in bfloat16)
        return [int(token) for token in logits.float().numpy().argmax(axis=-1)]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def _choose(logits: torch.Tensor, request: Request) -> int | None:
    """None: penalties took the highest logit beyond all numbers."""
    logits = _penalised(logits, request)
    highest = logits.max()
    if not math.isfinite(highest):
        return None
    if request.sampling_params.is_greedy:
        return int(logits.argmax())
    logits = _narrowed(logits - highest, request.sampling_params)  # with 0 as the highest, none overflows
    # Seeded per (request, position): a token recomputed after preemption or a failed load comes out the same.
    label = f"{request.sampling_seed} {request.num_tokens}".encode()
    seed = int.from_bytes(hashlib.sha256(label).digest()[:8], "little", signed=True)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    # As torch.multinomial does it, which takes twenty times as long over a vocabulary.
    upto = torch.softmax(logits[0], dim=-1, dtype=torch.float64).cumsum(0)
    drawn = torch.rand(1, dtype=torch.float64, generator=generator, device=logits.device) * upto[-1]
    last = torch.searchsorted(upto, upto[-1])  # rounding may bring a draw to the very end, behind all that is possible
    return int(torch.minimum(torch.searchsorted(upto, drawn, right=True)[0], last))


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


def _narrowed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[1, vocabulary] after temperature, with what min_p, top_k and top_p leave out at -inf."""
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(min(float(params.temperature), _HOTTEST)))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(float(params.min_p)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    logits = warpers(_NO_IDS, logits)
    return nucleus(logits, params.top_p) if params.top_p < 1 else logits


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """What transformers' TopPLogitsWarper does to [1, vocabulary]; sorts only the likeliest tokens if they suffice."""
    probabilities = torch.softmax(logits[0], dim=-1)
    for num_tokens in _NUCLEUS_TOKENS:
        top = probabilities.topk(min(num_tokens, len(probabilities)))
        if float(top.values.sum()) >= top_p:
            is_kept = top.values.cumsum(0) - top.values < top_p
            is_kept[0] = True  # below the least float32, top_p counts as 0
            kept = top.indices[is_kept]
            return torch.full_like(logits, -math.inf).index_copy_(1, kept, logits[:, kept])
    whole: torch.Tensor = TopPLogitsWarper(float(top_p))(_NO_IDS, logits)
    return whole


def _logprobs(logits: torch.Tensor, token: int, num_top: int) -> dict[int, Logprob]:
    """The chosen token first, then the `num_top` likeliest, likeliest first."""
    logprobs = torch.log_softmax(logits, dim=-1)
    rank = int((logprobs > logprobs[token]).sum()) + 1
    logprobs = logprobs.clamp(min=_LEAST_LOGPROB)
    found = {token: Logprob(float(logprobs[token]), rank)}
    top = logprobs.topk(min(num_top, len(logprobs)))
    for i, (value, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
        found.setdefault(index, Logprob(value, i + 1))
    return found
