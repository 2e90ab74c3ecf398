"""Engines that are full, which is no failure, and requests that end engines, which are not passed round."""

from __future__ import annotations

import json
import threading

import openai
import pytest
from tests.e2e.test_proxy import ASK, TEXT, Running, running, wait_until

# ---- engines that are full ------------------------------------------------------------------------------------------

FULL = ["full", "vllm_full", "429"]


def ask_in_background(r: Running) -> tuple[threading.Thread, list[tuple[int, dict[str, str], bytes]]]:
    replies: list[tuple[int, dict[str, str], bytes]] = []
    asking = threading.Thread(target=lambda: replies.append(r.http("POST", "/v1/completions", ASK)))
    asking.start()
    return asking, replies


@pytest.mark.parametrize("mode", FULL)
def test_full_decode_engine_is_no_failure_and_another_one_takes_the_same_hand_over(mode: str) -> None:
    with running(num_decode=2, failure_threshold=1) as r:
        r.decode[0].mode = mode
        for number in range(1, 4):
            assert r.client.completions.create(**ASK).choices[0].text == TEXT
            assert r.num_asked()[0] == [number], "never a second prefill"
        up = f'kvferry:proxy_engine_up{{role="decode",url="{r.decode[0].url}"}}'
        assert (r.metric(up), len(r.decode[0].seen)) == (1, 1), "nor is it asked again before it said"
        (handed,) = (body["kv_transfer_params"] for body in r.decode[0].seen)
        assert r.decode[1].seen[0]["kv_transfer_params"] == handed


@pytest.mark.parametrize("mode", FULL)
def test_request_waits_for_the_only_decode_engine_with_what_was_handed_over(mode: str) -> None:
    with running(failure_threshold=1) as r:
        r.decode[0].mode = mode
        asking, replies = ask_in_background(r)
        wait_until(lambda: len(r.decode[0].seen) >= 2)
        assert r.http("GET", "/ready")[0] == 200
        r.decode[0].mode = "ok"
        asking.join(60)
        ((status, _, content),) = replies
        assert (status, json.loads(content)["choices"][0]["text"]) == (200, TEXT)
        assert len(r.prefill[0].seen) == 1
        assert len({body["kv_transfer_params"]["transfer_id"] for body in r.decode[0].seen}) == 1


@pytest.mark.parametrize(("mode", "status", "code"), [("full", 503, "overloaded"), ("429", 429, "c")])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_engine_that_stays_full_answers_the_client(role: str, mode: str, status: int, code: str, stream: bool) -> None:
    with running(retry_deadline_s=3, failure_threshold=1) as r:
        full = (r.prefill if role == "prefill" else r.decode)[0]
        full.mode, full.retry_after = mode, "7"
        seconds = "7" if mode == "full" else "1"
        told, headers, content = r.http("POST", "/v1/completions", ASK | {"stream": stream})
        error = json.loads(content)["error"]
        assert (told, headers["retry-after"], error["code"]) == (status, seconds, code)
        assert f"{role} engine {full.url} is full: " in error["message"]
        assert ("64 unfinished requests" if mode == "full" else "it is 429") in error["message"]
        assert mode != "full" or len(full.seen) == 1
        assert len(r.prefill[0].seen) == 1 or role == "prefill"
        assert r.metric('kvferry:proxy_requests_total{outcome="full"}') == 1
        assert r.metric(f'kvferry:proxy_engine_up{{role="{role}",url="{full.url}"}}') == 1
        assert r.http("GET", "/ready")[0] == 200


def test_hand_over_too_old_to_be_kept_is_made_once_more_and_not_twice() -> None:
    with running(hand_over_s=0.5, retry_deadline_s=60) as r:
        r.decode[0].mode = "full"
        status, headers, _ = r.http("POST", "/v1/completions", ASK)
        assert (status, headers["retry-after"]) == (503, "1")
        assert len(r.prefill[0].seen) == 2


def test_ready_while_probes_find_the_decode_engine_full() -> None:
    with running(probe_interval_s=0.05, failure_threshold=1) as r:
        wait_until(lambda: r.http("GET", "/ready")[0] == 200)
        r.decode[0].mode = "full"
        num_asked = len(r.decode[0].seen)
        wait_until(lambda: len(r.decode[0].seen) > num_asked + 2)
        assert r.http("GET", "/ready")[0] == 200


def test_full_prefill_engine_does_not_hinder_where_decode_engines_may_compute() -> None:
    with running(strict=False, retry_deadline_s=0.5) as r:
        r.prefill[0].mode = "full"
        assert r.client.completions.create(**ASK).choices[0].text == TEXT
        assert r.metric('kvferry:proxy_recomputed_total{reason="no_prefill_engine"}') == 1


