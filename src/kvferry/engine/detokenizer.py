"""Text of a request as its tokens come, and the stop strings in it.

A token alone has no text: bytes of one character may be spread over several, and a space may belong to what comes
before. So a short window of tokens is decoded twice, without and with the new ones, and the difference is the new
text; it waits while it ends in an incomplete character.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from kvferry.engine.config import SamplingParams

_NUM_PROMPT_TOKENS = 6  # the first output token is read as following these
_MAX_HELD_TOKENS = 16  # no character has as many bytes: what is incomplete for so long is no text
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Grows `text` token by token. Text once there never changes, save that a stop string is cut off its end."""

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.text = ""
        self._decode = partial(
            tokenizer.decode, skip_special_tokens=params.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        self._stops = tuple(params.stop)
        self._keeps_stop = params.include_stop_str_in_output
        self._num_reported_chars = 0
        # The window: tokens whose text is out, then tokens whose text is yet to come.
        self._known = list(prompt_token_ids[-_NUM_PROMPT_TOKENS:])
        self._known_text: str = self._decode(self._known)
        self._held: list[int] = []

    def append(self, token_id: int) -> str | None:
        """Add a token. Returns the stop string that now ends the text, or None."""
        self._held.append(token_id)
        decoded: str = self._decode(self._known + self._held)
        is_whole = len(decoded) > len(self._known_text) and not decoded.endswith(_INCOMPLETE)
        if is_whole or len(self._held) > _MAX_HELD_TOKENS:
            return self._take(decoded)
        return None

    def flush(self) -> str | None:
        """Add what was waiting for the rest of a character that will not come. Returns as `append` does."""
        return self._take(self._decode(self._known + self._held)) if self._held else None

    def take_new(self, is_final: bool) -> str:
        """The text since the last call; what may yet turn out to be part of a stop string waits for a final call."""
        end = len(self.text) if is_final else self._num_safe_chars()
        start, self._num_reported_chars = self._num_reported_chars, max(end, self._num_reported_chars)
        return self.text[start:end]

    def reported_text(self) -> str:
        """All that `take_new` has returned."""
        return self.text[: self._num_reported_chars]

    def _take(self, decoded: str) -> str | None:
        new = decoded[len(self._known_text) :]
        self._known, self._held = self._held, []
        self._known_text = self._decode(self._known)
        self.text += new
        return self._cut_at_stop(len(new))

    def _cut_at_stop(self, num_new_chars: int) -> str | None:
        """Cut the text at the stop string that is complete first; of several ending together, the longest."""
        first_new = len(self.text) - num_new_chars
        found = []
        for stop in self._stops:
            start = self.text.find(stop, max(0, first_new - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        end, start, stop = min(found)
        self.text = self.text[: end if self._keeps_stop else start]
        return stop

    def _num_safe_chars(self) -> int:
        """Characters that no stop string can take back."""
        text = self.text
        if self._keeps_stop:
            return len(text)
        safe = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < safe:
                if stop.startswith(text[start:]):
                    safe = start
                start = text.find(stop[0], start + 1)
        return safe
