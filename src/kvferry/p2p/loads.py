"""Requests whose KV a peer has, as the scheduler's side keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvferry.contract.views import BlockIds


class HostLoadState(Enum):
    """A request whose KV a peer has, as the host sees it."""

    ANNOUNCED = "announced"
    LOADING = "loading"  # the host waits for it
    FAILED = "failed"  # before the host gave it blocks
    OVER = "over"


@dataclass(slots=True)
class HostLoad:
    """One such request. Token positions count from its first token."""

    peer: str = "no peer"
    is_push: bool = False
    num_remote_tokens: int | None = None
    """Tokens whose KV the peer has; None: all of the prompt."""
    lora_path: str | None = None
    state: HostLoadState = HostLoadState.ANNOUNCED
    reason: str = ""
    blames_params: bool = False
    """The reason is that the request's `kv_transfer_params` cannot be used."""
    num_local_tokens: int = 0
    end_token: int = 0
    blocks: BlockIds = ()
    is_gone: bool = False
    """The request ended while it was loading."""

    def told(self, num_prompt_tokens: int) -> dict[str, Any]:
        """For routers, of a load that failed: why, and how much was computed here, the prompt's last token apart."""
        num_last = num_prompt_tokens - 1
        num_promised = min(self.num_remote_tokens or num_last, num_last)
        blamed = {"load_error_param": "kv_transfer_params"} if self.blames_params else {}
        num_recomputed = max(0, num_promised - self.num_local_tokens)
        return {"load_error": self.reason, **blamed, "num_recomputed_tokens": num_recomputed}
