"""The README's `vllm serve` command, as HTTP clients see it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_process import assert_same_tokens
from tests.patience import PATIENCE_S, wait_until
from vllm_server import Server, complete

CHUNK_TOKENS = 64
CONNECTOR = "OffloadingConnector"
PROMPT = [(i * i * 31 + i * 7) % 40000 + 100 for i in range(700)]
ROOT = Path(__file__).parents[2]


def readme_command(model: str, folder: Path) -> list[str]:
    """The command the README gives, with this model, less memory and this folder for its file tier."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("vllm serve "))
    words = shlex.split(line.replace(" MODEL ", f" {shlex.quote(model)} "))
    place = words.index("--kv-transfer-config") + 1
    transfer = json.loads(words[place])
    extra = transfer["kv_connector_extra_config"]
    extra["cpu_bytes_to_use"] = 1 << 28
    extra["secondary_tiers"][0]["path"] = str(folder)
    words[place] = json.dumps(transfer)
    words[words.index("--shutdown-timeout") + 1] = str(int(PATIENCE_S))
    return words


@pytest.fixture(scope="module")
def server(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    command = [*readme_command(model_folder, folder / "kv"), "--enable-prompt-tokens-details"]
    server = Server(command, folder / "server.log")
    try:
        server.wait_until_up()
        yield server
    finally:
        server.stop()


def stored(prompt: list[int]) -> int:
    return len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS


def chunk_files(server: Server) -> list[Path]:
    return list((server.folder / "kv").rglob("*.kv"))


def step(server: Server) -> dict[str, float]:
    """Our rows after a step of the engine, for vLLM collects statistics only in one."""
    server.client.completions.create(model="small", prompt=[5], max_tokens=2)
    return server.connector_rows(CONNECTOR)


@pytest.mark.timeout(1500)
def test_hit_and_metrics(server: Server) -> None:
    cold = complete(server.client, PROMPT)
    assert server.counter("external_prefix_cache_hits") == 0
    server.reset(external=False)
    warm = complete(server.client, PROMPT)
    assert server.counter("external_prefix_cache_hits") == warm["cached_tokens"] == stored(PROMPT)
    assert server.counter("external_prefix_cache_queries") >= len(PROMPT)
    assert server.counter("prefix_cache_hits") == 0
    assert_same_tokens(warm, cold)
    wait_until("the file tier has it", lambda: step(server).get("stores_total fs", 0) > 0)
    rows = server.connector_rows(CONNECTOR)
    assert rows["hit_tokens_total host"] == stored(PROMPT)
    assert rows["loads_total host"] == stored(PROMPT) / CHUNK_TOKENS
    on_disk = sum(path.stat().st_size for path in server.folder.joinpath("kv").rglob("*") if path.is_file())
    assert 0 < rows["stored_bytes_total fs"] <= on_disk


@pytest.mark.timeout(1500)
def test_client_that_goes_away(server: Server) -> None:
    prompt = PROMPT[::-1]
    cold = complete(server.client, prompt)
    server.reset(external=True)
    hits, generated = server.counter("external_prefix_cache_hits"), server.counter("generation_tokens")
    with server.client.completions.create(
        model="small", prompt=prompt, max_tokens=1000, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    server.reset(external=False)  # possible once the request is gone
    assert server.counter("external_prefix_cache_hits") == hits
    assert 0 < server.counter("generation_tokens") - generated < 1000
    warm = complete(server.client, prompt)
    assert server.counter("external_prefix_cache_hits") - hits == warm["cached_tokens"] == stored(prompt)
    assert_same_tokens(warm, cold)


@pytest.mark.timeout(1500)
def test_sigterm_leaves_all_chunks_on_disk_and_no_shared_memory(server: Server) -> None:
    prompt = [token + 1 for token in PROMPT]
    before, on_disk = step(server)["stores_total host"], len(chunk_files(server))
    num_tokens = len(prompt) + len(complete(server.client, prompt)["token_ids"])
    num_chunks = num_tokens // CHUNK_TOKENS
    wait_until("host memory has it", lambda: step(server)["stores_total host"] == before + num_chunks)
    processes = server.processes()
    assert any("/kvferry-" in Path(f"/proc/{pid}/maps").read_text() for pid in processes)
    server.terminate()
    assert len(chunk_files(server)) == on_disk + num_chunks
    left = [path.name for path in Path("/dev/shm").glob("kvferry-*") if int(path.name.split("-")[2]) in processes]
    assert left == []
