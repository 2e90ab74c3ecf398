"""Which engine has probably seen the beginning of a prompt: hashes over pieces of its text, each over all before it.

The same idea as block hashes in engines (a chain, so that one look-up tells a whole prefix), but over the JSON text of
what the client sent: no tokenizer is needed, and a wrong guess costs time only.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

PIECE_BYTES = 512
_MAX_PIECES = 8192
_ROOT_FIELDS = ("model", "cache_salt", "tools", "chat_template_kwargs")  # other KV, or text before the messages


def piece_hashes(body: Mapping[str, Any]) -> list[int]:
    """One hash per whole piece of the prompt or the messages, from the start; [] for a short one."""
    root = json.dumps([body.get(name) for name in _ROOT_FIELDS], sort_keys=True).encode()
    text = json.dumps(body.get("messages", body.get("prompt")), ensure_ascii=False).encode(errors="surrogatepass")
    link, hashes = xxh3_64_intdigest(root), []
    for start in range(0, min(len(text) // PIECE_BYTES, _MAX_PIECES) * PIECE_BYTES, PIECE_BYTES):
        link = xxh3_64_intdigest(text[start : start + PIECE_BYTES], seed=link)
        hashes.append(link)
    return hashes


class PrefixMemory:
    """The pieces one engine has seen, the least recently used forgotten first, of one prompt the tail first."""

    def __init__(self, max_pieces: int) -> None:
        self._max_pieces = max_pieces
        self._seen: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def num_known(self, hashes: Sequence[int]) -> int:
        """Length of the longest known prefix, in pieces."""
        return next((i for i, link in enumerate(hashes) if link not in self._seen), len(hashes))

    def remember(self, hashes: Sequence[int]) -> None:
        """The engine sees this prompt now."""
        for link in reversed(hashes):
            self._seen[link] = None
            self._seen.move_to_end(link)
        while len(self._seen) > self._max_pieces:
            self._seen.popitem(last=False)

    def clear(self) -> None:
        """The engine may have lost its cache."""
        self._seen.clear()
