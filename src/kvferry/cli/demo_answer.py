"""An engine process's answer to one question, and when two answers are the same."""

from __future__ import annotations

from dataclasses import dataclass

from rich.padding import Padding
from rich.text import Text

_NEAR_TIE = 1e-4


@dataclass(slots=True)
class Answer:
    """A child's answer to one question."""

    ttft_s: float
    prompt_tokens: int
    tokens_from_host: int
    tokens_from_disk: int
    tokens_from_peer: int
    tokens_computed: int
    token_ids: list[int]
    logit_gaps: list[float]
    """Per token, how far the first choice was ahead of the second; of the reference only."""
    text: str
    block_digests: list[str]
    """SHA-256 of the prompt's KV block by block, read from the pool once the first token is there."""

    @property
    def tokens_loaded(self) -> int:
        return self.tokens_from_host + self.tokens_from_disk


def conversation(question: str, text: str) -> list[Padding]:
    """Question and answer for a console, below the line of their act."""
    answer = " ".join(text.split())
    return [Padding(Text(said, style="dim"), (0, 0, 0, 15)) for said in (f"question: {question}", f"answer: {answer}")]


def compare_tokens(answer: Answer, reference: Answer) -> tuple[bool, str]:
    """(equal?, remark). From the first near tie of the reference's two best logits on, either answer is right."""
    for position, gap in enumerate(reference.logit_gaps):
        if gap < _NEAR_TIE:
            return True, f" (up to a near tie at token {position})"
        if answer.token_ids[position] != reference.token_ids[position]:
            return False, f" (token {position} differs)"
    return len(answer.token_ids) == len(reference.logit_gaps), ""
