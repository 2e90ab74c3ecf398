"""Chosen tokens follow the distribution that the parameters define, computed here with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from kvferry.engine.config import SamplingParams
from kvferry.engine.request import Request, SampledToken
from kvferry.engine.sampler import nucleus, sample

LOGITS = [2.0, 1.5, 0.5, 0.0, -1.0, -3.0]


def request(seed=0, prompt=(0,), output=(), **params):
    made = Request("r", list(prompt), SamplingParams(**params), block_size=4, sampling_seed=seed)
    for token in output:
        made.append_token(SampledToken(token))
    return made


def chosen(logits, *requests):
    return [token.token_id for token in sample(torch.tensor([logits] * len(requests)), requests)]


def probabilities(logits):
    exp = np.exp(np.array(logits) - np.max(logits))
    return exp / exp.sum()


EXPECTED = {
    "plain": ({}, lambda p: p),
    "temperature": ({"temperature": 2.0}, lambda p: np.sqrt(p)),
    "top_k": ({"top_k": 2}, lambda p: np.where(np.arange(6) < 2, p, 0)),
    "top_p": ({"top_p": 0.7}, lambda p: np.where(np.arange(6) < 2, p, 0)),  # 0.50 + 0.30 reaches 0.7
    "min_p": ({"min_p": 0.2}, lambda p: np.where(p >= 0.2 * p.max(), p, 0)),
    "all": ({"temperature": 2.0, "min_p": 0.3, "top_k": 3}, lambda p: np.where(np.arange(6) < 3, np.sqrt(p), 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_draws_follow_the_distribution(name):
    params, change = EXPECTED[name]
    expected = change(probabilities(LOGITS))
    expected = expected / expected.sum()
    num_draws = 2000
    requests = [request(seed, **params) for seed in range(num_draws)]
    counts = np.bincount(chosen(LOGITS, *requests), minlength=6)
    assert (counts[expected == 0] == 0).all()
    deviation = np.abs(counts - num_draws * expected)
    assert (deviation <= 4.5 * np.sqrt(num_draws * expected * (1 - expected)) + 1e-9).all(), (counts, expected)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 20.0])  # from flat, where most tokens are in, to peaked
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_nucleus_is_that_of_transformers(spread, top_p):
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * spread
    expected = TopPLogitsWarper(top_p)(None, logits)
    assert torch.equal(nucleus(logits, top_p), expected)


def test_penalties_as_defined():
    greedy = {"temperature": 0}
    assert chosen(LOGITS, request(**greedy)) == [0]
    # 2.0 / 1.5 < 1.5: the token of the prompt loses; below zero a penalty multiplies.
    assert chosen(LOGITS, request(repetition_penalty=1.5, **greedy)) == [1]
    assert chosen([-1.0, -1.2], request(repetition_penalty=1.5, **greedy)) == [1]
    # Presence and frequency look at the output only: 2.0 - 0.6 < 1.5, and 2.0 - 3 * 0.2 < 1.5.
    assert chosen(LOGITS, request(presence_penalty=0.6, **greedy)) == [0]
    assert chosen(LOGITS, request(presence_penalty=0.6, output=[0], **greedy)) == [1]
    assert chosen(LOGITS, request(frequency_penalty=0.2, output=[0, 0], **greedy)) == [0]
    assert chosen(LOGITS, request(frequency_penalty=0.2, output=[0, 0, 0], **greedy)) == [1]
    assert chosen(LOGITS, request(frequency_penalty=-2.0, output=[5, 5, 5], **greedy)) == [5]


def test_a_draw_depends_on_seed_and_position_only():
    among = [request(seed) for seed in range(50)]
    alone = [chosen(LOGITS, one)[0] for one in among]
    assert chosen(LOGITS, *among) == alone == chosen(LOGITS, *among)
    assert len(set(alone)) > 2
    moved = [chosen(LOGITS, request(seed, output=[3]))[0] for seed in range(50)]
    assert moved != alone


def test_temperature_near_zero_is_greedy_and_nothing_overflows():
    for temperature in (1e-300, 1e-6, 1e-5, 1e-4):
        assert chosen([1e3, 999.0, -1e3], request(temperature=temperature, repetition_penalty=0.01)) == [0]
    assert chosen([math.log(1), -math.inf, -math.inf], request(temperature=100.0)) == [0]


def test_logprobs_are_of_the_unprocessed_logits():
    logits = torch.tensor([LOGITS])
    before = logits.clone()
    asked = request(temperature=0, logprobs=2, repetition_penalty=100.0)
    (token,) = sample(logits, [asked])
    assert torch.equal(logits, before)
    assert token.token_id == 1
    expected = np.log(probabilities(LOGITS))
    assert list(token.logprobs) == [1, 0]
    assert [entry.rank for entry in token.logprobs.values()] == [2, 1]
    assert [entry.logprob for entry in token.logprobs.values()] == pytest.approx(expected[[1, 0]], abs=1e-5)
    (token,) = sample(logits, [request(temperature=0, logprobs=0)])
    assert list(token.logprobs) == [0]
    (token,) = sample(logits, [request(temperature=0, logprobs=20)])
    assert list(token.logprobs) == [0, 1, 2, 3, 4, 5]
    assert sample(logits, [request(temperature=0)])[0].logprobs is None
