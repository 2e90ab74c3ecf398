"""A request as the scheduler keeps it and connectors see it (vLLM's attribute names)."""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kvferry.engine.config import SamplingParams
    from kvferry.engine.detokenizer import Detokenizer


class RequestStatus(enum.IntEnum):
    """Where a request is in its life; everything after PREEMPTED is final."""

    WAITING = enum.auto()
    WAITING_FOR_REMOTE_KVS = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH_CAPPED = enum.auto()
    FINISHED_ABORTED = enum.auto()
    FINISHED_ERROR = enum.auto()

    @property
    def is_finished(self) -> bool:
        """True for the final states."""
        return self > RequestStatus.PREEMPTED

    @property
    def finish_reason(self) -> str | None:
        """What users see: stop, length, abort, error; None while unfinished."""
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was at its position."""

    logprob: float
    """Natural logarithm of its probability, before penalties and temperature."""
    rank: int
    """1 is the likeliest."""
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen for a request in one step."""

    token_id: int
    logprobs: dict[int, Logprob] | None = None
    """By token id: the chosen token's and the likeliest ones'; None unless asked for."""


@dataclass(frozen=True, slots=True)
class NoToken:
    """The model's output for a request allows no choice of a token; the request ends with an error."""

    reason: str


Sampled = SampledToken | NoToken


class Request:
    """One sequence: its tokens, how far their KV is computed, and how it is to be sampled.

    `num_computed_tokens` counts tokens whose KV is in the request's blocks. Only the scheduler changes a request.
    """

    lora_request: None = None
    prompt_embeds: None = None
    skip_reading_prefix_cache: bool = False

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        block_size: int,
        arrival_s: float = 0.0,
        arrival_index: int = 0,
        cache_salt: str | None = None,
        sampling_seed: int = 0,
        prompt: str | None = None,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = list(prompt_token_ids)
        self.all_token_ids = list(prompt_token_ids)
        self.sampling_params = sampling_params
        self.sampling_seed = sampling_seed
        self.max_tokens = sampling_params.max_tokens
        self.cache_salt = cache_salt
        self.kv_transfer_params: dict[str, Any] | None = (sampling_params.extra_args or {}).get("kv_transfer_params")
        self.handed_over_token_ids: tuple[int, ...] = ()
        """The first tokens as a prefill engine chose them; taken over with the KV of the whole prompt."""
        self.mm_features: list[Any] = []
        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.detokenizer = detokenizer
        self.logprobs: list[dict[int, Logprob]] = []  # one per output token when asked for
        self.num_reported_tokens = 0
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.error_param: str | None = None
        # Where the prompt's KV came from when it was first admitted; shrinks when a load failed.
        self.num_local_tokens = 0
        self.num_external_tokens = 0
        self.external_hit_sources: dict[str, int] = {}
        self.num_load_failures = 0
        self.num_tokens_when_admitted = 0
        self.output_kv_transfer_params: dict[str, Any] | None = None
        self.arrival_s = arrival_s
        self.arrival_index = arrival_index  # who came first goes first
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._block_size = block_size
        self._chain = hashlib.sha256(b"kvferry engine prefix\0" + (cache_salt or "").encode()).digest()
        self.block_hashes: list[bytes] = []
        self._extend_hashes()

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens."""
        return len(self.all_token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens (a copy)."""
        return self.all_token_ids[len(self.prompt_token_ids) :]

    def is_finished(self) -> bool:
        """True once the request reached a final state."""
        return self.status.is_finished

    def get_skip_reading_prefix_cache(self) -> bool:
        """True when everything is to be computed anew."""
        return self.skip_reading_prefix_cache

    def append_token(self, token: SampledToken) -> None:
        """Add a generated token. Its text comes with `read`."""
        self.all_token_ids.append(token.token_id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        self._extend_hashes()

    def read(self, token_id: int, eos_token_ids: Collection[int], max_model_len: int) -> RequestStatus | None:
        """Read the newest token into the request's text; the status to end with, or None to go on."""
        params = self.sampling_params
        is_stop = token_id in params.stop_token_ids
        if is_stop or (token_id in eos_token_ids and not params.ignore_eos):
            self.stop_reason = token_id if is_stop else None
            if params.include_stop_str_in_output:
                self._read_text(token_id, is_last=True)
            return RequestStatus.FINISHED_STOPPED
        is_last = self.num_output_tokens >= self.max_tokens or self.num_tokens >= max_model_len
        self.stop_reason = self._read_text(token_id, is_last)
        if self.stop_reason is not None:
            return RequestStatus.FINISHED_STOPPED
        return RequestStatus.FINISHED_LENGTH_CAPPED if is_last else None

    def _read_text(self, token_id: int, is_last: bool) -> str | None:
        """Returns the stop string that now ends the text, or None."""
        if self.detokenizer is None:
            return None
        stop = self.detokenizer.append(token_id)
        return self.detokenizer.flush() if stop is None and is_last else stop

    def _extend_hashes(self) -> None:
        # One SHA-256 per full block over the chain so far and the block's tokens: a prefix is named by its last hash.
        size = self._block_size
        while (len(self.block_hashes) + 1) * size <= self.num_tokens:
            start = len(self.block_hashes) * size
            tokens = struct.pack(f"<{size}q", *self.all_token_ids[start : start + size])
            self._chain = hashlib.sha256(self._chain + tokens).digest()
            self.block_hashes.append(self._chain)
