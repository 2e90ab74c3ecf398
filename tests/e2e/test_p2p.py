"""Two `kvferry serve` processes: one prefills, the other decodes with its KV; all through HTTP, as a router does it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from test_serve import NAMED, model_folder, serving

PROMPT = [2 + (i * 31 + i * i) % 250 for i in range(300)]
SAMPLING: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 40}

__all__ = ["model_folder"]


def transfer(mode: str) -> tuple[str, ...]:
    config = {
        "kv_connector": "P2PConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"transport": "shm", "mode": mode, "handshake_s": 30.0},
    }  # fmt: skip
    return ("--kv-transfer-config", json.dumps(config), *NAMED)


def ask(client: openai.OpenAI, params: dict[str, Any] | None, **extra: Any) -> Any:
    body = {"ignore_eos": True, "kv_transfer_params": params} | extra
    return client.completions.create(prompt=PROMPT, extra_body=body, **SAMPLING)


def figure(client: openai.OpenAI, name: str) -> float:
    """The sum of a metric's series."""
    text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def test_prefill_here_decode_there(model_folder: Path) -> None:
    """The decode engine runs the second model runner, and so does the prefill engine that pushes."""
    v2 = "--use-v2-model-runner"
    with serving(model_folder, *transfer("pull"), v2) as (decoder, decode):
        for mode in ("pull", "push"):  # the prefill engine decides, and says so in the parameters
            with serving(model_folder, *transfer(mode), *([v2] if mode == "push" else [])) as (prefiller, prefill):
                params = check_hand_overs(prefill, decode, mode)
                prefiller.send_signal(signal.SIGTERM)
                assert prefiller.wait(90) == 0
            with pytest.raises(openai.APIError):
                ask(decode, params)  # its peer is gone, and the policy says that it fails
        assert ask(decode, None).usage.completion_tokens == 40
        decoder.send_signal(signal.SIGTERM)
        assert decoder.wait(90) == 0


def check_hand_overs(prefill: openai.OpenAI, decode: openai.OpenAI, mode: str) -> dict[str, Any]:
    """Two of one prompt; answers the parameters of the second."""
    salt = {"cache_salt": mode}
    before = figure(decode, "kvferry:connector_hit_tokens_total")
    for number in range(2):
        reply = ask(prefill, {"do_remote_decode": True}, max_tokens=1, **salt)
        params: dict[str, Any] = reply.model_extra["kv_transfer_params"]
        assert (params["remote_num_tokens"], params["transfer_mode"]) == (300, mode)
        handed = ask(decode, params, **salt)
        assert handed.usage.completion_tokens == 40
        cached = reply.usage.prompt_tokens_details.cached_tokens
        assert (cached == 0) == (number == 0), "what the prefill engine had in its cache"
        assert handed.usage.prompt_tokens_details.cached_tokens == params["remote_prefill_cached_tokens"] == cached
        # The second time all but what is behind the last whole block is there already.
        hits = figure(decode, "kvferry:connector_hit_tokens_total") - before
        assert hits == 300 if number == 0 else 300 < hits <= 316
    assert handed.choices[0].text == ask(prefill, None, **salt).choices[0].text
    mover, name = (decode, "loaded") if mode == "pull" else (prefill, "stored")
    assert figure(mover, f"kvferry:connector_{name}_bytes_total") > 0
    return params
