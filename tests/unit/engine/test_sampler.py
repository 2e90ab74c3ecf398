"""Chosen tokens follow the distribution that the parameters define, computed here with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from kvferry.engine.config import SamplingParams
from kvferry.engine.request import NoToken, Request, SampledToken
from kvferry.engine.sampler import nucleus, sample
from kvferry.errors import ConfigError

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


FLOAT_EDGES = [5e-324, 1e-310, 7e-46, 1.2e-38, 1e-7, 0.5, 1 - 2**-53, 1.0]
LOGIT_EDGES = [-math.inf, -3e38, -1.0, 0.0, 1e-40, 1.0, 3e38]


@given(
    logits=st.lists(st.sampled_from(LOGIT_EDGES) | st.floats(-50, 50, width=32), min_size=1, max_size=40),
    temperature=st.sampled_from([0, 5e-324, 1e-6, 1e-5, 1.0, 1e30, 1e308]),
    top_p=st.sampled_from(FLOAT_EDGES),
    min_p=st.sampled_from([0, *FLOAT_EDGES]),
    top_k=st.sampled_from([-1, 0, 1, 2, 2**63 - 1]),
    repetition_penalty=st.sampled_from([0.01, 1.0, 100.0]),
    presence_penalty=st.sampled_from([-2.0, 5e-324, 2.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=600, deadline=None)
def test_every_setting_at_its_edge_gives_a_possible_token_or_an_error_of_that_request(logits, seed, **params):
    """A token of the vocabulary that the model holds possible; the row beside it is what it is alone."""
    neighbour = request(3, temperature=1.0, top_p=0.9)
    (alone,) = chosen(LOGITS, neighbour)
    rows = torch.tensor([logits, (LOGITS * len(logits))[: len(logits)]])
    first, second = sample(rows, [request(seed, output=(0,), logprobs=2, **params), neighbour])
    if max(logits) == -math.inf:
        assert isinstance(first, NoToken)
    elif isinstance(first, SampledToken):
        assert 0 <= first.token_id < len(logits)
        assert logits[first.token_id] > -math.inf
        assert all(math.isfinite(entry.logprob) for entry in first.logprobs.values())
    else:  # penalties and temperature can take a logit near the largest float beyond it
        assert max(map(abs, (x for x in logits if x > -math.inf))) > 1e37
    if len(logits) >= len(LOGITS) and len(logits) % len(LOGITS) == 0:
        assert isinstance(second, SampledToken)
    if len(logits) == len(LOGITS):
        assert second.token_id == alone


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1}, {"presence_penalty": 1, "temperature": 0}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
def test_a_row_that_is_not_finite_is_an_error_of_that_request_alone(bad, params):
    rows = torch.tensor([LOGITS, [*LOGITS[:-1], bad], [-math.inf] * 6, LOGITS])
    first, second, third, fourth = sample(rows, [request(7, **params) for _ in range(4)])
    assert isinstance(first, SampledToken)
    assert first == fourth
    assert isinstance(second, NoToken)
    assert "no token can be chosen" in second.reason
    assert isinstance(third, NoToken)


NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]
WHOLE = ["seed", "max_tokens", "n", "top_k", "logprobs"]
SWITCHES = ["ignore_eos", "skip_special_tokens", "include_stop_str_in_output"]


@pytest.mark.parametrize("name", NUMBERS + WHOLE)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400, pytest.param(10**5000, id="5001 digits"), -(10**400), "1", True]
)
def test_what_is_no_number_of_that_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [*SWITCHES, "extra_args"])
@pytest.mark.parametrize("value", [np.array([1, 2]), "x", 1, [1]], ids=str)
def test_what_is_no_switch_and_no_object_is_refused_by_name(name, value):
    """An array has no truth value: the step that asked for it ended the engine."""
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), -1, 0])
def test_seeds_of_several_completions_differ_and_stay_in_range(seed):
    seeds = [each.seed for each in SamplingParams(seed=seed, n=3).per_completion()]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63 - 2, -(2**63), None])
def test_one_completion_keeps_its_seed(seed):
    """The largest one became the one before it: `generate` and the servers drew other tokens than `add_request`."""
    assert [each.seed for each in SamplingParams(seed=seed).per_completion()] == [seed]
