"""What each leg is sent, and what replies are understood to say."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from kvferry.http import ApiError
from kvferry.proxy.bodies import ClientCall, decode_body, prefill_body
from kvferry.proxy.replies import ReplyVerdict, error_of, judge_event

PATH = "/v1/completions"
HANDED = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 5, "remote_first_token_ids": [9]}


def prefill(body: dict[str, Any]) -> dict[str, Any]:
    before = copy.deepcopy(body)
    sent: dict[str, Any] = json.loads(prefill_body(ClientCall(PATH, body), "t1"))
    assert body == before
    return sent


def decode(body: dict[str, Any], params: dict[str, Any] | None = HANDED, **more: Any) -> dict[str, Any]:
    sent: dict[str, Any] = json.loads(decode_body(ClientCall(PATH, body), params, "t1", more.get("sign")))
    return sent


def test_prefill_keeps_what_shapes_the_first_token() -> None:
    shaping = {
        "model": "m", "prompt": [1, 2], "temperature": 0.5, "seed": 3, "top_p": 0.9, "logit_bias": {"5": 1},
        "stop_token_ids": [4], "ignore_eos": True, "cache_salt": "s", "response_format": {"type": "json_object"},
    }  # fmt: skip
    answer = {
        "stream": True, "stream_options": {"include_usage": True}, "stop": ["x"], "logprobs": 3, "n": 1, "echo": True,
        "max_tokens": 50, "return_token_ids": True, "logprob_token_ids": [5],
    }  # fmt: skip
    params = {
        "do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "t1", "remote_engine_id": None,
        "remote_block_ids": None, "remote_host": None, "remote_port": None, "remote_request_id": None,
    }  # fmt: skip
    wanted = shaping | {"max_tokens": 1, "stream": False, "n": 1, "kv_transfer_params": params}
    assert prefill(shaping | answer) == wanted


@pytest.mark.parametrize(("given", "sent"), [(0, 0), (1, 1), (30, 1)])
def test_min_tokens_still_forbids_an_early_end(given: int, sent: int) -> None:
    assert prefill({"prompt": "a", "min_tokens": given, "max_tokens": 40})["min_tokens"] == sent


def test_both_limits_of_a_chat_become_one_token() -> None:
    sent = prefill({"messages": [], "max_completion_tokens": 9})
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (1, 1)
    assert "max_completion_tokens" not in prefill({"prompt": "a", "max_tokens": 9}), "completions do not know it"


def test_decode_gets_the_clients_body_and_what_was_handed_over() -> None:
    body = {"prompt": "a", "max_tokens": 7, "stream": True, "stop": ["x"], "min_tokens": 3}
    assert decode(body) == body | {"kv_transfer_params": HANDED | {"transfer_id": "t1"}}
    assert decode(body, HANDED | {"transfer_id": "theirs"})["kv_transfer_params"]["transfer_id"] == "theirs"
    assert decode(body, HANDED | {"transfer_id": None})["kv_transfer_params"]["transfer_id"] == "t1"
    assert decode(body, None) == body


@pytest.mark.parametrize(("logprobs", "is_handed_over"), [(None, True), (False, True), (0, False), (True, False)])
def test_first_token_is_sampled_again_where_its_logprobs_are_wanted(logprobs: Any, is_handed_over: bool) -> None:
    sent = decode({"prompt": "a", "logprobs": logprobs})["kv_transfer_params"]
    assert ("remote_first_token_ids" in sent) == is_handed_over
    assert sent["remote_host"] == "h"


@pytest.mark.parametrize("body", ['{"prompt":"\u96ea\u0436\u00e9"}', '{"prompt":[1,2,3],"user":null}'])
def test_an_engine_gets_no_more_bytes_than_the_proxy_took(body: str) -> None:
    """Both have the same limit."""
    call = ClientCall.parse(PATH, body.encode(), {}, 64)
    assert decode_body(call, None, "t1", None) == body.encode()


def test_peers_are_signed_as_the_decode_engine_sees_them() -> None:
    def sign(params: dict[str, Any], hosts: tuple[str, ...]) -> str:
        return f"{params['remote_host']}:{params['remote_port']} {params['transfer_id']}"

    assert decode({"prompt": "a"}, sign=sign)["kv_transfer_params"]["peer_token"] == "h:5 t1"
    assert "kv_transfer_params" not in decode({"prompt": "a"}, None, sign=sign)
    assert "peer_token" not in decode({"prompt": "a"}, sign=lambda params, hosts: None)["kv_transfer_params"]
    assert "peer_token" not in HANDED
    assert "peer_token" not in decode({"prompt": "a"}, HANDED | {"peer_token": "an engine's"})["kv_transfer_params"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"prompt": "a"}, None),
        ({"prompt": ["a"]}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": [[1, 2]], "n": 1}, None),
        ({"messages": [{}, {}], "logprobs": True}, None),
        ({"prompt": "a", "echo": True}, None),
        ({"prompt": ["a", "b"]}, "prompt has 2 prompts"),
        ({"prompt": [[1], [2]]}, "prompt has 2 prompts"),
        ({"messages": [], "n": 3}, "n=3"),
        ({"prompt": "a", "best_of": 2}, "best_of=2"),
        ({"prompt": "a", "prompt_logprobs": 0}, "log-probabilities of the prompt"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "log-probabilities of the prompt"),
        ({"messages": [], "echo": True}, "log-probabilities of the prompt"),
        ({"messages": [], "echo": True, "top_logprobs": None}, "log-probabilities of the prompt"),
        ({"messages": [], "echo": False, "logprobs": True, "top_logprobs": 2}, None),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt_embeds": "bytes"}, "prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": ["bytes"]}, "prompt_embeds"),
    ],
)
def test_what_cannot_be_split(body: dict[str, Any], why: str | None) -> None:
    path = "/v1/chat/completions" if "messages" in body else PATH
    assert ClientCall(path, body).whole_because == why


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000], ids=lambda d: d[:8])
def test_bodies_that_are_no_object(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        ClientCall.parse(PATH, data, {}, 64)
    assert caught.value.status == 400


def test_clients_do_not_name_peers() -> None:
    with pytest.raises(ApiError, match="kv_transfer_params") as caught:
        ClientCall.parse(PATH, b'{"prompt": "a", "kv_transfer_params": {"remote_host": "10.0.0.1"}}', {}, 64)
    assert caught.value.param == "kv_transfer_params"
    with pytest.raises(ApiError, match="vllm_xargs"):  # vLLM would read them there, and fail
        ClientCall.parse(PATH, b'{"prompt": "a", "vllm_xargs": {"kv_transfer_params": "x"}}', {}, 64)
    assert ClientCall.parse(PATH, b'{"prompt": "a", "kv_transfer_params": null}', {}, 64).body == {"prompt": "a"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("stream", value) for value in (0, 1, "true", "on", "false", 1.0, [])),
        *((name, value) for name in ("n", "best_of", "min_tokens") for value in ("2", 2.0, True, [2])),
    ],
)
def test_what_the_proxy_reads_is_of_one_type(name: str, value: Any) -> None:
    """vLLM takes 1 for true and "2" for 2. Had the proxy read it otherwise, the engine would have answered a stream
    where a whole reply was awaited, which counts as its failure; or two completions for one hand-over."""
    with pytest.raises(ApiError, match=f"{name} is of type {type(value).__name__}, not ") as caught:
        ClientCall.parse(PATH, json.dumps({"prompt": "a", name: value}).encode(), {}, 64)
    assert (caught.value.status, caught.value.param) == (400, name)
    ClientCall.parse(PATH, json.dumps({"prompt": "a", name: None}).encode(), {}, 64)


def judge(content: Any) -> ReplyVerdict:
    return judge_event(json.dumps(content).encode())


def chunk(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **choice}]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (chunk(delta={"role": "assistant", "content": ""}, logprobs=None, finish_reason=None), False),
        (chunk(delta={"content": "a"}), True),
        (chunk(delta={"tool_calls": [{}]}), True),
        (chunk(delta={}, finish_reason="stop"), True),
        (chunk(text=""), False),
        (chunk(text="", token_ids=[5]), True),
        (chunk(text=" "), True),
        ({"choices": [], "usage": {}}, True),
    ],
)
def test_which_events_carry_an_answer(content: dict[str, Any], says: bool) -> None:
    assert judge(content).has_content == says


def test_errors_and_recomputes_are_seen() -> None:
    assert judge({"error": {"message": "no"}}).error == "no"
    assert judge({"error": "no"}).error == "no"
    assert 'finish_reason="error"' in str(judge(chunk(text="", finish_reason="error")).error)
    good = judge({**chunk(text="a"), "kv_transfer_params": {"num_recomputed_tokens": 5}})
    assert (good.error, good.num_recomputed_tokens) == (None, 5)
    for params in (None, {}, {"hidden_states_path": "/x"}, {"do_remote_prefill": False}):
        assert judge({**chunk(text="a"), "kv_transfer_params": params}).hand_over is None
    assert judge({**chunk(text="a"), "kv_transfer_params": HANDED}).hand_over == HANDED
    why = {"load_error": "gone", "num_recomputed_tokens": 5}
    assert judge({**chunk(text="a"), "kv_transfer_params": why}).load_error == "gone"


@pytest.mark.parametrize(
    ("body", "message", "is_full", "is_death"),
    [
        ({"error": {"message": "64 of 64", "type": "server_error", "code": "overloaded"}}, "64 of 64", True, False),
        ({"error": {"message": "busy", "type": "Service Unavailable", "code": 503}}, "busy", True, False),
        ({"error": {"message": "stopping", "type": "server_error", "code": "unavailable"}}, "stopping", False, False),
        ({"error": {"message": "it broke", "code": "engine_ended"}}, "it broke", False, True),
        ({"error": {"message": "EngineCore encountered an issue. See", "type": "InternalServerError", "code": 500}},
         "EngineCore encountered an issue. See", False, True),
        ({"error": "scaling"}, "scaling", False, False),
        ([], "[]", False, False),
    ],
)  # fmt: skip
def test_error_reply_tells_full_from_broken(body: Any, message: str, is_full: bool, is_death: bool) -> None:
    error = error_of(json.dumps(body).encode())
    assert (error.message, error.is_full, error.is_death) == (message, is_full, is_death)


def test_error_reply_that_is_no_json_is_neither_full_nor_dead() -> None:
    error = error_of(b"<h1>Service\n Unavailable</h1>")
    assert (error.message, error.is_full, error.is_death) == ("<h1>Service Unavailable</h1>", False, False)
