"""`kvferry serve` as a process: its options, its signals, and the guides to engine and server."""

from __future__ import annotations

import json
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from tests import small_tokenizer

from kvferry.errors import ConfigError
from kvferry.http import bind_socket
from kvferry.server.run import ServerOptions

ROOT = Path(__file__).parents[2]
NAMED = ("--served-model-name", "tiny")
KVFERRY = str(Path(sys.executable).parent / "kvferry")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, a tokenizer and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer.byte_level()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def serving(model: Path | str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """`kvferry serve` in a process of its own."""
    command = [KVFERRY, "serve", str(model), "--port", "0", "--num-threads", "1", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 240)
        assert ready, "the server did not start"
        line = process.stdout.readline()
        found = re.fullmatch(r"kvferry serves \S+ on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line
        yield process, openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_sigterm_ends_streams_in_good_order_and_flushes(model_folder: Path, tmp_path: Path) -> None:
    transfer = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": 1 << 24, "secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}],
            "stall_timeout_s": 60.0,
        },
    }  # fmt: skip
    arguments = ("--kv-transfer-config", json.dumps(transfer), "--drain-timeout-s", "30", *NAMED)
    request: dict[str, Any] = {
        "model": "tiny", "prompt": [2 + i % 300 for i in range(200)], "max_tokens": 400, "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    with serving(model_folder, *arguments) as (process, client):
        stream = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 400, "what was under way came to its end"
        assert process.wait(90) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    with serving(model_folder, *arguments) as (process, client):
        reply = client.completions.create(**(request | {"max_tokens": 2}))
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 192, "the first server's KV is on disk"
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0


def test_drain_is_bounded(model_folder: Path) -> None:
    with serving(model_folder, "--kv-offloading-size", "0.01", "--drain-timeout-s", "1", *NAMED) as (process, client):
        stream = client.completions.create(
            model="tiny", prompt=[5] * 20, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        started_s = time.monotonic()
        with suppress(openai.APIError, httpx2.HTTPError):
            list(stream)
        assert process.wait(90) == 0
        assert time.monotonic() - started_s < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-transfer-config", '{"kv_role": "kv_consumer"}', "--kv-offloading-size", "1"], "both say"),
        (["--kv-offloading-size", "-1"], "kv_offloading_size=-1.0"),
        (["--kv-transfer-config", "{"], "kv_transfer_config is not valid JSON"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    command = [KVFERRY, "serve", "no-such-model", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options", [{"port": -1}, {"max_queued_requests": -1}, {"max_body_bytes": 0}, {"drain_timeout_s": -1}], ids=repr
)
def test_bad_server_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerOptions(**options)


def test_port_in_use_is_told_before_the_model_is_loaded() -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="port="):
            bind_socket("127.0.0.1", taken.getsockname()[1])
    for host, port in (("127.0.0.1", 70_000), ("no such host", 0)):
        with pytest.raises(ConfigError, match="host="):
            bind_socket(host, port)


# ---- the guides ---------------------------------------------------------------------------------------------------


def fenced(page: str, language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / "guides" / page).read_text(), re.M | re.S)
    return str(block)


def run_python(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_engine_guides_program_runs(tmp_path: Path) -> None:
    lines = run_python(fenced("engine.md", "python"), tmp_path).splitlines()
    assert "Paris" in lines[0]
    assert lines[-1] == "done"


def test_server_guides_commands_run(tmp_path: Path) -> None:
    name, command, model, *options = shlex.split(fenced("server.md", "console"))
    assert (name, command) == ("kvferry", "serve")
    with serving(model, *options) as (_, client):
        program = fenced("server.md", "python")
        assert "http://127.0.0.1:8000/v1" in program, "the default port"
        program = program.replace("http://127.0.0.1:8000/v1", str(client.base_url))
        assert "Paris" in run_python(program, tmp_path)


def test_log_says_capacity_requests_and_what_was_done(model_folder: Path, tmp_path: Path) -> None:
    options = ("--access-log", "--log-interval-s", "0.01", "--num-kv-blocks", "300", "--dtype", "float32")
    log = tmp_path / "log"
    command = [KVFERRY, "serve", str(model_folder), "--port", "0", "--num-threads", "1", *NAMED, *options]
    with log.open("w") as err, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found
            client = openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0, timeout=120)
            client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=8, temperature=0)
            assert '"POST /v1/completions HTTP/1.1" 200' in process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0
        finally:
            process.kill()
    text = log.read_text()
    assert "float32; KV cache of 300 blocks of 16 tokens; at most 4096 tokens in a request, 64 requests" in text
    assert re.search(r"prompt tokens/s .* generated tokens/s; \d running, 0 waiting; KV cache", text)