# ---- engines that end while they have a request ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["drop", "engine_ended", "vllm_dead"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_request_that_ended_two_engines_is_not_given_to_a_third(role: str, mode: str, stream: bool) -> None:
    with running(**{f"num_{role}": 3}, max_attempts=9) as r:
        engines = r.prefill if role == "prefill" else r.decode
        for one in engines:
            one.mode = mode
        status, _, content = r.http("POST", "/v1/completions", ASK | {"stream": stream})
        error = json.loads(content)["error"]
        assert (status, error["code"]) == (502, "engines_ended")
        assert "2 engines in a row ended or fell silent while they had this request" in error["message"]
        assert sorted(len(one.seen) for one in engines) == [0, 1, 1]
        assert sum(one.url in error["message"] for one in engines) == 2


def test_stream_of_an_engine_that_ends_at_its_start_is_not_given_to_a_third() -> None:
    with running(num_decode=3, max_attempts=9) as r:
        for one in r.decode:
            one.mode = "cut_at_start"
        status, _, content = r.http("POST", "/v1/completions", ASK | {"stream": True})
        assert (status, json.loads(content)["error"]["code"]) == (502, "engines_ended")
        assert sorted(len(one.seen) for one in r.decode) == [0, 1, 1]


@pytest.mark.parametrize(("role", "stream"), [("prefill", False), ("decode", False), ("decode", True)])
def test_request_that_silenced_two_engines_is_not_given_to_a_third(role: str, stream: bool) -> None:
    limits = dict.fromkeys(("prefill_timeout_s", "decode_timeout_s", "answer_timeout_s"), 60.0)
    limits |= {f"{role}_timeout_s": 0.5} | ({"answer_timeout_s": 0.5} if role == "decode" else {})
    with running(**{f"num_{role}": 3}, max_attempts=9, **limits) as r:
        engines = r.prefill if role == "prefill" else r.decode
        for one in engines:
            one.mode = "hang"
        status, headers, content = r.http("POST", "/v1/completions", ASK | {"stream": stream})
        assert (status, json.loads(content)["error"]["code"]) == (502, "engines_ended")
        assert "no answer within 0.5 s" in json.loads(content)["error"]["message"]
        assert headers["x-should-retry"] == "false"
        assert sorted(len(one.seen) for one in engines) == [0, 1, 1]


def test_openais_client_does_not_send_a_request_again_that_ended_two_engines() -> None:
    with running(num_decode=6, max_attempts=9) as r:
        for one in r.decode:
            one.mode = "drop"
        assert openai.DEFAULT_MAX_RETRIES > 0
        patient = r.client.with_options(max_retries=openai.DEFAULT_MAX_RETRIES)
        with pytest.raises(openai.InternalServerError, match="2 engines in a row"):
            patient.completions.create(**ASK)
        assert sorted(len(one.seen) for one in r.decode) == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(("role", "stream"), [("prefill", False), ("decode", False), ("decode", True)])
def test_request_whose_logits_name_no_token_is_answered_alone(role: str, stream: bool) -> None:
    with running(num_prefill=2, num_decode=2, failure_threshold=1) as r:
        for one in r.prefill if role == "prefill" else r.decode:
            one.mode = "no_token"
        for number in (1, 2):
            status, _, content = r.http("POST", "/v1/completions", ASK | {"stream": stream})
            assert (status, json.loads(content)["error"]["code"]) == (500, "no_token")
            assert "no token can be chosen" in json.loads(content)["error"]["message"]
            asked = r.num_asked()
            assert sum(asked[role == "decode"]) == number, "another engine would say the same"
        for one in (*r.prefill, *r.decode):
            one.mode = "ok"
        for _ in range(2):
            assert r.client.completions.create(**ASK).choices[0].text == TEXT
        figures = [r.metric(f'kvferry:proxy_engine_up{{role="{p.role}",url="{p.url}"}}') for p in r.proxy.fleet.prefill]
        figures += [r.metric(f'kvferry:proxy_engine_up{{role="{d.role}",url="{d.url}"}}') for d in r.proxy.fleet.decode]
        assert figures == [1, 1, 1, 1]
        assert not r.proxy.fleet.problems()


def test_one_engine_that_ends_is_replaced_by_another() -> None:
    with running(num_decode=2) as r:
        r.decode[0].mode = "drop"
        assert r.client.completions.create(**ASK).choices[0].text == TEXT
        assert r.num_asked()[1] == [1, 1]


# ---- why KV was not loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_reason_of_a_failed_load_reaches_the_client(stream: bool, strict: bool) -> None:
    with running(strict=strict, retry_deadline_s=0) as r:
        r.decode[0].mode = "recomputed"
        status, _, content = r.http("POST", "/v1/completions", ASK | {"stream": stream})
        assert status == (502 if strict else 200)
        assert b"the lease is over" in content
        assert strict or b'"load_error": "the lease is over"' in content or b'"load_error":"the' in content
