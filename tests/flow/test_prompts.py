"""What `generate`, `chat`, `stream` and `add_request` take as prompts, and how they refuse all else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import small_tokenizer

from kvferry import SamplingParams
from kvferry.errors import ConfigError

GREEDY = SamplingParams(max_tokens=4, temperature=0)
TEXT, OTHER = "the quick brown fox", "What is it?"
MESSAGES = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is noon!"}]
RENDERED = "<|user|> What is it?\n<|assistant|> It is noon!\n<|assistant|> "  # what small_tokenizer.CHAT_TEMPLATE says
TOKENIZER = small_tokenizer.byte_level()
IDS = TOKENIZER.backend_tokenizer.encode(TEXT).ids
OTHER_IDS = TOKENIZER.backend_tokenizer.encode(OTHER).ids
CHAT_IDS = TOKENIZER.backend_tokenizer.encode(RENDERED).ids


@pytest.fixture
def engine(make_engine):
    engine = make_engine(connector=False, num_kv_blocks=200)
    engine.model.tokenizer = small_tokenizer.byte_level()
    engine.model.tokenizer.pad_token = "</s>"
    engine.model.vocab_size = len(engine.model.tokenizer)
    return engine


def batch(side: str, **settings):
    """Two prompts of different lengths as a tokenizer pads them."""
    tokenizer = small_tokenizer.byte_level()
    tokenizer.pad_token, tokenizer.padding_side = "</s>", side
    return tokenizer([TEXT, OTHER], padding=True, **settings)


def templated(**settings):
    return small_tokenizer.byte_level().apply_chat_template(MESSAGES, add_generation_prompt=True, **settings)


ACCEPTED = {
    "text": (lambda: TEXT, [IDS]),
    "texts": (lambda: [TEXT, OTHER], [IDS, OTHER_IDS]),
    "texts in a tuple": (lambda: (TEXT, OTHER), [IDS, OTHER_IDS]),
    "ids": (lambda: IDS, [IDS]),
    "ids in a tuple": (lambda: tuple(IDS), [IDS]),
    "ids as numpy numbers": (lambda: [np.int64(token) for token in IDS], [IDS]),
    "ids in an array": (lambda: np.array(IDS), [IDS]),
    "ids in a tensor": (lambda: torch.tensor(IDS), [IDS]),
    "rows in a tensor": (lambda: torch.tensor([IDS, IDS[::-1]]), [IDS, IDS[::-1]]),
    "several ids": (lambda: [IDS, OTHER_IDS], [IDS, OTHER_IDS]),
    "text and ids": (lambda: [TEXT, OTHER_IDS], [IDS, OTHER_IDS]),
    "vLLM's text": (lambda: {"prompt": TEXT}, [IDS]),
    "vLLM's tokens": (lambda: {"prompt_token_ids": IDS}, [IDS]),
    "tokens with their text": (lambda: {"prompt_token_ids": IDS, "prompt": "another"}, [IDS]),
    "vLLM's, several": (lambda: [{"prompt": TEXT}, {"prompt_token_ids": OTHER_IDS}], [IDS, OTHER_IDS]),
    "encoded text": (lambda: small_tokenizer.byte_level()(TEXT), [IDS]),
    "encoded text as tensors": (lambda: small_tokenizer.byte_level()(TEXT, return_tensors="pt"), [IDS]),
    "encoded texts": (lambda: small_tokenizer.byte_level()([TEXT, OTHER]), [IDS, OTHER_IDS]),
    "padded right": (lambda: batch("right"), [IDS, OTHER_IDS]),
    "padded left, tensors": (lambda: batch("left", return_tensors="pt"), [IDS, OTHER_IDS]),
    "encodings in a list": (lambda: [small_tokenizer.byte_level()(t) for t in (TEXT, OTHER)], [IDS, OTHER_IDS]),
    "template, mapping": (lambda: templated(return_dict=True), [CHAT_IDS]),
    "template, mapping of tensors": (lambda: templated(return_dict=True, return_tensors="pt"), [CHAT_IDS]),
    "template, ids": (lambda: templated(return_dict=False), [CHAT_IDS]),
    "template, text": (lambda: templated(tokenize=False), [CHAT_IDS]),
    "nothing": (list, []),
}
REFUSED = {
    "None": (None, "NoneType"),
    "a number": (7, "int"),
    "bytes": (b"text", "bytes"),
    "a set": ({5, 6}, "set"),
    "an iterator": (iter([5, 6]), "list_iterator"),
    "an object": (object(), "object"),
    "float ids": ([0.5, 1.5], r"prompts\[0\] is of type float"),
    "None among texts": ([TEXT, None], r"prompts\[1\] is of type NoneType"),
    "ids after text": ([TEXT, 5], r"prompts\[1\] is of type int"),
    "text after ids": ([5, TEXT], "'the quick brown fox' is not a token id"),
    "a truth value among ids": ([5, True], "True is not a token id"),
    "bytes in a list": ([b"text"], r"prompts\[0\] is of type bytes"),
    "messages": (MESSAGES, r"prompts\[0\] is a message.*LLM\.chat"),
    "one message": (MESSAGES[0], "is a message.*LLM.chat"),
    "conversations": ([MESSAGES], r"prompts\[0\] is of type list"),
    "an unknown mapping": ({"text": TEXT}, r"keys \['text'\].*prompt_token_ids"),
    "an empty mapping": ({}, r"keys \[\]"),
    "a prompt that is no text": ({"prompt": IDS}, "'prompt' of type list: it must be text"),
    "ids that are text": ({"prompt_token_ids": TEXT}, "'prompt_token_ids' of type str"),
    "a salt that is no text": ({"prompt": TEXT, "cache_salt": 7}, "'cache_salt' of type int"),
    "an image": ({"prompt": TEXT, "multi_modal_data": {"image": 1}}, "'multi_modal_data' beside 'prompt'"),
    "embeddings": ({"prompt_embeds": torch.zeros(2, 4)}, "prompt_embeds"),
    "a mask of another shape": ({"input_ids": IDS, "attention_mask": [1]}, "attention_mask"),
    "input_ids without a token": ({"input_ids": []}, "'input_ids'"),
    "an empty text": ("", "the prompt is empty"),
    "no ids in a list": ([TEXT, []], r"prompts\[1\] is empty"),
    "fully masked": ({"input_ids": IDS, "attention_mask": [0] * len(IDS)}, "the prompt is empty"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_each_accepted_type_is_answered_as_its_tokens_are(engine, name):
    make, expected_ids = ACCEPTED[name]
    outputs = engine.llm.generate(make(), GREEDY)
    assert [output.prompt_token_ids for output in outputs] == expected_ids
    assert [output.outputs[0].token_ids for output in outputs] == [
        engine.model.expected_tokens(ids, 4) for ids in expected_ids
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_all_else_is_refused_and_nothing_is_started(engine, name):
    prompt, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        engine.llm.generate(prompt, GREEDY)
    with pytest.raises(ConfigError):
        engine.llm.add_request(prompt, GREEDY)
    with pytest.raises(ConfigError):
        engine.llm.stream(prompt, GREEDY)
    assert not engine.llm.has_requests()


@pytest.mark.parametrize("params", [{"max_tokens": 4}, "greedy", 4, [GREEDY, {"max_tokens": 4}], SamplingParams])
def test_sampling_params_of_another_type_are_refused(engine, params):
    with pytest.raises(ConfigError, match="must be a SamplingParams"):
        engine.llm.generate([TEXT, OTHER], params)
    with pytest.raises(ConfigError, match="must be a SamplingParams"):
        engine.llm.add_request(TEXT, params)
    with pytest.raises(ConfigError, match="must be a SamplingParams"):
        engine.llm.stream(TEXT, params)
    assert not engine.llm.has_requests()


@pytest.mark.parametrize(
    "setting", [{"stop": 5}, {"stop_token_ids": 5}, {"stop_token_ids": {5: 1}}, {"stop": {"a": 1}}]
)
def test_stops_of_another_type_are_refused(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.* must be a list"):
        SamplingParams(**setting)


def test_one_prompt_is_wanted_where_one_is_answered(engine):
    with pytest.raises(ConfigError, match="one prompt is wanted here, not 2"):
        engine.llm.add_request(batch("left"), GREEDY)


def test_the_salt_of_a_prompt_keeps_its_kv_apart(engine):
    text = TEXT * 4
    prompts = [{"prompt": text, "cache_salt": "a"}, {"prompt": text, "cache_salt": "b"}, {"prompt": text}]
    assert [engine.llm.generate(prompt, GREEDY)[0].num_cached_tokens for prompt in prompts] == [0, 0, 0]
    assert all(engine.llm.generate(prompt, GREEDY)[0].num_cached_tokens > 0 for prompt in prompts)
    assert engine.llm.generate(text, GREEDY, cache_salt="a")[0].num_cached_tokens > 0


def test_salts_and_ids_that_are_no_text_are_refused(engine):
    with pytest.raises(ConfigError, match="cache_salt=7 must be text"):
        engine.llm.generate(TEXT, GREEDY, cache_salt=7)
    with pytest.raises(ConfigError, match="request_id=7 must be text"):
        engine.llm.add_request(TEXT, GREEDY, request_id=7)


def test_a_conversation_is_what_the_chat_template_makes_of_it(engine):
    one = engine.llm.chat(MESSAGES, GREEDY)
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]}]
    two = engine.llm.chat([MESSAGES, parts + MESSAGES[1:]], GREEDY)
    assert [output.prompt_token_ids for output in one + two] == [CHAT_IDS] * 3
    assert one[0].outputs[0].token_ids == engine.model.expected_tokens(CHAT_IDS, 4)
    open_ended = engine.llm.chat(MESSAGES, GREEDY, add_generation_prompt=False)[0].prompt_token_ids
    assert engine.llm.tokenizer.decode(open_ended) == RENDERED.removesuffix("<|assistant|> ")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages of type str"),
        (None, "messages of type NoneType"),
        ([TEXT], "messages of type str"),
        ([{"content": "hello"}], "a role"),
        ([{"role": "user"}], "content of type NoneType"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "image_url"),
        ([{"role": "pirate", "content": "hello"}], "chat template refuses the messages: unknown role"),
    ],
)
def test_what_is_no_conversation_is_refused(engine, messages, message):
    with pytest.raises(ConfigError, match=message):
        engine.llm.chat(messages, GREEDY)


def test_a_model_without_template_or_tokenizer_says_so(engine):
    engine.model.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        engine.llm.chat(MESSAGES, GREEDY)
    engine.model.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        engine.llm.chat(MESSAGES, GREEDY)


def test_n_completions_are_those_of_as_many_requests(engine):
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=40)
    alone = [
        engine.llm.generate(IDS, SamplingParams(max_tokens=6, temperature=1.5, seed=40 + i))[0].outputs[0].token_ids
        for i in range(3)
    ]
    assert len(set(map(tuple, alone))) == 3
    several = engine.llm.generate([IDS, OTHER_IDS], [SamplingParams(**{**_given(params), "n": 3}), GREEDY])
    assert [len(output.outputs) for output in several] == [3, 1]
    assert [part.token_ids for part in several[0].outputs] == alone
    assert [part.index for part in several[0].outputs] == [0, 1, 2]
    assert {part.finish_reason for part in several[0].outputs} == {"length"}
    assert several[1].outputs[0].token_ids == engine.model.expected_tokens(OTHER_IDS, 4)


def _given(params):
    return {name: getattr(params, name) for name in ("max_tokens", "temperature", "seed")}


@pytest.mark.parametrize("n", [0, -1, 129, 1.0, True, "2"])
def test_n_is_checked(n):
    with pytest.raises(ConfigError, match=f"n={n!r}"):
        SamplingParams(n=n)


@pytest.mark.parametrize("asked", ["do_remote_prefill", "do_remote_decode"])
def test_a_hand_over_is_for_one_completion(asked):
    params = {"kv_transfer_params": {asked: True}}
    assert SamplingParams(extra_args=params).n == 1
    assert SamplingParams(n=2, extra_args={"kv_transfer_params": {"other": True}}).n == 2
    with pytest.raises(ConfigError, match="n=2: one hand-over"):
        SamplingParams(n=2, extra_args=params)


def test_a_single_request_has_one_completion(engine):
    with pytest.raises(ConfigError, match="n=2: add one request for each"):
        engine.llm.add_request(IDS, SamplingParams(n=2))


def test_a_stream_brings_each_token_once_and_text_in_pieces(engine):
    params = SamplingParams(max_tokens=20, temperature=0, skip_special_tokens=False)
    whole = engine.llm.generate(TEXT, params)[0].outputs[0]
    outputs = list(engine.llm.stream(TEXT, params))
    assert [output.outputs[0].token_ids for output in outputs] == [
        [token] for token in engine.model.expected_tokens(IDS, 20)
    ]
    assert "".join(output.outputs[0].text for output in outputs) == whole.text
    assert [output.finished for output in outputs] == [False] * 19 + [True]
    assert not engine.llm.has_requests()


def test_streams_and_generate_take_nothing_from_each_other(engine):
    params = SamplingParams(max_tokens=12, temperature=0)
    first, second = engine.llm.stream(IDS, params), engine.llm.stream(OTHER_IDS, params)
    told = {"first": [next(first)], "second": [next(second)]}
    assert engine.llm.generate(IDS[::-1], params)[0].outputs[0].token_ids == engine.model.expected_tokens(IDS[::-1], 12)
    told["second"] += second
    told["first"] += first
    for name, ids in (("first", IDS), ("second", OTHER_IDS)):
        tokens = [token for output in told[name] for token in output.outputs[0].token_ids]
        assert tokens == engine.model.expected_tokens(ids, 12)


def test_a_stream_of_several_completions_says_which_is_which(engine):
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=40, n=3)
    right = [part.token_ids for part in engine.llm.generate(IDS, params)[0].outputs]
    got: list[list[int]] = [[], [], []]
    outputs = list(engine.llm.stream(IDS, params))
    for output in outputs:
        got[output.outputs[0].index] += output.outputs[0].token_ids
    assert got == right
    assert len({output.request_id for output in outputs}) == 1


def test_a_stream_that_is_given_up_ends_its_request(engine):
    with pytest.raises(ConfigError, match="not a token id"):
        engine.llm.stream([10**6], GREEDY)  # at once, before anything is asked of it
    stream = engine.llm.stream(IDS, SamplingParams(max_tokens=50, temperature=0))
    next(stream)
    stream.close()
    assert not engine.llm.has_unfinished_requests() or [o.outputs[0].finish_reason for o in engine.step()] == ["abort"]
    assert not engine.llm.has_unfinished_requests()
