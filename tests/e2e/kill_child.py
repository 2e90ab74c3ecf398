"""An engine that stores as fast as it can until it is killed; acknowledges each durable chunk on stdout.

argv: folder, step, count, number of the first prompt. Prints `prompt N` and `KEY DIGEST`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel

PROMPT_TOKENS = 400
CHUNK_TOKENS = 64
BLOCK_SIZE = 16


def prompt(number: int) -> list[int]:
    """A prompt of its own for each number."""
    return [number % 1000, number // 1000, *((i * 31 + i * i) % 1000 for i in range(PROMPT_TOKENS - 2))]


def batch_numbers(number: int) -> list[int]:
    """The prompts that run together: two new ones, and an old one to load."""
    return [number, number + 1, max(0, number - 6)]


def transfer(folder: Path, step: str, count: int) -> dict[str, object]:
    """Both tiers: a host arena that is always too small, and the disk."""
    tier = {
        "type": "KillableDisk",
        "tier_module_path": "killable_disk",
        "path": str(folder),
        "step": step,
        "count": count,
    }
    extra: dict[str, object] = {"weights_version": "1", "cpu_bytes_to_use": 30 * 8192, "secondary_tiers": [tier]}
    extra["stall_timeout_s"] = 60.0
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def main() -> None:
    folder, step, count, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    llm = LLM(StubModel(), block_size=BLOCK_SIZE, num_kv_blocks=120, kv_transfer_config=transfer(folder, step, count))

    def acknowledge(key: bytes, digest: bytes, tier: str) -> None:
        os.write(1, f"{key.hex()} {digest.hex()}\n".encode())

    llm.connector.side.on_durable = acknowledge  # type: ignore[union-attr]
    greedy = SamplingParams(max_tokens=2, temperature=0)
    while True:
        os.write(1, f"prompt {number}\n".encode())
        prompts = [prompt(n) for n in batch_numbers(number)]
        for output, tokens in zip(llm.generate(prompts, greedy), prompts, strict=True):
            assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, 2)
        number += 2


if __name__ == "__main__":
    main()
