"""A storing engine is killed at 20 moments; whatever it acknowledged is found again, and every byte served is right.

The right bytes come from the stub model's definition (a pure function of the tokens), not from anything stored.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kill_child
import pytest
import xxhash
from kill_child import BLOCK_SIZE, CHUNK_TOKENS, PROMPT_TOKENS, batch_numbers, prompt, transfer

from kvferry import LLM, SamplingParams
from kvferry.kv.keys import Identity, KeyChain, store_key
from kvferry.testing.stub_model import StubModel

HERE = Path(__file__).parent
CHUNKS_PER_PROMPT = PROMPT_TOKENS // CHUNK_TOKENS
ROUND_SIZE = 1000
MIDDLE_OF = ["chunk-write"] * 6 + ["index-write"] * 4 + ["chunk-rename"] * 2
NUM_KILLS = 20


def expected_payloads(tokens: list[int]) -> Iterator[tuple[bytes, bytes]]:
    """(key, payload) of each chunk: block by block, layer by layer, in token order."""
    model = StubModel()
    layers = [model.expected_kv(tokens, layer) for layer in range(len(model.layers))]
    block_bytes = BLOCK_SIZE * model.token_bytes
    chain = KeyChain(Identity("version:1"))
    chain.extend(tokens)
    for chunk in range(CHUNKS_PER_PROMPT):
        blocks = range(chunk * CHUNK_TOKENS // BLOCK_SIZE, (chunk + 1) * CHUNK_TOKENS // BLOCK_SIZE)
        payload = b"".join(kv[b * block_bytes : (b + 1) * block_bytes] for b in blocks for kv in layers)
        yield store_key(chain.value_at((chunk + 1) * CHUNK_TOKENS), 0, 0), payload


def kill_once(folder: Path, step: str, count: int, first_prompt: int, num_acks: int) -> tuple[dict[str, str], set[int]]:
    """Run an engine until it dies: by itself in the middle of `step`, or by us after `num_acks` acknowledgements."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])}
    argv = [sys.executable, kill_child.__file__, str(folder), step, str(count), str(first_prompt)]
    acknowledged: dict[str, str] = {}
    prompts: set[int] = set()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for line in child.stdout:
            first, _, second = line.removesuffix("\n").partition(" ")
            if first == "prompt":
                prompts.update(batch_numbers(int(second)))
            elif line.endswith("\n") and len(second) == 32:  # the last line may be torn
                acknowledged[first] = second
            if step == "never" and len(acknowledged) >= num_acks:
                child.kill()
        errors = child.stderr.read()
    assert child.returncode == -signal.SIGKILL, errors[-3000:]
    return acknowledged, prompts


def check_chunks(folder: Path, acknowledged: dict[str, str], prompts: set[int]) -> set[int]:
    """Each acknowledged chunk is a whole file of the right bytes. Returns the prompts that are there completely."""
    files = {file.stem: file for file in folder.rglob("*.kv")}
    unseen, whole = set(acknowledged), set()
    for number in prompts:
        is_whole = True
        for key, payload in expected_payloads(prompt(number)):
            is_whole &= key.hex() in acknowledged
            if key.hex() in acknowledged:
                unseen.discard(key.hex())
                assert acknowledged[key.hex()] == xxhash.xxh3_128(payload).hexdigest(), "acknowledged wrong bytes"
                assert files[key.hex()].read_bytes()[4096:] == payload
        if is_whole:
            whole.add(number)
    assert not unseen, "acknowledged chunks that belong to no prompt"
    return whole


def check_engine(folder: Path, whole: set[int]) -> None:
    """A new engine serves every complete prompt from disk: tokens and KV bytes right."""
    model = StubModel()
    config = transfer(folder, "never", 0)
    with LLM(StubModel(), block_size=BLOCK_SIZE, num_kv_blocks=120, kv_transfer_config=config) as llm:
        for number in sorted(whole):
            tokens = prompt(number)
            output = llm.generate(tokens, SamplingParams(max_tokens=2, temperature=0))[0]
            assert output.external_hit_sources == {"disk": CHUNKS_PER_PROMPT * CHUNK_TOKENS}
            assert output.outputs[0].token_ids == model.expected_tokens(tokens, 2)
            assert llm.reset_prefix_cache()


@pytest.mark.timeout(1500)
def test_everything_acknowledged_survives_20_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    steps = MIDDLE_OF + ["never"] * (NUM_KILLS - len(MIDDLE_OF))
    rng.shuffle(steps)
    folder = tmp_path / "kv"
    acknowledged: dict[str, str] = {}
    prompts: set[int] = set()
    for round_, step in enumerate(steps):
        acks, numbers = kill_once(folder, step, rng.randrange(2, 40), round_ * ROUND_SIZE, rng.randrange(1, 60))
        acknowledged |= acks
        prompts |= numbers
    whole = check_chunks(folder, acknowledged, prompts)
    print(f"{len(acknowledged)} chunks acknowledged, {len(whole)} prompts complete, deaths: {sorted(steps)}")
    assert len(acknowledged) >= 200
    assert len(whole) >= 10
    check_engine(folder, set(rng.sample(sorted(whole), min(30, len(whole)))))
