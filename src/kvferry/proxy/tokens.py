"""Tokens by which decode engines may talk to peers that are not on their list: the proxy signs for its own engines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from ipaddress import ip_address

from kvferry.config import shown
from kvferry.p2p.wire import LOOPBACK, Address, derive_key, is_allowed, is_ip, parse_network, sign_peer
from kvferry.proxy.bodies import Params, SignPeer

logger = logging.getLogger(__name__)

TOKEN_LIFE_S = 120
"""From the proxy to the decode engine's scheduler; the clocks of both may differ by as much."""
_MAX_WARNED = 100


def peer_signer(key: str, allowed: Sequence[str] = (), now: Callable[[], float] = time.time) -> SignPeer:
    """Signs with the key that all engines have in their `key_file`. ConfigError when it is too short to be one.

    Only for the hosts by which the proxy itself reaches the prefill engine, and for those in `allowed`, networks and
    names as in the engines' `allowed_peers`: a prefill engine need not have the key, and could name any machine.
    `now`: seconds since 1970.
    """
    derive_key(key, "peer token")
    for pattern in allowed:
        if "/" in pattern:
            parse_network(pattern, "--allowed-peers")
    warned: set[str] = set()

    def sign(params: Params, own_hosts: Collection[str]) -> str | None:
        host, port, transfer_id = (params.get(name) for name in ("remote_host", "remote_port", "transfer_id"))
        if not isinstance(host, str) or not isinstance(port, int) or not isinstance(transfer_id, str):
            return None
        if any(_is_same(host, own) for own in own_hosts) or is_allowed(host, allowed):
            return sign_peer(key, Address(host, port), transfer_id, int(now()) + TOKEN_LIFE_S)
        if host not in warned and len(warned) < _MAX_WARNED:
            warned.add(host)
            logger.warning(
                "a prefill engine that is reached at %s names %s as its address for KV; the proxy does not "
                "sign that address. If the address is right, name it or its network with --allowed-peers; until then "
                "decode engines take KV from there only if their own allowed_peers contain it",
                " or ".join(sorted(own_hosts)), shown(host),
            )  # fmt: skip
        return None

    return sign


def _is_same(host: str, own: str) -> bool:
    if is_allowed(own, LOOPBACK):
        return is_allowed(host, LOOPBACK)
    if is_ip(host) and is_ip(own):
        return ip_address(host) == ip_address(own)
    return host.lower() == own.lower()
