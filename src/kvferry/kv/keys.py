"""Keys of KV: a SHA-256 chain over identity and tokens; and the fast digest that proves bytes.

Algorithm (version 1; test vectors in docs/keys.md, so that routers in any language can compute keys):

    field(x)   = u32-LE length of x + x as UTF-8;  absent: the four bytes FF FF FF FF
    root       = SHA-256("kvferry-key-v1" + field(model fingerprint) + field(cache salt) + field(LoRA fingerprint))
    unit i     = tokens [16 i, 16 i + 16), each as u32-LE, then for every media item whose placeholder tokens
                 overlap the unit, in prompt order: field(identifier) + i32-LE (item's first token - 16 i)
    chain[i]   = SHA-256(chain[i - 1] + unit i),  chain[-1] = root

A chunk's key is the chain value at its last token. Only whole units have a value. Block size, dtype, layer order and
parallel shards are no part of the chain: they stand in the namespace and in each chunk's header.

The digest of any number n of first tokens, by which engines prove to each other what KV they mean (version 1):

    rest       = tokens [16 k, n) as u32-LE, k = n // 16, then the media that overlap them, as in a unit
    digest(n)  = SHA-256("kvferry-tokens-v1" + u32-LE n + chain[k - 1] + rest)

What a prefill engine has sampled behind a prompt of n tokens, and under which settings (a JSON text; version 1):

    SHA-256("kvferry-first-tokens-v1" + digest(n) + field(settings) + sampled tokens as u32-LE)
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from kvferry.types import MultimodalItem, StoreKey

UNIT_TOKENS = 16
DIGEST_BYTES = 16
HANDOVER = "hand-over"
"""In the place of a model fingerprint, where engines hand KV over that compare their weights otherwise."""
_DOMAIN = b"kvferry-key-v1"
_TOKENS_DOMAIN = b"kvferry-tokens-v1"
_FIRST_TOKENS_DOMAIN = b"kvferry-first-tokens-v1"
_ABSENT = b"\xff\xff\xff\xff"


def digest(buffer: bytes | bytearray | memoryview) -> bytes:
    """xxh3-128 of the bytes (16 bytes). Detects corruption; it is no protection against an attacker."""
    return xxhash.xxh3_128_digest(buffer)


Digest = xxhash.xxh3_128
"""The same, of bytes that come piece by piece: `update`, and `digest` at the end."""


def store_key(chain_value: bytes, group_id: int, rank: int) -> StoreKey:
    """The store's key of one shard of one chunk: chain value, KV cache group, worker rank."""
    return StoreKey(chain_value + struct.pack("<HH", group_id, rank))


def _field(text: str | None) -> bytes:
    if text is None:
        return _ABSENT
    data = text.encode()
    return struct.pack("<I", len(data)) + data


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes equal tokens mean equal KV."""

    model_fingerprint: str
    cache_salt: str | None = None
    lora_fingerprint: str | None = None

    def root(self) -> bytes:
        """Start of the chain (32 bytes)."""
        fields = (self.model_fingerprint, self.cache_salt, self.lora_fingerprint)
        return hashlib.sha256(_DOMAIN + b"".join(_field(f) for f in fields)).digest()


class KeyChain:
    """The chain of one request, extended as its tokens grow."""

    def __init__(self, identity: Identity, media: Sequence[MultimodalItem] = ()) -> None:
        self._values: list[bytes] = []
        self.root = self._last = identity.root()
        self._media = media

    @property
    def num_media(self) -> int:
        """Media items the chain knows of."""
        return len(self._media)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Hash the whole units of `token_ids` (all tokens from position 0) that are not hashed yet."""
        first = len(self._values)
        num_units = len(token_ids) // UNIT_TOKENS
        if num_units <= first:
            return
        tokens = np.array(token_ids[first * UNIT_TOKENS : num_units * UNIT_TOKENS], dtype="<u4")
        data = memoryview(tokens.tobytes())
        step = UNIT_TOKENS * 4
        for i in range(num_units - first):
            unit = data[i * step : (i + 1) * step]
            hasher = hashlib.sha256(self._last)
            hasher.update(unit)
            hasher.update(self._media_in((first + i) * UNIT_TOKENS, (first + i + 1) * UNIT_TOKENS))
            self._last = hasher.digest()
            self._values.append(self._last)

    def _media_in(self, start: int, end: int) -> bytes:
        return b"".join(
            _field(item.identifier) + struct.pack("<iI", item.offset_tokens - start, item.num_tokens)
            for item in self._media
            if item.offset_tokens < end and item.offset_tokens + item.num_tokens > start
        )

    @property
    def num_hashed_tokens(self) -> int:
        """Tokens covered by the chain so far."""
        return len(self._values) * UNIT_TOKENS

    def value_at(self, num_tokens: int) -> bytes:
        """Chain value after `num_tokens` tokens (a multiple of 16, hashed already)."""
        assert num_tokens % UNIT_TOKENS == 0 and num_tokens > 0, num_tokens
        return self._values[num_tokens // UNIT_TOKENS - 1]

    def digest(self, num_tokens: int, rest: bytes) -> bytes:
        """Of the first `num_tokens` tokens, whose whole units are hashed already; `rest`: the others as u32-LE."""
        whole = num_tokens // UNIT_TOKENS * UNIT_TOKENS
        start = self.value_at(whole) if whole else self.root
        head = _TOKENS_DOMAIN + struct.pack("<I", num_tokens) + start
        return hashlib.sha256(head + rest + self._media_in(whole, num_tokens)).digest()


class TokenDigests:
    """The digest of the first n tokens of one request, for any n up to all of `token_ids`."""

    def __init__(self, chain: KeyChain, token_ids: Sequence[int]) -> None:
        self._chain = chain
        self._token_ids = np.array(token_ids, dtype="<u4")
        chain.extend(token_ids)

    def at(self, num_tokens: int) -> bytes:
        """Of the first `num_tokens` tokens (32 bytes)."""
        assert 0 <= num_tokens <= len(self._token_ids), num_tokens
        whole = num_tokens // UNIT_TOKENS * UNIT_TOKENS
        return self._chain.digest(num_tokens, self._token_ids[whole:num_tokens].tobytes())


def first_tokens_digest(prompt_digest: bytes, token_ids: Sequence[int], sampling_facts: str, generation: str) -> bytes:
    """Binds sampled tokens to their prompt, to the sampling settings and to the engine's life (32 bytes)."""
    tokens = np.array(token_ids, dtype="<u4").tobytes()
    return hashlib.sha256(
        _FIRST_TOKENS_DOMAIN + prompt_digest + _field(sampling_facts) + _field(generation) + tokens
    ).digest()
