"""What `step` reports of requests on their way: streamed output, ends by text, sampling that repeats."""

from __future__ import annotations

import pytest
from tests import small_tokenizer

from kvferry import LLM, SamplingParams
from kvferry.engine import RequestOutputKind
from kvferry.errors import ConfigError
from kvferry.testing.stub_model import StubModel


@pytest.fixture
def text_engine(make_engine):
    """An engine whose stub model has a byte-level tokenizer."""
    engine = make_engine(connector=False, num_kv_blocks=100)
    engine.model.tokenizer = small_tokenizer.byte_level()
    engine.model.vocab_size = len(engine.model.tokenizer)
    return engine


def reports(engine, request_id):
    """Step to the end; all outputs of the request in order."""
    found = []
    while engine.llm.has_unfinished_requests():
        found += [output for output in engine.step() if output.request_id == request_id]
    return found


def test_cumulative_delta_and_final_reports_tell_the_same(text_engine):
    prompt = [5, 6, 7, 8, 9]
    right = text_engine.model.expected_tokens(prompt, 20)
    text = text_engine.llm.tokenizer.decode(prompt + right)[len(text_engine.llm.tokenizer.decode(prompt)) :]
    params = {"max_tokens": 20, "temperature": 0, "skip_special_tokens": False}
    for kind in RequestOutputKind:
        request_id = text_engine.llm.add_request(prompt, SamplingParams(output_kind=kind, **params))
        outputs = reports(text_engine, request_id)
        parts = [output.outputs[0] for output in outputs]
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert [part.finish_reason for part in parts] == [None] * (len(outputs) - 1) + ["length"]
        if kind is RequestOutputKind.DELTA:
            assert [part.token_ids for part in parts] == [[token] for token in right]
            assert "".join(part.text for part in parts) == text
        else:
            assert (parts[-1].token_ids, parts[-1].text) == (right, text)
        if kind is RequestOutputKind.CUMULATIVE:
            assert [part.token_ids for part in parts] == [right[: i + 1] for i in range(20)]
            assert all(text.startswith(part.text) for part in parts)
        assert len(parts) == (1 if kind is RequestOutputKind.FINAL_ONLY else 20)


def test_times_are_told_as_they_become_known(make_engine, tokens):
    engine = make_engine(connector=False, max_num_seqs=1)
    first, second = engine.add(tokens(20, 1), 2), engine.add(tokens(9, 2), 2)
    outputs = []
    while engine.llm.has_unfinished_requests():
        outputs += engine.step()
    of_second = [output.metrics for output in outputs if output.request_id == second]
    assert [metrics.e2e_s is None for metrics in of_second] == [True, False]
    # A step takes 1 ms of the fake clock: two for the first prompt, one for its second token.
    assert of_second[-1].queue_s == pytest.approx(0.003)
    assert of_second[-1].ttft_s == pytest.approx(0.003)
    assert of_second[-1].e2e_s == pytest.approx(0.004)
    assert [output.metrics.queue_s for output in outputs if output.request_id == first] == [0, 0]


@pytest.mark.parametrize("keeps", [False, True])
def test_stop_string_ends_the_request(text_engine, keeps):
    prompt = [5, 6, 7, 8, 9]
    tokenizer = text_engine.llm.tokenizer
    right = text_engine.model.expected_tokens(prompt, 30)
    text = tokenizer.decode(prompt + right)[len(tokenizer.decode(prompt)) :]
    stop = next(text[i : i + 3] for i in range(10, 40) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i)
    params = SamplingParams(
        max_tokens=30, temperature=0, stop=["never seen", stop], include_stop_str_in_output=keeps,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    outputs = reports(text_engine, text_engine.llm.add_request(prompt, params))
    last = outputs[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    streamed = "".join(output.outputs[0].text for output in outputs)
    assert streamed == text[: text.index(stop)] + (stop if keeps else "")
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    num_needed = next(
        n for n in range(31) if stop in tokenizer.decode(prompt + right[:n])[len(tokenizer.decode(prompt)) :]
    )
    assert num_tokens <= num_needed + 1, "a token may have to wait for the rest of a character"


def test_the_text_of_a_stop_token_is_left_out(text_engine):
    prompt = [5, 6, 7, 8, 9]
    right = text_engine.model.expected_tokens(prompt, 8)
    stop_token = next(token for i, token in enumerate(right) if i > 2 and token not in right[:i])
    num = right.index(stop_token) + 1
    for keeps in (False, True):
        params = SamplingParams(
            max_tokens=8, temperature=0, stop_token_ids=[stop_token], include_stop_str_in_output=keeps
        )
        output = text_engine.llm.generate(prompt, params)[0].outputs[0]
        assert output.token_ids == right[:num]
        tokenizer = text_engine.llm.tokenizer
        shown = right[:num] if keeps else right[: num - 1]
        assert output.text == tokenizer.decode(prompt + shown)[len(tokenizer.decode(prompt)) :]


def test_stop_strings_need_a_tokenizer(make_engine, tokens):
    llm = make_engine(connector=False).llm
    with pytest.raises(ConfigError, match=r"stop=.*tokenizer"):
        llm.add_request(tokens(5), SamplingParams(stop="x"))
    assert not llm.has_requests()


def test_logprobs_come_one_per_token(text_engine):
    prompt = [5, 6, 7]
    params = {"max_tokens": 4, "temperature": 0, "logprobs": 1}
    (output,) = text_engine.llm.generate(prompt, SamplingParams(**params))
    completion = output.outputs[0]
    assert [list(entry) for entry in completion.logprobs] == [[token] for token in completion.token_ids]
    first = completion.logprobs[0][completion.token_ids[0]]
    assert first.decoded_token == text_engine.llm.tokenizer.decode([completion.token_ids[0]])
    assert first.rank == 1
    request_id = text_engine.llm.add_request(prompt, SamplingParams(output_kind=RequestOutputKind.DELTA, **params))
    assert [len(output.outputs[0].logprobs) for output in reports(text_engine, request_id)] == [1] * 4


def test_ids_are_the_callers_and_must_be_new(make_engine, tokens):
    llm = make_engine(connector=False).llm
    assert llm.add_request(tokens(5), request_id="mine") == "mine"
    with pytest.raises(ConfigError, match="request_id='mine'"):
        llm.add_request(tokens(5), request_id="mine")


def test_generate_leaves_others_reports_to_step(make_engine, tokens):
    llm = make_engine(connector=False).llm
    delta = SamplingParams(max_tokens=3, temperature=0, output_kind=RequestOutputKind.DELTA)
    other = llm.add_request(tokens(9, 1), delta)
    llm.generate(tokens(9, 2), SamplingParams(max_tokens=8, temperature=0))
    outputs = llm.step()
    assert [output.request_id for output in outputs] == [other] * 3
    told = [token for output in outputs for token in output.outputs[0].token_ids]
    assert told == StubModel().expected_tokens(tokens(9, 1), 3)


def test_sampled_output_is_a_function_of_the_seed(tokens):
    def run(seed, **settings):
        with LLM(StubModel(), block_size=4, seed=seed, **settings) as llm:
            outputs = llm.generate([tokens(10 + i, i) for i in range(6)], SamplingParams(max_tokens=12))
            return [output.outputs[0].token_ids for output in outputs], llm.scheduler.num_preemptions

    plain, _ = run(3)
    assert run(3)[0] == plain
    assert run(4)[0] != plain
    squeezed, num_preemptions = run(3, num_kv_blocks=14, max_num_batched_tokens=9, enable_prefix_caching=False)
    assert num_preemptions > 0
    assert squeezed == plain
