"""Text token by token equals text decoded at once; stop strings are found whatever tokens they are cut into."""

from __future__ import annotations

import random
from functools import cache

import pytest
from tests import small_tokenizer

from kvferry.engine.config import SamplingParams
from kvferry.engine.detokenizer import Detokenizer

TEXTS = [
    "the quick brown fox",
    "naïve café, Größe: 12 µm",
    "日本語のテキスト and English",
    "emoji 👩‍👩‍👧 🇩🇪 👍🏽 end",
    "  spaces   and\n\nlines\t",
    "ẛ̣ combining é ö",
]
tokenizer_of = cache(lambda name: getattr(small_tokenizer, name)())


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request):
    return tokenizer_of(request.param)


def stream(tokenizer, prompt_ids, ids, **params):
    """Feed tokens; (text, deltas, stop, number of tokens it took)."""
    detokenizer = Detokenizer(tokenizer, prompt_ids, SamplingParams(**params))
    deltas, stop = [], None
    for num_tokens, token_id in enumerate(ids, start=1):
        stop = detokenizer.append(token_id)
        if stop is None and num_tokens == len(ids):
            stop = detokenizer.flush()
        deltas.append(detokenizer.take_new(is_final=stop is not None or num_tokens == len(ids)))
        assert detokenizer.reported_text() == "".join(deltas)
        if stop is not None:
            break
    assert "".join(deltas) == detokenizer.text
    return detokenizer.text, deltas, stop, num_tokens


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "the dog", "Größe 日本"])
def test_deltas_add_up_to_the_text(tokenizer, text, prompt):
    prompt_ids = tokenizer(prompt)["input_ids"] if prompt else []
    ids = tokenizer(text)["input_ids"]
    streamed, deltas, _, _ = stream(tokenizer, prompt_ids, ids)
    whole = tokenizer.decode(prompt_ids + ids)
    assert streamed == whole[len(tokenizer.decode(prompt_ids)) :]
    assert not any("\ufffd" in delta for delta in deltas)


def test_a_character_is_reported_once_it_is_whole():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer("a👍b")["input_ids"]
    assert len(ids) == 6
    assert stream(tokenizer, [], ids)[1] == ["a", "", "", "", "👍", "b"]
    text, deltas, _, _ = stream(tokenizer, [], ids[:3])
    assert deltas == ["a", "", "\ufffd"], "what never becomes whole is shown at the end"
    assert text == tokenizer.decode(ids[:3])


def test_nonsense_bytes_do_not_hold_text_back_for_ever():
    tokenizer = tokenizer_of("byte_level")
    continuation = tokenizer("👍")["input_ids"][-1]
    _, deltas, _, _ = stream(tokenizer, [], [continuation] * 100)
    assert sum(bool(delta) for delta in deltas) >= 5


def test_special_tokens_are_skipped_or_shown():
    tokenizer = tokenizer_of("byte_level")
    ids = [*tokenizer("the")["input_ids"], 1, *tokenizer(" dog")["input_ids"]]
    assert stream(tokenizer, [], ids)[0] == "the dog"
    assert stream(tokenizer, [], ids, skip_special_tokens=False)[0] == "the</s> dog"


def expected_stop(text, stops):
    """Read one character at a time; the first stop string that is complete, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("seed", range(30))
def test_stops_are_those_of_a_reader_of_characters(tokenizer, seed):
    print("seed", seed)
    rng = random.Random(seed)
    prompt_ids = tokenizer("the dog")["input_ids"]
    text = "".join(rng.choice(["the ", "dog", "日本", "ab", "a", " ", "👍", ".\n"]) for _ in range(20))
    starts = [rng.randrange(len(text)) for _ in range(rng.randint(1, 3))]
    stops = [text[start : start + rng.randint(1, 6)] for start in starts] + ["never", "abab"]
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]
    expected, stop = expected_stop(whole, stops)
    streamed, _, found, num_tokens = stream(tokenizer, prompt_ids, ids, stop=stops)
    assert (streamed, found) == (expected, stop)
    if num_tokens > 1:  # the token before did not complete it
        assert stream(tokenizer, prompt_ids, ids[: num_tokens - 1], stop=stops)[2] is None
    assert stream(tokenizer, prompt_ids, ids, stop=stops, include_stop_str_in_output=True)[0] == expected + (stop or "")


def test_no_more_than_a_possible_stop_is_held_back():
    tokenizer = tokenizer_of("byte_level")
    ids = [tokenizer(letter)["input_ids"][0] for letter in "xENDyEN"]
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop="ENDx"))
    deltas = []
    for token_id in ids:
        detokenizer.append(token_id)
        deltas.append(detokenizer.take_new(is_final=False))
    assert deltas == ["x", "", "", "", "ENDy", "", ""]
    assert detokenizer.take_new(is_final=True) == "EN"
