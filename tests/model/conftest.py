"""Models on disk, and transformers' own greedy `generate` as the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

GAP_LIMIT = 1e-4


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Llama with grouped heads; weights large enough that attention matters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Reference:
    """Greedy float32 completions by transformers, with the top-2 logit gap at each of their tokens."""

    def __init__(self, folder: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._known: dict[tuple[tuple[int, ...], int], tuple[list[int], list[float]]] = {}
        self.num_compared = 0
        self.num_near_ties = 0

    def complete(self, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
        key = (tuple(prompt), num_tokens)
        if key not in self._known:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out: Any = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    return_dict_in_generate=True,
                    output_logits=True,
                    pad_token_id=0,
                )
            top = torch.stack(out.logits)[:, 0].topk(2).values
            self._known[key] = out.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()
        return self._known[key]

    def check(self, prompt: list[int], tokens: list[int]) -> None:
        """Equal, except from the first near-tie of the reference on; those are printed and at most 1 %."""
        expected, gaps = self.complete(prompt, len(tokens))
        self.num_compared += 1
        if tokens != expected:
            first = next(i for i, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)) if ours != theirs)
            near = next((i for i, gap in enumerate(gaps) if gap < GAP_LIMIT), len(gaps))
            assert near <= first, f"token {first} differs with a top-2 gap of {gaps[first]:.2g}: {tokens} != {expected}"
            self.num_near_ties += 1
            print(f"near-tie at token {near}: {gaps[near]:.2g}")

    def check_near_ties(self) -> None:
        assert self.num_near_ties <= max(1, self.num_compared // 100), (self.num_near_ties, self.num_compared)


@pytest.fixture(scope="session")
def reference() -> Callable[[str | Path], Reference]:
    """`reference(folder)` -> Reference, one per folder."""
    made: dict[str, Reference] = {}
    return lambda folder: made.setdefault(str(folder), Reference(folder))
