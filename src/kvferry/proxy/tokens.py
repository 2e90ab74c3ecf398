"""Tokens by which decode engines may talk to peers that are not on their list: the proxy signs whom it names."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvferry.p2p.wire import Address, derive_key, sign_peer
from kvferry.proxy.bodies import Params, SignPeer

TOKEN_LIFE_S = 120
"""From the proxy to the decode engine's scheduler; the clocks of both may differ by as much."""


def peer_signer(key: str, now: Callable[[], float] = time.time) -> SignPeer:
    """Signs with the key that all engines have in their `key_file`. ConfigError when it is too short to be one.

    `now`: seconds since 1970.
    """
    derive_key(key, "peer token")

    def sign(params: Params) -> str | None:
        host, port, transfer_id = (params.get(name) for name in ("remote_host", "remote_port", "transfer_id"))
        if not isinstance(host, str) or not isinstance(port, int) or not isinstance(transfer_id, str):
            return None
        return sign_peer(key, Address(host, port), transfer_id, int(now()) + TOKEN_LIFE_S)

    return sign
